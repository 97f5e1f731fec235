"""Custom calls of XLA's that numba compiles: what one is handed, and how XLA's threads share its work. CPUs only.

What a call hands over is read as 8-byte words, by the layout in jaxlib's `include/xla/ffi/api/c_api.h` (version 0.3 of
XLA's FFI). numba is an extra of the package (`cpu`); modules that import this one are imported where it is installed
(`product.host_kernel`).

A call's work is cut in chunks. Whoever comes takes the next chunk that nobody has, the caller among them, so that a
helper that is late costs nothing. What they share, a *job*, lies on the heap, as a helper may come when all is done.
No chunk may raise, as nobody would count it as done: errors of arithmetic are NumPy's, 0 / 0 is NaN.
"""

import ctypes
import os
from collections.abc import Callable
from typing import Any, no_type_check

import jax
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

MOST_HELPERS = 7
HELPERS = min(len(os.sched_getaffinity(0)) - 1, MOST_HELPERS) if hasattr(os, "sched_getaffinity") else 0
"""Threads that are asked for help: memory is the limit, and a few cores reach it."""
SPINS_BEFORE_YIELD = 256
LANES = 16
"""float32 numbers in a vector: a register of AVX-512."""

WORD = 8
JOB_HOLDERS, JOB_NEXT, JOB_DONE, JOB_CHUNKS, JOB_FIRST = range(5)
"""Words of a job: who has not let go of it, the next chunk, those done, all; then the kernel's own."""

# words of XLA's structs
_FFI_MINOR_VERSION = 3
_FRAME_EXTENSION, _FRAME_API, _FRAME_CONTEXT, _FRAME_ARGUMENTS, _FRAME_RESULTS = 1, 2, 3, 9, 14
_BUFFER_DATA, _BUFFER_DIMENSIONS = 3, 5
_EXTENSION_METADATA, _METADATA_VERSION, _METADATA_TRAITS, _METADATA_STATE = 3, 3, 4, 5
_API_ERROR_DESTROY, _API_SCHEDULE = 6 + 2, 6 + 11
_ASKED_WORDS = 5  # of the largest argument of XLA's functions

NUMBER, LANE_TYPE, LANE_NUMBERS = (
    ir.FloatType(),
    ir.VectorType(ir.FloatType(), LANES),
    ir.VectorType(ir.IntType(32), LANES),
)
WORD_TYPE = ir.IntType(64)
_libc = ctypes.CDLL(None)
malloc, free, _yield = _libc.malloc, _libc.free, _libc.sched_yield
malloc.argtypes, malloc.restype = [ctypes.c_int64], ctypes.c_int64
free.argtypes, free.restype = [ctypes.c_int64], None
_yield.argtypes, _yield.restype = [], ctypes.c_int


@no_type_check
def call_llvm(builder, name, result, *values):
    """A call of one of LLVM's own functions."""
    form = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, form, name), values)


@no_type_check
def multiply_add(builder, a, b, c):
    """`a * b + c`, by lanes, rounded once."""
    return call_llvm(builder, f"llvm.fma.v{LANES}f32", LANE_TYPE, a, b, c)


@no_type_check
def added_up(builder, lanes):
    """The sum of a vector's lanes, in an order that is the same wherever it is asked for."""
    form = ir.FunctionType(NUMBER, [NUMBER, LANE_TYPE])
    function = cgutils.get_or_insert_function(builder.module, form, f"llvm.vector.reduce.fadd.v{LANES}f32")
    return builder.call(function, [ir.Constant(NUMBER, -0.0), lanes], fastmath=("reassoc",))


@no_type_check
def every_lane(value, of=LANE_TYPE):
    """A vector of one constant."""
    return ir.Constant(of, [value] * LANES)


