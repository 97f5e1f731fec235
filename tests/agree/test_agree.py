"""Equal at every offset where all is sound; each fault, put in through a real setting or a changed cache, is named."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from dflash_jax import targets, text
from dflash_jax.accept import evaluate_cache, replay_blocks
from dflash_jax.agree import AgreeConfig, agree
from dflash_jax.agree.cause import judge_draft, judge_label
from dflash_jax.cache import CacheBuildConfig, build, open_cache
from dflash_jax.cli import main
from dflash_jax.core import InputError, no_progress, read_json, sha256_file, write_json
from dflash_jax.decode import Decoder
from dflash_jax.drafter import load_drafter, save_drafter, with_draft_vocabulary
from dflash_jax.targets import load_target
from dflash_jax.text import load_tokenizer
from support import tiny, tiny_chain

FAR, BUDGET = 70000, 64
OFFSETS = (0, 9, FAR)
TEXTS = tiny.TEXTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("agree")


@pytest.fixture(scope="module")
def cache(folder):
    return tiny_chain.make_cache(
        folder / "chain", tiny.tiny_target(), TEXTS, max_new_tokens=BUDGET, position_offsets=OFFSETS
    )


@pytest.fixture(scope="module")
def drafter(folder):
    (folder / "drafter").mkdir()
    save_drafter(tiny.half_memorised(), folder / "drafter")
    return folder / "drafter"


@pytest.fixture(scope="module")
def revision(folder, drafter):
    """The drafter trained a little further, so to speak: surer of less."""
    (folder / "revision").mkdir()
    noise = iter(jax.random.split(jax.random.key(1), 99))
    moved = jax.tree_util.tree_map(
        lambda leaf: leaf + 0.1 * jax.random.normal(next(noise), leaf.shape), load_drafter(drafter)
    )
    save_drafter(moved, folder / "revision")
    return folder / "revision"


def run(cache, drafter, **changes):
    config = {"target": tiny.tiny_target(), "cache": cache, "drafter": drafter}
    return agree(AgreeConfig(**config | changes))


def other_cache(folder, cache, name, **changes):
    """Another build of the same responses at offset 0."""
    target = changes.pop("target", tiny.tiny_target())
    config = {"capture_layers": tiny.CAPTURE_LAYERS, "features": "float32"} | changes
    config = CacheBuildConfig(target=target, responses=cache.parent / "responses.jsonl", out=folder / name, **config)
    build(config, fingerprint=targets.fingerprint(target) | text.load_tokenizer(target).fingerprint())
    return folder / name


def adds_up(found):
    """Differences account for every block that is not equal, and every difference has what the design promises."""
    assert found["num_equal"] + sum(one["num_blocks"] for one in found["differences"]) == found["num_blocks"]
    assert sum(found["causes"].values()) == len(found["differences"])
    for one in found["differences"]:
        assert one["margin"] is None or one["margin"] >= 0
        assert one["slot"] >= 1
        assert one["found"]
    return found


@pytest.fixture(scope="module")
def sound(cache, drafter):
    return adds_up(run(cache, drafter))


@pytest.mark.slow
def test_every_block_is_equal_at_every_offset(sound):
    assert (sound["num_equal"], sound["differences"]) == (sound["num_blocks"], [])
    assert sound["causes"] == {}
    rows = sound["by_ctx_pos_start"]
    assert list(rows) == ["0", "9", str(FAR)]
    for row in rows.values():
        assert row["num_blocks"] == row["num_equal"] == rows["0"]["num_blocks"] > 30
        assert 1.2 < row["replay_tau_micro"] == row["decode_tau_micro"]
    assert (sound["num_prompts"], sound["num_texts"]) == (len(TEXTS), len(OFFSETS) * len(TEXTS))
    assert sound["replay"] == sound["decode"]
    assert sound["warnings"] == []


@pytest.mark.slow
def test_with_a_draft_vocabulary_too(sound, cache, drafter, tmp_path):
    """Replay and decoding, on a mesh, leave out the same tokens, and accept less for it."""
    labels = open_cache(cache).sequence(2).next_ids
    ids = np.setdiff1d(np.arange(len(tiny.TOKENS)), labels[-3:])
    save_drafter(with_draft_vocabulary(load_drafter(drafter), ids), tmp_path)
    found = adds_up(run(cache, tmp_path, mesh="data=2"))
    assert (found["num_equal"], found["differences"]) == (found["num_blocks"], [])
    assert sound["num_blocks"] < found["num_blocks"]
    # decoding with the whole vocabulary is another drafter's, and is told apart
    served = adds_up(run(cache, tmp_path, served_drafter=drafter))
    assert served["num_equal"] < served["num_blocks"]
    assert served["causes"].keys() == {"drafter"}


@pytest.mark.slow
def test_with_sliding_layers_too(sound, cache, drafter, tmp_path):
    """Decoding's blocks see the window that the replay's do, at every offset."""
    model = load_drafter(drafter)
    config = dataclasses.replace(model.config, sliding_window=4, sliding_layers=(0,))
    save_drafter(dataclasses.replace(model, config=config), tmp_path)
    found = adds_up(run(cache, tmp_path))
    assert (found["num_equal"], found["differences"]) == (found["num_blocks"], [])
    assert found["replay"] != sound["replay"]


@pytest.mark.slow
def test_a_mesh_compares_the_same_blocks(sound, cache, drafter):
    found = run(cache, drafter, mesh="data=2", batch_size=3)
    assert found["mesh"] == "data=2"
    for key in ("num_blocks", "num_equal", "differences", "replay", "decode", "by_ctx_pos_start"):
        assert found[key] == sound[key], key


@pytest.mark.slow
def test_both_sides_are_the_check_s_and_decode_s_own(sound, cache, drafter):
    """Blocks and taus found here from the rooms themselves."""
    target, model, opened = load_target(tiny.tiny_target()), load_drafter(drafter), open_cache(cache)
    results = evaluate_cache(
        model,
        target.embed_tokens,
        target.head,
        opened,
        max_positions=target.config.max_positions,
        block_size=5,
        anchors_per_chunk=8,
        position_offsets=(9,),
        progress=no_progress,
    )
    blocks = [count for result in results for count in replay_blocks(result)]
    assert sound["by_ctx_pos_start"]["9"]["replay_tau_micro"] == pytest.approx(np.mean(blocks))
    decoder = Decoder(
        target,
        stop_ids=load_tokenizer(tiny.tiny_target()).stop_ids,
        max_new_tokens=BUDGET,
        batch_size=len(results),
    )
    by_text = {r.sequence_index: opened.sequence(i) for i in range(opened.num_sequences) for r in [opened.sequence(i)]}
    prompts = [by_text[r.sequence_index].token_ids[: r.prompt_len].tolist() for r in results]
    rows = decoder.decode(prompts, drafter=model, position_offset=9).rows
    assert sum(len(row.committed) for row in rows) == sound["by_ctx_pos_start"]["9"]["num_blocks"] == len(blocks)


@pytest.mark.slow
def test_another_revision_of_the_drafter_is_named(cache, drafter, revision):
    found = adds_up(run(cache, drafter, served_drafter=revision, position_offsets=(0, FAR)))
    assert 0 < found["num_equal"] < found["num_blocks"]
    assert set(found["causes"]) == {"drafter"}
    for one in found["differences"]:
        assert one["kind"] == "draft"
        assert one["feature_drift"] < 1e-5
        assert one["tokens"]["offline"] != one["tokens"]["online"]
        assert one["slot"] == min(one["committed"].values()) < max(one["committed"].values())
        # one side is right
        assert one["label"] in one["tokens"].values()


@pytest.mark.slow
def test_features_in_8_bits_are_named(folder, cache, revision):
    found = adds_up(run(other_cache(folder, cache, "int8", features="int8"), revision))
    assert found["features_dtype"] == "int8"
    assert found["causes"].keys() == {"features"}
    assert found["num_blocks"] - 20 < found["num_equal"] < found["num_blocks"]
    assert all(1e-3 < one["feature_drift"] < 0.1 for one in found["differences"])
    assert found["warnings"] == []


def changed_labels(cache, out, *, row, token):
    """A copy whose label of one response token is another, with the ledger made good again; where that was."""
    from dflash_jax.cache.manifest import write_manifest

    shutil.copytree(cache, out)
    manifest = json.loads((out / "manifest.json").read_text())
    entry = manifest["shards"][0]
    path = out / entry["file"]
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
    (sequence,) = np.flatnonzero((tensors["sequence_index"] == row) & (tensors["position_offset"] == 0))
    prompt_len = int(tensors["prompt_len"][sequence])
    at = int(tensors["seq_starts"][sequence]) + prompt_len + token
    tensors["next_ids"][at] = (tensors["next_ids"][at] + 1) % len(tiny.TOKENS)
    save_file(tensors, path, metadata={"format": "pt"})
    entry |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_manifest(out, manifest)
    return prompt_len + token


@pytest.mark.slow
def test_a_cache_of_another_target_is_named(folder, cache, drafter):
    other = tiny.write_tiny_target(folder / "other", seed=99)
    found = adds_up(run(other_cache(folder, cache, "foreign", target=other), drafter))
    assert any("target_weights" in line for line in found["warnings"])
    assert found["num_equal"] < found["num_blocks"]
    assert found["causes"]["label"] >= len(TEXTS) - 1


@pytest.mark.slow
def test_bfloat16_angles_of_decoding_are_named(cache, drafter):
    found = adds_up(run(cache, drafter, rope="bfloat16", position_offsets=(FAR,)))
    assert found["num_equal"] < found["num_blocks"]
    assert found["causes"].keys() <= {"features", "label"}
    drafts = [one for one in found["differences"] if one["kind"] == "draft" and one["cause"] == "features"]
    assert all(one["feature_drift"] > 1e-2 for one in drafts)
    tokens = [one for one in found["differences"] if one["kind"] == "token"]
    assert tokens, "the text itself changes"
    assert all(one["cause"] == "label" for one in tokens)


@pytest.mark.slow
def test_a_stored_text_that_is_not_greedy_is_named(folder, cache, drafter):
    rows = [json.loads(line) for line in (cache.parent / "responses.jsonl").read_text().split("\n") if line]
    ids = rows[1]["response_ids"]
    rows[1]["response_ids"] = [*ids[:6], ids[6] + 1 if ids[6] < 40 else ids[6] - 1, *ids[7:]]
    (folder / "sampled").mkdir()
    (folder / "sampled" / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampled = tiny_chain.build_cache(
        folder / "sampled" / "cache", tiny.tiny_target(), folder / "sampled" / "responses.jsonl"
    )
    found = adds_up(run(sampled, drafter))
    assert {one["sequence_index"] for one in found["differences"]} == {1}
    (one,) = [one for one in found["differences"] if one["kind"] == "token"]
    assert one["cause"] == "label"
    assert "not greedy" in one["found"]
    assert one["tokens"] == {"offline": rows[1]["response_ids"][6], "online": ids[6]}


def row(**logits):
    """Logits of 5 tokens a to e."""
    return np.array([logits.get(name, 0.0) for name in "abcde"], np.float32)


def test_a_near_tie_is_numerics():
    rows = {name: row(a=10.0, b=9.995) for name in ("stored", "features", "drafter", "both")}
    found = judge_draft(rows, online=1, feature_drift=1e-6, same_drafter=True)
    assert (found.name, found.tokens) == ("numerics", (0, 1))
    assert found.margin == pytest.approx(0.005, rel=1e-3)
    # features that differ by rounding alone are not to blame, even where they tip the balance
    assert (
        judge_draft(rows | {"features": row(b=1)}, online=1, feature_drift=1e-6, same_drafter=True).name == "numerics"
    )
    clear = {name: row(a=10.0, b=9.0) for name in rows}
    assert "its loop" in judge_draft(clear, online=1, feature_drift=1e-6, same_drafter=True).found


def test_the_first_link_that_turns_the_draft_is_named():
    rows = {name: row(a=10.0) for name in ("stored", "features", "drafter", "both")}
    both = judge_draft(rows | {"both": row(b=9)}, online=1, feature_drift=1e-2, same_drafter=False)
    features = judge_draft(rows | {"features": row(b=9)}, online=1, feature_drift=1e-2, same_drafter=False)
    drafter = judge_draft(rows | {"drafter": row(b=9)}, online=1, feature_drift=1e-2, same_drafter=False)
    assert (both.name, features.name, drafter.name) == ("drafter", "features", "drafter")


def test_labels_are_judged_by_what_the_target_says_now():
    logits = row(a=10.0, b=9.995, c=3.0)
    assert judge_label(logits, text=1, stored=1, online=0, kind="draft").name == "numerics"
    assert judge_label(logits, text=2, stored=2, online=0, kind="draft").name == "label"
    assert judge_label(logits, text=2, stored=0, online=0, kind="token").name == "label"
    fault = judge_label(logits, text=0, stored=0, online=2, kind="draft")
    assert (fault.name, fault.margin) == ("numerics", 7.0)
    assert "its passes are to blame" in fault.found


def refused(message, cache, drafter, **changes):
    with pytest.raises(InputError, match=message) as error:
        run(cache, drafter, **changes)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_one_line(tmp_path, folder, cache, drafter):
    refused("^--limit is 0: a positive number is needed$", cache, drafter, limit=0)
    refused("^--block-size is 1: at least 2", cache, drafter, block_size=1)
    refused("^--block-size is 9: the drafter was trained for blocks of 5", cache, drafter, block_size=9)
    refused(r"^--position-offsets names 8: .*cache holds 0, 9, 70000$", cache, drafter, position_offsets=(0, 8))
    refused("^no drafter folder at .*gone$", cache, drafter, served_drafter=tmp_path / "gone")
    refused("^no cache at .*gone", tmp_path / "gone", drafter)
    layers = shutil.copytree(drafter, tmp_path / "layers")
    config = read_json(layers / "config.json", what="config")
    write_json(layers / "config.json", config | {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2]}})
    refused(r"^--served-drafter .* has blocks of 5 and layers \(1, 2\), --drafter 5 and \(1, 3\)", cache, drafter,
            served_drafter=layers)  # fmt: skip
    narrow = other_cache(folder, cache, "narrow", capture_layers=(1,))
    refused("holds features of 24 columns, the drafter .* reads 48$", narrow, drafter)


def command(*arguments, capsys):
    """Exit code, document and the lines before it."""
    code = main(["agree", "--target", str(tiny.tiny_target()), *map(str, arguments)])
    *lines, last = capsys.readouterr().out.splitlines()
    return code, json.loads(last), "\n".join(lines)


@pytest.mark.slow
def test_some_texts_at_one_offset_in_smaller_blocks_by_a_copy_of_the_drafter(folder, cache, drafter, capsys):
    copy = shutil.copytree(drafter, folder / "copy")
    some = ("--limit", 3, "--position-offsets", FAR, "--block-size", 3, "--served-drafter", copy)
    code, found, shown = command("--cache", cache, "--drafter", drafter, *some, capsys=capsys)
    assert code == 0
    assert list(found["by_ctx_pos_start"]) == [str(FAR)]
    assert (found["num_texts"], found["block_size"], found["differences"]) == (3, 3, [])
    assert 1 < found["decode"]["tau_micro"] <= 3
    assert f"every block is equal ({found['num_blocks']} of {found['num_blocks']})" in shown


@pytest.mark.slow
def test_a_changed_label_is_named_and_the_command_exits_1(folder, cache, drafter, capsys):
    at = changed_labels(cache, folder / "labels", row=2, token=5)
    code, found, shown = command(
        "--cache", folder / "labels", "--drafter", drafter, "--position-offsets", "0,9", capsys=capsys
    )
    assert code == 1
    (one,) = adds_up(found)["differences"]
    assert (one["sequence_index"], one["ctx_pos_start"], one["cause"]) == (2, 0, "label")
    assert one["anchor"] + one["slot"] - 1 == at
    assert one["label"] == one["tokens"]["offline"] != one["tokens"]["online"]
    assert one["margin"] > 1e-3 * one["logit_scale"]
    assert "causes: label 1" in shown
