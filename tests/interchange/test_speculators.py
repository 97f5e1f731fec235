"""speculators' offline hidden states: written by transformers and `datasets`, read by speculators' own class."""

import hashlib
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
import torch
from hs_connectors.fp8_utils import dequantize_fp8_tensor, quantize_tensor_to_fp8
from safetensors.torch import load_file, save_file

from dflash_jax import targets, text
from dflash_jax.cache import CacheBuildConfig, build, open_cache, verify_cache
from dflash_jax.core import InputError
from dflash_jax.interchange import (
    CacheExportConfig,
    CacheImportConfig,
    export_cache,
    from_speculators_layer,
    import_cache,
    to_speculators_layer,
)
from dflash_jax.interchange.turns import responses
from support import tiny, toy_cache
from support.peer_caches import bits, trace, write_speculators
from support.speculators_reader import ArrowDataset
from support.zlab import load_hf_target

AUX = (2, 4)  # what layers 2 and 4 read: the outputs of our layers 1 and 3
DRAW = np.random.default_rng(3)


def ids(count):
    return DRAW.integers(4, 48, count).tolist()


CONVERSATION = ids(31)
ROWS = (
    (ids(17), [0] * 6 + [1] * 11),
    # three answers: one sequence each; the words after the last are no use
    (CONVERSATION, [0] * 4 + [1] * 5 + [0] * 7 + [1] * 3 + [0] * 2 + [1] * 6 + [0] * 4),
    (ids(9), [0] * 9),  # no answer
    (ids(12), [1] * 12),  # no prompt: the first token is one
)


