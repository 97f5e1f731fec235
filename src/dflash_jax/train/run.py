"""The `train` command: a cache in, a run folder out."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dflash_jax import targets, text
from dflash_jax.cache import Cache, check_fingerprint, open_cache
from dflash_jax.core import RECORD_NAME, InputError, Move, make_record, no_progress, read_json, sha256_json
from dflash_jax.drafter import Drafter, load_drafter, read_drafter_config
from dflash_jax.train.checkpoint import RunFolder
from dflash_jax.train.config import TrainConfig
from dflash_jax.train.data import make_batches
from dflash_jax.train.init import drafter_config, new_drafter
from dflash_jax.train.optimizer import learning_rate_schedule
from dflash_jax.train.step import StepResult, TrainState, frozen_ends, make_step, new_state
from dflash_jax.train.watch import LossWatch

DEFAULT_BLOCK_SIZE = 8
DEFAULT_NUM_LAYERS = 4
FLUSH_EVERY = 10  # steps between looks at the device's results: the host waits for nothing in between
_FREE_ON_RESUME = ("resume", "out", "target", "cache")  # where things lie may change, what they are may not


def _target_fingerprint(target: Path) -> dict[str, Any]:
    return targets.fingerprint(target) | text.load_tokenizer(target).fingerprint()


def _init_config(config: TrainConfig, cache: Cache) -> TrainConfig:
    """The config with block_size and num_layers filled in, from --init-from where it is given.

    Raises:
        InputError: --init-from does not fit the flags, the cache or the target.
    """
    if config.init_from is None:
        return replace(
            config,
            block_size=config.block_size or DEFAULT_BLOCK_SIZE,
            num_layers=config.num_layers or DEFAULT_NUM_LAYERS,
        )
    parent, target = read_drafter_config(config.init_from), targets.read_target_config(config.target)
    problems = [
        f"{name} is {theirs}, {ours} is needed"
        for name, theirs, ours in (
            ("block_size", parent.block_size, config.block_size),
            ("num_layers", parent.num_layers, config.num_layers),
            ("mask_token_id", parent.mask_token_id, config.mask_token_id),
            ("capture_layers", list(parent.capture_layers), cache.manifest["capture_layers"]),
            ("hidden_size", parent.hidden_size, target.hidden_size),
            ("vocab_size", parent.vocab_size, target.vocab_size),
            ("num_target_layers", parent.num_target_layers, target.num_layers),
        )
        if ours is not None and ours != theirs
    ]
    if problems:
        raise InputError(f"--init-from {config.init_from} does not fit: {'; '.join(problems)}")
    return replace(
        config, block_size=parent.block_size, num_layers=parent.num_layers, mask_token_id=parent.mask_token_id
    )


def _first_drafter(config: TrainConfig, cache: Cache, target: targets.Target) -> Drafter:
    if config.init_from is not None:
        return load_drafter(config.init_from)
    assert config.block_size is not None
    assert config.num_layers is not None
    mask = config.mask_token_id
    if mask is None:
        mask = text.load_tokenizer(config.target).mask_token_id(target.config.vocab_size)
    if not 0 <= mask < target.config.vocab_size:
        raise InputError(f"--mask-token-id is {mask}: the target's vocabulary is 0 to {target.config.vocab_size - 1}")
    shape = drafter_config(
        target,
        capture_layers=tuple(cache.manifest["capture_layers"]),
        num_layers=config.num_layers,
        block_size=config.block_size,
        mask_token_id=mask,
    )
    return new_drafter(shape, target, init=config.init, key=jax.random.key(config.seed))


def _inherited_prompts(config: TrainConfig) -> set[str]:
    """Hashes of the prompts that --init-from was trained on, as hex; none for new weights."""
    if config.init_from is None or not (config.init_from / RECORD_NAME).is_file():
        return set()
    record = read_json(config.init_from / RECORD_NAME, what="the record of --init-from")
    return set(record.get("trained_prompt_hashes", []))


def _begin(config: TrainConfig, folder: RunFolder) -> tuple[TrainConfig, dict[str, Any] | None]:
    """The config, with the --init-from that a run to be resumed was begun with, and what that run's folder says.

    Raises:
        InputError: nothing to resume, or a folder that is not new.
    """
    if not config.resume:
        folder.check_new()
        return config, None
    begun = folder.read_config()
    parent = begun["config"].get("init_from")
    return replace(config, init_from=config.init_from or (parent and Path(parent))), begun


def _check_resumable(begun: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise where a resumed run would not be the run that was begun.

    Raises:
        InputError: every setting that differs.
    """
    changed = [
        f"{name} was {begun['config'].get(name)!r}, now {value!r}"
        for name, value in now["config"].items()
        if name not in _FREE_ON_RESUME and begun["config"].get(name) != value
    ]
    changed += [
        f"the cache is another one ({name} differs)"
        for name in ("cache_fingerprint", "cache_sha256")
        if begun.get(name) != now[name]
    ]
    if changed:
        raise InputError(f"--resume needs the settings the run was begun with: {'; '.join(changed)}")


def _metrics_row(
    step: int, result: StepResult, learning_rate: float, anchors_per_s: float, seconds: float
) -> dict[str, Any]:
    statistics = result.statistics
    return {
        "step": step,
        "loss": float(statistics.loss),
        "accuracy": float(statistics.accuracy),
        "accuracy_by_slot": np.asarray(statistics.accuracy_by_slot).tolist(),
        "num_labels": int(statistics.num_labels),
        "learning_rate": learning_rate,
        "grad_norm": float(result.grad_norm),
        "anchors_per_s": anchors_per_s,
        "seconds": seconds,
    }


