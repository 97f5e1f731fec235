"""Reading: views of mapped files, verified before first use, in a deterministic order."""

import shutil

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_jax.cache import open_cache, sequence_source
from dflash_jax.core import InputError


@pytest.fixture(scope="module")
def toy_sequences(toy):
    cache = open_cache(toy / "cache")
    return cache, sorted(names(cache.sequence(i) for i in range(24)))


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
    assert cache.lengths().tolist() == [len(sequence.token_ids) for sequence in sequences]
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


def test_a_seed_out_of_range_is_refused(toy):
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="0 to 2\\^32 - 1 is needed"):
            sequence_source(open_cache(toy / "cache"), seed=seed, shuffle=True)


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32 - 1), processes=st.integers(1, 7), step=st.integers(0, 40), batch_size=st.integers(1, 5)
)
@settings(max_examples=30, deadline=None)
def test_processes_share_an_epoch_and_go_on_anywhere(toy_sequences, seed, processes, step, batch_size):
    cache, everything = toy_sequences
    whole = sequence_source(cache, seed=seed, shuffle=True)
    parts = [sequence_source(cache, seed=seed, shuffle=True)[p::processes] for p in range(processes)]
    # element i of the whole is element i // processes of process i % processes; three epochs, each complete
    order = names(parts[i % processes][i // processes] for i in range(72))
    assert order == names(whole[i] for i in range(72))
    assert all(sorted(order[first : first + 24]) == everything for first in (0, 24, 48))
    # a step's batch depends on its number alone
    batches = parts[-1].batch(batch_size, batch_fn=names)
    assert batches[step] == names(parts[-1][i] for i in range(step * batch_size, (step + 1) * batch_size))


def test_an_iterator_is_checkpointed(toy):
    cache = open_cache(toy / "cache")
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    batches = sequence_source(cache, seed=3, shuffle=True)[1::2].batch(5, batch_fn=names).to_iter_dataset(options)
    one = iter(batches)
    head = [next(one) for _ in range(7)]
    state = one.get_state()
    tail = [next(one) for _ in range(7)]
    other = iter(batches)
    other.set_state(state)
    assert [next(other) for _ in range(7)] == tail
    assert head[0] == names(sequence_source(cache, seed=3, shuffle=True)[i] for i in range(1, 11, 2))


def test_the_order_is_that_of_every_machine(toy):
    # literals: where they change, a resumed run reads other sequences than the one it goes on with
    source = sequence_source(open_cache(toy / "cache"), seed=1234567, shuffle=True)
    in_order = names(sequence_source(open_cache(toy / "cache"), seed=0, shuffle=False)[i] for i in range(24))
    assert [in_order.index(name) for name in names(source[i] for i in range(24, 36))] == [
        8,
        23,
        11,
        22,
        0,
        13,
        4,
        15,
        21,
        7,
        20,
        10,
    ]
