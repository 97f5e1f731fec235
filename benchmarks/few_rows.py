"""Products of a few float32 rows with many weights: by the kernel for CPUs with AVX-512, and as XLA makes them.

Matrices of SmolLM2's MLP, as many as do not fit in any cache, follow each other as in a decoding step; what is held
against memory is how fast their bytes are read. A row alone is XLA's matrix-vector product in both. Where the two
differ by more than rounding, the exit status is 1.

    .venv-dev/bin/python benchmarks/few_rows.py > few_rows.json

Needs a CPU with AVX-512 under Linux, and numba (the package's extra `cpu`).
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common import Work, machine, paired_ratio, time_interleaved, write_result
from dflash_jax.nn.product import host_kernel, rows_product, rows_product_by_xla

WIDE, NARROW = 1536, 576
Product = Callable[[Float[Array, "row inputs"], Float[Array, "outputs inputs"]], Float[Array, "row outputs"]]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12, 16, 32])
    parser.add_argument("--matrices", type=int, default=120, help="of 3.5 MB")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def weights_of(matrices: int) -> list[Float[Array, "outputs inputs"]]:
    """Matrices up and down in turns, so that a product's result is the next one's row."""
    draw = np.random.default_rng(0)
    shapes = ((WIDE, NARROW), (NARROW, WIDE))
    made = (draw.standard_normal(shapes[number % 2], dtype=np.float32) for number in range(matrices))
    return [jnp.asarray(matrix / np.sqrt(matrix.shape[1])) for matrix in made]


def chain_of(product: Product) -> Callable[..., Array]:
    """Jitted: rows through every matrix in turn."""

    def run(x: Array, weights: list[Array]) -> Array:
        for weight in weights:
            x = product(x, weight)
        return x

    return jax.jit(run)


def main() -> int:
    """Run it."""
    options = parse()
    weights, ours, xlas = weights_of(options.matrices), chain_of(rows_product), chain_of(rows_product_by_xla)
    if host_kernel("rows_kernel", weights[0]) is None:
        sys.stderr.write("few_rows.py: the kernel is for one CPU with AVX-512, under Linux, with numba installed\n")
        return 2
    inputs = {
        rows: jnp.asarray(np.random.default_rng(rows).standard_normal((rows, NARROW), dtype=np.float32))
        for rows in options.rows
    }
    apart = {
        rows: float(jnp.abs(ours(x, weights) - xlas(x, weights)).max() / jnp.abs(xlas(x, weights)).max())
        for rows, x in inputs.items()
    }
    work: dict[str, Work] = {
        f"{kind} {rows}": lambda run=run, x=x: run(x, weights)
        for rows, x in inputs.items()
        for kind, run in (("kernel", ours), ("xla", xlas))
    }
    times = time_interleaved(work, rounds=options.rounds)
    num_bytes = sum(weight.nbytes for weight in weights)
    result: dict[str, Any] = {
        "benchmark": "few_rows",
        "machine": machine(("jax", "jaxlib", "numba")),
        "weight_bytes": num_bytes,
        "relative_difference": apart,
        "rows": {},
    }
    for rows in options.rows:
        seconds = {kind: times[f"{kind} {rows}"].median() for kind in ("kernel", "xla")}
        ratio = paired_ratio(times[f"xla {rows}"], times[f"kernel {rows}"])
        result["rows"][str(rows)] = {
            f"{kind}_gb_per_s": num_bytes / each / 1e9 for kind, each in seconds.items()
        } | {
            f"{kind}_gflop_per_s": 2 * rows * num_bytes / 4 / each / 1e9 for kind, each in seconds.items()
        } | {"speedup": ratio}  # fmt: skip
        sys.stderr.write(
            f"{rows:>3} rows: kernel {num_bytes / seconds['kernel'] / 1e9:5.1f} GB/s   "
            f"xla {num_bytes / seconds['xla'] / 1e9:5.1f} GB/s   {ratio.median:.2f}\n"
        )
    write_result(result)
    return int(max(apart.values()) > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