@dataclass(kw_only=True)
class _Loop:
    """The steps of one call: what they need, and what they leave."""

    config: TrainConfig
    folder: RunFolder
    record: dict[str, Any]
    progress: Move
    watch: LossWatch

    def run(self, state: TrainState, done: int, target: targets.Target, cache: Cache) -> TrainState:
        """Train from step `done` to the last one, with checkpoints on the way."""
        config = self.config
        step_function = make_step(config)
        batches = make_batches(
            cache,
            sequences_per_step=config.sequences_per_step,
            max_positions=target.config.max_positions,
            seed=config.seed,
        )
        ends = frozen_ends(target.embed_tokens, target.head, config)
        pending: list[StepResult] = []
        started = last = time.perf_counter()
        for step in range(done, config.steps):
            state, result = step_function(state, *ends, batches(step))
            pending.append(result)
            is_checkpoint = (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
            if is_checkpoint or len(pending) == FLUSH_EVERY:
                jax.block_until_ready(pending[-1].grad_norm)
                now = time.perf_counter()
                self._flush(pending, step + 1, rate=len(pending) / (now - last), seconds=now - started)
                pending, last = [], now
            if is_checkpoint:
                self.folder.save(state, step=step + 1, record=self.record | {"step": step + 1})
                last = time.perf_counter()
        return state

    def _flush(self, results: list[StepResult], step: int, *, rate: float, seconds: float) -> None:
        """Write finished steps to the curve.

        Raises:
            InputError: a loss is not finite, or spikes; the last good checkpoint is named.
        """
        schedule = learning_rate_schedule(self.config)
        anchors = self.config.sequences_per_step * self.config.anchors_per_sequence
        rows = []
        for index, result in enumerate(results):
            number = step - len(results) + 1 + index
            row = _metrics_row(number, result, float(np.asarray(schedule(number - 1))), rate * anchors, seconds)
            if trouble := self.watch.see(number, loss=row["loss"], grad_norm=row["grad_norm"]):
                self.folder.append_metrics(rows)
                # the weights that gave this loss are those of the step before: its checkpoint is no good one
                good = [self.folder.drafter_path(s) for s in self.folder.drafter_steps() if s < trouble.step - 1]
                where = f"the last good checkpoint is {good[-1]}" if good else "no good checkpoint was written yet"
                raise InputError(
                    f"{trouble.what}: {where}; start again with a lower --learning-rate, from there with --init-from "
                    "or anew"
                )
            rows.append(row)
        self.folder.append_metrics(rows)
        note = f"loss {rows[-1]['loss']:.3f}  acc {rows[-1]['accuracy']:.3f}  {rows[-1]['anchors_per_s']:.0f} anchors/s"
        self.progress(step, self.config.steps, note)


def train(config: TrainConfig, *, progress: Move = no_progress) -> dict[str, Any]:
    """Train a drafter; write `run-<step>` folders, the curve and the resumable state.

    With `resume`, the run goes on from its newest state to the same weights, bit for bit, that it would have had
    uninterrupted (same devices, same settings).

    Returns:
        `run`, `drafter` (the last one's folder), `steps`, `steps_this_run`, `loss`, `accuracy`, `accuracy_by_slot`,
        `anchors_per_s` (of the last steps), `seconds`, `num_prompts` (seen by the drafter, `init_from`'s included),
        `num_parameters`.

    Raises:
        InputError: bad target or cache; a cache of another target, or without what the loss needs; settings that do not
            fit `init_from` or the run to resume; an existing `out`; a loss that is not finite.
    """
    started = time.perf_counter()
    cache = open_cache(config.cache)
    check_fingerprint(cache.manifest, _target_fingerprint(config.target), what=f"the target {config.target}")
    if config.loss == "kl" and not cache.manifest.get("top_k", 0):
        raise InputError(
            f"--loss kl needs the target's distribution, which the cache {config.cache} does not have: build one with "
            "`cache build --top-k 32`"
        )
    folder = RunFolder(config.out)
    config, begun = _begin(config, folder)
    config = _init_config(config, cache)
    record = make_record("train", config, seed=config.seed) | {
        "cache_fingerprint": cache.manifest["fingerprint"],
        "cache_sha256": sha256_json([entry["sha256"] for entry in cache.manifest["shards"]]),
    }
    if begun is not None:
        _check_resumable(begun, record)
    inherited = _inherited_prompts(config)
    # every shard is verified here, before anything is written
    seen = sorted(inherited | {f"{value:016x}" for value in cache.prompt_hashes().tolist()})
    target = targets.load_target(config.target)
    drafter = _first_drafter(config, cache, target)
    state, done = new_state(drafter, config), 0
    if config.resume:
        state, done = folder.restore(state)
    else:
        folder.create(record)
    if config.keep_initial and done == 0:
        folder.save_drafter(state, step=0, record=record | {"trained_prompt_hashes": sorted(inherited), "step": 0})
    watch = LossWatch(config.spike_factor, curve=folder.metrics_path)
    record |= {"trained_prompt_hashes": seen}
    loop = _Loop(config=config, folder=folder, record=record, progress=progress, watch=watch)
    state = loop.run(state, done, target, cache)
    last = folder.last_metrics()
    return {
        "run": str(config.out),
        "drafter": str(folder.drafter_path(config.steps)),
        "steps": config.steps,
        "steps_this_run": config.steps - done,
        **{name: last.get(name) for name in ("loss", "accuracy", "accuracy_by_slot", "anchors_per_s")},
        "seconds": time.perf_counter() - started,
        "num_prompts": len(seen),
        "num_parameters": sum(leaf.size for leaf in jax.tree_util.tree_leaves(state.drafter)),
    }
