import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dflash_jax.cache import open_cache
from dflash_jax.cli import main
from dflash_jax.core import InputError, load_tensors, read_json, save_tensors, write_json
from dflash_jax.drafter import draft_blocks, drafter_shapes, load_drafter, read_drafter_config, save_drafter
from dflash_jax.interchange import DrafterExportConfig, DrafterImportConfig, drafters, export_drafter, import_drafter
from dflash_jax.nn.rope_scaling import Llama3Scaling, YarnScaling
from dflash_jax.targets import load_target
from support import tiny, tiny_chain

WORKER = Path(__file__).parents[1] / "support" / "speculators_drafter.py"
YARN = YarnScaling(factor=4.0, original_max_position_embeddings=32, truncate=False)
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
VARIANTS = {
    "plain": {},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN, "attention_bias": True},
    "reduced": {},
    # causal in one layer; the window is longer than the texts, at whose edge speculators differs
    "sliding": {"sliding_window": 64, "sliding_layers": (1,)},
}


@pytest.fixture
def run(tmp_path):
    """A drafter folder with a record, as training leaves it."""
    return write_drafter(tmp_path / "run-7")


def write_drafter(folder, **changes):
    folder.mkdir()
    save_drafter(tiny.random_drafter(tiny.tiny_drafter_config(**changes)), folder)
    write_json(folder / "record.json", {"trained_prompt_hashes": ["00ff"], "step": 7, "argv": ["train"]})
    return folder


def export(run, out, **changes):
    return export_drafter(DrafterExportConfig(drafter=run, out=out, **changes))


def exported(run, out, target, **changes):
    settings = {"format": "speculators", "target": target, "dtype": "float32"}
    export(run, out, **settings | changes)
    return out


def edit(folder, change):
    config = read_json(folder / "config.json", what="config")
    change(config)
    write_json(folder / "config.json", config)


def test_an_export_is_what_z_lab_reads_rounded_to_bfloat16_once(run, tmp_path):
    result = export(run, tmp_path / "out")
    ours = load_tensors(run / "model.safetensors", what="w")
    theirs = load_tensors(tmp_path / "out" / "model.safetensors", what="w")
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(theirs[name], tensor.astype(ml_dtypes.bfloat16))
    assert read_drafter_config(tmp_path / "out") == read_drafter_config(run)
    assert result["num_tensors"] == len(ours)
    assert result["num_parameters"] == sum(tensor.size for tensor in ours.values())
    assert result["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "record.json"}


def test_engines_are_told_how_many_tokens_are_drafted(run, tmp_path):
    result = export(run, tmp_path / "out")
    assert result["block_size"] == 5
    flag, _, value = result["vllm"].partition(" ")
    assert flag == "--speculative-config"
    wanted = {"method": "dflash", "model": str(tmp_path / "out"), "num_speculative_tokens": 4}
    assert json.loads(value.strip("'")) == wanted
    assert result["sglang"].endswith("--speculative-num-draft-tokens 5")
    assert result["warnings"] == []


def test_what_some_engines_leave_out_is_said(tmp_path):
    run = write_drafter(tmp_path / "run", attention_bias=True, rope_scaling=YARN)
    scaling, biases = export(run, tmp_path / "out")["warnings"]
    assert "yarn" in scaling
    assert "biases" in biases


def test_the_prompts_a_drafter_was_trained_on_go_along_both_ways(run, tmp_path, target_folder):
    folder = exported(run, tmp_path / "out", target_folder)
    import_drafter(DrafterImportConfig(drafter=folder, out=tmp_path / "back", target=target_folder))
    for path in (folder, tmp_path / "back"):
        record = read_json(path / "record.json", what="record")
        assert (record["trained_prompt_hashes"], record["step"]) == (["00ff"], 7)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, target_folder):
    return tiny_chain.make_cache(tmp_path_factory.mktemp("labels") / "chain", target_folder, tiny.TEXTS[:4])


