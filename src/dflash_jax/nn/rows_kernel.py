"""A few float32 rows against all weights as fast as they come out of memory: a kernel for CPUs with AVX-512.

XLA's products of two to twelve rows repack the weights first, which costs a third of their time and more
(docs/design/024-rows-kernel.md). Here a tile of weights meets all rows while it is in registers. numba compiles the
kernel when this module is imported (a second), XLA calls it as a custom call, and XLA's own threads share the work.

Every sum is made of the same 16 partial sums in the same order, however many rows there are and whichever thread takes
them: a row's result does not depend, in any bit, on the rows beside it.

What a call hands over is read as 8-byte words, by the layout in jaxlib's `include/xla/ffi/api/c_api.h` (version 0.3 of
XLA's FFI). numba is an extra of the package (`cpu`): `product.rows_product` imports this module where it is installed.
"""

import ctypes
import os
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numba
from jaxtyping import Array, Float
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

NAME = "dflash_jax_rows_product"
LANES = 16
"""Partial sums of one result: a vector register of AVX-512."""
OUTPUTS = 2
"""Weight rows in a tile; a tile of 8 rows then holds 16 of the 32 vector registers."""
MOST_ROWS = 12
"""16 rows no longer stay in the first cache, and XLA's products are as fast."""
CHUNKS = 8
"""Parts that a product's outputs are shared out in."""
ALONE_BYTES = 2**17
"""Weights of so few bytes are done before another thread has woken."""
HELPERS = min(len(os.sched_getaffinity(0)), CHUNKS) - 1 if hasattr(os, "sched_getaffinity") else 0
"""Threads that are asked for help: memory is the limit, and a few cores reach it."""
SPINS_BEFORE_YIELD = 256

FFI_MINOR_VERSION = 3
# words of XLA's structs
FRAME_EXTENSION, FRAME_API, FRAME_CONTEXT, FRAME_ARGUMENTS, FRAME_RESULTS = 1, 2, 3, 9, 14
BUFFER_DATA, BUFFER_DIMENSIONS = 3, 5
EXTENSION_METADATA, METADATA_VERSION, METADATA_TRAITS, METADATA_STATE = 3, 3, 4, 5
API_ERROR_DESTROY, API_SCHEDULE = 6 + 2, 6 + 11
# words of a job: what several threads share of one product
JOB_HOLDERS, JOB_NEXT, JOB_DONE, JOB_WEIGHT, JOB_X, JOB_OUT, JOB_ROWS, JOB_OUTPUTS, JOB_INPUTS, JOB_WORDS = range(10)
WORD = 8

_words = types.CPointer(types.int64)
_address = types.int64
_libc = ctypes.CDLL(None)
_malloc, _free, _yield = _libc.malloc, _libc.free, _libc.sched_yield
_malloc.argtypes, _malloc.restype = [ctypes.c_int64], ctypes.c_int64
_free.argtypes, _free.restype = [ctypes.c_int64], None
_yield.argtypes, _yield.restype = [], ctypes.c_int


@intrinsic
@no_type_check
def _words_at(context, address):
    """The words at an address."""

    def build(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return _words(_address), build


@intrinsic
@no_type_check
def _fetch_add(context, address, number):
    """Add to the word at an address, atomically; what was there before."""

    def build(context, builder, signature, values):
        word = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", word, values[1], "acq_rel")

    return types.int64(_address, types.int64), build


@intrinsic
@no_type_check
def _load(context, address):
    """The word at an address, and all that was written before it."""

    def build(context, builder, signature, values):
        return builder.load_atomic(builder.inttoptr(values[0], ir.IntType(64).as_pointer()), "acquire", WORD)

    return types.int64(_address), build


@intrinsic
@no_type_check
def _call(context, function, argument):
    """Call the C function at an address with one word; the word that it returns."""

    def build(context, builder, signature, values):
        form = ir.FunctionType(ir.IntType(64), [ir.IntType(64)])
        return builder.call(builder.inttoptr(values[0], form.as_pointer()), [values[1]])

    return types.int64(_address, types.int64), build


@intrinsic
@no_type_check
def _pause(context):
    """Let the other thread of a core go on for a moment."""

    def build(context, builder, signature, values):
        form = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, form, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), build


