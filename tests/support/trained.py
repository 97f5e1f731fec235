"""A drafter trained by our own commands on the real SmolLM2: half memorised, so that its blocks are of every length."""

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dflash_jax import targets, text
from dflash_jax.cache import CacheBuildConfig, build
from dflash_jax.generate import ResponsesConfig, generate_responses
from dflash_jax.train import TrainConfig, train
from support.smollm2 import smollm2_target

NEW_TOKENS, BLOCK_SIZE, STEPS, CAPTURE_LAYERS = 32, 8, 60, (10, 18, 27)
SEEN = ("Count from one to ten in words.", "Write a Python function that adds two numbers.")
UNSEEN = ("Count from one to five in words.", "Why is the sky blue?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a run left.

    Attributes:
        responses: rows of the responses file: two prompts that were trained on, then two that were not.
        cache: float32 features of the two.
        unseen_cache: float32 features of the other two.
        drafter: run folder's last drafter.
    """

    responses: list[dict]
    cache: Path
    unseen_cache: Path
    drafter: Path


def _build_cache(target: Path, responses: Path, out: Path) -> Path:
    fingerprint = targets.fingerprint(target) | text.load_tokenizer(target).fingerprint()
    config = CacheBuildConfig(
        target=target, responses=responses, out=out, capture_layers=CAPTURE_LAYERS, features="float32"
    )
    build(config, fingerprint=fingerprint)
    return out


def train_on_a_few(target: Path, folder: Path, *, steps: int) -> Trained:
    """Responses, cache and a 2-layer drafter of a few steps, about a minute on 2 cores."""
    rows = [
        {"id": f"q{i}", "messages": [{"role": "user", "content": content}]} for i, content in enumerate(SEEN + UNSEEN)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate_responses(
        ResponsesConfig(
            target=target,
            prompts=str(folder / "prompts.jsonl"),
            out=folder / "all.jsonl",
            max_new_tokens=NEW_TOKENS,
            batch_size=len(rows),
        )
    )
    lines = (folder / "all.jsonl").read_text(encoding="utf-8").split("\n")[: len(rows)]
    caches = []
    for name, part in (("seen", lines[: len(SEEN)]), ("unseen", lines[len(SEEN) :])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
        # the cache takes max_new_tokens from the responses' record, without which its blocks end with the text
        (folder / f"{name}.jsonl.record.json").write_bytes((folder / "all.jsonl.record.json").read_bytes())
        caches.append(_build_cache(target, folder / f"{name}.jsonl", folder / f"cache-{name}"))
    config = TrainConfig(
        target=target,
        cache=caches[0],
        out=folder / "run",
        steps=steps,
        block_size=BLOCK_SIZE,
        num_layers=2,
        sequences_per_step=len(SEEN),
        anchors_per_sequence=12,
        learning_rate=1.5e-3,
        warmup_ratio=0.1,
        adam_b2=0.95,
    )
    train(config)
    return Trained(
        responses=[json.loads(line) for line in lines],
        cache=caches[0],
        unseen_cache=caches[1],
        drafter=folder / "run" / f"run-{steps}",
    )


@functools.cache
def trained_drafter() -> Trained:
    """`train_on_a_few` of the real SmolLM2, once per process; do not write into it."""
    return train_on_a_few(smollm2_target(), Path(tempfile.mkdtemp(prefix="trained-")), steps=STEPS)
