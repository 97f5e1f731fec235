import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.nn import attention, causal_attention, write_rows
from dflash_jax.nn.product import on_one_cpu
from oracles import attention as oracle

causal = jax.jit(causal_attention, static_argnames="window")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def causal_inputs(*, query, capacity, heads, kv_heads, batch=2, head_dim=5):
    q = normal(0, batch, query, heads, head_dim) * 2
    k, v = (normal(seed, batch, kv_heads, capacity, head_dim) for seed in (1, 2))
    starts = np.linspace(0, capacity - query, batch).astype(np.int32)  # the first and the last that fit
    return q, k, v, starts


def sinks_of(heads):
    return np.linspace(-3, 4, heads).astype(np.float32)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "with_sinks"),
    [(6, 2, None, False), (3, 3, None, True), (4, 1, 1, True), (6, 2, 3, False), (6, 2, 3, True), (4, 1, 100, True)],
)
def test_causal_attention_is_the_plain_loop(heads, kv_heads, window, with_sinks):
    # capacity 13: a window of 3 and 4 queries reach 6 rows, so the rest of the cache is cut off
    inputs = causal_inputs(query=4, capacity=13, heads=heads, kv_heads=kv_heads, batch=3)
    sinks = sinks_of(heads) if with_sinks else None
    got = causal(*map(jnp.asarray, inputs), window=window, sinks=None if sinks is None else jnp.asarray(sinks))
    want = oracle.causal_attention(*inputs, window, sinks)
    np.testing.assert_allclose(got, want, atol=2e-6)  # measured 6.0e-7


@pytest.mark.parametrize(
    ("query", "capacity", "window"),
    [
        pytest.param(257, 257, None, marks=pytest.mark.slow),
        (512, 520, 3),
        pytest.param(300, 700, 40, marks=pytest.mark.slow),
        pytest.param(300, 310, 290, marks=pytest.mark.slow),
    ],
)
def test_chunks_of_queries_are_the_plain_loop(query, capacity, window):
    assert query > attention.QUERIES_PER_CHUNK
    inputs = causal_inputs(query=query, capacity=capacity, heads=2, kv_heads=1, batch=2, head_dim=2)
    got = causal(*map(jnp.asarray, inputs), window=window, sinks=jnp.asarray(sinks_of(2)))
    want = oracle.causal_attention(*inputs, window, sinks_of(2))
    np.testing.assert_allclose(got, want, atol=2e-6)  # measured 4.8e-7


DRAWN_CAUSAL = """
    x x x . . .     . x x . . .
    x x x x . .     . . x x . .
    x x x x x .     . . . x x .
"""


def test_a_query_sees_what_is_drawn():
    lines = [line.split(")", 1)[-1].split() for line in DRAWN_CAUSAL.strip().split("\n")]
    assert [" ".join(line) for line in lines] == [
        " ".join(line.split()[2:])
        for line in (causal_attention.__doc__ or "").split("\n")
        if line.strip().startswith("query ")
    ], "the drawing of the docstring is the one tested"
    q, k, v, _ = causal_inputs(query=3, capacity=6, heads=2, kv_heads=1, batch=1)
    starts = jnp.array([2], jnp.int32)
    for half, window in enumerate((None, 2)):
        before = np.asarray(causal(*map(jnp.asarray, (q, k, v)), starts, window=window))
        for column in range(6):
            for part in range(2):  # keys, then values
                changed = [k.copy(), v.copy()]
                changed[part][:, :, column] += 1
                after = np.asarray(causal(jnp.asarray(q), *map(jnp.asarray, changed), starts, window=window))
                moved = (after != before).any(axis=(0, 2, 3)).tolist()
                assert moved == [line[6 * half + column] == "x" for line in lines]


def test_a_window_does_not_make_the_scores_of_a_long_cache():
    shapes = jax.eval_shape(lambda: causal_inputs_of_zeros(query=8, capacity=4096))
    whole, cut = (
        (causal.lower(*shapes, window=window).compile().cost_analysis() or {})["flops"] for window in (None, 32)
    )
    assert cut < whole * (8 + 32) / 4096 * 1.5  # measured 1.06 times the share of the rows


