"""The target's likeliest tokens in a cache: what is stored, what is said of it, what a cache without them means."""

import jax
import numpy as np
import pytest

from dflash_jax.cache import CacheCostConfig, cache_cost, cache_info, open_cache, stack_sequences, verify_cache
from dflash_jax.core import InputError
from dflash_jax.targets import load_target, prefill
from support import tiny, tiny_chain, toy_cache


def test_bytes_and_layout_are_what_was_said(tmp_path):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(20, responses=2))
    built = toy_cache.build_toy(tmp_path, top_k=5)
    cost = cache_cost(CacheCostConfig(
        target=tmp_path / "target", responses=tmp_path / "responses.jsonl", device="h100", capture_layers=(1, 3),
        position_offsets=(0, 1000), tokens_per_batch=256, tokens_per_shard=600, top_k=5,
    ))  # fmt: skip
    assert cost["bytes"]["total"] == built["bytes"]
    assert sum(cost["bytes"].values()) == 2 * built["bytes"]
    assert cost["bytes"]["top_ids_top_logprobs"] == built["num_tokens"] * 5 * (4 + 2)
    assert cost["bytes_per_token"] == cache_info(tmp_path / "cache")["bytes_per_token"] == 2 * 3 * 2 + 9 + 30
    assert cache_info(tmp_path / "cache")["top_k"] == 5
    assert verify_cache(tmp_path / "cache")["problems"] == []


def test_sequences_and_batches_have_them_and_those_of_other_caches_none(tmp_path):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(4, responses=2))
    toy_cache.build_toy(tmp_path, top_k=3)
    cache = open_cache(tmp_path / "cache")
    sequence = cache.sequence(0)
    assert sequence.top_ids is not None
    assert sequence.top_ids.tolist() == [[(n + i) % toy_cache.VOCAB for i in range(3)] for n in sequence.next_ids]
    batch = stack_sequences([cache.sequence(0), cache.sequence(1)], width=200, max_new_tokens=None)
    assert batch.top_ids is not None
    assert batch.top_logprobs is not None
    for row in range(2):
        stored = cache.sequence(row)
        length = len(stored.token_ids)
        np.testing.assert_array_equal(batch.top_ids[row, :length], stored.top_ids)
        np.testing.assert_array_equal(batch.top_logprobs[row, :length], stored.top_logprobs)
        assert not np.asarray(batch.top_ids[row, length:]).any()
    toy_cache.build_toy(tmp_path, out=tmp_path / "without")
    plain = open_cache(tmp_path / "without")
    assert plain.sequence(0).top_ids is None
    assert stack_sequences([plain.sequence(0)], width=200, max_new_tokens=None).top_logprobs is None


@pytest.mark.slow
def test_they_are_those_of_the_targets_softmax(tmp_path):
    target_folder = tiny.tiny_target()
    built = tiny_chain.make_cache(tmp_path / "chain", target_folder, tiny.TEXTS[:2], top_k=4)
    target, cache = load_target(target_folder), open_cache(built)
    for index in range(cache.num_sequences):
        sequence = cache.sequence(index)
        assert sequence.top_ids is not None
        assert sequence.top_logprobs is not None
        tokens = jax.numpy.asarray(sequence.token_ids)[None]
        zero = jax.numpy.zeros(1, jax.numpy.int32)
        out = prefill(target, tokens, lengths=zero + tokens.shape[1], position_offset=zero)
        logits = np.asarray(out.hidden[0], np.float64) @ np.asarray(target.head, np.float64).T
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        want = np.argsort(-logprobs, axis=-1, kind="stable")[:, :4]
        np.testing.assert_array_equal(sequence.top_ids, want)
        np.testing.assert_array_equal(sequence.top_ids[:, 0], sequence.next_ids)
        # float16: 2^-11 of the number
        np.testing.assert_allclose(
            sequence.top_logprobs, np.take_along_axis(logprobs, want, axis=-1), rtol=6e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("top_k", "message"),
    [
        (-1, r"--top-k is -1: a number from 0 to 1024 is needed"),
        (2000, r"--top-k is 2000: a number from 0 to 1024 is needed"),
        (98, r"--top-k is 98, the target .*/target has 97 tokens: lower it"),
    ],
)
def test_a_bad_number_is_named(tmp_path, top_k, message):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(2))
    with pytest.raises(InputError, match=f"^{message}$"):
        toy_cache.build_toy(tmp_path, top_k=top_k)
    assert not (tmp_path / "cache").exists()
