"""Building a cache against the target's bare features + next_ids, in turns, in one run.

Bare is the compiled forward alone: batches lie on the device, their results are waited for there and dropped, and all
tokens of a batch count, padding too, as if all rows were full. The build is what `cache build` does: responses read
from their file, batches made, forwards, results fetched, checked for NaN, copied into shards, hashed, written, synced;
of a batch only the tokens that are stored count. So the ratio holds padding against the build.

Padding depends on how many texts there are to choose batches from. So the plan is one of `--sequences` texts, and what
is built of it, by every round anew, is one share in the middle, as one of many processes would build it.

    .venv-dev/bin/python benchmarks/cache_build.py --target DIR [--responses R.jsonl]

Compiling, loading and the self-test are not in the ratio; they are paid once, and told apart. About 7 minutes on two
idle cores with SmolLM2-135M and the defaults.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common import Ratio, machine, matmul_work, paired_ratio, time_interleaved, write_result
from dflash_jax.cache import CacheBuildConfig, build_cache
from dflash_jax.cache.build import BuildPlan, plan_build
from dflash_jax.cache.capture import TargetCapture, target_capture
from dflash_jax.cache.ledger import Share
from dflash_jax.cache.plan import ShardPlan
from dflash_jax.targets import prefill_flops, read_target_config


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--responses", type=Path, default=None, help="default: random texts of 96 to 290 tokens")
    parser.add_argument("--sequences", type=int, default=1000, help="how many, where there is no --responses")
    parser.add_argument("--share-tokens", type=int, default=16384, help="about how many tokens are built in a round")
    parser.add_argument("--longest", type=int, default=290, help="tokens of the longest of them")
    parser.add_argument("--features", default="bfloat16")
    parser.add_argument("--dtype", default="float32", help="what the target runs in")
    parser.add_argument("--capture-layers", default=None, help="such as 1,10,18,27; default: 4, evenly spaced")
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument(
        "--out", type=Path, default=None, help="folder on the disk to write to; default: a temporary one"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--matmul-size", type=int, default=2048)
    return parser.parse_args(arguments)


def write_random_responses(path: Path, *, count: int, longest: int, vocab_size: int) -> None:
    """Texts of random tokens: a forward takes as long on them as on any.

    They are from the middle of the vocabulary: special ones, which the self-test wants to find in no text, are at its
    ends.
    """
    draw = np.random.default_rng(0)
    with path.open("w") as file:
        for index in range(count):
            length = draw.integers(max(2, longest // 3), longest + 1)
            ids = draw.integers(vocab_size // 4, vocab_size // 2, length).tolist()
            half = len(ids) // 2
            row = {"id": f"r{index}", "set": "random", "prompt_ids": ids[:half], "response_ids": ids[half:]}
            file.write(json.dumps(row) + "\n")


class Bare:
    """The plan's forwards, on arrays that are on the device already."""

    def __init__(self, plan: BuildPlan, shards: Sequence[ShardPlan], capture: TargetCapture) -> None:
        """Make the batches, every row full."""
        self.plan, self.capture = plan, capture
        draw = np.random.default_rng(1)
        self.batches = []
        for step in (step for shard in shards for step in shard.steps):
            shape = (step.padded_rows, step.padded_length)
            tokens = draw.integers(0, plan.target.vocab_size, shape).astype(np.int32)
            lengths = np.full(step.padded_rows, step.padded_length, np.int32)
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


def stored_share(shards: Sequence[ShardPlan]) -> float:
    """How many of the tokens that are computed for some shards are stored."""
    computed = sum(step.padded_rows * step.padded_length for shard in shards for step in shard.steps)
    return sum(shard.tokens for shard in shards) / computed


def build_config(arguments: argparse.Namespace, folder: Path) -> CacheBuildConfig:
    """The build, with responses that are there."""
    responses = arguments.responses or folder / "responses.jsonl"
    if arguments.responses is None:
        vocab_size = read_target_config(arguments.target).vocab_size
        write_random_responses(responses, count=arguments.sequences, longest=arguments.longest, vocab_size=vocab_size)
    return CacheBuildConfig(
        target=arguments.target,
        responses=responses,
        out=folder / "cache",
        features=arguments.features,
        dtype=arguments.dtype,
        capture_layers=tuple(map(int, arguments.capture_layers.split(","))) if arguments.capture_layers else None,
        tokens_per_batch=arguments.tokens_per_batch,
        tokens_per_shard=2 * arguments.tokens_per_batch,
        share_prompts=False,
    )


