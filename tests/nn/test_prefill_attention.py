"""Attention from an empty cache against attention over a cache, and the library's against ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.nn import attention, causal_attention, prefill_attention, write_first_rows, write_rows

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 5


def inputs(length, *, batch=2):
    keys = jax.random.split(jax.random.key(length), 4)
    q = jax.random.normal(keys[0], (batch, length, HEADS, HEAD_DIM))
    k, v = (jax.random.normal(key, (batch, length, KV_HEADS, HEAD_DIM)) for key in keys[1:3])
    return q, k, v, 2 * jax.random.normal(keys[3], (HEADS,))


# one span, spans that end with the text, a last span that is shorter, spans of 256
@pytest.mark.parametrize(
    "length", [pytest.param(length, marks=[pytest.mark.slow] * (length != 300)) for length in (7, 256, 300, 600)]
)
@pytest.mark.parametrize("window", [None, 9])
def test_spans_give_what_a_cache_gives(length, window):
    q, k, v, sinks = inputs(length)
    got = prefill_attention(q, k, v, window=window, sinks=sinks)
    starts = jnp.zeros(2, jnp.int32)
    want = causal_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), starts, window=window, sinks=sinks)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_spans_leave_out_what_the_mask_would():
    def flops(function, *arguments):
        return (jax.jit(function).lower(*arguments).compile().cost_analysis() or {})["flops"]

    length = attention.MOST_SPANS * attention.SPAN_MULTIPLE
    q, k, v, _ = inputs(length, batch=1)
    spans = flops(lambda q, k, v: prefill_attention(q, k, v), q, k, v)
    products = 2 * 2 * HEADS * HEAD_DIM * length * length
    # a quarter of the queries each meet 1/4, 2/4, 3/4 and all of the keys: 0.625; and the softmax of as many scores
    assert 0.625 * products < spans < 0.625 * products * 2
    whole = flops(lambda q, k, v: attention._attend_chunk(q, k, v, jnp.zeros(1, jnp.int32), window=None, sinks=None),
                  q, k.swapaxes(1, 2), v.swapaxes(1, 2))  # fmt: skip
    assert spans < 0.7 * whole


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_the_librarys_attention_with_our_sinks_is_ours(window, with_sinks):
    q, k, v, sinks = inputs(11)
    given = {"window": window, "sinks": sinks if with_sinks else None}
    got = attention._by_library(q, k, v, **given, implementation="xla")
    np.testing.assert_allclose(got, prefill_attention(q, k, v, **given), rtol=0, atol=2e-6)


def test_first_rows_are_rows_from_zero():
    rows = jax.random.normal(jax.random.key(0), (2, 3, KV_HEADS, HEAD_DIM))
    buffer = jnp.full((2, KV_HEADS, 4, HEAD_DIM), 7.0)
    want = write_rows(buffer, rows, jnp.zeros(2, jnp.int32))
    np.testing.assert_array_equal(write_first_rows(buffer, rows), want)
    np.testing.assert_array_equal(want[:, :, 3], 7.0)
