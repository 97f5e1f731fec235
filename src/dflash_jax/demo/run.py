"""The chain, stage by stage, through the same functions that the commands call."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from dflash_jax import targets, text
from dflash_jax.cache import BuildProgress, CacheBuildConfig, build
from dflash_jax.check import CheckConfig, check
from dflash_jax.core import InputError, Move, atomic_file, progress_bar, read_json, write_json
from dflash_jax.demo.config import DemoConfig
from dflash_jax.generate import DecodeConfig, ResponsesConfig, decode_prompts, generate_responses
from dflash_jax.importer import import_smollm2
from dflash_jax.report import ReportConfig, write_report
from dflash_jax.train import TrainConfig, train

POSITION_OFFSETS = (0, 4096, 65536, 131072)
# What two cores can train in four minutes. Blocks of 4 and not 8: so young a drafter is hardly ever accepted beyond
# slot 3. Many small steps on the target's distribution; the head, most of the work, meets a sample of the vocabulary.
# docs/log.md has the runs behind these.
BLOCK_SIZE = 4
NUM_LAYERS = 3
SEQUENCES_PER_STEP = 4
ANCHORS_PER_SEQUENCE = 16
LEARNING_RATE = 1e-3
ADAM_B2 = 0.95
DECAY_GAMMA = 2.0
TOP_K = 32
SAMPLED_VOCAB = 4096
TRAINING_FORM = "/complete"  # the stdlib prompts that ask for a function's body, as HumanEval does


class _Stages:
    """Runs stages, times them, and passes over those whose result an earlier run left complete."""

    def __init__(self, out: Path) -> None:
        self._folder = out / "records"
        self._console = Console(stderr=True)
        self.seconds: dict[str, float] = {}

    def run(self, name: str, work: Callable[[Move], dict[str, Any]]) -> dict[str, Any]:
        """Return the stage's result, from its record where there is one."""
        path = self._folder / f"{name}.json"
        if path.exists():
            record = read_json(path, what=f"the record of the demo's stage {name}")
            self._console.print(f"{name}: kept from an earlier run ({record['seconds']:.0f} s)")
        else:
            begin = time.perf_counter()
            with progress_bar(name) as move:
                result = work(move)
            record = {"seconds": time.perf_counter() - begin, "result": result}
            write_json(path, record)
        self.seconds[name] = record["seconds"]
        return record["result"]

    def path(self, name: str) -> Path:
        """Where a stage's result alone is written, for the report."""
        return self._folder / name


def _import(folder: Path) -> dict[str, Any]:
    # an import is whole or absent, but its record may be missing after a kill
    return {"out": str(folder)} if folder.exists() else import_smollm2(folder)


def _write_training_prompts(path: Path) -> None:
    """Write the stdlib prompts of one form as a prompt file."""
    chosen = [prompt for prompt in text.load_prompts("stdlib") if prompt.id.endswith(TRAINING_FORM)]
    rows = [{"id": prompt.id, "messages": prompt.messages, "set": prompt.set} for prompt in chosen]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _responses(config: DemoConfig, prompts: str, limit: int, out: Path, move: Move) -> dict[str, Any]:
    if out.exists():
        return {"responses": str(out)}
    settings = ResponsesConfig(
        target=config.out / "target",
        prompts=prompts,
        out=out,
        max_new_tokens=config.max_new_tokens,
        batch_size=32,
        limit=limit,
        seed=config.seed,
    )
    return generate_responses(settings, progress=move)


def _cache(
    config: DemoConfig, responses: Path, out: Path, move: Move, *, offsets: tuple[int, ...] = (0,), top_k: int = 0
) -> dict[str, Any]:
    target = config.out / "target"
    fingerprint = targets.fingerprint(target) | text.load_tokenizer(target).fingerprint()

    def progress(now: BuildProgress) -> None:
        move(now.tokens_done, now.tokens_total, f"{now.tokens_done:,} tokens")

    settings = CacheBuildConfig(target=target, responses=responses, out=out, position_offsets=offsets, top_k=top_k)
    return build(settings, fingerprint=fingerprint, progress=progress)


