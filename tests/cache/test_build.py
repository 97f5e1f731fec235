"""Plan, inputs, and what a build does with them."""

import json
import tracemalloc
from dataclasses import fields
from itertools import combinations

import ml_dtypes
import numpy as np
import pytest

from dflash_jax.cache import BuildProgress, CacheBuildConfig, open_cache, read_responses
from dflash_jax.cache.features import first_not_finite
from dflash_jax.cache.plan import choose_lengths, group_prompts, plan_batches, plan_shards, stored_order
from dflash_jax.core import InputError
from support import toy_cache


def test_batches_by_hand():
    # 256 tokens a batch: one row of 192, then two of 128 (100 and 70 share it), then what is left, one of 64
    batches = plan_batches(np.array([60, 130, 70, 100]), tokens_per_batch=256)
    assert [(rows.tolist(), *shape) for rows, *shape in batches] == [([1], 1, 192), ([3, 2], 2, 128), ([0], 1, 64)]


def test_compiled_lengths_by_hand():
    lengths = np.array([130, 70, 60])  # 1, 2 or 4 rows a batch
    choose = lambda tokens_per_shape, copies=1: choose_lengths(
        lengths, tokens_per_batch=256, copies=copies, tokens_per_shape=tokens_per_shape
    )
    assert choose(0) == [192, 128, 64]  # 192 + 128 + 64 = 384
    assert choose(200) == [192]  # 3 * 192 + 200 = 776; [192, 128] 448 + 400; all 384 + 600
    assert choose(200, copies=4) == [192, 128, 64]  # 4 * 384 + 600 = 2136; 4 * 576 + 200; 4 * 448 + 400 = 2192


