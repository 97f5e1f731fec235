import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_jax.drafter import StoredSequence, block_labels, eligible_anchors
from oracles import blocks

WIDTH = 13


@functools.partial(jax.jit, static_argnames=("block_size",))
def rules(sequence, *, block_size):
    """Eligible anchors, and labels of blocks at every index of the padded sequence."""
    every = jnp.arange(WIDTH, dtype=jnp.int32)
    return eligible_anchors(sequence), block_labels(sequence, every, block_size=block_size)


def stored(token_ids, next_ids, *, prompt_len, limit, pad_with=0):
    """A padded sequence; features are not looked at here."""
    length = len(token_ids)

    def padded(ids):
        return jnp.asarray([*ids, *[pad_with] * (WIDTH - length)], jnp.int32)

    return StoredSequence(
        features=jnp.zeros((WIDTH, 1)),
        token_ids=padded(token_ids),
        next_ids=padded(next_ids),
        length=jnp.int32(length),
        prompt_len=jnp.int32(prompt_len),
        limit=jnp.int32(limit),
        position_offset=jnp.int32(0),
    )


def test_the_docstring_s_example():
    sequence = stored([5, 6, 7, 9, 1], [6, 7, 8, 1, 2], prompt_len=1, limit=9)
    found = block_labels(sequence, jnp.array([0], jnp.int32), block_size=5)
    assert found.labels[0].tolist() == [6, 7, 8, 1]
    assert found.labelled[0].tolist() == [True, True, True, False]
    assert found.lengths.tolist() == [5]


def test_ends_of_the_text_and_of_the_budget():
    # greedy all along: [1 2 3 4 5 6 7], prompt of 2; the limit leaves two tokens more than there are
    sequence = stored([1, 2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7, 8], prompt_len=2, limit=9)
    assert np.flatnonzero(eligible_anchors(sequence)).tolist() == [2, 3, 4, 5]
    found = block_labels(sequence, jnp.array([2, 4, 5], jnp.int32), block_size=4)
    assert found.labelled.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert found.lengths.tolist() == [4, 4, 4]
    short = block_labels(
        stored([1, 2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7, 8], prompt_len=2, limit=7),
        jnp.array([2, 4, 5], jnp.int32),
        block_size=4,
    )
    assert short.lengths.tolist() == [4, 3, 2]


def test_an_anchor_needs_features_of_all_tokens_before_it():
    # the docstring's example; and labels do not need features: those of anchor 3 reach to the end of the text
    sequence = stored([1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 7], prompt_len=2, limit=9)
    partial = replace(sequence, features_len=jnp.int32(3))
    assert np.flatnonzero(eligible_anchors(partial)).tolist() == [2, 3]
    assert np.flatnonzero(eligible_anchors(replace(sequence, features_len=jnp.int32(6)))).tolist() == [2, 3, 4]
    assert np.flatnonzero(eligible_anchors(sequence)).tolist() == [2, 3, 4]
    assert block_labels(partial, jnp.array([3], jnp.int32), block_size=4).labelled.tolist() == [[True, True, False]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_labels_are_those_of_a_plain_loop(data):
    length = data.draw(st.integers(2, WIDTH))
    # two token ids only, so that departures from the greedy path fall everywhere
    ids = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    token_ids, next_ids = data.draw(ids), data.draw(ids)
    prompt_len = data.draw(st.integers(1, length))
    limit = data.draw(st.integers(length - 1, length + 5))  # below the text only where a record is wrong
    block_size = data.draw(st.sampled_from([2, 3, 5]))
    sequence = stored(token_ids, next_ids, prompt_len=prompt_len, limit=limit, pad_with=data.draw(st.integers(0, 1)))
    eligible, found = jax.device_get(rules(sequence, block_size=block_size))
    assert np.flatnonzero(eligible).tolist() == blocks.eligible(prompt_len, length)
    for row in range(length):
        slots, wanted = blocks.labels(
            token_ids, next_ids, length=length, limit=limit, anchor=row, block_size=block_size
        )
        assert found.lengths[row] == slots
        assert found.labelled[row].tolist() == [label is not None for label in wanted]
        assert [int(x) for x, label in zip(found.labels[row], wanted, strict=True) if label is not None] == [
            label for label in wanted if label is not None
        ]