def scaled(ratio: Ratio, factor: float) -> Ratio:
    """A ratio and its interval, times a number that is known."""
    low, high = ratio.ci95
    return replace(ratio, median=ratio.median * factor, ci95=(low * factor, high * factor))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time both and return the result."""
    whole = build_config(arguments, folder)
    plan = plan_build(whole)
    count = max(1, sum(shard.tokens for shard in plan.shards) // arguments.share_tokens)
    config = replace(whole, process_index=count // 2, process_count=count)
    shards = Share(index=count // 2, count=count).of(plan.shards)
    capture = target_capture(config, plan.target, mesh=None)
    _ = capture.target  # loading is not building

    def build() -> None:
        shutil.rmtree(config.out, ignore_errors=True)
        build_cache(config, fingerprint={}, capture=capture)

    began = time.perf_counter()
    build()
    first_build_s = time.perf_counter() - began
    matmul, matmul_flops = matmul_work(size=arguments.matmul_size)
    jax.block_until_ready(matmul())  # compiled; build and bare share programs, which are
    bare = Bare(plan, shards, capture)
    times = time_interleaved({"build": build, "bare": bare, "matmul": matmul}, rounds=arguments.rounds, warmups=0)
    bare_s, build_s = times["bare"].median(), times["build"].median()
    tokens, computed = sum(shard.tokens for shard in shards), int(sum(batch[0].size for batch in bare.batches))
    flops = sum(prefill_flops(plan.target, batch=len(batch[0]), length=batch[0].shape[1]) for batch in bare.batches)
    same_batches = paired_ratio(times["bare"], times["build"])
    same_batches_cpu = paired_ratio(times["bare"], times["build"], clock="cpu_s")
    stored = {"built": stored_share(shards), "whole_plan": stored_share(plan.shards)}
    return {
        "benchmark": "cache_build",
        "machine": machine(),
        "target": str(arguments.target),
        "features": config.features,
        "dtype": config.dtype,
        "plan": {"sequences": plan.responses.num_rows, "tokens": sum(shard.tokens for shard in plan.shards)},
        "plan_shapes": shapes_of(plan.shards),
        "built": {"shards": len(shards), "tokens": tokens, "computed_tokens": computed, "shapes": shapes_of(shards)},
        "bytes": sum(path.stat().st_size for path in config.out.glob("*.safetensors")),
        "wall_s": {"build": build_s, "bare": bare_s, "first_build_with_compiling": first_build_s},
        "tokens_per_s": {"build": tokens / build_s, "bare": computed / bare_s},
        "bare_flops_per_s": flops / bare_s,
        "matmul_flops_per_s": matmul_flops / times["matmul"].median(),
        "stored_share": stored,
        # the build's rate over the bare one's: without padding; of what was built; of the whole plan
        "ratio_same_batches": same_batches,
        "ratio_same_batches_cpu": same_batches_cpu,
        "ratio_built": scaled(same_batches, stored["built"]),
        "ratio": scaled(same_batches, stored["whole_plan"]),
        "ratio_cpu": scaled(same_batches_cpu, stored["whole_plan"]),
    }


def shapes_of(shards: Sequence[ShardPlan]) -> list[tuple[int, int]]:
    """Compiled shapes, rows and length of each."""
    return sorted({(step.padded_rows, step.padded_length) for shard in shards for step in shard.steps})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parsed = read_arguments(arguments)
    with tempfile.TemporaryDirectory(dir=parsed.out) as folder:
        result = measure(parsed, Path(folder))
    ratio, stored = result["ratio"], result["stored_share"]
    sys.stdout.write(
        f"build {result['tokens_per_s']['build']:.0f} tokens/s, bare {result['tokens_per_s']['bare']:.0f}; on the same "
        f"batches {result['ratio_same_batches'].median:.3f}, of whose tokens {stored['whole_plan']:.1%} are stored: "
        f"{ratio.median:.3f} [{ratio.ci95[0]:.3f}, {ratio.ci95[1]:.3f}]\n"
    )
    write_result(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
