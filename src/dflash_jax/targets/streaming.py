"""A checkpoint's tensors, read piece by piece straight into the shards of this process.

Peak host memory over the loaded weights is about one tensor: a file is mapped, never read whole; a shard is copied (and
converted, or dequantised) some megabytes at a time, after which the mapped pages are given back; a tensor is on its
devices before the next one is begun.
"""

import math
import mmap
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, UInt8

from dflash_jax.core import InputError, read_header
from dflash_jax.targets.mxfp4 import MXFP4_GROUP, dequantise_mxfp4

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
PACKED_DTYPES = {"U8": np.dtype(np.uint8)}  # MXFP4 blocks and scales: numbers that mean nothing by themselves
PIECE_BYTES = 16 * 2**20
_RELEASE = getattr(mmap, "MADV_DONTNEED", None)  # absent on some systems: pages then stay until the tensor is read

Index = tuple[slice, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: a safetensors file.
        dtype: as stored.
        shape: as stored.
        first_byte: of its data in the file.
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    first_byte: int

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Return every tensor of some safetensors files by name, from their headers.

    Raises:
        InputError: a file is missing or damaged; a tensor lies in two files; a dtype is neither a plain float nor bytes
            of MXFP4; a tensor's place is not what its shape and dtype need.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        header = read_header(file, what="the target's weights")
        with file.open("rb") as opened:
            data = 8 + int.from_bytes(opened.read(8), "little")
        for name, entry in header.items():
            dtype = (DTYPES | PACKED_DTYPES).get(entry["dtype"])
            if dtype is None:
                raise InputError(f"{file}: {name} is {entry['dtype']}; only {', '.join(DTYPES)} and MXFP4 are handled")
            if name in found:
                raise InputError(f"{name} lies in {found[name].file} and in {file}: remove one of them")
            begin, end = entry["data_offsets"]
            tensor = StoredTensor(file=file, dtype=dtype, shape=tuple(entry["shape"]), first_byte=data + begin)
            if begin < 0 or end - begin != tensor.num_bytes:
                raise InputError(
                    f"the target's weights are not readable: {file}: {name} {list(tensor.shape)} {entry['dtype']} "
                    f"takes {tensor.num_bytes} bytes, its header gives it {end - begin}"
                )
            found[name] = tensor
    return found


def read_slice(tensor: StoredTensor, index: Index, out: np.ndarray) -> None:
    """Copy a part of a tensor into `out`, converting to its dtype.

    Args:
        tensor: where it lies.
        index: a slice of step 1 per dimension.
        out: of the slice's shape.
    """
    if not out.size:
        return
    start = index[0].indices(tensor.shape[0])[0] if tensor.shape else 0
    rows = tensor.shape[0] if tensor.shape else 1
    row_bytes = tensor.num_bytes // rows
    step = max(1, PIECE_BYTES // row_bytes)
    page = mmap.ALLOCATIONGRANULARITY
    with tensor.file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        whole = np.frombuffer(mapped, tensor.dtype, math.prod(tensor.shape), tensor.first_byte).reshape(tensor.shape)
        target = out.reshape(1) if not tensor.shape else out
        source = whole.reshape(1) if not tensor.shape else whole
        for row in range(0, target.shape[0], step):
            stop = min(row + step, target.shape[0])
            target[row:stop] = source[start + row : start + stop][(slice(None), *index[1:])]
            if _RELEASE is not None:
                # whole pages up to the piece's end; a page that the next piece begins in is simply mapped once more
                first = (tensor.first_byte + (start + row) * row_bytes) // page * page
                mapped.madvise(_RELEASE, first, tensor.first_byte + (start + stop) * row_bytes - first)
        del whole, source  # the mapping cannot be closed while arrays look into it


def same_bits(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors of at least one dimension are equal in dtype, shape and every bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    rest = tuple(slice(None) for _ in one.shape[1:])
    step = max(1, PIECE_BYTES // max(1, one.num_bytes // max(1, one.shape[0])))
    for first in range(0, one.shape[0], step):
        rows = slice(first, min(first + step, one.shape[0]))
        parts = [np.empty((rows.stop - first, *one.shape[1:]), one.dtype) for _ in range(2)]
        for tensor, part in zip((one, other), parts, strict=True):
            read_slice(tensor, (rows, *rest), part)
        mine, others = (part.view(np.uint8) for part in parts)
        if not np.array_equal(mine, others):
            return False
    return True


@partial(jax.jit, static_argnames="dtype")
def _dequantise(
    blocks: UInt8[Array, "rows groups 16"], scales: UInt8[Array, "rows groups"], dtype: str
) -> Float[Array, "rows columns"]:
    return dequantise_mxfp4(blocks, scales, dtype=jnp.dtype(dtype))


def _host() -> AbstractContextManager[Any]:
    """Compute on the host's CPU; where jax was started without it, on the default device."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return nullcontext()


def read_mxfp4(blocks: StoredTensor, scales: StoredTensor, index: Index, out: np.ndarray) -> None:
    """Copy a part of a matrix per expert that is stored as MXFP4 into `out`, one expert at a time.

    Args:
        blocks: `[experts, columns, groups of rows, 16]`.
        scales: `[experts, columns, groups of rows]`.
        index: a slice per dimension of the matrices `[experts, rows, columns]`.
        out: of the slice's shape.
    """
    experts, rows, columns = index
    first = rows.start // MXFP4_GROUP
    groups = slice(first, -(-rows.stop // MXFP4_GROUP))
    part = slice(rows.start - first * MXFP4_GROUP, rows.stop - first * MXFP4_GROUP)
    shape = (1, columns.stop - columns.start, groups.stop - groups.start)
    packed, exponents = np.empty((*shape, blocks.shape[-1]), np.uint8), np.empty(shape, np.uint8)
    with _host():
        for number, expert in enumerate(range(experts.start, experts.stop)):
            one = slice(expert, expert + 1)
            read_slice(blocks, (one, columns, groups, slice(None)), packed)
            read_slice(scales, (one, columns, groups), exponents)
            # copied: jax may look into a host array for as long as it likes, and these are written again
            values = _dequantise(jnp.array(packed[0]), jnp.array(exponents[0]), out.dtype.name)
            out[number] = np.asarray(values).T[part]


def make_array(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
    fill: Callable[[Index, np.ndarray], Any],
) -> jax.Array:
    """Return an array whose shards are made one by one on the host; it is on its devices when this returns.

    Args:
        shape: of the whole array.
        dtype: of the array.
        sharding: where its shards go; None is the default device.
        fill: writes the part of the array that a slice per dimension names. Called once for shards that are copies of
            each other, and not at all for those of other processes.
    """
    made: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        assert index is not None, "only shards of this process are asked for"
        bounds = tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))
        if bounds not in made:
            made[bounds] = np.empty([stop - start for start, stop in bounds], dtype)
            fill(tuple(slice(*bound) for bound in bounds), made[bounds])
        return made[bounds]

    if sharding is None:
        return jax.block_until_ready(jax.device_put(part((slice(None),) * len(shape))))
    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, part))
