"""Attention of a few queries over the cache rows in use: a kernel for CPUs with AVX-512.

XLA's products read a cache's whole capacity, turn some of it round, and mask what is not in use afterwards
(docs/design/024-cpu-kernels.md). Here every sequence and key-value head is a chunk of its own, which reads its rows in
use once: scores by the tiles of `rows_kernel`, a softmax in float32, and a weighted sum of values kept in registers.
"""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numba
from jaxtyping import Array, Float, Int32
from numba.core import types
from numba.extending import intrinsic

from dflash_jax.nn import host_call
from dflash_jax.nn.host_call import (
    JOB_FIRST,
    LANE_NUMBERS,
    LANE_TYPE,
    LANES,
    NUMBER,
    WORD_TYPE,
    added_up,
    call_llvm,
    every_lane,
    lanes_at,
    loop,
    multiply_add,
    number_at,
    spread,
)
from dflash_jax.nn.rows_kernel import OUTPUTS, multiply_tile

NAME = "dflash_jax_decode_attention"
VECTORS = 4
"""Vectors of a value row that are summed at once."""
MOST_QUERIES = 8
UNSEEN = -1e30
LEAST = -87.0  # its exponential is the smallest that is not 0 here

(Q, K, V, STARTS, SINKS, OUT, KV_HEADS, GROUP, QUERIES, CAPACITY, HEAD_DIM, WINDOW, SPLIT, JOB_WORDS) = range(
    JOB_FIRST, JOB_FIRST + 14
)
"""Words of a job: where arrays lie; sizes; whether a chunk is a query head and not a key-value head."""


@no_type_check
def _exponential(builder, x):
    """The exponentials of numbers up to 0, 0 below `LEAST`: 2^n times a polynomial of degree 7, errors below 2^-23.

    **Source:** the reduction by a power of two is Cody and Waite's, ln 2 in two parts.
    """
    # what is NaN or far below has no integer: the power is of what is left, the polynomial of x itself
    least = call_llvm(builder, f"llvm.maxnum.v{LANES}f32", LANE_TYPE, x, every_lane(LEAST - 1))
    times = builder.fmul(least, every_lane(1.4426950408889634))
    times = call_llvm(builder, f"llvm.rint.v{LANES}f32", LANE_TYPE, times)
    rest = multiply_add(builder, times, every_lane(-0.693359375), x)
    rest = multiply_add(builder, times, every_lane(2.12194440e-4), rest)
    power = every_lane(1 / 5040)
    for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        power = multiply_add(builder, power, rest, every_lane(term))
    exponent = builder.add(builder.fptosi(times, LANE_NUMBERS), every_lane(127, LANE_NUMBERS))
    two_to_n = builder.bitcast(builder.shl(exponent, every_lane(23, LANE_NUMBERS)), LANE_TYPE)
    is_nothing = builder.fcmp_ordered("<", x, every_lane(LEAST))
    return builder.select(is_nothing, every_lane(0.0), builder.fmul(power, two_to_n))


