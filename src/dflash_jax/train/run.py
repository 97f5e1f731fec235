"""The `train` command: a cache or responses in, a run folder out."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dflash_jax import targets, text
from dflash_jax.cache import DEFAULT_CAPTURE_COUNT, check_fingerprint, open_cache
from dflash_jax.core import RECORD_NAME, InputError, Move, make_record, no_progress, parse_mesh, read_json
from dflash_jax.drafter import Drafter, load_drafter, read_drafter_config, with_draft_vocabulary
from dflash_jax.train.checkpoint import BEST, RunFolder, open_writer
from dflash_jax.train.config import TrainConfig
from dflash_jax.train.data import CachedSource, Source
from dflash_jax.train.evaluate import HeldOut, open_held_out
from dflash_jax.train.init import drafter_config, new_drafter, warm_layers
from dflash_jax.train.live import make_live_step, open_live
from dflash_jax.train.loop import Loop, Step
from dflash_jax.train.offsets import parse_offsets
from dflash_jax.train.plan import DEFAULT_BLOCK_SIZE, DEFAULT_NUM_LAYERS, plan_run
from dflash_jax.train.sharding import WHOLE, check_batch, put
from dflash_jax.train.step import frozen_ends, make_step, new_state, put_state
from dflash_jax.train.track import Tracker, check_trackers, open_trackers
from dflash_jax.train.watch import LossWatch

# where things lie, on what they run and what is kept may change; what is trained, and on what, may not
_FREE_ON_RESUME = (
    "resume",
    "out",
    "target",
    "cache",
    "responses",
    "eval_cache",
    "mesh",
    "keep",
    "tensorboard",
    "track",
)
_SOURCE_IDENTITIES = ("cache_fingerprint", "cache_sha256", "responses_sha256")


def _target_fingerprint(target: Path) -> dict[str, Any]:
    return targets.fingerprint(target) | text.load_tokenizer(target).fingerprint()


def _open_source(config: TrainConfig) -> Source:
    """Where sequences come from, held against the target.

    Raises:
        InputError: a bad target, cache or responses file; a cache of another target.
    """
    fingerprint = _target_fingerprint(config.target)
    if config.cache is not None:
        cache = open_cache(config.cache)
        check_fingerprint(cache.manifest, fingerprint, what=f"the target {config.target}")
        if config.loss == "kl" and not cache.manifest.get("top_k", 0):
            raise InputError(
                f"--loss kl needs the target's distribution, which the cache {config.cache} does not have: build one "
                "with `cache build --top-k 32`"
            )
        return CachedSource(cache)
    assert config.responses is not None
    target, layers = targets.read_target_config(config.target), config.capture_layers
    if layers is None and config.init_from is not None:
        layers = read_drafter_config(config.init_from).capture_layers
    return open_live(
        config.responses,
        target=target,
        capture_layers=layers or targets.default_capture_layers(target.num_layers, DEFAULT_CAPTURE_COUNT),
        offsets=parse_offsets(config.position_offsets),
        fingerprint=fingerprint,
    )


def _init_config(config: TrainConfig, source: Source) -> TrainConfig:
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
            ("capture_layers", list(parent.capture_layers), list(source.capture_layers)),
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


def _first_drafter(config: TrainConfig, source: Source, target: targets.Target) -> Drafter:
    if config.init_from is not None:
        # the loss is over all tokens: a draft vocabulary is chosen anew when the result is exported
        return with_draft_vocabulary(load_drafter(config.init_from), None)
    assert config.block_size is not None
    assert config.num_layers is not None
    mask = config.mask_token_id
    if mask is None:
        mask = text.load_tokenizer(config.target).mask_token_id(target.config.vocab_size)
    if not 0 <= mask < target.config.vocab_size:
        raise InputError(f"--mask-token-id is {mask}: the target's vocabulary is 0 to {target.config.vocab_size - 1}")
    shape = drafter_config(
        target,
        capture_layers=source.capture_layers,
        num_layers=config.num_layers,
        block_size=config.block_size,
        mask_token_id=mask,
        sliding_window=config.sliding_window,
        full_layers=config.full_layers or (),
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
        if folder.is_writer:  # who may have made it already when the others look
            folder.check_new()
        return config, None
    begun = folder.read_config()
    parent = begun["config"].get("init_from")
    return replace(config, init_from=config.init_from or (parent and Path(parent))), begun


def _resolved(path: Path | None) -> Path | None:
    """What a link such as RUN/best points to now: it may point elsewhere when the run is resumed."""
    return path.parent / path.readlink() if path is not None and path.is_symlink() else path


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
        f"the {name.partition('_')[0]} {'are others' if 'responses' in name else 'is another one'} ({name} differs)"
        for name in _SOURCE_IDENTITIES
        if begun.get(name) != now.get(name)
    ]
    if changed:
        raise InputError(f"--resume needs the settings the run was begun with: {'; '.join(changed)}")


def _open_mesh(config: TrainConfig) -> Mesh | None:
    """The devices to train on.

    Raises:
        InputError: see `targets.open_mesh` and `check_batch`.
    """
    check_batch(parse_mesh(config.mesh), config.sequences_per_step, parts=config.parts)
    return targets.open_mesh(targets.read_target_config(config.target), config.mesh)


def _load_target(config: TrainConfig, mesh: Mesh | None) -> targets.Target:
    """The target in the step's dtype, with the layers that are needed: all for live features, else those copied from.

    Where a CPU needs no more of it than those and the two ends it is float32, as `frozen_ends` wants them there.

    Raises:
        InputError: see `targets.load_target`; a drafter deeper than the target.
    """
    depth, wanted = targets.read_target_config(config.target).num_layers, config.num_layers or 0
    layers = None
    if config.features == "cached":
        copies = config.init == "target" and config.init_from is None
        if copies and wanted > depth:
            raise InputError(
                f"--num-layers is {wanted}, the target has {depth} to copy from: give at most that, or --init random"
            )
        layers = warm_layers(wanted, num_target_layers=depth) if copies else ()
    is_wide = config.features == "cached" and jax.default_backend() == "cpu"
    dtype = jnp.dtype(jnp.float32 if is_wide else config.dtype)
    return targets.load_target(config.target, dtype=dtype, mesh=mesh, layers=layers)


def _held_out(config: TrainConfig, source: Source, seen: list[str]) -> HeldOut | None:
    """The prompts of --eval-cache; None without."""
    if config.eval_cache is None:
        return None
    wanted = _target_fingerprint(config.target) | {"capture_layers": list(source.capture_layers)}
    return open_held_out(
        config.eval_cache,
        fingerprint=wanted,
        seen=frozenset(int(value, 16) for value in seen),
        max_positions=targets.read_target_config(config.target).max_positions,
        where=f"the target {config.target} with the layers that are trained on",
    )


def _trackers(config: TrainConfig, folder: RunFolder, record: dict[str, Any], *, first: int) -> list[Tracker]:
    """What is told every row; in the process that writes the curve."""
    if not folder.is_writer:
        return []
    settings = {"tensorboard": config.tensorboard, "track": config.track}
    return open_trackers(config.out, **settings, config=record["config"], first=first)


def _make_step(
    config: TrainConfig, source: Source, target: targets.Target, mesh: Mesh | None
) -> tuple[Step, Callable[[int], Any], targets.Target]:
    """One step, the batch of every step, and what stays of the target: its layers only where features are live."""
    step_function = make_step(config, mesh=mesh)
    batches = source.batches(
        sequences_per_step=config.sequences_per_step,
        max_positions=target.config.max_positions,
        seed=config.seed,
        mesh=mesh,
        widths=config.length_buckets or 1,
    )
    if config.features == "live":
        live = make_live_step(step_function, config, capture_layers=source.capture_layers)
        return lambda state, texts: live(state, target, texts), batches, target
    ends = frozen_ends(target.embed_tokens, target.head, config)
    return lambda state, batch: step_function(state, *ends, batch), batches, replace(target, layers=())


def train(config: TrainConfig, *, progress: Move = no_progress) -> dict[str, Any]:
    """Train a drafter; write `run-<step>` folders, the curve and the resumable state.

    With `resume`, the run goes on from its newest state to the same weights, bit for bit, that it would have had
    uninterrupted (same devices, same settings). With `plan`, nothing is trained or written: see `plan_run`.

    Returns:
        `run`, `drafter` (the last one's folder), `steps`, `steps_this_run`, `loss`, `accuracy`, `accuracy_by_slot`,
        `anchors_per_s` (of the last steps), `seconds`, `input_share` (of the steps' seconds that the loop waited for
        batches), `best` (step, folder and held-out numbers; None without `eval_cache`), `num_prompts` (seen by the
        drafter, `init_from`'s included), `num_parameters`.

    Raises:
        InputError: bad target or cache; a cache of another target, or without what the loss needs; settings that do not
            fit `init_from` or the run to resume; an existing `out`; a loss that is not finite.
    """
    if config.plan:
        return plan_run(config)
    started = time.perf_counter()
    check_trackers(tensorboard=config.tensorboard, track=config.track)
    config = replace(config, init_from=_resolved(config.init_from))
    folder = RunFolder(config.out)
    config, begun = _begin(config, folder)
    source = _open_source(config)
    config = _init_config(config, source)
    record = make_record("train", config, seed=config.seed) | {
        "cache_fingerprint": source.fingerprint,
        **source.identity,
    }
    if begun is not None:
        _check_resumable(begun, record)
    mesh = _open_mesh(config)
    inherited = _inherited_prompts(config)
    # every shard is verified here, before anything is written
    seen = sorted(inherited | {f"{value:016x}" for value in source.prompt_hashes()})
    held_out = _held_out(config, source, seen)
    target = _load_target(config, mesh)
    drafter = _first_drafter(config, source, target)
    state, done = put_state(new_state(put(drafter, WHOLE, mesh), config), mesh), 0
    if config.resume:
        state, done = folder.restore(state)
    else:
        folder.create(record)
    if config.keep_initial and done == 0 and folder.is_writer:
        untrained = record | {"trained_prompt_hashes": sorted(inherited), "step": 0}
        folder.save_drafter(state.drafter, step=0, record=untrained)
    step, batches, target = _make_step(config, source, target, mesh)
    loop = Loop(
        config=config,
        folder=folder,
        record=record | {"trained_prompt_hashes": seen},
        progress=progress,
        step=step,
        batches=batches,
        embed_tokens=target.embed_tokens,
        head=target.head,
        held_out=held_out,
        watch=LossWatch(config.spike_factor, curve=folder.metrics_path),
        trackers=_trackers(config, folder, record, first=done + 1),
    )
    del drafter, target
    with ExitStack() as closing:
        for tracker in loop.trackers:
            closing.callback(tracker.close)
        writer = closing.enter_context(open_writer(folder, keep=config.keep))
        state = loop.run(state, done, writer)
        best = writer.best
    last = (folder.metrics() or [{}])[-1]
    return {
        "run": str(config.out),
        "drafter": str(folder.drafter_path(config.steps)),
        "best": None if best is None else {"step": best, "drafter": str(config.out / BEST), **folder.evaluation(best)},
        "steps": config.steps,
        "steps_this_run": config.steps - done,
        **{name: last.get(name) for name in ("loss", "accuracy", "accuracy_by_slot", "anchors_per_s")},
        "seconds": time.perf_counter() - started,
        "input_share": loop.input_s / loop.seconds if loop.seconds else 0.0,
        "num_prompts": len(seen),
        "num_parameters": sum(leaf.size for leaf in jax.tree_util.tree_leaves(state.drafter)),
    }
