"""The attention kernel against a plain loop in float64, and what it promises of bits, rows, threads and memory."""

import importlib
import resource
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dflash_jax.nn import causal_attention, write_rows
from oracles import attention as oracle

product = importlib.import_module("dflash_jax.nn.product")
kernel = product.host_kernel("attention_kernel", np.zeros(2**17))
pytestmark = pytest.mark.skipif(kernel is None, reason="the kernel is for one CPU with AVX-512, with numba")
causal = jax.jit(causal_attention, static_argnames="window")


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(product, "KERNEL_BYTES", 0)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def inputs(batch: int, query: int, heads: int, kv_heads: int, capacity: int, head_dim: int, *, scale: float = 2.0):
    q = random(batch, query, heads, head_dim, scale=scale)
    k, v = (random(batch, kv_heads, capacity, head_dim, seed=seed) for seed in (1, 2))
    return q, k, v, np.linspace(0, capacity - query, batch).astype(np.int32)  # the first and the last that fit


def loop(q, k, v, starts, window=None, sinks=None) -> np.ndarray:
    return oracle.causal_attention(np.asarray(q), np.asarray(k), np.asarray(v), starts.tolist(), window, sinks)


def made(q, k, v, starts, *, window=None, sinks=None) -> np.ndarray:
    given = (jnp.asarray(part) for part in (q, k, v, starts))
    return np.asarray(causal(*given, window=window, sinks=None if sinks is None else jnp.asarray(sinks)))


# batch, queries, query heads, key-value heads, capacity, head size: chunks of query heads and of key-value heads,
# capacities that are whole vectors and not, one key and many
SIZES = [
    (1, 1, 9, 3, 64, 64),
    (1, 4, 9, 3, 450, 64),
    (3, 8, 8, 8, 130, 128),
    (8, 4, 9, 3, 66, 64),
    (16, 1, 4, 2, 30, 64),
    (2, 7, 6, 1, 34, 192),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("window", "with_sinks"), [(None, False), (None, True), (1, True), (5, False), (23, True)])
def test_it_is_the_plain_loop(sizes, window, with_sinks):
    q, k, v, starts = inputs(*sizes)
    assert kernel.NAME in str(
        jax.make_jaxpr(lambda *given: causal_attention(*given))(*map(jnp.asarray, (q, k, v, starts)))
    )
    sinks = np.linspace(-3, 4, sizes[2]).astype(np.float32) if with_sinks else None
    want = loop(q, k, v, starts, window, sinks)
    np.testing.assert_allclose(made(q, k, v, starts, window=window, sinks=sinks), want, atol=4e-6)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_flat_and_sharp_softmaxes(scale):
    """From equal weights for all to a single key's, far below what exp can hold."""
    q, k, v, starts = inputs(2, 4, 6, 2, 200, 64, scale=scale)
    want = loop(q, k, v, starts)
    # scores of up to `50 * scale` are rounded to 24 bits before the softmax
    np.testing.assert_allclose(made(q, k, v, starts), want, atol=max(4e-6, 1e-5 * scale), rtol=1e-5)


def test_exponentials_are_numpys():
    numba = importlib.import_module("numba")
    weigh = kernel._weights

    @numba.njit
    def run(address, count, top, scale):
        return weigh(address, count, top, scale)

    x = -np.abs(np.concatenate([np.linspace(0, 1, 8000), np.linspace(0, 86.9, 8000)])).astype(np.float32)
    made = x + np.float32(3)
    total = run(made.ctypes.data, len(made), np.float32(3), np.float32(1))
    exact = np.exp((x + np.float32(3) - np.float32(3)).astype(np.float64))
    assert np.abs(made / exact - 1).max() < 2**-23
    assert abs(total / exact.sum() - 1) < 1e-5
    far = np.full(16, -1e30, np.float32)
    assert run(far.ctypes.data, 16, np.float32(0), np.float32(1)) == 0


def test_bfloat16_queries_meet_a_float32_cache():
    q, k, v, starts = map(jnp.asarray, inputs(2, 2, 6, 2, 64, 64))
    found = causal(q.astype(jnp.bfloat16), k, v, starts)
    assert found.dtype == jnp.bfloat16
    want = loop(q.astype(jnp.bfloat16).astype(jnp.float32), k, v, starts)
    np.testing.assert_allclose(found.astype(jnp.float32), want, atol=2e-2)


def test_a_query_does_not_hang_on_the_others():
    """Plain decoding's query and a verified block's are the same in every bit, in any batch."""
    q, k, v, starts = inputs(6, 8, 9, 3, 96, 64)
    whole = made(q, k, v, starts)
    for sequence in range(6):
        one = slice(sequence, sequence + 1)
        np.testing.assert_array_equal(made(q[one], k[one], v[one], starts[one]), whole[one])
        for query in range(8):
            alone = made(q[one, query : query + 1], k[one], v[one], starts[one] + query)
            np.testing.assert_array_equal(alone, whole[one, query : query + 1])


