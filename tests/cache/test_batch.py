"""Batches: every row what was stored, zeros behind it, in memory that is used again and never too early."""

import gc

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_jax.cache import open_cache, stack_on_host, stack_sequences
from support import toy_cache


def slow_features(sequences, width):
    """The plain way: fresh zeros, one token at a time."""
    columns = 2 * toy_cache.HIDDEN
    batch = np.zeros((len(sequences), width, columns), np.float32)
    for row, sequence in enumerate(sequences):
        for token in range(len(sequence.token_ids)):
            batch[row, token] = sequence.features[token].astype(np.float32)
    return batch


def address(batch):
    return batch.features.ctypes.data


@pytest.fixture(scope="module")
def sequences(toy):
    cache = open_cache(toy / "cache")
    return [cache.sequence(i) for i in range(cache.num_sequences)]


def test_fields_by_hand(sequences):
    rows = toy_cache.toy_rows(12)
    two = [
        next(s for s in sequences if s.sequence_index == i and s.position_offset == o) for i, o in ((3, 0), (7, 1000))
    ]
    batch = stack_on_host(two, width=160, max_new_tokens=50)
    for row, (index, offset) in enumerate(((3, 0), (7, 1000))):
        prompt, response = rows[index]
        length = len(prompt) + len(response)
        assert batch.token_ids[row].tolist() == prompt + response + [0] * (160 - length)
        assert batch.next_ids[row, :length].tolist() == two[row].next_ids.tolist()
        assert not batch.next_ids[row, length:].any()
        assert (batch.length[row], batch.prompt_len[row], batch.position_offset[row]) == (length, len(prompt), offset)
        assert batch.limit[row] == len(prompt) + 50
    assert (stack_on_host(two, width=160, max_new_tokens=None).limit == 2**31 - 1).all()


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 23), min_size=1, max_size=5), st.sampled_from((150, 151, 190)), st.booleans()
        ),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=40, deadline=None)
def test_used_again_memory_holds_nothing_of_the_last_batch(sequences, plan):
    held = []
    for indices, width, keep in plan:
        chosen = [sequences[i] for i in indices]
        batch = stack_on_host(chosen, width=width, max_new_tokens=None)
        wanted = slow_features(chosen, width)
        np.testing.assert_array_equal(batch.features.astype(np.float32), wanted)
        if keep:
            held.append((batch, wanted))
    # those that were kept were not written over by those that came after them
    for batch, wanted in held:
        np.testing.assert_array_equal(batch.features.astype(np.float32), wanted)


def test_memory_is_used_again_when_the_last_view_is_gone(sequences):
    first = stack_on_host(sequences[:3], width=150, max_new_tokens=None)
    place, view = address(first), first.features[1:, :7]
    del first
    second = stack_on_host(sequences[3:6], width=150, max_new_tokens=None)
    assert address(second) != place
    del view
    others = [stack_on_host(sequences[6:9], width=150, max_new_tokens=None) for _ in range(5)]
    assert place in [address(batch) for batch in others]


def test_a_device_array_keeps_its_memory(sequences):
    wanted = [slow_features(sequences[i : i + 3], 150) for i in range(0, 24, 3)]
    batches = [stack_sequences(sequences[i : i + 3], width=150, max_new_tokens=None) for i in range(0, 24, 3)]
    sums = [jax.numpy.sum(batch.features.astype(np.float32), axis=(1, 2)) for batch in batches]
    del batches[::2]
    gc.collect()
    again = [stack_sequences(sequences[i : i + 3], width=150, max_new_tokens=None) for i in range(0, 24, 3)]
    for batch, right in zip([*batches, *again], [*wanted[1::2], *wanted], strict=True):
        np.testing.assert_array_equal(np.asarray(batch.features, np.float32), right)
    for total, right in zip(sums, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(total), right.sum((1, 2)))


def test_a_cpu_takes_the_batch_as_it_is(sequences):
    host = stack_on_host(sequences[:3], width=150, max_new_tokens=None)
    device = jax.device_put(host.features)
    assert device.unsafe_buffer_pointer() == address(host)