@no_type_check
def _tile(num_rows: int) -> Any:
    """`OUTPUTS` weight rows times `num_rows` rows, as a function of addresses: weights, rows, results; inputs; outputs.

    The inputs are walked by `LANES`; a lane is one running sum. The weights of the next tile are fetched meanwhile.
    """
    number, lanes = ir.FloatType(), ir.VectorType(ir.FloatType(), LANES)
    word, byte, half = ir.IntType(64), ir.IntType(8).as_pointer(), ir.IntType(32)

    def build(context, builder, signature, values):
        def function(name, result, *arguments):
            return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)

        def lanes_at(base, row):
            return builder.add(builder.add(base, builder.mul(row_bytes, word(row))), at)

        multiply_add = function(f"llvm.fma.v{LANES}f32", lanes, lanes, lanes, lanes)
        add_up = function(f"llvm.vector.reduce.fadd.v{LANES}f32", number, number, lanes)
        fetch = function("llvm.prefetch.p0", ir.VoidType(), byte, half, half, half)
        weights, rows, results, inputs, outputs = values
        row_bytes = builder.mul(inputs, word(4))
        tile = [(output, row) for output in range(OUTPUTS) for row in range(num_rows)]
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(word)
        at.add_incoming(word(0), before)
        sums = {place: builder.phi(lanes) for place in tile}
        loaded = [
            builder.load(builder.inttoptr(lanes_at(weights, output), lanes.as_pointer()), align=4)
            for output in range(OUTPUTS)
        ]
        for output in range(OUTPUTS):
            ahead = builder.inttoptr(lanes_at(weights, OUTPUTS + output), byte)
            builder.call(fetch, [ahead, half(0), half(3), half(1)])
        added = {}
        for row in range(num_rows):
            x = builder.load(builder.inttoptr(lanes_at(rows, row), lanes.as_pointer()), align=4)
            for output in range(OUTPUTS):
                added[output, row] = builder.call(multiply_add, [loaded[output], x, sums[output, row]])
        following = builder.add(at, word(4 * LANES))
        at.add_incoming(following, loop)
        for place in tile:
            sums[place].add_incoming(ir.Constant(lanes, None), before)
            sums[place].add_incoming(added[place], loop)
        builder.cbranch(builder.icmp_signed("<", following, row_bytes), loop, after)
        builder.position_at_end(after)
        for output, row in tile:
            total = builder.call(add_up, [ir.Constant(number, -0.0), added[output, row]], fastmath=("reassoc",))
            place = builder.add(
                results, builder.mul(word(4), builder.add(builder.mul(outputs, word(row)), word(output)))
            )
            builder.store(total, builder.inttoptr(place, number.as_pointer()), align=4)
        return context.get_dummy_value()

    def typed(context, weights, rows, results, inputs, outputs):
        return types.void(*[types.int64] * 5), build

    return intrinsic(typed)


_tile8, _tile4, _tile2, _tile1 = (_tile(rows) for rows in (8, 4, 2, 1))


@numba.njit
@no_type_check
def _outputs(job, first, last):
    """All rows' results of some outputs; a tile's weights stay in the first cache between its groups of rows."""
    words = numba.carray(_words_at(job), (JOB_WORDS,))
    weight, x, out = words[JOB_WEIGHT], words[JOB_X], words[JOB_OUT]
    rows, outputs, inputs = words[JOB_ROWS], words[JOB_OUTPUTS], words[JOB_INPUTS]
    for output in range(first, last, OUTPUTS):
        weights, row = weight + 4 * output * inputs, 0
        while rows - row >= 8:
            _tile8(weights, x + 4 * row * inputs, out + 4 * (row * outputs + output), inputs, outputs)
            row += 8
        if rows - row >= 4:
            _tile4(weights, x + 4 * row * inputs, out + 4 * (row * outputs + output), inputs, outputs)
            row += 4
        if rows - row >= 2:
            _tile2(weights, x + 4 * row * inputs, out + 4 * (row * outputs + output), inputs, outputs)
            row += 2
        if rows - row >= 1:
            _tile1(weights, x + 4 * row * inputs, out + 4 * (row * outputs + output), inputs, outputs)


