"""Products of the precision that their operands have, on every device."""

import functools
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def product(terms: str, *operands: Float[Array, "..."], out: Any = None) -> Float[Array, "..."]:
    """Return `jnp.einsum(terms, *operands)`, float32 operands multiplied as float32.

    Left to themselves, accelerators round them first: a TPU to bfloat16, an NVIDIA GPU to TF32 (10 bits of mantissa),
    and neither decoding is lossless then nor do features agree over positions to 1e-5. Who wants speed gives bfloat16
    operands, on which this has no effect.

    A CPU multiplies 16-bit operands several times as fast where the sums stay float32 (AMX and AVX-512 tiles): there
    they are rounded afterwards, which is what a 16-bit result is in any case.

    Args:
        terms: subscripts of the operands and of the result.
        operands: all of one dtype.
        out: dtype of sums and result; None: the operands'.
    """
    dtype = operands[0].dtype
    sums = jnp.float32 if out is None and dtype.itemsize < 4 and jax.default_backend() == "cpu" else out
    made = jnp.einsum(terms, *operands, precision=lax.Precision.HIGHEST, preferred_element_type=sums)
    return made.astype(dtype) if out is None else made


FEW_ROWS = 64
KERNEL_BYTES = 2**17
"""Of weights, or of a cache's keys; smaller ones do not leave the caches of a core between two steps."""


def _whole_tiles(rows: int) -> int:
    """How many rows are multiplied, zeros among them: XLA's kernels for CPUs take 4, 8 or 16 at once, not 12."""
    if rows <= 4:
        return rows
    if rows <= 16:
        return 8 if rows <= 8 else 16
    return 32 if 24 < rows < 32 else rows


def rows_product(
    x: Float[Array, "*rows in_features"], weight: Float[Array, "out_features in_features"], *, out: Any = None
) -> Float[Array, "*rows out_features"]:
    """Return `x @ weight.T` by the form that the device is fastest at.

    2 to 12 float32 rows are the kernel's (`nn.rows_kernel`) where it can be and weights are not small; all others are
    XLA's.

    Args:
        x: rows.
        weight: stored `[out, in]`, of `x`'s dtype.
        out: as in `product`.
    """
    rows, kernel = x.size // x.shape[-1], host_kernel("rows_kernel", weight)
    if kernel is not None and x.dtype == jnp.float32 and kernel.takes(rows, weight):
        return kernel.kernel_product(x.reshape(rows, -1), weight).reshape(*x.shape[:-1], weight.shape[0])
    return rows_product_by_xla(x, weight, out=out)


def rows_product_by_xla(
    x: Float[Array, "*rows in_features"], weight: Float[Array, "out_features in_features"], *, out: Any = None
) -> Float[Array, "*rows out_features"]:
    """Return `x @ weight.T` by that form of XLA's products which the device is fastest at.

    On a CPU, XLA's kernels repack the second of a product's operands. With the rows first that is the weights, of which
    a decoding step reads every one once: up to `FEW_ROWS` float32 rows they come first. A single float32 row is a
    matrix-vector product and repacks nothing; a single 16-bit row has no such kernel and gets company. Figures are in
    `docs/design/017-few-rows.md`. Arguments are those of `rows_product`.
    """
    rows, wide = x.size // x.shape[-1], x.dtype.itemsize >= 4
    if on_one_cpu() and wide and 1 < rows <= FEW_ROWS:
        whole = jnp.pad(x.reshape(rows, -1), ((0, _whole_tiles(rows) - rows), (0, 0)))
        columns = product("oi,ri->or", weight, whole, out=out)
        # without the barrier XLA swaps the operands back, to save the transpose of a small result
        return lax.optimization_barrier(columns)[:, :rows].T.reshape(*x.shape[:-1], weight.shape[0])
    if on_one_cpu() and not wide and rows == 1:
        two = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))
        return product("ri,oi->ro", two, weight, out=out)[0].reshape(*x.shape[:-1], weight.shape[0])
    return product("...i,oi->...o", x, weight, out=out)


TILE = 16


def can_turn(x: Float[Array, "*batch rows columns"]) -> bool:
    """Whether `turned` makes a copy that stays one: tiles fit."""
    return x.shape[-2] % TILE == 0 and x.shape[-1] % TILE == 0


def turned(x: Float[Array, "*batch rows columns"]) -> Float[Array, "*batch columns rows"]:
    """Return `x.mT` as a copy that XLA for CPUs leaves alone; for a 16-bit product that sums over the rows of both.

    It has no kernel for one of those and widens the operands. A plain transpose it would undo, and have the same
    product again. One in two steps, by tiles, it does not see through: such products take half the time
    (docs/design/015-smollm2-recipe.md). Where tiles do not fit it is a plain transpose.
    """
    *batch, rows, columns = x.shape
    if not can_turn(x):
        return x.mT
    tiles = x.reshape(*batch, rows // TILE, TILE, columns // TILE, TILE)
    tiles = lax.optimization_barrier(jnp.moveaxis(tiles, (-4, -3, -2, -1), (-3, -1, -4, -2)))
    whole = tiles.swapaxes(-3, -2).reshape(*batch, columns, rows)
    return lax.optimization_barrier(whole)


def host_kernel(name: str, array: Any) -> Any:
    """A module of kernels for CPUs, `nn.rows_kernel` or `nn.attention_kernel`; None where it is no use or cannot be.

    They are for one CPU with AVX-512, under Linux, with numba, the package's extra `cpu`, and are compiled, in a second
    or two, when they are first asked for: not for a small model.

    Args:
        name: of the module.
        array: what is read, of which there must be `KERNEL_BYTES`.
    """
    return _host_kernel(name) if array.size * array.dtype.itemsize >= KERNEL_BYTES else None


@functools.cache
def _host_kernel(name: str) -> Any:
    if not (on_one_cpu() and sys.platform == "linux" and "avx512f" in cpu_says("flags").split()):
        return None
    try:
        return importlib.import_module(f"dflash_jax.nn.{name}")
    except ImportError:
        return None
    except Exception as error:  # noqa: BLE001  (a numba or jaxlib that it does not know: XLA's own do as well)
        warnings.warn(f"without dflash_jax.nn.{name}, whose part XLA takes: {error}", stacklevel=2)
        return None


def on_one_cpu() -> bool:
    """Whether programs run on one CPU device, where no mesh splits an axis and XLA is helped by other forms."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


@functools.cache
def cpu_says(name: str) -> str:
    """Return what Linux says of the first processor: "model name", "flags"; "" where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    said = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in said if key.strip() == name), "")


def has_fast_16_bit_products() -> bool:
    """Whether 16-bit operands are multiplied faster than float32 ones: on a CPU, where AVX-512 or AMX has bfloat16."""
    # who has AMX has the other too
    return jax.default_backend() != "cpu" or "avx512_bf16" in cpu_says("flags").split()


def has_tiles() -> bool:
    """Whether a CPU multiplies 8-bit operands by tiles (AMX), several times as fast as by vectors."""
    return "amx_int8" in cpu_says("flags").split()