def _train(config: DemoConfig, cache: Path, out: Path, move: Move) -> dict[str, Any]:
    settings = TrainConfig(
        target=config.out / "target",
        cache=cache,
        out=out,
        steps=config.steps,
        block_size=BLOCK_SIZE,
        num_layers=NUM_LAYERS,
        sequences_per_step=SEQUENCES_PER_STEP,
        anchors_per_sequence=ANCHORS_PER_SEQUENCE,
        loss="kl",
        sampled_vocab=SAMPLED_VOCAB,
        learning_rate=LEARNING_RATE,
        adam_b2=ADAM_B2,
        decay_gamma=DECAY_GAMMA,
        checkpoint_every=max(1, config.steps // 2),
        keep_initial=True,
        seed=config.seed,
        resume=(out / "config.json").exists(),
    )
    return train(settings, progress=move)


def _check(config: DemoConfig, cache: Path, run: Path, move: Move) -> dict[str, Any]:
    """The trained drafter at every offset, and the untrained one at the first."""
    settings = CheckConfig(
        target=config.out / "target", cache=cache, drafter=run / f"run-{config.steps}", seed=config.seed
    )
    trained = check(settings, progress=move)
    untrained = CheckConfig(
        target=settings.target, cache=cache, drafter=run / "run-0", position_offsets=(0,), seed=config.seed
    )
    return trained | {"untrained": check(untrained, progress=move)}


def _decode(config: DemoConfig, drafter: Path, out: Path, move: Move) -> dict[str, Any]:
    settings = DecodeConfig(
        target=config.out / "target",
        drafter=drafter,
        prompts="humaneval",
        max_new_tokens=config.max_new_tokens,
        compare=True,
        limit=config.decode_prompts,
        seed=config.seed,
        out=out,
    )
    return decode_prompts(settings, progress=move)


def _same_settings(config: DemoConfig) -> None:
    """Hold a continued demo to the settings it was begun with.

    Raises:
        InputError: they differ, or the folder holds something else.
    """
    path, settings = (
        config.out / "demo.json",
        {name: getattr(config, name) for name in DemoConfig.__dataclass_fields__ if name != "out"},
    )
    if path.exists():
        begun = read_json(path, what="the demo's settings")
        changed = [
            f"{name} was {begun.get(name)!r}, now {value!r}"
            for name, value in settings.items()
            if begun.get(name) != value
        ]
        if changed:
            raise InputError(
                f"{config.out} holds a demo with other settings: {'; '.join(changed)}: choose another --out"
            )
    elif config.out.exists() and any(config.out.iterdir()):
        raise InputError(f"{config.out} exists and is not a demo's folder: choose another --out or remove it")
    else:
        write_json(path, settings)


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the whole chain: train on `stdlib` prompts, check and decode on held-out `humaneval` prompts, report.

    Returns:
        `check` (its JSON, with the untrained drafter's under `untrained`), `decode` (its JSON), `report` (path of the
        page), `seconds` by stage.

    Raises:
        InputError: the wheels with SmolLM2 or HumanEval are not installed; `out` holds something else.
    """
    _same_settings(config)
    out, stages = config.out, _Stages(config.out)
    trained_on, held_out, run = out / "cache-train", out / "cache-check", out / "run"
    train_responses, check_responses = out / "responses-train.jsonl", out / "responses-check.jsonl"
    decoded = out / "decoded.jsonl"
    stages.run("target", lambda _: _import(out / "target"))
    prompts = out / "prompts-train.jsonl"
    if not prompts.exists():
        _write_training_prompts(prompts)
    stages.run("responses-train", lambda m: _responses(config, str(prompts), config.train_prompts, train_responses, m))
    stages.run("responses-check", lambda m: _responses(config, "humaneval", config.check_prompts, check_responses, m))
    stages.run("cache-train", lambda m: _cache(config, train_responses, trained_on, m, top_k=TOP_K))
    stages.run("cache-check", lambda m: _cache(config, check_responses, held_out, m, offsets=POSITION_OFFSETS))
    stages.run("train", lambda m: _train(config, trained_on, run, m))
    checked = stages.run("check", lambda m: _check(config, held_out, run, m))
    compared = stages.run("decode", lambda m: _decode(config, run / f"run-{config.steps}", decoded, m))
    write_json(stages.path("check-result.json"), checked)
    write_json(stages.path("decode-result.json"), compared)
    inputs = (stages.path("check-result.json"), stages.path("decode-result.json"), decoded, run)
    report = ReportConfig(inputs=inputs, out=out / "report.html", title="dflash-jax demo: SmolLM2-135M-Instruct")
    page = stages.run("report", lambda _: write_report(report))
    return {"check": checked, "decode": compared, "report": page["report"], "seconds": stages.seconds}
