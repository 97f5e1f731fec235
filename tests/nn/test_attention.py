import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.nn import attention, block_attention, causal_attention, write_rows
from oracles import attention as oracle

causal = jax.jit(causal_attention)
blocks = jax.jit(block_attention)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def causal_inputs(*, query, capacity, heads, kv_heads, batch=2, head_dim=5):
    q = normal(0, batch, query, heads, head_dim) * 2
    k, v = (normal(seed, batch, kv_heads, capacity, head_dim) for seed in (1, 2))
    visible = np.random.default_rng(3).random((batch, query, capacity)) < 0.6
    visible[0, 1] = False  # a query that sees nothing
    return q, k, v, visible


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)])
def test_causal_attention_is_the_plain_loop(heads, kv_heads):
    inputs = causal_inputs(query=4, capacity=7, heads=heads, kv_heads=kv_heads)
    got = causal(*map(jnp.asarray, inputs))
    want = oracle.causal_attention(*inputs)
    np.testing.assert_allclose(got, want, atol=1e-6)  # measured 2.6e-7
    assert not np.asarray(got)[0, 1].any()


@pytest.mark.parametrize("query", [257, 512])
def test_chunks_of_queries_are_the_plain_loop(query):
    assert query > attention.QUERIES_PER_CHUNK
    inputs = causal_inputs(query=query, capacity=11, heads=2, kv_heads=1, batch=2, head_dim=2)
    got = causal(*map(jnp.asarray, inputs))
    np.testing.assert_allclose(got, oracle.causal_attention(*inputs), atol=1e-6)  # measured 4.1e-7


def test_rows_that_are_not_visible_may_hold_anything():
    q, k, v, visible = causal_inputs(query=4, capacity=7, heads=6, kv_heads=2)
    visible[:, :, 5:] = False
    got = causal(*map(jnp.asarray, (q, k, v, visible)))
    k[:, :, 5:], v[:, :, 5:] = 3e37, -3e37
    np.testing.assert_array_equal(causal(*map(jnp.asarray, (q, k, v, visible))), got)


def test_softmax_is_float32_and_survives_large_scores():
    # Scores 200 and 199 (head_dim 1): the weights are e/(1+e) and 1/(1+e); values 1 and 0.
    q, k = jnp.full((1, 1, 1, 1), 200.0), jnp.array([[[[1.0], [0.995]]]])
    got = causal(q, k, jnp.array([[[[1.0], [0.0]]]]), jnp.ones((1, 1, 2), bool))
    assert got.item() == pytest.approx(np.e / (1 + np.e), abs=1e-5)
    # A visible key's score is -200 and a hidden one's 200: the visible one has all the weight, whatever its score.
    hidden = causal(q, jnp.array([[[[-1.0], [1.0]]]]), jnp.array([[[[3.0], [0.0]]]]), jnp.array([[[True, False]]]))
    assert hidden.item() == 3.0
    # In bfloat16 the sum of 300 equal weights would stick at 256.
    ones = jnp.ones((1, 1, 300, 2), jnp.bfloat16)
    got = causal(jnp.ones((1, 1, 1, 2), jnp.bfloat16), ones, ones, jnp.ones((1, 1, 300), bool))
    assert got.dtype == jnp.bfloat16
    assert got.tolist() == [[[[1.0, 1.0]]]]


def block_inputs(*, anchors=3, block=4, heads=6, kv_heads=2, context=5, head_dim=4):
    q = normal(4, anchors, block, heads, head_dim) * 2
    context_k, context_v = (normal(seed, kv_heads, context, head_dim) for seed in (5, 6))
    block_k, block_v = (normal(seed, anchors, block, kv_heads, head_dim) for seed in (7, 8))
    return q, (context_k, context_v), (block_k, block_v)