def most_frequent_labels(cache, count):
    """By a plain loop over what was generated."""
    opened, labels = open_cache(cache), []
    for index in range(opened.num_sequences):
        sequence = opened.sequence(index)
        labels += sequence.next_ids[sequence.prompt_len :].tolist()
    counted = sorted(range(len(tiny.TOKENS)), key=lambda token: (-labels.count(token), token))[:count]
    return sorted(counted), sum(labels.count(token) for token in counted) / len(labels)


def test_a_draft_vocabulary_is_the_cache_s_most_frequent_labels(run, tmp_path, cache):
    result = export(run, tmp_path / "out", draft_vocab=9, cache=cache, dtype="float32")
    ids, share = most_frequent_labels(cache, 9)
    assert (result["draft_vocab_size"], result["label_share"]) == (9, pytest.approx(share))
    assert 0.2 < share < 1
    # the network is as it was, and no engine is told to serve what z-lab's layout cannot say
    before, after = load_drafter(run), load_drafter(tmp_path / "out")
    assert np.asarray(after.draft_ids).tolist() == ids
    assert jnp.array_equal(before.fc.weight, after.fc.weight)
    assert result["num_parameters"] == export(run, tmp_path / "whole")["num_parameters"]
    assert (result["vllm"], result["sglang"]) == (None, None)
    assert "z-lab's layout has no draft vocabulary" in result["warnings"][0]
    with pytest.raises(InputError, match="has a draft vocabulary of 9 tokens already"):
        export(tmp_path / "out", tmp_path / "again", draft_vocab=5, cache=cache)
    # one that is there goes along
    assert export(tmp_path / "out", tmp_path / "copy")["draft_vocab_size"] == 9


@pytest.mark.parametrize(("size", "said"), [(53, "fewer than all 53"), (900, "fewer than all 53")])
def test_a_draft_vocabulary_of_all_tokens_is_refused(run, tmp_path, cache, size, said):
    with pytest.raises(InputError, match=said):
        export(run, tmp_path / "out", draft_vocab=size, cache=cache)
    assert not (tmp_path / "out").exists()


def test_a_cache_of_other_layers_counts_nothing(tmp_path, cache):
    other = write_drafter(tmp_path / "run", capture_layers=(0, 2))
    with pytest.raises(InputError, match="capture_layers"):
        export(other, tmp_path / "out", draft_vocab=9, cache=cache)


@pytest.mark.parametrize("name", ["target_weights", "tokenizer_sha256"])
def test_a_cache_of_another_target_counts_nothing(run, tmp_path, cache, name):
    write_json(run / "record.json", {"cache_fingerprint": {name: "other"}})
    with pytest.raises(InputError, match=name):
        export(run, tmp_path / "out", draft_vocab=9, cache=cache)
    assert not (tmp_path / "out").exists()


def test_ids_that_do_not_rise_are_not_imported_from_our_own_layout(run, tmp_path, cache):
    export(run, tmp_path / "out", draft_vocab=9, cache=cache)
    tensors = {name: np.array(t) for name, t in load_tensors(tmp_path / "out" / "model.safetensors", what="w").items()}
    tensors["d2t"][4] = -4
    save_tensors(tmp_path / "out" / "model.safetensors", tensors)
    with pytest.raises(InputError, match="must rise"):
        import_drafter(DrafterImportConfig(drafter=tmp_path / "out", out=tmp_path / "back"))
    assert not (tmp_path / "back").exists()


@pytest.fixture
def reduced(run, tmp_path, target_folder, cache):
    return exported(run, tmp_path / "reduced", target_folder, draft_vocab=9, cache=cache)