@pytest.mark.parametrize("window", [None, 6])
def test_rows_that_are_not_seen_may_hold_anything_finite(window):
    q, k, v, starts = inputs(3, 3, 6, 2, 64, 64)
    want = made(q, k, v, starts, window=window)
    for row, start in enumerate(starts):
        k[row, :, start + 3 :], v[row, :, start + 3 :] = 1e30, -1e30
        if window is not None:
            k[row, :, : max(0, start - window + 1)] = 1e30
            v[row, :, : max(0, start - window + 1)] = 1e30
    np.testing.assert_array_equal(made(q, k, v, starts, window=window), want)


def test_nan_stays_in_its_query():
    q, k, v, starts = inputs(2, 3, 6, 2, 64, 64)
    q[1, 1, 4, 7] = np.nan
    found = made(q, k, v, starts).copy()
    assert np.isnan(found[1, 1, 4]).all()
    found[1, 1, 4] = 0
    assert np.isfinite(found).all()


def test_many_threads():
    q, k, v, starts = inputs(8, 4, 9, 3, 128, 64)
    want = made(q, k, v, starts)
    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(lambda _: (made(q, k, v, starts) == want).all(), range(200)))


def test_what_it_takes_it_gives_back():
    """A call's scores and job: 20,000 calls would keep 60 MB."""
    q, k, v, starts = map(jnp.asarray, inputs(1, 1, 2, 1, 256, 64))

    @jax.jit
    def many(q):
        return lax.fori_loop(0, 10_000, lambda _, q: q + 0 * causal_attention(q, k, v, starts + 200), q)

    many(q).block_until_ready()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many(q).block_until_ready()
    many(q).block_until_ready()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4_000  # KiB


@pytest.mark.parametrize(
    ("queries", "capacity", "head_dim", "dtype", "taken"),
    [
        (8, 64, 64, jnp.float32, True),
        (9, 64, 64, jnp.float32, False),
        (1, 63, 64, jnp.float32, False),
        (1, 64, 96, jnp.float32, False),
        (1, 64, 64, jnp.bfloat16, False),
    ],
)
def test_what_the_kernel_takes(monkeypatch, queries, capacity, head_dim, dtype, taken):
    q, cache = jnp.ones((1, queries, 2, head_dim), dtype), jnp.ones((1, 1, capacity, head_dim), dtype)
    assert kernel.takes(queries, cache) == taken
    traced = jax.make_jaxpr(lambda *given: causal_attention(*given))(q, cache, cache, jnp.zeros(1, jnp.int32))
    assert (kernel.NAME in str(traced)) == taken
    monkeypatch.setattr(product, "KERNEL_BYTES", cache.nbytes + 1)
    assert product.host_kernel("attention_kernel", cache) is None


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decoding_loop_copies_no_cache(batch: int):
    """A cache that a loop writes to and the kernel reads is written in place."""

    def loop(k: jax.Array, v: jax.Array, q: jax.Array) -> tuple[jax.Array, ...]:
        def step(carry: tuple[jax.Array, ...], _: None) -> tuple[tuple[jax.Array, ...], None]:
            k, v, q, starts = carry
            k, v = (write_rows(part, q[:, :, :3], starts) for part in (k, v))
            return (k, v, causal_attention(q, k, v, starts), starts + 1), None

        carry, _ = lax.scan(step, (k, v, q, jnp.zeros(batch, jnp.int32)), length=8)
        return carry

    cache = jnp.zeros((batch, 3, 128, 64))
    compiled = jax.jit(loop, donate_argnums=(0, 1)).lower(cache, cache, jnp.ones((batch, 1, 9, 64))).compile()
    lines = str(compiled.as_text()).splitlines()
    assert any(kernel.NAME in line for line in lines)
    assert not [line for line in lines if f"[{batch},3,128,64]" in line and " copy(" in line]


@pytest.mark.parametrize("start", [-40, 64, 10**6])
def test_a_start_out_of_the_cache_stays_in_it(start):
    q, cached = np.ones((1, 2, 4, 64), np.float32), np.ones((1, 2, 64, 64), np.float32)
    found = jax.jit(causal_attention)(q, cached, cached, jnp.array([start], jnp.int32))
    np.testing.assert_allclose(found, q, rtol=1e-6)


def test_weights_that_sum_to_nothing_harm_their_own_head_alone():
    """Scores below all that is masked: 0 / 0, which must neither hang nor spoil other heads."""
    q = np.ones((1, 1, 64, 64), np.float32)
    q[0, 0, 40] = 1e16
    k, v = np.full((1, 64, 64, 64), -1.0, np.float32), np.ones((1, 64, 64, 64), np.float32)
    k[0, 40] = -1e16
    for _ in range(20):
        found = np.asarray(jax.jit(causal_attention)(q, k, v, jnp.array([15], jnp.int32)))[0, 0]
        np.testing.assert_allclose(np.delete(found, 40, axis=0), 1.0, rtol=1e-6)
