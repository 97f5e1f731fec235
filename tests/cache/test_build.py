"""Plan, inputs, and what a build does with them."""

import json

import ml_dtypes
import numpy as np
import pytest

from dflash_jax.cache import CacheBuildConfig, open_cache
from dflash_jax.cache.build import first_not_finite
from dflash_jax.cache.plan import plan_batches, plan_shards
from dflash_jax.core import InputError
from support import toy_cache


def test_batches_by_hand():
    # 256 tokens a batch: one row of 192, then two of 128 (100 and 70 share it), then what is left, one of 64
    batches = plan_batches(np.array([60, 130, 70, 100]), tokens_per_batch=256)
    assert [(rows.tolist(), *shape) for rows, *shape in batches] == [([1], 1, 192), ([3, 2], 2, 128), ([0], 1, 64)]


def test_compiled_lengths_are_few():
    # after 1280, the bucket of 1216 is not short enough for a compile of its own, 1152 is (1152 <= 0.9 * 1280)
    lengths = np.array([1280, 1200, 1152, 1100])
    assert [shape for _, _, shape in plan_batches(lengths, tokens_per_batch=1280)] == [1280, 1280, 1152, 1152]
    every = plan_batches(np.arange(1, 8193), tokens_per_batch=16384)
    assert len({shape for _, _, shape in every}) <= 32
    padded, real = sum(rows * length for _, rows, length in every), 8192 * 8193 // 2
    assert padded / real < 1.07


@pytest.mark.parametrize("seed", range(5))
def test_plan_holds_every_sequence_once_per_offset_within_its_limits(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 400, 83)
    shards = plan_shards(lengths, position_offsets=(7, 0, 4096), tokens_per_batch=1000, tokens_per_shard=3000)
    steps = [step for shard in shards for step in shard.steps]
    for offset in (7, 0, 4096):
        rows = np.concatenate([step.rows for step in steps if step.position_offset == offset])
        assert sorted(rows.tolist()) == list(range(83))
        assert (np.diff(lengths[rows]) <= 0).all()
    for step in steps:
        assert step.padded_rows & (step.padded_rows - 1) == 0
        assert step.padded_length % 64 == 0
        assert len(step.rows) <= step.padded_rows
        assert lengths[step.rows].max() <= step.padded_length
        assert step.padded_rows * step.padded_length <= 1000
    assert [shard.file for shard in shards][:2] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    for shard in shards:
        assert shard.tokens == sum(int(lengths[step.rows].sum()) for step in shard.steps) <= 3000
        assert shard.sequences == sum(len(step.rows) for step in shard.steps)


def test_batch_larger_than_a_shard_has_its_own():
    shards = plan_shards(np.array([50, 40]), position_offsets=(0, 1), tokens_per_batch=1, tokens_per_shard=10)
    assert [shard.tokens for shard in shards] == [50, 50, 40, 40]


def test_what_is_read_is_what_was_captured(tmp_path):
    rows = toy_cache.toy_rows(12)
    toy_cache.write_inputs(tmp_path, rows)
    done = toy_cache.build_toy(tmp_path, features="float32")
    cache = open_cache(tmp_path / "cache")
    assert (cache.num_sequences, cache.num_tokens) == (done["num_sequences"], done["num_tokens"])
    seen = set()
    for i in range(cache.num_sequences):
        got = cache.sequence(i)
        prompt, response = rows[got.sequence_index]
        seen.add((got.sequence_index, got.position_offset))
        tokens = prompt + response
        assert got.token_ids.tolist() == tokens
        assert got.prompt_len == len(prompt)
        assert got.prompt_set == f"toy-{got.sequence_index % 3}"
        assert got.loss_mask.tolist() == [0] * len(prompt) + [1] * len(response)
        assert got.next_ids.tolist() == [(5 * token + place) % 97 for place, token in enumerate(tokens)]
        shift = got.position_offset // 1000
        first = [float(ml_dtypes.bfloat16((3 * t + p + shift) % 200)) for p, t in enumerate(tokens)]
        assert got.features[:, 0].tolist() == first
        assert got.features.dtype == np.float32
    assert seen == {(row, offset) for row in range(12) for offset in (0, 1000)}


def test_not_finite():
    for dtype in (ml_dtypes.bfloat16, np.float32):
        features = np.full((4, 3), -np.finfo(np.float32).max / 2, dtype)
        assert first_not_finite(features) is None
        features[3, 0], features[2, 1] = np.nan, -np.inf
        assert first_not_finite(features) == 2


