"""Reading: views of mapped files, verified before first use, in a deterministic order."""

import shutil

import numpy as np
import pytest

from dflash_jax.cache import open_cache, sequence_source
from dflash_jax.core import InputError


def names(sequences):
    return [(sequence.sequence_index, sequence.position_offset) for sequence in sequences]


def test_sequences_are_views_of_the_mapped_file(toy):
    cache = open_cache(toy / "cache")
    one, again, other = cache.sequence(0), cache.sequence(0), cache.sequence(1)
    assert np.shares_memory(one.features, again.features)
    assert not one.features.flags.writeable
    base = one.features
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    # sequences of one shard lie one after the other
    assert other.features.ctypes.data - one.features.ctypes.data == one.features.nbytes


def test_shards_join_without_a_gap(toy):
    cache = open_cache(toy / "cache")
    sequences = [cache.sequence(i) for i in range(24)]
    assert sum(len(sequence.token_ids) for sequence in sequences) == cache.num_tokens
    assert max(len(sequence.token_ids) for sequence in sequences) == cache.max_length
    assert cache.prompt_hashes().tolist() == [sequence.prompt_hash for sequence in sequences]
    assert cache.prompt_hashes().dtype == np.uint64
    for index in (-1, 24):
        with pytest.raises(IndexError, match=f"sequence {index} of a cache of 24"):
            cache.sequence(index)


def test_damage_is_found_when_the_shard_is_first_touched(toy, tmp_path):
    folder = shutil.copytree(toy / "cache", tmp_path / "cache")
    path = folder / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 128
    path.write_bytes(content)
    cache = open_cache(folder)
    first = cache.manifest["shards"][0]["sequences"]
    cache.sequence(first - 1)
    with pytest.raises(
        InputError, match=r"shard-00001.safetensors is damaged: its sha256 .*: run the same `cache build`"
    ):
        cache.sequence(first)
    with pytest.raises(InputError, match="shard-00001.safetensors is damaged"):
        cache.prompt_hashes()


def test_source_in_order(toy):
    cache = open_cache(toy / "cache")
    source = sequence_source(cache, seed=0, shuffle=False)
    in_order = names(cache.sequence(i) for i in range(24))
    assert names(source[i] for i in range(30)) == in_order + in_order[:6]


def test_source_shuffles_by_seed_alone_and_starts_anywhere(toy):
    everything = set(names(open_cache(toy / "cache").sequence(i) for i in range(24)))
    one, other = (sequence_source(open_cache(toy / "cache"), seed=7, shuffle=True) for _ in range(2))
    order = names(one[i] for i in range(72))
    # a run that goes on at element 41 sees what the first would have seen
    assert names(other[i] for i in range(41, 72)) == order[41:]
    epochs = [order[i : i + 24] for i in (0, 24, 48)]
    assert all(set(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    third = sequence_source(open_cache(toy / "cache"), seed=8, shuffle=True)
    assert names(third[i] for i in range(24)) != epochs[0]