def causal_inputs_of_zeros(*, query, capacity):
    cache = jnp.zeros((2, 2, capacity, 16))
    return jnp.zeros((2, query, 4, 16)), cache, cache, jnp.zeros(2, jnp.int32)


def test_rows_that_are_not_visible_may_hold_anything():
    q, k, v, starts = causal_inputs(query=4, capacity=7, heads=6, kv_heads=2)
    starts[:] = [0, 1]
    got = causal(*map(jnp.asarray, (q, k, v, starts)))
    k[:, :, 5:], v[:, :, 5:] = 3e37, -3e37
    np.testing.assert_array_equal(causal(*map(jnp.asarray, (q, k, v, starts))), got)


def test_a_sink_takes_weight_and_gives_nothing():
    # one key of score 0 and a sink of log 3: the key has a quarter of the weight
    q, k, v = jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)), jnp.full((1, 1, 1, 1), 8.0)
    start = jnp.zeros(1, jnp.int32)
    assert causal(q, k, v, start, sinks=jnp.log(jnp.array([3.0]))).item() == pytest.approx(2.0)
    assert causal(q, k, v, start, sinks=jnp.array([500.0])).item() == pytest.approx(0.0)
    assert causal(q, k, v, start, sinks=jnp.array([-500.0])).item() == 8.0


def test_softmax_is_float32_and_survives_large_scores():
    # Scores 200 and 199 (head_dim 1): the weights are e/(1+e) and 1/(1+e); values 1 and 0.
    q, k = jnp.full((1, 1, 1, 1), 200.0), jnp.array([[[[1.0], [0.995]]]])
    got = causal(q, k, jnp.array([[[[1.0], [0.0]]]]), jnp.array([1], jnp.int32))
    assert got.item() == pytest.approx(np.e / (1 + np.e), abs=1e-5)
    # A visible key's score is -200 and a hidden one's 200: the visible one has all the weight, whatever its score.
    hidden = causal(q, jnp.array([[[[-1.0], [1.0]]]]), jnp.array([[[[3.0], [0.0]]]]), jnp.array([0], jnp.int32))
    assert hidden.item() == 3.0
    # In bfloat16 the sum of 300 equal weights would stick at 256.
    ones = jnp.ones((1, 1, 300, 2), jnp.bfloat16)
    got = causal(jnp.ones((1, 1, 1, 2), jnp.bfloat16), ones, ones, jnp.array([299], jnp.int32))
    assert got.dtype == jnp.bfloat16
    assert got.tolist() == [[[[1.0, 1.0]]]]


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


@pytest.mark.skipif(not on_one_cpu(), reason="it is XLA for one CPU that copies")
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_loop_copies_no_cache(batch: int):
    """A cache that a loop writes to and attends over is written in place."""
    kv_heads, capacity, head_dim = 3, 128, 16

    def loop(k: jax.Array, v: jax.Array, q: jax.Array) -> tuple[jax.Array, ...]:
        def step(carry: tuple[jax.Array, ...], _: None) -> tuple[tuple[jax.Array, ...], None]:
            k, v, q, starts = carry
            row = q[:, :, :kv_heads]
            k, v = (write_rows(part, row, starts) for part in (k, v))
            return (k, v, causal_attention(q, k, v, starts), starts + 1), None

        carry, _ = jax.lax.scan(step, (k, v, q, jnp.zeros(batch, jnp.int32)), length=8)
        return carry

    cache = jnp.zeros((batch, kv_heads, capacity, head_dim))
    compiled = jax.jit(loop, donate_argnums=(0, 1)).lower(cache, cache, jnp.ones((batch, 1, 9, head_dim))).compile()
    copies = [
        line for line in str(compiled.as_text()).splitlines() if f"[{batch},3,128,16]" in line and " copy(" in line
    ]
    assert not copies, copies