def test_features_that_are_not_finite_stop_the_build_by_name(tmp_path):
    toy_cache.write_inputs(tmp_path, [([1], [2, 3]), ([4, 66], [5, 6, 7])])

    def capture(tokens, lengths, position_offset):
        features, next_ids = toy_cache.toy_capture(tokens, lengths, position_offset)
        features[tokens == 66] = np.inf
        return features, next_ids

    with pytest.raises(InputError, match=r"NaN or infinite features for 'r1' of .* \(token 1, position_offset 0\)"):
        toy_cache.build_toy(tmp_path, capture=capture)
    assert list((tmp_path / "cache").glob("shard-*")) == []


GOOD = {"id": "a", "prompt_ids": [1], "response_ids": [2], "set": "s", "finish": "stop", "text": "x"}
BAD_ROWS = [
    (GOOD | {"id": 3}, "id is missing or not a string"),
    ({"id": "a", "response_ids": [2]}, "prompt_ids is missing"),
    (GOOD | {"set": 7}, "set is not a string"),
    (GOOD | {"response_ids": []}, "response_ids is not a list of token ids, or empty"),
    (GOOD | {"response_ids": "2"}, "response_ids is not a list of token ids, or empty"),
    (GOOD | {"prompt_ids": [1, 2.5]}, "prompt_ids holds something that is not a whole number"),
    (GOOD | {"prompt_ids": [True]}, "prompt_ids holds something that is not a whole number"),
    (GOOD | {"prompt_ids": [1, 97]}, "prompt_ids holds token 97, the target's vocabulary is 0 to 96"),
    (GOOD | {"prompt_ids": [-1]}, "prompt_ids holds token -1, the target's vocabulary is 0 to 96"),
    (
        GOOD | {"prompt_ids": [1] * 150, "response_ids": [1] * 51},
        r"150 \+ 51 tokens are more than the target's context of 200",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_row_is_named_by_line_before_anything_is_written(tmp_path, row, message):
    toy_cache.write_inputs(tmp_path, [])
    # the blank line counts
    (tmp_path / "responses.jsonl").write_text(json.dumps(GOOD) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=f"responses.jsonl line 3: {message}: fix or drop that row"):
        toy_cache.build_toy(tmp_path)
    assert not (tmp_path / "cache").exists()


def test_rows_without_a_set_are_of_the_unknown_one(tmp_path):
    toy_cache.write_inputs(tmp_path, [([1], [2, 3])])
    line = json.loads((tmp_path / "responses.jsonl").read_text())
    del line["set"]
    (tmp_path / "responses.jsonl").write_text(json.dumps(line) + "\n")
    toy_cache.build_toy(tmp_path)
    assert open_cache(tmp_path / "cache").sequence(0).prompt_set == "unknown"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capture_layers": (1, 5)}, "--capture-layers names layer 5, the target .* has 0 to 4"),
        (
            {"position_offsets": (0, 2**31 - 3)},
            "--position-offsets 2147483645 . the longest sequence's 4 tokens are more than",
        ),
    ],
)
def test_settings_that_do_not_fit_the_target(tmp_path, changes, message):
    toy_cache.write_inputs(tmp_path, [([1], [2, 3, 4])])
    with pytest.raises(InputError, match=message):
        toy_cache.build_toy(tmp_path, **changes)
    assert not (tmp_path / "cache").exists()


def test_largest_offset_that_fits(tmp_path):
    toy_cache.write_inputs(tmp_path, [([1], [2, 3, 4])])
    toy_cache.build_toy(tmp_path, position_offsets=(2**31 - 5,))
    assert open_cache(tmp_path / "cache").sequence(0).position_offset == 2147483643


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capture_layers": ()}, "--capture-layers is '': name different layers from 0 up, such as 1,10,18,27"),
        ({"capture_layers": (3, -1)}, "--capture-layers is '3,-1'"),
        ({"capture_layers": (3, 3)}, "--capture-layers is '3,3'"),
        ({"position_offsets": ()}, "--position-offsets is '': name different positions from 0 to 2147483647"),
        ({"position_offsets": (0, -4)}, "--position-offsets is '0,-4'"),
        ({"position_offsets": (0, 2**31)}, "--position-offsets is '0,2147483648'"),
        ({"position_offsets": (0, 0)}, "--position-offsets is '0,0'"),
        ({"tokens_per_batch": 0}, "--tokens-per-batch is 0: a positive number is needed"),
        ({"tokens_per_shard": -1}, "--tokens-per-shard is -1: a positive number is needed"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        CacheBuildConfig(**{"target": tmp_path, "responses": tmp_path, "out": tmp_path} | changes)


def test_unknown_features_dtype(tmp_path):
    config = toy_cache.toy_config(tmp_path)
    object.__setattr__(config, "features", "int8")  # the test hook's type check would not let it in
    with pytest.raises(InputError, match="--features is 'int8': choose bfloat16 or float32"):
        config.__post_init__()


def test_no_responses(tmp_path):
    toy_cache.write_inputs(tmp_path, [])
    with pytest.raises(InputError, match="the responses file holds no rows"):
        toy_cache.build_toy(tmp_path)
