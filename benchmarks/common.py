"""What the benchmarks share: paired interleaved timing, ratios with intervals, the matmul ceiling, one JSON line.

Times of two programs are only comparable when both ran on the same machine under the same load. So contestants run in
turns, round by round, and are compared within a round: a load that comes and goes hits both, and its effect on the
ratio is what the interval shows. The ceiling that a rate is held against is a contestant too.
"""

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.nn.product import cpu_says

Work = Callable[[], Any]
Clock = Literal["wall_s", "cpu_s"]

# Dense bfloat16 FLOP/s as the makers publish them, without sparsity, by the start of JAX's device_kind; the first match
# counts. The base of MFU (model FLOPs utilisation).
_PEAK_FLOPS = (
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA L4", 121e12),
    ("TPU v6", 918e12),
    ("TPU v5p", 459e12),
    ("TPU v5 lite", 197e12),
    ("TPU v4", 275e12),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """What one contestant took, round by round.

    Attributes:
        wall_s: seconds on the clock; what counts on a quiet machine.
        cpu_s: CPU seconds of all threads of this process. On a shared machine `cpu_s / cores` estimates what idle cores
            would take, as long as threads do not spin while they wait (OpenMP's do: torch with more threads than free
            cores). It says nothing of an accelerator.
    """

    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]

    def median(self, clock: Clock = "wall_s") -> float:
        """Return the median over rounds, seconds."""
        return statistics.median(getattr(self, clock))


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """How many times longer one contestant took than another.

    Attributes:
        median: median over rounds of the ratio within a round.
        ci95: 95 % percentile bootstrap interval of that median, over rounds.
        rounds: how many rounds there were.
    """

    median: float
    ci95: tuple[float, float]
    rounds: int


def warm_up(work: Iterable[Work], *, threads: int = 1) -> None:
    """Run every contestant once; with several threads side by side, so that what they compile is compiled so too."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda run: jax.block_until_ready(run()), work))


def time_interleaved(work: Mapping[str, Work], *, rounds: int, warmups: int = 1) -> dict[str, Times]:
    """Run every contestant once per round and return the times of each.

    The order turns round every other round, so that nobody always runs behind the same neighbour's caches. Each time
    goes to stderr as it is taken: who waits sees what is slow, and a run that is stopped was not for nothing.

    Args:
        work: contestants by name. What they return is waited for where it is a pytree of jax arrays.
        rounds: timed rounds, at least 1.
        warmups: rounds before them that are not timed: compiling, page faults, thread pools.
    """
    for _ in range(warmups):
        warm_up(work.values())
    wall: dict[str, list[float]] = {name: [] for name in work}
    cpu: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds):
        for name in list(work)[:: 1 if number % 2 == 0 else -1]:
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            jax.block_until_ready(work[name]())
            wall[name].append(time.perf_counter() - wall_start)
            cpu[name].append(time.process_time() - cpu_start)
            sys.stderr.write(f"round {number + 1}/{rounds}: {name:24} {wall[name][-1]:9.4f} s\n")
    return {name: Times(wall_s=tuple(wall[name]), cpu_s=tuple(cpu[name])) for name in work}


def paired_ratio(slow: Times, fast: Times, *, clock: Clock = "wall_s") -> Ratio:
    """Return how many times longer `slow` took than `fast`, from the ratios within rounds.

    Worked: rounds of (2, 1), (6, 2) and (4, 1) seconds have ratios 2, 3 and 4: the median is 3.
    """
    ratios = np.array(getattr(slow, clock)) / np.array(getattr(fast, clock))
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return Ratio(median=float(np.median(ratios)), ci95=(float(low), float(high)), rounds=len(ratios))


def matmul_work(*, size: int, products: int = 1, dtype: str = "float32") -> tuple[Work, float]:
    """Return a contestant that multiplies large square matrices, and its FLOPs: the ceiling of everything else.

    The FLOP/s it reaches, `flops / median`, is what this machine gives at this moment, not what a data sheet says.

    Args:
        size: rows and columns. 2048 fills a CPU's caches and cores; accelerators need 8192.
        products: how many run in one call, each on the result of the one before it: on an accelerator enough of them
            hide the launch.
        dtype: of both operands; sums are float32 where the device has a choice.
    """
    kind = jnp.dtype(dtype)
    # entries near 1 / sqrt(size) keep the size of the products the same, however many there are
    weight = (jax.random.normal(jax.random.key(0), (size, size)) / np.sqrt(size)).astype(kind)
    start = jax.random.normal(jax.random.key(1), (size, size)).astype(kind)

    @jax.jit
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(products):
            x = x @ w
        return x

    return lambda: run(start, weight), 2.0 * products * size**3


def compiled_flops(compiled: jax.stages.Compiled) -> float:
    """Return the FLOPs that XLA counts in a compiled program: products and elementwise operations alike.

    A loop's body is counted once, whatever the number of turns, and a library call (cuDNN, a custom kernel) not at all:
    where a program has those, the count is too low.
    """
    analysis: Any = compiled.cost_analysis()
    if isinstance(analysis, list):
        analysis = analysis[0]
    return float(analysis["flops"])


def peak_flops() -> float | None:
    """Return this device's published dense bfloat16 FLOP/s; None for a CPU or a device that is not in the table."""
    kind = jax.devices()[0].device_kind
    return next((flops for name, flops in _PEAK_FLOPS if kind.startswith(name)), None)


def peak_memory_bytes() -> dict[str, int | None]:
    """Return the most memory this process has held: `host_bytes` (resident) and `device_bytes` (None on a CPU)."""
    stats = jax.devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "device_bytes": stats.get("peak_bytes_in_use"),
    }


def _processor() -> str | None:
    """What the CPU calls itself, and the widest products that it has; None where Linux does not say."""
    flags = cpu_says("flags").split()
    kinds = [kind for kind in ("avx2", "avx512_bf16", "amx_bf16") if kind in flags]
    return ", ".join([cpu_says("model name"), *kinds[-1:]]) or None


def machine(libraries: Sequence[str] = ("jax", "jaxlib")) -> dict[str, Any]:
    """Return what a number was measured on: device, processor, cores, load before the run, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "num_devices": jax.device_count(),
        "processor": _processor(),
        "cores": cores,
        "load_average_1min": os.getloadavg()[0],
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in libraries},
    }


def rounded(value: Any, *, digits: int = 5) -> Any:
    """Return a JSON value with floats cut to `digits` significant ones, tuples as lists and `Ratio` as a mapping."""
    if isinstance(value, Ratio):
        value = {"median": value.median, "ci95": value.ci95, "rounds": value.rounds}
    if isinstance(value, Mapping):
        return {str(key): rounded(item, digits=digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits=digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def write_result(result: Mapping[str, Any]) -> None:
    """Write a benchmark's result as the last line of stdout: one JSON document."""
    sys.stdout.write(json.dumps(rounded(result), allow_nan=False) + "\n")
    sys.stdout.flush()