@intrinsic
@no_type_check
def _largest(context, scores, count, least):
    """The largest of a row of scores, a whole number of vectors, and of `least`."""

    def build(context, builder, signature, values):
        scores, count, least = values

        def walk(at, kept):
            score = builder.load(lanes_at(builder, scores, builder.shl(at, WORD_TYPE(2))), align=4)
            return [call_llvm(builder, f"llvm.maxnum.v{LANES}f32", LANE_TYPE, *kept, score)]

        (top,) = loop(builder, count, LANES, [spread(builder, least)], walk)
        return call_llvm(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", NUMBER, top)

    return types.float32(types.int64, types.int64, types.float32), build


@intrinsic
@no_type_check
def _weights(context, scores, count, top, scale):
    """The sum of `exp(scale * (score - top))` of a row of scores, in whose place these weights are left."""

    def build(context, builder, signature, values):
        scores, count, top, scale = values
        tops, scales = spread(builder, top), spread(builder, scale)

        def walk(at, kept):
            place = lanes_at(builder, scores, builder.shl(at, WORD_TYPE(2)))
            below = builder.fsub(builder.load(place, align=4), tops)
            weight = _exponential(builder, builder.fmul(below, scales))
            builder.store(weight, place, align=4)
            return [builder.fadd(*kept, weight)]

        (sums,) = loop(builder, count, LANES, [every_lane(0.0)], walk)
        return added_up(builder, sums)

    return types.float32(types.int64, types.int64, types.float32, types.float32), build


@no_type_check
def _summed_values(num_rows: int):
    """`num_rows` rows of weights times value rows, `VECTORS` vectors of them: of addresses; keys, strides in bytes."""
    places = [(row, vector) for row in range(num_rows) for vector in range(VECTORS)]

    def build(context, builder, signature, values):
        weights, rows, results, keys, weights_stride, row_bytes = values

        def vector_at(base, row, vector):
            return lanes_at(builder, base, builder.mul(row_bytes, row), WORD_TYPE(4 * LANES * vector))

        def walk(key, sums):
            loaded = [builder.load(vector_at(rows, key, vector), align=4) for vector in range(VECTORS)]
            at = builder.shl(key, WORD_TYPE(2))
            starts = [builder.mul(weights_stride, WORD_TYPE(row)) for row in range(num_rows)]
            weight = [
                spread(builder, builder.load(number_at(builder, weights, start, at), align=4)) for start in starts
            ]
            return [
                multiply_add(builder, loaded[vector], weight[row], total)
                for (row, vector), total in zip(places, sums, strict=True)
            ]

        sums = loop(builder, keys, 1, [every_lane(0.0)] * len(places), walk)
        for (row, vector), total in zip(places, sums, strict=True):
            builder.store(total, vector_at(results, WORD_TYPE(row), vector), align=4)
        return context.get_dummy_value()

    def typed(context, weights, rows, results, keys, weights_stride, row_bytes):
        return types.void(*[types.int64] * 6), build

    return intrinsic(typed)


_sum4, _sum1 = _summed_values(4), _summed_values(1)


@numba.njit(error_model="numpy")
@no_type_check
def _start_of(words, sequence):
    """The cache row of a sequence's first query; one that is out of the cache must not reach other memory."""
    start = host_call.integers_of(words[STARTS], sequence + 1)[sequence]
    return max(0, min(start, words[CAPACITY] - words[QUERIES]))


@numba.njit(error_model="numpy")
@no_type_check
def _weigh(words, scores, stride, rows, first_head, sequence, lowest):
    """Scores of all rows to weights, 0 where a row does not see; every row's sum, behind its scores."""
    start = _start_of(words, sequence)
    sinks = host_call.floats_of(words[SINKS], (words[KV_HEADS] * words[GROUP],))
    scale = numba.float32(1 / numba.float64(words[HEAD_DIM]) ** 0.5)
    count = stride - LANES
    for row in range(rows):
        query, head = row % words[QUERIES], first_head + row // words[QUERIES]
        last = start + query
        begin = max(0, last - words[WINDOW] + 1) if words[WINDOW] > 0 else 0
        at = scores + 4 * row * stride
        own = host_call.floats_of(at, (stride,))
        for key in range(begin - lowest):
            own[key] = UNSEEN
        for key in range(last + 1 - lowest, count):
            own[key] = UNSEEN
        sink = sinks[head]
        top = _largest(at, count, max(numba.float32(UNSEEN), sink / scale))
        total = _weights(at, count, top, scale)
        own[count] = total + _exp_of((sink / scale - top) * scale, scores + 4 * rows * stride)


@numba.njit(error_model="numpy")
@no_type_check
def _exp_of(x, room):
    """The exponential of one number, by the same form: 0 for minus infinity. `room` holds a vector."""
    if x < LEAST:
        return numba.float32(0.0)
    vector = host_call.floats_of(room, (LANES,))
    for lane in range(LANES):
        vector[lane] = UNSEEN
    vector[0] = x
    return _weights(room, LANES, numba.float32(0.0), numba.float32(1.0))


@numba.njit(error_model="numpy")
@no_type_check
def _do_chunk(words, chunk):
    """All queries of a sequence's head, or of all query heads of a key-value head."""
    group, queries, head_dim, capacity = words[GROUP], words[QUERIES], words[HEAD_DIM], words[CAPACITY]
    first_head = chunk if words[SPLIT] else chunk * group  # over all sequences
    rows = queries if words[SPLIT] else group * queries
    heads = words[KV_HEADS] * group
    sequence, cached = first_head // heads, first_head // group
    start = _start_of(words, sequence)
    lowest = max(0, start - words[WINDOW] + 1) // OUTPUTS * OUTPUTS if words[WINDOW] > 0 else 0
    keys = start + queries - lowest
    stride = -(-keys // LANES) * LANES + LANES  # and a vector whose first number is the sum
    row_bytes = 4 * head_dim
    scores = host_call.malloc(4 * (rows * stride + LANES))
    q = words[Q] + row_bytes * first_head * queries
    k = words[K] + row_bytes * (cached * capacity + lowest)
    v = words[V] + row_bytes * (cached * capacity + lowest)
    out = words[OUT] + row_bytes * first_head * queries
    for key in range(0, keys, OUTPUTS):
        multiply_tile(k + row_bytes * key, q, scores + 4 * key, rows, head_dim, stride)
    _weigh(words, scores, stride, rows, first_head % heads, sequence, lowest)
    for channel in range(0, row_bytes, 4 * LANES * VECTORS):
        row = 0
        while rows - row >= 4:
            _sum4(scores + 4 * row * stride, v + channel, out + row_bytes * row + channel, keys, 4 * stride, row_bytes)
            row += 4
        while rows - row >= 1:
            _sum1(scores + 4 * row * stride, v + channel, out + row_bytes * row + channel, keys, 4 * stride, row_bytes)
            row += 1
    sums = host_call.floats_of(scores, (rows, stride))
    summed = host_call.floats_of(out, (rows, head_dim))
    for row in range(rows):
        for channel in range(head_dim):
            summed[row, channel] /= sums[row, stride - LANES]
    host_call.free(scores)


@numba.njit(error_model="numpy")
@no_type_check
def _begin(frame, words):
    q, q_sizes = host_call.argument(frame, 0)
    k, k_sizes = host_call.argument(frame, 1)
    words[Q], words[K], words[V] = q, k, host_call.argument(frame, 2)[0]
    words[STARTS], words[SINKS], words[OUT] = (
        host_call.argument(frame, 3)[0],
        host_call.argument(frame, 4)[0],
        host_call.result(frame),
    )
    words[WINDOW] = host_call.integers_of(host_call.argument(frame, 5)[0], 1)[0]
    batch, words[KV_HEADS], words[GROUP], words[QUERIES] = q_sizes[0], q_sizes[1], q_sizes[2], q_sizes[3]
    words[CAPACITY], words[HEAD_DIM] = k_sizes[2], k_sizes[3]
    # few key-value heads do not share out evenly
    words[SPLIT] = 1 if batch * words[KV_HEADS] < 4 * (host_call.HELPERS + 1) else 0
    return batch * words[KV_HEADS] * (words[GROUP] if words[SPLIT] else 1)


host_call.register(NAME, job_words=JOB_WORDS, begin=_begin, do_chunk=_do_chunk)


def takes(queries: int, k: Any) -> bool:
    """Whether the kernel takes so many queries over these keys: float32, whole tiles."""
    capacity, head_dim = k.shape[-2:]
    whole = capacity % OUTPUTS == 0 and head_dim % (LANES * VECTORS) == 0
    return queries <= MOST_QUERIES and k.dtype == jnp.float32 and whole


def kernel_attention(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch kv_heads capacity head_dim"],
    v: Float[Array, "batch kv_heads capacity head_dim"],
    starts: Int32[Array, " batch"],
    *,
    window: int | None,
    sinks: Float[Array, " heads"] | None,
) -> Float[Array, "batch query heads head_dim"]:
    """`causal_attention` of what `takes` says yes to, on a CPU. It has no derivative.

    Of the rows past a sequence's last query one may be read, and means nothing.
    """
    batch, query, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    rows = q.astype(jnp.float32).reshape(batch, query, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    pulled = jnp.full(heads, -jnp.inf, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    reach = jnp.array([window or 0], jnp.int32)
    out = jax.ffi.ffi_call(NAME, jax.ShapeDtypeStruct(rows.shape, jnp.float32))(rows, k, v, starts, pulled, reach)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