@no_type_check
def spread(builder, number):
    """A vector of one number."""
    nothing = ir.Constant(LANE_TYPE, ir.Undefined)
    one = builder.insert_element(nothing, number, ir.IntType(32)(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(LANE_NUMBERS, None))


@no_type_check
def lanes_at(builder, address, *offsets):
    """A pointer to a vector at an address and so many bytes more."""
    for offset in offsets:
        address = builder.add(address, offset)
    return builder.inttoptr(address, LANE_TYPE.as_pointer())


@no_type_check
def number_at(builder, address, *offsets):
    """A pointer to a number at an address and so many bytes more."""
    for offset in offsets:
        address = builder.add(address, offset)
    return builder.inttoptr(address, NUMBER.as_pointer())


@no_type_check
def loop(builder, end, step, carried, body):
    """A loop that is run once at least: what it carries, after it.

    Args:
        builder: LLVM's.
        end: the counter, from 0 on, stays below it.
        step: of the counter.
        carried: values before the loop.
        body: of `(counter, values)`: the next values.
    """
    before, inside, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(inside)
    builder.position_at_end(inside)
    counter = builder.phi(WORD_TYPE)
    values = [builder.phi(value.type) for value in carried]
    following = body(counter, values)
    counter.add_incoming(WORD_TYPE(0), before)
    count = builder.add(counter, WORD_TYPE(step))
    counter.add_incoming(count, inside)
    for value, first, later in zip(values, carried, following, strict=True):
        value.add_incoming(first, before)
        value.add_incoming(later, inside)
    builder.cbranch(builder.icmp_signed("<", count, end), inside, after)
    builder.position_at_end(after)
    return following


@no_type_check
def _seen_as(kind):
    """A function of an address that is what lies there, seen as numbers of a kind."""

    def build(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    def typed(context, address):
        return types.CPointer(kind)(types.int64), build

    return intrinsic(typed)


_words_at, _halves_at, _floats_at = map(_seen_as, (types.int64, types.int32, types.float32))


@intrinsic
@no_type_check
def _fetch_add(context, address, number):
    """Add to the word at an address, atomically; what was there before."""

    def build(context, builder, signature, values):
        word = builder.inttoptr(values[0], WORD_TYPE.as_pointer())
        return builder.atomic_rmw("add", word, values[1], "acq_rel")

    return types.int64(types.int64, types.int64), build


@intrinsic
@no_type_check
def _load(context, address):
    """The word at an address, and all that was written before it."""

    def build(context, builder, signature, values):
        return builder.load_atomic(builder.inttoptr(values[0], WORD_TYPE.as_pointer()), "acquire", WORD)

    return types.int64(types.int64), build


@intrinsic
@no_type_check
def _call(context, function, argument):
    """Call the C function at an address with one word; the word that it returns."""

    def build(context, builder, signature, values):
        form = ir.FunctionType(WORD_TYPE, [WORD_TYPE])
        return builder.call(builder.inttoptr(values[0], form.as_pointer()), [values[1]])

    return types.int64(types.int64, types.int64), build


@intrinsic
@no_type_check
def _pause(context):
    """Let the other thread of a core go on for a moment."""

    def build(context, builder, signature, values):
        call_llvm(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), build


@numba.njit(error_model="numpy")
@no_type_check
def words_of(address, count):
    """So many words at an address."""
    return numba.carray(_words_at(address), (count,))


@numba.njit(error_model="numpy")
@no_type_check
def integers_of(address, count):
    """So many int32 numbers at an address."""
    return numba.carray(_halves_at(address), (count,))


@numba.njit(error_model="numpy")
@no_type_check
def floats_of(address, shape):
    """float32 numbers at an address."""
    return numba.carray(_floats_at(address), shape)


@numba.njit(error_model="numpy")
@no_type_check
def argument(frame, number):
    """Where a call's operand lies, and its dimensions."""
    buffer = words_of(words_of(frame[_FRAME_ARGUMENTS], number + 1)[number], 6)
    return buffer[_BUFFER_DATA], words_of(buffer[_BUFFER_DIMENSIONS], 8)


@numba.njit(error_model="numpy")
@no_type_check
def result(frame):
    """Where a call's one result goes."""
    return words_of(words_of(frame[_FRAME_RESULTS], 1)[0], 6)[_BUFFER_DATA]


@numba.njit(error_model="numpy")
@no_type_check
def _let_go(job):
    """Whoever holds a job last frees it."""
    if _fetch_add(job + WORD * JOB_HOLDERS, -1) == 1:
        free(job)


@numba.njit(error_model="numpy")
@no_type_check
def _ask_for_help(frame, job, asked_at, helper):
    """Have XLA's threads come to a job when they are free."""
    api = words_of(frame[_FRAME_API], _API_SCHEDULE + 1)
    asked = words_of(asked_at, _ASKED_WORDS)
    for _ in range(HELPERS):
        asked[0], asked[1], asked[2], asked[3], asked[4] = 5 * WORD, 0, frame[_FRAME_CONTEXT], helper, job
        error = _call(api[_API_SCHEDULE], asked_at)
        if error != 0:  # nobody will come
            asked[0], asked[1], asked[2] = 3 * WORD, 0, error
            _call(api[_API_ERROR_DESTROY], asked_at)
            _let_go(job)


@numba.njit(error_model="numpy")
@no_type_check
def _answer_metadata(frame):
    """Tell XLA the version that this was written for."""
    told = words_of(words_of(frame[_FRAME_EXTENSION], 4)[_EXTENSION_METADATA], 6)
    told[_METADATA_VERSION], told[_METADATA_TRAITS], told[_METADATA_STATE] = _FFI_MINOR_VERSION << 32, 0, 0


@numba.njit(error_model="numpy")
@no_type_check
def _wait_for(done_at, chunks):
    spins = 0
    while _load(done_at) < chunks:
        spins += 1
        if spins % SPINS_BEFORE_YIELD:
            _pause()
        else:
            _yield()


@no_type_check
def register(name: str, *, job_words: int, begin: Callable[..., int], do_chunk: Callable[..., None]) -> None:
    """Compile a kernel and let XLA call it by a name.

    Args:
        name: of the custom call.
        job_words: words of a job, the first `JOB_FIRST` included.
        begin: numba's, of `(frame, words)`: write the kernel's own words of a job; how many chunks it has.
        do_chunk: numba's, of `(words, chunk)`: any two may run at once.
    """

    @numba.njit(error_model="numpy")
    def take_chunks(job):
        words = words_of(job, job_words)
        while True:
            chunk = _fetch_add(job + WORD * JOB_NEXT, 1)
            if chunk >= words[JOB_CHUNKS]:
                return
            do_chunk(words, chunk)
            _fetch_add(job + WORD * JOB_DONE, 1)

    @numba.cfunc(types.int64(types.int64), error_model="numpy")
    def helper(job):
        take_chunks(job)
        _let_go(job)
        return 0

    address = helper.address

    @numba.cfunc(types.int64(types.int64), error_model="numpy")
    def handler(frame_at):
        frame = words_of(frame_at, _FRAME_RESULTS + 1)
        if frame[_FRAME_EXTENSION] != 0:
            _answer_metadata(frame)
            return 0
        job = malloc(WORD * (job_words + _ASKED_WORDS))
        words = words_of(job, job_words)
        chunks = begin(frame, words)
        words[JOB_HOLDERS], words[JOB_NEXT], words[JOB_DONE], words[JOB_CHUNKS] = 1, 0, 0, chunks
        if HELPERS > 0 and chunks > 1:
            words[JOB_HOLDERS] += HELPERS
            _ask_for_help(frame, job, job + WORD * job_words, address)
        take_chunks(job)
        _wait_for(job + WORD * JOB_DONE, chunks)
        _let_go(job)
        return 0

    _KEPT.extend((helper, handler))
    called = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(handler.address)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(called), platform="cpu")


_KEPT: list[Any] = []  # compiled code lives as long as numba's objects do