def loaded(path):
    """A file's tensors, which no longer lie in the file: tests write it anew."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def greedy_of_bfloat16(target, last):
    """Labels by transformers of a last layer that was stored in bfloat16."""
    model = load_hf_target(target)
    with torch.inference_mode():
        return model.lm_head(model.model.norm(last.to(torch.bfloat16).float())).argmax(-1).tolist()


def imported(source, target, out, **changes):
    config = {"format": "speculators", "source": source, "target": target, "out": out, "aux_layers": AUX}
    return import_cache(CacheImportConfig(**config | changes))


def exported(cache, target, out, **changes):
    return export_cache(CacheExportConfig(**{"cache": cache, "target": target, "out": out} | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory, target_folder):
    folder = tmp_path_factory.mktemp("speculators") / "data"
    return folder, write_speculators(folder, target_folder, ROWS, aux_layers=AUX)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, data, target_folder):
    out = tmp_path_factory.mktemp("speculators-cache") / "cache"
    return out, imported(data[0], target_folder, out, prompt_set="chats")


@pytest.fixture
def source(data, tmp_path):
    return shutil.copytree(data[0], tmp_path / "source")


@pytest.fixture(scope="module")
def built(tmp_path_factory, target_folder):
    """Our own caches of five texts at two offsets, without and with the last layer."""
    folder = tmp_path_factory.mktemp("built")
    rows = [(ids(5 + i), ids(11 - i)) for i in range(5)]
    toy_cache.write_responses(folder / "responses.jsonl", rows)
    fingerprint = targets.fingerprint(target_folder) | text.load_tokenizer(target_folder).fingerprint()
    for name, layers in (("plain", (1, 3)), ("last", (1, 4, 3))):
        config = CacheBuildConfig(
            target=target_folder,
            responses=folder / "responses.jsonl",
            out=folder / name,
            capture_layers=layers,
            position_offsets=(0, 4096),
        )
        build(config, fingerprint=fingerprint)
    return folder, rows


def test_one_rule_for_layer_ids(data):
    assert [from_speculators_layer(k) for k in (1, 2, 30)] == [0, 1, 29]
    assert [to_speculators_layer(k) for k in (0, 1, 29)] == [1, 2, 30]
    # the writer above took what a layer reads from transformers: here is that it is the output of the one before
    stored = loaded(data[0] / "hidden_states" / "hs_0.safetensors")["hidden_states"]
    assert torch.equal(stored[:, 0], data[1][0].layers[1].to(torch.bfloat16))


def test_responses_by_hand():
    assert responses(np.array([1, 1, 0, 1, 0, 0, 1, 1, 1])) == [(1, 2), (3, 4), (6, 9)]
    assert responses(np.array([1, 0, 0])) == []
    assert responses(np.array([0, 0, 1])) == [(2, 3)]
    assert responses(np.zeros(4, int)) == []


def test_features_are_the_stored_bits_and_labels_the_target_s(data, cache, target_folder):
    opened = open_cache(cache[0])
    labels = [greedy_of_bfloat16(target_folder, one.layers[-1]) for one in data[1]]
    sequences = [opened.sequence(i) for i in range(opened.num_sequences)]
    wanted = [(0, 6, 17), (1, 21, 27), (1, 16, 19), (1, 4, 9), (3, 1, 12)]
    assert [(len(s.token_ids), s.prompt_len) for s in sequences] == [(end, start) for _, start, end in wanted]
    for sequence, (row, start, end) in zip(sequences, wanted, strict=True):
        token_ids, one = ROWS[row][0], data[1][row]
        assert sequence.token_ids.tolist() == token_ids[:end]
        assert sequence.loss_mask.tolist() == [0] * start + [1] * (end - start)
        columns = np.concatenate([bits(one.layers[k]) for k in (1, 3)], axis=1)[:end]
        np.testing.assert_array_equal(np.ascontiguousarray(sequence.features).view(np.uint16), columns)
        assert sequence.next_ids.tolist() == labels[row][:end]
        assert (sequence.position_offset, sequence.features_len, sequence.prompt_set) == (0, end, "chats")
        prompt = np.array(token_ids[:start], "<i4").tobytes()
        assert sequence.prompt_hash == int.from_bytes(hashlib.sha256(prompt).digest()[:8], "little")
    assert len({s.sequence_index for s in sequences}) == 5


def test_counts_and_one_copy_of_shared_turns(cache):
    out, result = cache
    # 17 + 12 tokens of the rows with one answer; 27 of the conversation, and the earlier answers' 3 and 5 once more
    assert (result["num_sequences"], result["num_tokens"]) == (5, 17 + 12 + 27 + 3 + 5)
    counted = {name: result[name] for name in ("rows", "rows_merged", "rows_without_hidden_states")}
    assert counted == {"rows": 4, "rows_merged": 0, "rows_without_hidden_states": 0}
    assert (result["rows_without_response"], result["capture_layers"]) == (1, [1, 3])
    assert 0 < result["features_relative_error"] < 0.01
    assert verify_cache(out)["ok"]


@pytest.mark.slow
def test_rows_that_go_on_the_row_before_are_merged(tmp_path, target_folder):
    """A row per turn; transformers gives equal features for equal beginnings only where its products are the same."""
    rows = [(CONVERSATION[:9], [0] * 4 + [1] * 5), (CONVERSATION[:19], [0] * 16 + [1] * 3), (ids(7), [0] * 3 + [1] * 4)]
    write_speculators(tmp_path / "source", target_folder, rows, aux_layers=AUX)
    shorter, longer = (tmp_path / "source" / "hidden_states" / f"hs_{i}.safetensors" for i in (0, 1))
    whole = loaded(longer)["hidden_states"]
    tokens = loaded(shorter)["token_ids"]
    save_file({"token_ids": tokens, "hidden_states": whole[:9].contiguous()}, shorter)
    result = imported(tmp_path / "source", target_folder, tmp_path / "cache")
    assert (result["rows"], result["rows_merged"], result["num_sequences"]) == (3, 1, 3)
    sequences = [open_cache(tmp_path / "cache").sequence(i) for i in range(3)]
    assert [(s.prompt_len, len(s.token_ids)) for s in sequences] == [(16, 19), (4, 9), (3, 7)]
    # one bit apart: both are kept
    whole[2, 1, 5] *= 2
    save_file({"token_ids": tokens, "hidden_states": whole[:9].contiguous()}, shorter)
    assert imported(tmp_path / "source", target_folder, tmp_path / "other")["rows_merged"] == 0


def test_float32_and_rows_without_hidden_states(tmp_path, target_folder):
    traced = write_speculators(
        tmp_path / "source", target_folder, ROWS, aux_layers=(3,), dtype=torch.float32, leave_out=(1,)
    )
    result = imported(tmp_path / "source", target_folder, tmp_path / "cache", aux_layers=(3,))
    assert (result["rows_without_hidden_states"], result["num_sequences"]) == (1, 2)
    sequence = open_cache(tmp_path / "cache").sequence(0)
    assert sequence.features.dtype == np.float32
    np.testing.assert_array_equal(sequence.features, traced[0].layers[2].numpy())
    assert result["features_relative_error"] < 1e-4


def test_fp8_as_hs_connectors_reads_it(source, target_folder, tmp_path):
    for path in (source / "hidden_states").iterdir():
        tensors = loaded(path)
        small, scales = quantize_tensor_to_fp8(tensors["hidden_states"])
        save_file({"token_ids": tensors["token_ids"], "hidden_states": small, "hidden_states_scales": scales}, path)
    imported(source, target_folder, tmp_path / "cache")
    stored = loaded(source / "hidden_states" / "hs_0.safetensors")
    assert stored["hidden_states"].dtype == torch.float8_e4m3fn
    wanted = dequantize_fp8_tensor(stored["hidden_states"], stored["hidden_states_scales"])
    found = open_cache(tmp_path / "cache").sequence(0).features
    np.testing.assert_array_equal(np.ascontiguousarray(found).view(np.uint16), bits(wanted[:, :-1].flatten(1)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "last"), [("plain", "computed"), ("last", "stored")])
def test_speculators_reads_our_export(built, target_folder, tmp_path, name, last):
    folder, rows = built
    result = exported(folder / name, target_folder, tmp_path / "out")
    assert (result["rows"], result["last_layer"]) == (5, last)
    assert result["aux_hidden_state_layer_ids"] == [2, 4]
    assert result["num_tokens"] == sum(len(p) + len(r) for p, r in rows)
    dataset = ArrowDataset(max_len=64, datapath=tmp_path / "out", on_missing="raise")
    assert dataset.approx_lengths == [len(p) + len(r) for p, r in rows]
    model, stored = load_hf_target(target_folder), open_cache(folder / name)
    ours = {(s.sequence_index, s.position_offset): s for s in map(stored.sequence, range(stored.num_sequences))}
    for row, (prompt, response) in enumerate(rows):
        sample = dataset[row]
        assert isinstance(sample, dict)
        assert sample["input_ids"].tolist() == prompt + response
        assert sample["loss_mask"].tolist() == [0] * len(prompt) + [1] * len(response)
        features = np.asarray(ours[row, 0].features).reshape(
            len(prompt + response), len(stored.manifest["capture_layers"]), -1
        )
        columns = features[:, [0, -1]].reshape(len(features), -1)
        np.testing.assert_array_equal(bits(sample["hidden_states"]), columns.view(np.uint16))
        # and against transformers, which knows nothing of our ids: within bfloat16's rounding
        one = trace(model, prompt + response)
        wanted = torch.cat([one.layers[k - 1] for k in result["aux_hidden_state_layer_ids"]], dim=1)
        torch.testing.assert_close(sample["hidden_states"].float(), wanted, rtol=2**-7, atol=1e-3)
        torch.testing.assert_close(sample["verifier_last_hidden_states"].float(), one.layers[-1], rtol=2**-7, atol=1e-3)


def test_out_and_in_again(built, target_folder, tmp_path):
    folder, _ = built
    exported(folder / "plain", target_folder, tmp_path / "out")
    result = imported(tmp_path / "out", target_folder, tmp_path / "cache")
    assert result["num_sequences"] == 5
    before, after = open_cache(folder / "plain"), open_cache(tmp_path / "cache")
    assert {
        k: v for k, v in before.manifest["fingerprint"].items() if k in after.manifest["fingerprint"]
    } == after.manifest["fingerprint"]
    ours = {(s.sequence_index, s.position_offset): s for s in map(before.sequence, range(10))}
    for sequence in map(after.sequence, range(5)):
        wanted = ours[sequence.sequence_index, 0]
        np.testing.assert_array_equal(sequence.features.view(np.uint16), wanted.features.view(np.uint16))
        # labels were of float32 there, and are of the last layer in bfloat16 here
        assert (sequence.next_ids == wanted.next_ids).mean() > 0.8
        for name in ("token_ids", "loss_mask", "prompt_len", "prompt_hash"):
            np.testing.assert_array_equal(getattr(sequence, name), getattr(wanted, name))


def test_offsets_are_exported_on_demand_alone(built, target_folder, tmp_path):
    folder, _ = built
    assert exported(folder / "last", target_folder, tmp_path / "out", position_offset=4096)["rows"] == 5
    opened = open_cache(folder / "last")
    ours = next(s for s in map(opened.sequence, range(10)) if (s.sequence_index, s.position_offset) == (3, 4096))
    stored = loaded(tmp_path / "out" / "hidden_states" / "hs_3.safetensors")["hidden_states"]
    wanted = ours.features.reshape(len(stored), 3, -1)[:, 1]  # layers 1, 4, 3: the last is in the middle
    np.testing.assert_array_equal(bits(stored[:, 2]), wanted.view(np.uint16))
    with pytest.raises(InputError, match=r"no sequence at position offset 5: name one of \[0, 4096\]"):
        exported(folder / "last", target_folder, tmp_path / "other", position_offset=5)
    assert not (tmp_path / "other").exists()


def test_bad_exports(built, target_folder, tmp_path):
    folder, _ = built
    with pytest.raises(InputError, match="was not made for the target"):
        exported(folder / "plain", tiny.write_tiny_target(tmp_path / "other", seed=3), tmp_path / "out")
    with pytest.raises(InputError, match="no cache at"):
        exported(tmp_path / "nothing", target_folder, tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    with pytest.raises(InputError, match="taken exists already"):
        exported(folder / "plain", target_folder, tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "taken"]


def hs(row):
    return Path("hidden_states") / f"hs_{row}.safetensors"


def rewrite(row, **changes):
    def edit(folder):
        tensors = loaded(folder / hs(row))
        save_file({k: v for k, v in (tensors | changes).items() if v is not None}, folder / hs(row))

    return edit


def cut(folder):
    path = folder / hs(1)
    path.write_bytes(path.read_bytes()[:-9])


def state_with(**changes):
    def edit(folder):
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | changes))

    return edit


def without_mask(folder):
    for path in folder.glob("*.arrow"):
        with (
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_stream(file, pa.schema([("input_ids", pa.list_(pa.int64()))])),
        ):
            pass


SHAPE = (17, 3, 24)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no folder .*source: name speculators' data folder"),
        (lambda folder: (folder / "state.json").unlink(), "the dataset's state.json is missing"),
        (lambda folder: (folder / "state.json").write_text("[1]"), "is not of a saved dataset: it has no _data_files"),
        (state_with(_data_files=[{"filename": "../x.arrow"}]), "'../x.arrow', which is not a file of that folder"),
        (state_with(_indices_data_files=[{"filename": "i"}]), "save it again with flatten_indices"),
        (lambda folder: next(folder.glob("*.arrow")).write_bytes(b"no arrow"), "is not a readable Arrow stream"),
        (without_mask, "has no column loss_mask"),
        (lambda folder: shutil.rmtree(folder / "hidden_states"), "name the one with hs_0.safetensors by"),
        (lambda folder: [path.unlink() for path in (folder / "hidden_states").iterdir()], "there is nothing to import"),
        (cut, "hs_1.safetensors.*truncated|truncated or damaged.*hs_1.safetensors"),
        (rewrite(0, token_ids=torch.tensor(ids(17))), "hs_0.safetensors: token_ids are not the input_ids of row 0"),
        (rewrite(0, token_ids=None), "hs_0.safetensors has no tensor token_ids"),
        (rewrite(0, hidden_states=None), "hs_0.safetensors has no tensor hidden_states"),
        (rewrite(0, hidden_states=torch.zeros(SHAPE, dtype=torch.int32)), r"is int32 \[17, 3, 24\], floats"),
        (rewrite(0, hidden_states=torch.zeros(17, 4, 24)), r"is \[17, 4, 24\], 2 aux layers and the last one"),
        (rewrite(0, hidden_states=torch.randn(SHAPE).bfloat16()), "the hidden states are not of the target"),
        (rewrite(1, hidden_states=torch.zeros(31, 3, 24)), "hs_1.safetensors holds float32, those before it bfloat16"),
        (rewrite(3, hidden_states=torch.full((12, 3, 24), torch.inf).bfloat16()), "token 0 are not finite"),
    ],
)
def test_bad_sources_are_one_line_and_leave_nothing(source, target_folder, tmp_path, damage, message):
    damage(source)
    with pytest.raises(InputError, match=message) as caught:
        imported(source, target_folder, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_the_last_slot_must_not_be_normed(source, target_folder, tmp_path):
    model = load_hf_target(target_folder)
    for path in (source / "hidden_states").iterdir():
        tensors = loaded(path)
        with torch.inference_mode():
            tensors["hidden_states"][:, -1] = model.model.norm(tensors["hidden_states"][:, -1].float()).bfloat16()
        save_file(tensors, path)
    with pytest.raises(InputError, match="said to be of layer 4 differ from every layer"):
        imported(source, target_folder, tmp_path / "cache")


@pytest.mark.parametrize(
    ("aux", "message"),
    [
        ((1, 3), "the layer ids are wrong: the hidden states said to be the output of layer 0 are that of layer 1"),
        ((4, 2), "said to be the output of layer 3 are that of layer 1"),
        ((2, 6), "--aux-layers names 6: speculators' ids of this target's layers are 1 to 5"),
        ((0, 2), "--aux-layers names 0: .*0 is the embedding"),
    ],
)
def test_wrong_layer_ids_are_named(data, target_folder, tmp_path, aux, message):
    with pytest.raises(InputError, match=message):
        imported(data[0], target_folder, tmp_path / "cache", aux_layers=aux)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aux_layers": None}, "--aux-layers names speculators' layers: it is needed"),
        ({"format": "windows"}, "--aux-layers names speculators' layers"),
        ({"format": "windows", "aux_layers": None, "hidden_states": Path("x")}, "--hidden-states is for"),
        ({"aux_layers": (2, 2)}, "--aux-layers is '2,2': name different layers"),
        ({"tokens_per_shard": 0}, "--tokens-per-shard is 0"),
        ({"check_tokens": -1}, "--check-tokens is -1"),
    ],
)
def test_flags_that_contradict_each_other(changes, message):
    config = {"format": "speculators", "source": Path("a"), "target": Path("b"), "out": Path("c"), "aux_layers": (2,)}
    with pytest.raises(InputError, match=message):
        CacheImportConfig(**config | changes)


def test_bfloat16_is_what_it_seems():
    assert np.array([1.0], ml_dtypes.bfloat16).view(np.uint16)[0] == bits(torch.tensor([1.0]))[0] == 0x3F80
