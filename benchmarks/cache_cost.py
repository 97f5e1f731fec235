"""What `cache cost` says against what `cache build` then takes: bytes to the byte, and the time.

Both are commands, each in a process of its own, as a user runs them: nothing is compiled before, nothing is loaded. A
round is one of each, so a load that comes and goes between them is in the error; run it on a quiet machine. The bytes
must be equal (exit 1 where they are not).

    .venv-dev/bin/python benchmarks/cache_cost.py --target DIR [--responses R.jsonl] [--rounds 3]

About three minutes a round on two idle cores with SmolLM2-135M and the default of 200 texts.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache_build import write_random_responses
from common import machine, write_result
from dflash_jax.targets import read_target_config

PROGRAM = (sys.executable, "-c", "import sys; from dflash_jax.cli import main; sys.exit(main())")


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--responses", type=Path, default=None, help="default: random texts of 96 to 290 tokens")
    parser.add_argument("--sequences", type=int, default=200, help="how many, where there is no --responses")
    parser.add_argument("--longest", type=int, default=290, help="tokens of the longest of them")
    parser.add_argument("--flags", nargs="*", default=[], help="further flags of both, such as features=int8")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args(arguments)


def run(words: str, flags: Sequence[str]) -> tuple[dict[str, Any], float]:
    """Run a command as a program; return its result and the seconds it took from start to end."""
    # a compile that an earlier run has kept would be in neither the estimate nor the time
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    began = time.perf_counter()
    done = subprocess.run([*PROGRAM, *words.split(), *flags], capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]), seconds


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ask and build, round by round."""
    responses = arguments.responses or folder / "responses.jsonl"
    if arguments.responses is None:
        vocab_size = read_target_config(arguments.target).vocab_size
        write_random_responses(responses, count=arguments.sequences, longest=arguments.longest, vocab_size=vocab_size)
    flags = ["--target", str(arguments.target), "--responses", str(responses), "--out", str(folder / "cache")]
    for pair in arguments.flags:
        name, _, value = pair.partition("=")
        flags += [f"--{name}", value]
    rounds = []
    for _ in range(arguments.rounds):
        cost, cost_s = run("cache cost", flags)
        built, build_s = run("cache build", flags)
        shutil.rmtree(folder / "cache")
        rounds.append(
            {
                "asking_s": cost_s,
                "said_s": cost["time"]["total_s"],
                "took_s": built["seconds"],
                "whole_command_s": build_s,
                "said_over_took": cost["time"]["total_s"] / built["seconds"],
                "said_bytes": cost["bytes"]["total"],
                "took_bytes": built["bytes"],
                "time": cost["time"],
            }
        )
        sys.stderr.write(f"said {rounds[-1]['said_s']:.1f} s, took {built['seconds']:.1f} s\n")
    return {
        "benchmark": "cache_cost",
        "machine": machine(),
        "target": str(arguments.target),
        "bytes_equal": all(each["said_bytes"] == each["took_bytes"] for each in rounds),
        "said_over_took": {
            "median": statistics.median(each["said_over_took"] for each in rounds),
            "all": [each["said_over_took"] for each in rounds],
        },
        "within_30_percent": all(1 / 1.3 <= each["said_over_took"] <= 1.3 for each in rounds),
        "rounds": rounds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(read_arguments(arguments), Path(folder))
    write_result(result)
    return 0 if result["bytes_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
