"""A few float32 rows against all weights as fast as they come out of memory: a kernel for CPUs with AVX-512.

XLA's products of two to twelve rows repack the weights first, which costs a third of their time and more
(docs/design/024-cpu-kernels.md). Here a tile of weights meets all rows while it is in registers. numba compiles the
kernel when this module is imported (a second), XLA calls it as a custom call, and XLA's own threads share the work.

Every sum is made of the same 16 partial sums in the same order, however many rows there are and whichever thread takes
them: a row's result does not depend, in any bit, on the rows beside it.
"""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numba
from jaxtyping import Array, Float
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from dflash_jax.nn import host_call
from dflash_jax.nn.host_call import (
    JOB_FIRST,
    LANES,
    WORD_TYPE,
    added_up,
    call_llvm,
    every_lane,
    lanes_at,
    loop,
    multiply_add,
    number_at,
)

NAME = "dflash_jax_rows_product"
OUTPUTS = 2
"""Weight rows in a tile; a tile of 8 rows then holds 16 of the 32 vector registers."""
MOST_ROWS = 12
"""16 rows no longer stay in the first cache, and XLA's products are as fast."""
CHUNKS = 8
"""Parts that a product's outputs are shared out in."""
WEIGHT, X, OUT, ROWS, OUTPUT_COUNT, INPUTS, JOB_WORDS = range(JOB_FIRST, JOB_FIRST + 7)
"""Words of a job: where weights, rows and results lie; sizes."""


@no_type_check
def tile(num_rows: int) -> Any:
    """`OUTPUTS` weight rows times `num_rows` rows, as a function of addresses: weights, rows, results; inputs; outputs.

    The inputs are walked by `LANES`; a lane is one running sum. The weights of the next tile are fetched meanwhile.
    """
    places = [(output, row) for output in range(OUTPUTS) for row in range(num_rows)]

    def build(context, builder, signature, values):
        weights, rows, results, inputs, outputs = values
        row_bytes = builder.mul(inputs, WORD_TYPE(4))

        def row_at(base, row, at):
            return lanes_at(builder, base, builder.mul(row_bytes, WORD_TYPE(row)), at)

        def fetch(address):
            byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
            where = builder.bitcast(address, byte)
            call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), where, flag(0), flag(3), flag(1))

        def walk(at, sums):
            loaded = [builder.load(row_at(weights, output, at), align=4) for output in range(OUTPUTS)]
            for output in range(OUTPUTS):
                fetch(row_at(weights, OUTPUTS + output, at))
            x = [builder.load(row_at(rows, row, at), align=4) for row in range(num_rows)]
            return [
                multiply_add(builder, loaded[output], x[row], total)
                for (output, row), total in zip(places, sums, strict=True)
            ]

        sums = loop(builder, row_bytes, 4 * LANES, [every_lane(0.0)] * len(places), walk)
        for (output, row), total in zip(places, sums, strict=True):
            place = builder.mul(WORD_TYPE(4), builder.add(builder.mul(outputs, WORD_TYPE(row)), WORD_TYPE(output)))
            builder.store(added_up(builder, total), number_at(builder, results, place), align=4)
        return context.get_dummy_value()

    def typed(context, weights, rows, results, inputs, outputs):
        return types.void(*[types.int64] * 5), build

    return intrinsic(typed)


tile8, tile4, tile2, tile1 = (tile(rows) for rows in (8, 4, 2, 1))


@numba.njit(error_model="numpy")
@no_type_check
def multiply_tile(weights, x, results, rows, inputs, outputs):
    """`OUTPUTS` weight rows times all rows; of addresses, and of the results' row length."""
    row = 0
    while rows - row >= 8:
        tile8(weights, x + 4 * row * inputs, results + 4 * row * outputs, inputs, outputs)
        row += 8
    if rows - row >= 4:
        tile4(weights, x + 4 * row * inputs, results + 4 * row * outputs, inputs, outputs)
        row += 4
    if rows - row >= 2:
        tile2(weights, x + 4 * row * inputs, results + 4 * row * outputs, inputs, outputs)
        row += 2
    if rows - row >= 1:
        tile1(weights, x + 4 * row * inputs, results + 4 * row * outputs, inputs, outputs)


@numba.njit(error_model="numpy")
@no_type_check
def _do_chunk(words, chunk):
    """All rows' results of some outputs; a tile's weights stay in the first cache between its groups of rows."""
    weight, x, out = words[WEIGHT], words[X], words[OUT]
    rows, outputs, inputs = words[ROWS], words[OUTPUT_COUNT], words[INPUTS]
    tiles, chunks = outputs // OUTPUTS, words[host_call.JOB_CHUNKS]
    for output in range(OUTPUTS * (tiles * chunk // chunks), OUTPUTS * (tiles * (chunk + 1) // chunks), OUTPUTS):
        multiply_tile(weight + 4 * output * inputs, x, out + 4 * output, rows, inputs, outputs)


@numba.njit(error_model="numpy")
@no_type_check
def _begin(frame, words):
    x, x_sizes = host_call.argument(frame, 0)
    weight, sizes = host_call.argument(frame, 1)
    words[WEIGHT], words[X], words[OUT] = weight, x, host_call.result(frame)
    words[ROWS], words[OUTPUT_COUNT], words[INPUTS] = x_sizes[0], sizes[0], sizes[1]
    return CHUNKS


host_call.register(NAME, job_words=JOB_WORDS, begin=_begin, do_chunk=_do_chunk)


def takes(rows: int, weight: Any) -> bool:
    """Whether the kernel takes a product of so many float32 rows with these weights: their sizes are whole tiles."""
    outputs, inputs = weight.shape
    return 1 < rows <= MOST_ROWS and weight.dtype == jnp.float32 and outputs % OUTPUTS == 0 and inputs % LANES == 0


@jax.custom_jvp
def kernel_product(
    x: Float[Array, "rows in_features"], weight: Float[Array, "out_features in_features"]
) -> Float[Array, "rows out_features"]:
    """Return `x @ weight.T` of what `takes` says yes to, float32, on a CPU.

    A row's result is the same in every bit for any number of rows. It is differentiable; under `jax.vmap` over rows
    alone it is one product of all of them.
    """
    return _batched(x, weight)


@jax.custom_batching.custom_vmap
def _batched(x: Float[Array, "rows inputs"], weight: Float[Array, "outputs inputs"]) -> Float[Array, "rows outputs"]:
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(NAME, out)(x, weight)


@_batched.def_vmap
def _vmapped(size: int, is_batched: Any, x: Array, weight: Array) -> tuple[Array, bool]:
    terms = ("bri" if is_batched[0] else "ri") + "," + ("boi" if is_batched[1] else "oi") + "->bro"
    return jnp.einsum(terms, x, weight, precision=jax.lax.Precision.HIGHEST), True


@kernel_product.defjvp
def _with_slopes(primals: Any, slopes: Any) -> tuple[Array, Array]:
    (x, weight), (x_slope, weight_slope) = primals, slopes
    terms, precision = "ri,oi->ro", jax.lax.Precision.HIGHEST
    slope = jnp.einsum(terms, x_slope, weight, precision=precision)
    return kernel_product(x, weight), slope + jnp.einsum(terms, x, weight_slope, precision=precision)
