"""Building a cache against the target's bare features + next_ids on the same batches, in turns, in one run.

Bare is the compiled forward alone: batches lie on the device, and their results are waited for there and dropped. The
build is what `cache build` does: responses read from their file, batches made, forwards, results fetched, checked for
NaN, copied into shards, hashed, written, synced. Both run the same programs; compiling is timed apart, in the first
build, and its ratio is told too.

    .venv-dev/bin/python benchmarks/cache_build.py --target DIR [--responses R.jsonl]

A minute or two a round on two cores with SmolLM2-135M and the default of 48 sequences.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common import machine, matmul_work, paired_ratio, time_interleaved, write_result
from dflash_jax.cache import CacheBuildConfig, build_cache
from dflash_jax.cache.build import BuildPlan, plan_build
from dflash_jax.cache.capture import TargetCapture, target_capture
from dflash_jax.targets import prefill_flops, read_target_config


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--responses", type=Path, default=None, help="default: random texts of 100 to 290 tokens")
    parser.add_argument("--sequences", type=int, default=48, help="how many, where there is no --responses")
    parser.add_argument("--longest", type=int, default=290, help="tokens of the longest of them")
    parser.add_argument("--features", default="bfloat16")
    parser.add_argument("--capture-layers", default=None, help="such as 1,10,18,27; default: 4, evenly spaced")
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument(
        "--out", type=Path, default=None, help="folder on the disk to write to; default: a temporary one"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--matmul-size", type=int, default=2048)
    return parser.parse_args(arguments)


def write_random_responses(path: Path, *, count: int, longest: int, vocab_size: int) -> None:
    """Texts of random tokens: a forward takes as long on them as on any."""
    draw = np.random.default_rng(0)
    with path.open("w") as file:
        for index in range(count):
            ids = draw.integers(0, vocab_size, draw.integers(max(2, longest // 3), longest + 1)).tolist()
            half = len(ids) // 2
            row = {"id": f"r{index}", "set": "random", "prompt_ids": ids[:half], "response_ids": ids[half:]}
            file.write(json.dumps(row) + "\n")


class Bare:
    """The plan's forwards, on arrays that are on the device already."""

    def __init__(self, plan: BuildPlan, capture: TargetCapture) -> None:
        """Make the batches."""
        self.plan, self.capture = plan, capture
        self.batches = []
        for step in (step for shard in plan.shards for step in shard.steps):
            tokens = np.zeros((step.padded_rows, step.padded_length), np.int32)
            lengths = np.ones(step.padded_rows, np.int32)
            for i, row in enumerate(step.rows.tolist()):
                ids = plan.responses.tokens(row)
                tokens[i, : len(ids)], lengths[i] = ids, len(ids)
            self.batches.append((tokens, lengths, np.full(step.padded_rows, step.position_offset, np.int32)))

    def __call__(self) -> None:
        """Run all of them, one launched ahead, as the build does."""
        before = None
        for batch in self.batches:
            captured, _ = self.capture.start(*batch, keep=self.plan.extends)
            if before is not None:
                jax.block_until_ready((before.features, before.next_ids))
            before = captured
        if before is not None:
            jax.block_until_ready((before.features, before.next_ids))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time both and return the result."""
    target = read_target_config(arguments.target)
    responses = arguments.responses or folder / "responses.jsonl"
    if arguments.responses is None:
        write_random_responses(
            responses, count=arguments.sequences, longest=arguments.longest, vocab_size=target.vocab_size
        )
    config = CacheBuildConfig(
        target=arguments.target,
        responses=responses,
        out=folder / "cache",
        features=arguments.features,
        capture_layers=tuple(map(int, arguments.capture_layers.split(","))) if arguments.capture_layers else None,
        tokens_per_batch=arguments.tokens_per_batch,
        share_prompts=False,
    )
    plan = plan_build(config)
    capture = target_capture(config, target, mesh=None)
    _ = capture.target  # loading is not building

    def build() -> None:
        shutil.rmtree(config.out, ignore_errors=True)
        build_cache(config, fingerprint={}, capture=capture)

    began = time.perf_counter()
    build()
    first_build_s = time.perf_counter() - began
    matmul, matmul_flops = matmul_work(size=arguments.matmul_size)
    bare = Bare(plan, capture)
    times = time_interleaved({"build": build, "bare": bare, "matmul": matmul}, rounds=arguments.rounds, warmups=1)
    bare_s, build_s = times["bare"].median(), times["build"].median()
    shapes = {(step.padded_rows, step.padded_length) for shard in plan.shards for step in shard.steps}
    tokens = sum(shard.tokens for shard in plan.shards)
    flops = sum(
        prefill_flops(target, batch=step.padded_rows, length=step.padded_length)
        for shard in plan.shards
        for step in shard.steps
    )
    return {
        "benchmark": "cache_build",
        "machine": machine(),
        "target": str(arguments.target),
        "features": config.features,
        "num_sequences": plan.responses.num_rows,
        "num_tokens": tokens,
        "padded_tokens": int(sum(batch[0].size for batch in bare.batches)),
        "shapes": sorted(shapes),
        "bytes": sum(path.stat().st_size for path in config.out.glob("*.safetensors")),
        "wall_s": {"build": build_s, "bare": bare_s, "first_build_with_compiling": first_build_s},
        "tokens_per_s": {"build": tokens / build_s, "bare": tokens / bare_s, "first_build": tokens / first_build_s},
        "flops": flops,
        "bare_flops_per_s": flops / bare_s,
        "matmul_flops_per_s": matmul_flops / times["matmul"].median(),
        # the build's rate over the bare one's
        "ratio": paired_ratio(times["bare"], times["build"]),
        "ratio_cpu": paired_ratio(times["bare"], times["build"], clock="cpu_s"),
        "first_build_ratio": bare_s / first_build_s,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parsed = read_arguments(arguments)
    with tempfile.TemporaryDirectory(dir=parsed.out) as folder:
        result = measure(parsed, Path(folder))
    ratio = result["ratio"]
    sys.stdout.write(
        f"build {result['tokens_per_s']['build']:.0f} tokens/s, bare {result['tokens_per_s']['bare']:.0f}: "
        f"{ratio.median:.3f} [{ratio.ci95[0]:.3f}, {ratio.ci95[1]:.3f}]; "
        f"with compiling {result['first_build_ratio']:.3f}\n"
    )
    write_result(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
