import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_jax.decode import accept_len
from oracles import blocks


@pytest.mark.parametrize(
    ("drafted", "greedy", "num_drafted", "accepted"),
    [
        ([7, 8, 9, 4], [7, 8, 1, 4], 4, 2),  # a match behind a miss does not count
        ([7, 8, 9, 4], [7, 8, 1, 4], 1, 1),
        ([7, 8, 9, 4], [7, 8, 9, 4], 4, 4),
        ([7, 8, 9, 4], [7, 8, 9, 4], 3, 3),
        ([7, 8, 9, 4], [7, 8, 9, 4], 0, 0),
        ([6, 8, 9, 4], [7, 8, 9, 4], 4, 0),
    ],
)
def test_worked_blocks(drafted, greedy, num_drafted, accepted):
    found = accept_len(jnp.array(drafted, jnp.int32), jnp.array(greedy, jnp.int32), num_drafted=jnp.int32(num_drafted))
    assert (int(found), found.dtype) == (accepted, jnp.int32)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_batches_of_blocks_are_loops(seed):
    draw = np.random.default_rng(seed)
    drafted, greedy = draw.integers(0, 2, (2, 3, 4, 6)).astype(np.int32)
    counts = draw.integers(0, 7, (3, 4)).astype(np.int32)
    found = accept_len(jnp.asarray(drafted), jnp.asarray(greedy), num_drafted=jnp.asarray(counts))
    for index in np.ndindex(3, 4):
        assert found[index] == blocks.accept_len(drafted[index].tolist(), greedy[index].tolist(), int(counts[index]))
