"""Responses that share a prompt: computed once, stored once, read as if each had its own."""

import numpy as np
import pytest

from dflash_jax.cache import CacheBuildConfig, build, open_cache, verify_cache
from dflash_jax.cache.manifest import read_manifest
from dflash_jax.core import InputError
from support import tiny, toy_cache

FIELDS = ("token_ids", "next_ids", "loss_mask")


def sequences(folder):
    cache = open_cache(folder)
    found = [cache.sequence(i) for i in range(cache.num_sequences)]
    return {(sequence.sequence_index, sequence.position_offset): sequence for sequence in found}


def sums_capture(tokens, lengths, position_offset):
    """Next ids that depend on all tokens before them, so that an extension of another prompt's memory is seen."""
    features, next_ids = toy_cache.toy_capture(tokens, lengths, position_offset)
    return features, ((next_ids + np.cumsum(tokens, axis=1)) % toy_cache.VOCAB).astype(np.int32)


def test_shared_prompts_are_stored_once_and_read_whole(tmp_path):
    rows = toy_cache.toy_rows(30, responses=5)
    toy_cache.write_inputs(tmp_path, rows)
    settings = {"tokens_per_shard": 1200, "capture": sums_capture}  # four batches: at most 4 responses a group
    shared = toy_cache.build_toy(tmp_path, **settings)
    apart = toy_cache.build_toy(tmp_path, share_prompts=False, out=tmp_path / "apart", **settings)
    prompts = [len(prompt) for prompt, _ in rows[::5]]
    assert apart["num_tokens"] - shared["num_tokens"] == shared["num_tokens_shared"] == 2 * 3 * sum(prompts)
    assert (apart["num_tokens_shared"], apart["num_sequences"]) == (0, shared["num_sequences"])
    assert shared["bytes"] < apart["bytes"]
    assert verify_cache(tmp_path / "cache")["problems"] == []
    one, other = sequences(tmp_path / "cache"), sequences(tmp_path / "apart")
    assert one.keys() == other.keys()
    for key, sequence in one.items():
        for name in (*FIELDS, "features"):
            assert np.array_equal(getattr(sequence, name), getattr(other[key], name)), (key, name)
        for name in ("prompt_len", "prompt_hash", "prompt_set"):
            assert getattr(sequence, name) == getattr(other[key], name)
    assert all(entry["tokens"] <= 1200 for entry in read_manifest(tmp_path / "cache")["shards"])
    cache = open_cache(tmp_path / "cache")
    lengths = [len(cache.sequence(index).token_ids) for index in range(cache.num_sequences)]
    assert cache.lengths().tolist() == lengths


def test_damaged_shard_with_shared_prompts_is_built_again(tmp_path):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(20, responses=4))
    toy_cache.build_toy(tmp_path)
    wanted = toy_cache.shard_bytes(tmp_path / "cache")
    victim = tmp_path / "cache" / "shard-00001.safetensors"
    victim.write_bytes(b"\0" + victim.read_bytes()[1:])
    assert toy_cache.build_toy(tmp_path)["shards_damaged"] == 1
    assert toy_cache.shard_bytes(tmp_path / "cache") == wanted


def test_not_finite_in_an_extension_is_named(tmp_path):
    prompt = [1, 2, 3]
    toy_cache.write_inputs(tmp_path, [(prompt, [4] * 9), (prompt, [5, 66, 7])])

    def capture(tokens, lengths, position_offset):
        features, next_ids = toy_cache.toy_capture(tokens, lengths, position_offset)
        features[tokens == 66] = np.nan
        return features, next_ids

    with pytest.raises(InputError, match=r"features for 'r1' of .* \(token 4, position_offset 0\)"):
        toy_cache.build_toy(tmp_path, capture=capture)


def test_responses_changed_during_the_build_stop_it(tmp_path):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(9))

    def capture(*given):
        (tmp_path / "responses.jsonl").write_text("{}\n" * 9)
        return toy_cache.toy_capture(*given)

    with pytest.raises(InputError, match="responses.jsonl was changed while it was in use: run the command again"):
        toy_cache.build_toy(tmp_path, capture=capture)


@pytest.mark.slow  # four shapes are compiled
def test_target_extends_its_memory_to_what_whole_sequences_give(tmp_path):
    """Rows of several lengths and prompts, so that a wrong source, start or length would be seen."""
    target = tiny.write_tiny_target(tmp_path / "target", seed=3)
    draw = np.random.default_rng(0)
    ids = lambda count: draw.integers(4, len(tiny.TOKENS), count).tolist()  # no special ones
    prompts = [ids(40), ids(63), ids(7)]
    rows = [(prompts[i], ids(n)) for i, n in [(0, 70), (1, 5), (0, 12), (2, 30), (0, 65), (1, 64), (2, 1)]]
    toy_cache.write_responses(tmp_path / "r.jsonl", rows)
    built = {}
    for share in (True, False):
        config = CacheBuildConfig(
            target=target, responses=tmp_path / "r.jsonl", out=tmp_path / f"{share}", capture_layers=(3, 1),
            position_offsets=(0, 70000), features="float32", tokens_per_batch=512, share_prompts=share,
        )  # fmt: skip
        built[share] = build(config, fingerprint={})
    assert built[True]["num_tokens_shared"] == 2 * (2 * 40 + 63 + 7)
    assert all(finding["holds"] for finding in built[True]["self_test"].values())
    one, other = sequences(tmp_path / "True"), sequences(tmp_path / "False")
    assert len(one) == len(other) == 14
    for key, sequence in one.items():
        wanted = other[key].features
        # measured: 2e-6 of the largest
        assert np.abs(sequence.features - wanted).max() < 2e-5 * np.abs(wanted).max(), key
        for name in FIELDS:
            assert np.array_equal(getattr(sequence, name), getattr(other[key], name)), (key, name)