@pytest.mark.parametrize("seed", range(4))
def test_chosen_lengths_cost_least_of_all(seed):
    draw = np.random.default_rng(seed)
    lengths = -np.sort(-draw.integers(1, 500, 23))
    buckets = sorted({-(-int(length) // 64) * 64 for length in lengths}, reverse=True)

    def cost(choices):
        total, first = 300 * len(choices), 0
        for shorter, length in zip([*choices[1:], 0], choices, strict=True):
            held = sum(shorter < bucket <= length for bucket in (-(-lengths // 64) * 64).tolist())
            rows = 1
            while rows * 2 * length <= 1024 and rows < held:
                rows *= 2
            total += -(-held // rows) * rows * length * 2
            first += held
        assert first == len(lengths)
        return total

    found = choose_lengths(lengths, tokens_per_batch=1024, copies=2, tokens_per_shape=300)
    every = [[buckets[0], *rest] for n in range(len(buckets)) for rest in combinations(buckets[1:], n)]
    assert cost(found) == min(cost(choices) for choices in every)


def test_small_builds_compile_few_shapes():
    # the prompts of the demo: a hundred and some of 100 to 290 tokens took five shapes once, each as dear as a batch
    lengths = np.random.default_rng(0).integers(100, 290, 128)
    batches = plan_batches(lengths, tokens_per_batch=4096, tokens_per_shape=4096)
    assert len({tuple(shape) for _, *shape in batches}) <= 2
    lengths = np.random.default_rng(0).integers(100, 1270, 20000)
    batches = plan_batches(lengths, tokens_per_batch=4096, tokens_per_shape=int(0.01 * lengths.sum()))
    assert len({tuple(shape) for _, *shape in batches}) <= 10
    assert sum(rows * length for _, rows, length in batches) < 1.11 * lengths.sum()


def test_last_batch_keeps_a_compiled_shape_unless_another_pays():
    lengths = np.full(17, 64)
    shapes = lambda tokens_per_shape: [
        shape for _, *shape in plan_batches(lengths, tokens_per_batch=1024, tokens_per_shape=tokens_per_shape)
    ]
    assert shapes(1024) == [[16, 64], [16, 64]]
    assert shapes(900) == [[16, 64], [1, 64]]


def test_prompts_are_grouped_longest_first():
    group = lambda hashes, prompt_len, most: group_prompts(
        np.array([5, 9, 7, 9, 4]), np.array(prompt_len, np.int32), np.array(hashes, np.uint64), most=most
    )
    assert group([1, 1, 1, 2, 1], [3] * 5, 9) == {1: [2, 0, 4], 3: []}
    assert group([1, 1, 1, 2, 1], [3] * 5, 2) == {1: [2], 3: [], 0: [4]}
    assert group([1, 1, 1, 1, 1], [3, 3, 2, 3, 3], 9) == {1: [3, 0, 4], 2: []}  # equal hashes, other lengths
    assert group([1] * 5, [3] * 5, 1) == {1: [], 3: [], 2: [], 0: [], 4: []}


def no_groups(lengths):
    return {"prompt_len": np.ones(len(lengths), np.int32), "groups": {row: [] for row in range(len(lengths))}}


@pytest.mark.parametrize("seed", range(5))
def test_plan_holds_every_sequence_once_per_offset_within_its_limits(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, 400, 83)
    prompt_len = (draw.uniform(0, 1, 83) * (lengths - 1)).astype(np.int32) + 1
    if seed:  # some prompts have several responses
        hashes = draw.integers(0, 20, 83).astype(np.uint64)
        prompt_len = np.minimum(prompt_len, [lengths[hashes == mine].min() - 1 for mine in hashes]).astype(np.int32)
        prompt_len = np.array([prompt_len[hashes == mine].min() for mine in hashes], np.int32)
        groups = group_prompts(lengths, prompt_len, hashes, most=3)
    else:
        groups = no_groups(lengths)["groups"]
    shards = plan_shards(
        lengths, prompt_len=prompt_len, groups=groups,
        position_offsets=(7, 0, 4096), tokens_per_batch=1000, tokens_per_shard=3000,
    )  # fmt: skip
    steps = [step for shard in shards for step in shard.steps]
    for offset in (7, 0, 4096):
        parts = [part for step in steps if step.position_offset == offset for part in (step, *step.extensions)]
        assert sorted(np.concatenate([part.rows for part in parts]).tolist()) == list(range(83))
        rows = np.concatenate([step.rows for step in steps if step.position_offset == offset])
        assert (np.diff(lengths[rows]) <= 0).all()
    for step in steps:
        assert step.padded_rows & (step.padded_rows - 1) == 0
        assert step.padded_length % 64 == 0
        assert len(step.rows) <= step.padded_rows
        assert lengths[step.rows].max() <= step.padded_length
        assert step.padded_rows * step.padded_length <= 1000
        for extension in step.extensions:
            assert len(extension.rows) <= step.padded_rows
            assert (lengths - prompt_len)[extension.rows].max() <= extension.padded_length <= step.padded_length
            assert all(groups[int(step.rows[source])].count(row) == 1
                       for row, source in zip(extension.rows.tolist(), extension.sources, strict=True))  # fmt: skip
    assert [shard.file for shard in shards][:2] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    for shard in shards:
        order = stored_order(shard)
        stored = lengths[order.rows] - np.where(order.source < 0, 0, prompt_len[order.rows])
        assert shard.tokens == stored.sum() <= 3000
        assert shard.sequences == len(order.rows)
        shared = order.source >= 0
        assert (order.source[shared] < np.flatnonzero(shared)).all()
        assert (order.position_offset[order.source[shared]] == order.position_offset[shared]).all()


def test_batch_larger_than_a_shard_has_its_own():
    lengths = np.array([50, 40])
    shards = plan_shards(
        lengths, **no_groups(lengths), position_offsets=(0, 1), tokens_per_batch=1, tokens_per_shard=10
    )
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


def test_a_row_that_is_there_twice_is_named_and_other_responses_of_its_id_are_not(tmp_path):
    toy_cache.write_inputs(tmp_path, [])
    rows = [GOOD, GOOD | {"id": "b"}, GOOD | {"response_ids": [3]}, GOOD | {"id": "b", "text": "y"}]
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"line 4: the id and the tokens are those of line 2 already \(1 rows"):
        toy_cache.build_toy(tmp_path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert toy_cache.build_toy(tmp_path, position_offsets=(0,))["num_sequences"] == 3


def test_what_is_kept_of_a_response_does_not_grow_with_its_tokens(tmp_path):
    toy_cache.write_responses(tmp_path / "r.jsonl", toy_cache.toy_rows(300))
    responses = read_responses(tmp_path / "r.jsonl", vocab_size=toy_cache.VOCAB, max_length=200)
    kept = [getattr(responses, field.name) for field in fields(responses)]
    assert sum(value.nbytes for value in kept if isinstance(value, np.ndarray)) == 30 * 300
    assert not any(isinstance(value, list | tuple) and len(value) > 3 for value in kept)
    assert [responses.tokens(row).tolist() for row in (299, 0)] == [
        prompt + response for prompt, response in (toy_cache.toy_rows(300)[row] for row in (299, 0))
    ]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_sequences(tmp_path):
    """Of a row that is longer by one, a build keeps what its plan and ledger need, and not its features."""
    peaks, counts, stored = [], (100, 700), 0.0
    for count in counts:
        folder = tmp_path / f"{count}"
        toy_cache.write_inputs(folder, toy_cache.toy_rows(count))
        tracemalloc.start()
        built = toy_cache.build_toy(folder, position_offsets=(0,), features="float32", tokens_per_shard=4000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        stored = built["bytes"] / count
    assert stored > 2000
    assert (peaks[1] - peaks[0]) / (counts[1] - counts[0]) < 0.25 * stored


def test_progress_by_hand(tmp_path):
    now = BuildProgress(tokens_done=700, tokens_total=1000, tokens_kept=100, bytes_done=7, bytes_total=10, seconds=20.0)
    assert (now.tokens_per_s, now.seconds_left) == (30.0, 10.0)
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(20))
    told = []
    built = toy_cache.build_toy(tmp_path, progress=told.append)
    assert [each.tokens_done for each in told] == sorted({each.tokens_done for each in told})
    # 6 columns * 2 + 9 per token; what shards have besides is left out
    assert {each.bytes_done / each.tokens_done for each in told} == {21.0}
    assert told[-1].bytes_done == told[-1].bytes_total == 21 * built["num_tokens"]


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("features", "--features is 'int3': choose one of bfloat16, float32, int8, float8"),
        ("dtype", "--dtype is 'int3': choose one of float32, bfloat16"),
    ],
)
def test_unknown_dtypes(tmp_path, name, message):
    config = toy_cache.toy_config(tmp_path)
    object.__setattr__(config, name, "int3")  # the test hook's type check would not let it in
    with pytest.raises(InputError, match=message):
        config.__post_init__()


def test_no_responses(tmp_path):
    toy_cache.write_inputs(tmp_path, [])
    with pytest.raises(InputError, match="the responses file holds no rows"):
        toy_cache.build_toy(tmp_path)