def test_speculators_layout_says_it_as_speculators_does_and_is_read_back(reduced, run, tmp_path, target_folder, cache):
    ids, _ = most_frequent_labels(cache, 9)
    tensors = load_tensors(reduced / "model.safetensors", what="w")
    assert np.flatnonzero(tensors["t2d"]).tolist() == ids
    assert (tensors["d2t"] + np.arange(9)).tolist() == ids
    np.testing.assert_array_equal(tensors["lm_head.weight"], np.asarray(load_target(target_folder).head)[ids])
    config = read_json(reduced / "config.json", what="c")
    assert (config["draft_vocab_size"], config["transformer_layer_config"]["vocab_size"]) == (9, len(tiny.TOKENS))
    assert "draft_vocab_size" not in config["transformer_layer_config"]
    result = import_drafter(DrafterImportConfig(drafter=reduced, out=tmp_path / "back", target=target_folder))
    assert (result["draft_vocab_size"], result["dropped"]) == (9, ["lm_head.weight", "t2d"])
    back = load_drafter(tmp_path / "back")
    assert np.asarray(back.draft_ids).tolist() == ids
    assert jnp.array_equal(back.fc.weight, load_drafter(run).fc.weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["t2d"].__setitem__(slice(None), np.roll(t["t2d"], 1)), "t2d and d2t do not name the same"),
        (lambda t: t["lm_head.weight"].__setitem__((2, 3), 9), "lm_head.weight is not the target's"),
        (lambda t: t.pop("d2t"), "t2d and d2t do not name the same"),
        (lambda t: t["d2t"].__setitem__(4, 0), "must rise"),
    ],
)
def test_a_draft_vocabulary_that_is_said_in_two_ways_is_refused(reduced, tmp_path, target_folder, change, said):
    tensors = {name: np.array(tensor) for name, tensor in load_tensors(reduced / "model.safetensors", what="w").items()}
    change(tensors)
    save_tensors(reduced / "model.safetensors", tensors)
    with pytest.raises(InputError, match=said):
        import_drafter(DrafterImportConfig(drafter=reduced, out=tmp_path / "back", target=target_folder))
    assert not (tmp_path / "back").exists()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, target_folder, cache):
    """What speculators itself made of our folders: logits of exports by variant, and a folder that it converted."""
    folder, jobs = tmp_path_factory.mktemp("speculators"), []
    for name, changes in VARIANTS.items():
        run = write_drafter(folder / name, **changes)
        vocabulary = {"draft_vocab": 9, "cache": cache} if name == "reduced" else {}
        out = exported(run, folder / f"{name}-out", target_folder, **vocabulary)
        np.savez(folder / f"{name}-in.npz", **random_blocks(load_drafter(run).config))
        jobs.append(f"draft:{out}:{folder / f'{name}-in.npz'}:{folder / f'{name}.npz'}")
    jobs.append(f"convert:{folder / 'plain'}:{target_folder}:{folder / 'converted'}")
    done = subprocess.run([sys.executable, WORKER, *jobs], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def random_blocks(config):
    draw = np.random.default_rng(0)
    return {
        "features": draw.normal(size=(40, config.num_features)).astype(np.float32),
        "token_ids": draw.integers(0, config.vocab_size, 40),
        "anchors": np.array([3, 11, 30]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_speculators_own_model_drafts_what_ours_drafts(theirs, target_folder, variant):
    drafter, target = load_drafter(theirs / variant), load_target(target_folder)
    given = random_blocks(drafter.config)
    ours = draft_blocks(
        drafter,
        target.embed_tokens,
        jnp.asarray(given["features"]),
        jnp.asarray(given["token_ids"], jnp.int32),
        jnp.asarray(given["anchors"], jnp.int32),
        block_lengths=jnp.full(3, drafter.config.block_size, jnp.int32),
        block_size=drafter.config.block_size,
        position_offset=jnp.int32(0),
    )
    logits = np.load(theirs / f"{variant}.npz")["logits"]
    head = target.head
    if variant == "reduced":
        head = head[np.flatnonzero(load_tensors(theirs / "reduced-out" / "model.safetensors", what="w")["t2d"])]
    np.testing.assert_allclose(np.asarray(ours @ head.T), logits[:, 1:], rtol=1e-4, atol=1e-4 * np.abs(logits).max())


@pytest.mark.slow
def test_what_speculators_makes_of_z_lab_s_layout_is_read_back(theirs, tmp_path, target_folder):
    run, converted = theirs / "plain", theirs / "converted"
    result = import_drafter(DrafterImportConfig(drafter=converted, out=tmp_path / "back", target=target_folder))
    assert result["format"] == "speculators"
    assert read_drafter_config(tmp_path / "back") == read_drafter_config(run)
    same = jax.tree_util.tree_map(np.array_equal, load_drafter(tmp_path / "back"), load_drafter(run))
    assert all(jax.tree_util.tree_leaves(same))
    # and our own export says the same as theirs, where both say anything
    ours = read_json(theirs / "plain-out" / "config.json", what="config")
    wanted = read_json(converted / "config.json", what="config")
    for name in ("architectures", "aux_hidden_state_layer_ids", "block_size", "mask_token_id", "draft_vocab_size"):
        assert ours[name] == wanted[name]
    assert ours["speculators_config"]["verifier"] == wanted["speculators_config"]["verifier"]


def test_an_import_keeps_every_bit_and_writes_settings_where_all_look(run, tmp_path):
    source = tmp_path / "newer"
    export(run, source)

    def as_newer_checkpoints(config):
        config["dflash_config"]["block_size"] = config.pop("block_size")
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}

    edit(source, as_newer_checkpoints)
    result = import_drafter(DrafterImportConfig(drafter=source, out=tmp_path / "out"))
    assert (result["format"], result["dtype"], result["dropped"]) == ("z-lab", "bfloat16", [])
    written = read_json(tmp_path / "out" / "config.json", what="config")
    assert (written["block_size"], written["rope_theta"], written["dtype"]) == (5, 7000.0, "bfloat16")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("speculators_model_type", "eagle3", "speculators_model_type is 'eagle3'"),
        ("sample_from_anchor", True, "sample_from_anchor is True"),
        ("draft_vocab_size", 7, r"missing d2t \[7\]"),
        ("draft_vocab_size", None, "draft_vocab_size is None"),
        ("target_hidden_size", 48, "target_hidden_size is 48"),
        ("aux_hidden_state_layer_ids", [0, 2], "names 0, the embedding"),
        ("aux_hidden_state_layer_ids", None, "aux_hidden_state_layer_ids is None"),
        ("transformer_layer_config", None, "transformer_layer_config is None"),
        ("mask_token_id", None, "no number"),
    ],
)
def test_what_would_draft_otherwise_is_refused_by_name(run, tmp_path, target_folder, name, value, said):
    folder = exported(run, tmp_path / "out", target_folder)
    edit(folder, lambda config: config.update({name: value}))
    with pytest.raises(InputError, match=said):
        import_drafter(DrafterImportConfig(drafter=folder, out=tmp_path / "back", target=target_folder))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(("is_causal", "non_causal"), [(None, False), (False, True)])