@numba.njit
@no_type_check
def _take_chunks(job):
    """Take chunks until none is left that nobody has taken."""
    words = numba.carray(_words_at(job), (JOB_WORDS,))
    tiles = words[JOB_OUTPUTS] // OUTPUTS
    while True:
        chunk = _fetch_add(job + WORD * JOB_NEXT, 1)
        if chunk >= CHUNKS:
            return
        _outputs(job, OUTPUTS * (tiles * chunk // CHUNKS), OUTPUTS * (tiles * (chunk + 1) // CHUNKS))
        _fetch_add(job + WORD * JOB_DONE, 1)


@numba.njit
@no_type_check
def _let_go(job):
    """Whoever holds a job last frees it: a thread may come to it when all its chunks are long done."""
    if _fetch_add(job + WORD * JOB_HOLDERS, -1) == 1:
        _free(job)


@numba.cfunc(types.int64(_address))
@no_type_check
def _help(job):
    """What another thread does for a job."""
    _take_chunks(job)
    _let_go(job)
    return 0


_HELP = _help.address


@numba.njit
@no_type_check
def _ask_for_help(frame, job):
    """Have XLA's threads come to a job when they are free."""
    api = numba.carray(_words_at(frame[FRAME_API]), (API_SCHEDULE + 1,))
    for _ in range(HELPERS):
        asked = numba.carray(_words_at(job + WORD * JOB_WORDS), (5,))
        asked[0], asked[1], asked[2], asked[3], asked[4] = 5 * WORD, 0, frame[FRAME_CONTEXT], _HELP, job
        error = _call(api[API_SCHEDULE], job + WORD * JOB_WORDS)
        if error != 0:  # nobody will come
            asked[0], asked[1], asked[2] = 3 * WORD, 0, error
            _call(api[API_ERROR_DESTROY], job + WORD * JOB_WORDS)
            _let_go(job)


@numba.cfunc(types.int64(_words))
@no_type_check
def _handler(frame):
    """What XLA calls: first to be told the version that this was written for, then for every product."""
    frame = numba.carray(frame, (FRAME_RESULTS + 1,))
    if frame[FRAME_EXTENSION] != 0:
        metadata = numba.carray(_words_at(frame[FRAME_EXTENSION]), (4,))[EXTENSION_METADATA]
        told = numba.carray(_words_at(metadata), (6,))
        told[METADATA_VERSION], told[METADATA_TRAITS], told[METADATA_STATE] = FFI_MINOR_VERSION << 32, 0, 0
        return 0
    arguments = numba.carray(_words_at(frame[FRAME_ARGUMENTS]), (2,))
    x = numba.carray(_words_at(arguments[0]), (6,))
    weight = numba.carray(_words_at(arguments[1]), (6,))
    out = numba.carray(_words_at(numba.carray(_words_at(frame[FRAME_RESULTS]), (1,))[0]), (6,))
    sizes = numba.carray(_words_at(weight[BUFFER_DIMENSIONS]), (2,))
    job = _malloc(WORD * (JOB_WORDS + 5))
    words = numba.carray(_words_at(job), (JOB_WORDS,))
    words[JOB_HOLDERS], words[JOB_NEXT], words[JOB_DONE] = 1 + HELPERS, 0, 0
    words[JOB_WEIGHT], words[JOB_X], words[JOB_OUT] = weight[BUFFER_DATA], x[BUFFER_DATA], out[BUFFER_DATA]
    words[JOB_ROWS] = numba.carray(_words_at(x[BUFFER_DIMENSIONS]), (2,))[0]
    words[JOB_OUTPUTS], words[JOB_INPUTS] = sizes[0], sizes[1]
    if HELPERS == 0 or 4 * sizes[0] * sizes[1] <= ALONE_BYTES:
        _outputs(job, 0, sizes[0])
        _free(job)
        return 0
    _ask_for_help(frame, job)
    _take_chunks(job)
    spins = 0
    while _load(job + WORD * JOB_DONE) < CHUNKS:
        spins += 1
        if spins % SPINS_BEFORE_YIELD:
            _pause()
        else:
            _yield()
    _let_go(job)
    return 0


assert isinstance(_handler.address, int)
_c_handler = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(_handler.address)
jax.ffi.register_ffi_target(NAME, jax.ffi.pycapsule(_c_handler), platform="cpu")


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