def run_blocks(q, context, context_visible, block, block_visible):
    return np.asarray(blocks(*map(jnp.asarray, (q, *context, context_visible, *block, block_visible))))


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3)])
def test_block_attention_is_the_plain_loop(heads, kv_heads):
    q, context, block = block_inputs(heads=heads, kv_heads=kv_heads)
    context_visible = np.arange(5)[None] < np.array([0, 3, 5])[:, None]
    block_visible = np.arange(4)[None] < np.array([4, 2, 3])[:, None]
    got = run_blocks(q, context, context_visible, block, block_visible)
    want = oracle.block_attention(q, context, context_visible, block, block_visible)
    np.testing.assert_allclose(got, want, atol=1e-6)  # measured 2.3e-7


DRAWN = """
    x x . .   x x   . .
    x x x x   . .   x x
"""


def test_a_block_sees_what_is_drawn():
    seen = [[mark == "x" for mark in line.split()] for line in DRAWN.split("\n") if line.strip()]
    assert [" ".join(line.split()) for line in DRAWN.strip().split("\n")] == [
        " ".join(line.split(")", 1)[1].split())
        for line in (block_attention.__doc__ or "").split("\n")
        if "(anchor " in line
    ], "the drawing of the docstring is the one tested"
    q, context, block = block_inputs(anchors=2, block=2, context=4)
    context_visible = np.arange(4)[None] < np.array([2, 4])[:, None]
    before = run_blocks(q, context, context_visible, block, np.ones((2, 2), bool))
    for column in range(8):
        for part in range(2):  # keys, then values
            changed_context, changed_block = [c.copy() for c in context], [b.copy() for b in block]
            if column < 4:
                changed_context[part][:, column] += 1
            else:
                changed_block[part][(column - 4) // 2, (column - 4) % 2] += 1
            after = run_blocks(q, changed_context, context_visible, changed_block, np.ones((2, 2), bool))
            for number in range(2):
                changed = (after[number] != before[number]).any(axis=(1, 2))  # per slot
                assert changed.tolist() == [seen[number][column]] * 2, (column, part, number)


def test_a_slot_that_does_not_exist_is_seen_by_none():
    q, context, block = block_inputs()
    context_visible = np.ones((3, 5), bool)
    block_visible = np.array([[1, 1, 0, 0]] * 3, bool)
    before = run_blocks(q, context, context_visible, block, block_visible)
    block[0][:, 2:], block[1][:, 2:] = 3e37, -3e37
    np.testing.assert_array_equal(run_blocks(q, context, context_visible, block, block_visible), before)


def test_a_block_that_sees_nothing_gives_zeros_and_finite_gradients():
    q, context, block = block_inputs()
    mask = np.array([False, True, True])
    visible = np.repeat(mask[:, None], 5, axis=1), np.repeat(mask[:, None], 4, axis=1)

    def total(q, context, block):
        (context_k, context_v), (block_k, block_v) = context, block
        seen = jnp.asarray(visible[0]), jnp.asarray(visible[1])
        return jnp.sum(block_attention(q, context_k, context_v, seen[0], block_k, block_v, seen[1]) ** 2)

    assert not run_blocks(q, context, visible[0], block, visible[1])[0].any()
    q_gradient, *others = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, context, block)
    assert not np.asarray(q_gradient[0]).any()
    assert np.asarray(q_gradient[1]).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(others))


def test_rows_are_written_from_each_sequences_own_start():
    buffer = jnp.zeros((2, 1, 4, 1))
    rows = jnp.array([[[[1.0]], [[2.0]]], [[[3.0]], [[4.0]]]])
    got = write_rows(buffer, rows, jnp.array([0, 2], jnp.int32))
    assert got[:, 0, :, 0].tolist() == [[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]]


def test_written_rows_take_the_buffers_dtype_and_keep_heads_apart():
    rows = jnp.array([[[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]])  # one sequence, one token, three kv_heads
    got = write_rows(jnp.zeros((1, 3, 2, 2), jnp.bfloat16), rows, jnp.array([1], jnp.int32))
    assert got.dtype == jnp.bfloat16
    assert got[0, :, 1].tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert not got[0, :, 0].any()