def test_sliding_layers_go_to_speculators_and_back(tmp_path, target_folder, is_causal, non_causal):
    run = write_drafter(tmp_path / "run", sliding_window=6, sliding_layers=(0,), is_causal=is_causal)
    folder = exported(run, tmp_path / "out", target_folder)
    config = read_json(folder / "config.json", what="config")
    assert config["sliding_window_non_causal"] is non_causal
    inner = config["transformer_layer_config"]
    assert inner["layer_types"] == ["sliding_attention", "full_attention"]
    assert (inner["sliding_window"], inner["use_sliding_window"]) == (6, True)
    assert "is_causal" not in inner
    import_drafter(DrafterImportConfig(drafter=folder, out=tmp_path / "back", target=target_folder))
    assert read_drafter_config(tmp_path / "back") == read_drafter_config(run)
    (said,) = read_json(folder / "record.json", what="record")["result"]["warnings"]
    assert said.startswith("layers 0 slide over 6 tokens: TPU servers run them as full attention")


def test_full_layers_that_are_causal_are_no_layout_of_speculators(tmp_path, target_folder):
    run = write_drafter(tmp_path / "run", is_causal=True)
    with pytest.raises(InputError, match="is_causal is true, for every layer"):
        exported(run, tmp_path / "out", target_folder)


