"""The records that tests/report draws pages from, made by the package's own commands on the tiny target.

Run as a program: `PYTHONPATH=tests python tests/support/tiny_records.py tests/report/records`. The folder is committed,
so that tests of pages need no model; run it again when a record's form changes. Two CPU minutes.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from dflash_jax.cli import main
from support import tiny, tiny_chain

OFFSETS = "0,4096,65536"
SEEN = ("a", "hello th", "0123 (ab) tho", "q.", "th!", "zz top, of", "x:", "say (a, b)", "no 1", "n o p q r s t")
UNSEEN = ("b", "hello you", "9876 (xy)", "r.", "the", "aa and bb", "y:", "do (c)", "no 3", "u v w x y 1")


def _run(*arguments: str, exit_code: int = 0) -> None:
    """One command, as typed; its table and progress go nowhere."""
    with contextlib.redirect_stdout(io.StringIO()):
        found = main(arguments)
    assert found == exit_code, f"{arguments} ended with {found}, {exit_code} was expected"


def _prompts(path: str, texts: tuple[str, ...], *, name: str) -> None:
    rows = [{"id": f"{name}/{number}", "prompt": text, "set": name} for number, text in enumerate(texts)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _cache(name: str, *, offsets: str = "0", limit: int | None = None) -> None:
    """Responses to a prompt file and their cache."""
    some = [] if limit is None else ["--limit", str(limit)]
    prompts = ["--prompts", f"{name}.jsonl", "--out", f"responses-{name}.jsonl", "--max-new-tokens", "48"]
    _run("responses", "--target", "target", *prompts, *some)
    layers = ["--capture-layers", ",".join(map(str, tiny.CAPTURE_LAYERS)), "--features", "float32"]
    into = ["--responses", f"responses-{name}.jsonl", "--out", f"cache-{name}", "--position-offsets", offsets]
    _run("cache", "build", "--target", "target", *into, *layers)


def _train(*more: str) -> None:
    shape = ["--block-size", "5", "--num-layers", "2", "--sequences-per-step", "5", "--anchors-per-sequence", "12"]
    rate = ["--learning-rate", "1e-2", "--steps", "120", "--checkpoint-every", "60", "--keep-initial"]
    _run("train", "--target", "target", "--cache", "cache-train", "--out", "run", *shape, *rate, *more)


def make_records() -> None:
    """Everything, in the current folder."""
    tiny.write_tiny_target(Path("target"), seed=tiny.TARGET_SEED)
    _prompts("train.jsonl", SEEN, name="train")
    _prompts("mixed.jsonl", SEEN[:5] + UNSEEN, name="mixed")
    _prompts("held-out.jsonl", UNSEEN, name="held-out")
    _cache("train")
    _cache("mixed", offsets=OFFSETS)
    _train("--eval-cache", "cache-mixed", "--eval-every", "30")
    checked = ["check", "--target", "target", "--drafter", "run/run-120", "--cache"]
    _run(*checked, "cache-train", "--json", "check-seen.json")
    _run(*checked, "cache-mixed", "--json", "check.json")
    _run(*checked, "cache-mixed", "--compare-drafters", "run/run-60", "run/run-0", "--json", "comparison.json")
    parity = ["parity", "--target", "target", "--drafter", "run/run-120", "--prompts", "mixed.jsonl"]
    parity += ["--max-new-tokens", "48", "--position-offsets", "0,4096,65536,1048576", "--json"]
    _run(*parity, "parity-holds.json")
    _run(*parity, "parity-broken.json", "--rope", "bfloat16", exit_code=1)
    decoded = ["--prompts", "held-out.jsonl", "--max-new-tokens", "48", "--compare", "--out", "decoded.jsonl"]
    _run("decode", "--target", "target", "--drafter", "run/run-120", *decoded, "--json", "decode.json")


def main_program(out: Path) -> None:
    """Make the records in a folder of their own, and keep what a report reads."""
    out = out.resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), tiny_chain.quick_compiles():
        make_records()
        shutil.rmtree(out, ignore_errors=True)
        (out / "run").mkdir(parents=True)
        for name in (*Path().glob("check*.json"), *Path().glob("comparison.json"), *Path().glob("parity-*.json")):
            shutil.copy(name, out)
        for name in ("decode.json", "decoded.jsonl", "decoded.jsonl.record.json"):
            shutil.copy(name, out)
        for name in ("config.json", "metrics.jsonl"):
            shutil.copy(Path("run") / name, out / "run")
        for kept in Path("run").glob("run-*"):
            (out / "run" / kept.name).mkdir()
            shutil.copy(kept / "record.json", out / "run" / kept.name)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main_program(Path(sys.argv[1]))