def with_ends(folder, target, *, change=0.0):
    """The checkpoint as older versions saved it, the target's embedding and head in it."""
    tensors = load_tensors(folder / "model.safetensors", what="w")
    model = load_target(target)
    ends = {"embed_tokens.weight": np.array(model.embed_tokens), "lm_head.weight": np.array(model.head)}
    ends["lm_head.weight"][2, 3] += change
    save_tensors(folder / "model.safetensors", tensors | ends)


def test_a_head_that_is_the_target_s_is_dropped_and_said(run, tmp_path, target_folder):
    folder = exported(run, tmp_path / "out", target_folder)
    with_ends(folder, target_folder)
    result = import_drafter(DrafterImportConfig(drafter=folder, out=tmp_path / "back", target=target_folder))
    assert result["dropped"] == ["embed_tokens.weight", "lm_head.weight"]
    assert (
        load_tensors(tmp_path / "back" / "model.safetensors", what="w").keys()
        == drafter_shapes(read_drafter_config(run)).keys()
    )


def test_a_head_that_was_trained_is_not_dropped(run, tmp_path, target_folder):
    folder = exported(run, tmp_path / "out", target_folder)
    with_ends(folder, target_folder, change=1e-3)
    with pytest.raises(InputError, match=r"lm_head.weight is not the target's"):
        import_drafter(DrafterImportConfig(drafter=folder, out=tmp_path / "back", target=target_folder))


def test_a_drafter_of_another_target_is_named(tmp_path, target_folder):
    run = write_drafter(tmp_path / "run", num_target_layers=9)
    with pytest.raises(InputError, match="does not fit the target: num_target_layers is 9, the target's is 5"):
        exported(run, tmp_path / "out", target_folder)


def test_a_taken_folder_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    for do in (
        lambda: export(run, tmp_path / "out"),
        lambda: import_drafter(DrafterImportConfig(drafter=run, out=tmp_path / "out")),
    ):
        with pytest.raises(InputError, match="exists already"):
            do()
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_a_write_that_did_not_come_back_leaves_nothing(run, tmp_path, monkeypatch):
    save = drafters.save_drafter

    def other_weights(drafter, folder):
        save(replace(drafter, norm=replace(drafter.norm, weight=drafter.norm.weight * 2)), folder)

    monkeypatch.setattr(drafters, "save_drafter", other_weights)
    with pytest.raises(InputError, match="not what was read"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_both_are_commands(run, tmp_path, capsys, target_folder):
    out, back = tmp_path / "out", tmp_path / "back"
    arguments = ["--format", "speculators", "--target", str(target_folder), "--verifier", "org/name"]
    assert main(["export", "--drafter", str(run), "--out", str(out), *arguments]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sglang"] is None
    written = read_json(out / "config.json", what="config")
    assert written["speculators_config"]["verifier"]["name_or_path"] == "org/name"
    assert main(["import", "--drafter", str(out), "--out", str(back)]) == 2
    assert "--target" in capsys.readouterr().err
    assert main(["import", "--drafter", str(out), "--out", str(back), "--target", str(target_folder)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["format"] == "speculators"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "speculators"}, "--target"),
        ({"verifier": "org/name"}, "--verifier"),
        ({"draft_vocab": 0, "cache": Path("c")}, "--draft-vocab is 0"),
        ({"draft_vocab": 9}, "give --draft-vocab and --cache together"),
        ({"cache": Path("c")}, "give --draft-vocab and --cache together"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        DrafterExportConfig(drafter=Path("a"), out=Path("b"), **settings)
