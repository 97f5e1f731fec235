"""Building a cache: plan, capture, write. It can be killed at any instant and started again, to the same bytes."""

import fcntl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax import Array
from jaxtyping import Float, Int32
from safetensors import SafetensorError

from dflash_jax.cache.config import MAX_POSITION, CacheBuildConfig
from dflash_jax.cache.features import feature_layout
from dflash_jax.cache.manifest import (
    FORMAT,
    FORMAT_VERSION,
    LOCK_NAME,
    MANIFEST_NAME,
    read_manifest,
    write_manifest,
)
from dflash_jax.cache.plan import ShardPlan, Step, plan_shards
from dflash_jax.cache.responses import Responses, read_responses
from dflash_jax.cache.shards import Layout, bytes_per_token, empty_tensors, file_problem, tensor_layout, write_shard
from dflash_jax.core import InputError, make_record
from dflash_jax.targets import default_capture_layers, read_target_config

DEFAULT_CAPTURE_COUNT = 4
_PATHS = ("target", "responses", "out")  # where things lie may change between runs; what they are may not


@runtime_checkable
class Capture(Protocol):
    """The numerics of a build: features and greedy labels of a padded batch."""

    def __call__(
        self,
        tokens: Int32[np.ndarray, "batch seq"],
        lengths: Int32[np.ndarray, " batch"],
        position_offset: Int32[np.ndarray, " batch"],
    ) -> tuple[Float[np.ndarray | Array, "batch seq features"], Int32[np.ndarray | Array, "batch seq"]]:
        """Return features `[batch, seq, K*H]` and next_ids; values past a row's length are ignored.

        What comes back may still be computing on the device (jax arrays): it is fetched after the next batch was
        launched.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildProgress:
    """How far a build is.

    Attributes:
        tokens_done: tokens captured, those of shards kept from an earlier run included.
        tokens_total: tokens of the whole cache.
        tokens_kept: tokens of shards kept from an earlier run.
        bytes_done: what tokens_done take in shards, a thousandth at most left out.
        bytes_total: the same for tokens_total.
    """

    tokens_done: int
    tokens_total: int
    tokens_kept: int
    bytes_done: int
    bytes_total: int


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turn what a full disk, a quota or a read-only folder raises into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write the cache {out}: {error}: see to it, then run the same `cache build` again"
        ) from error


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder's lock. The kernel releases it when the process ends, however it ends."""
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK_NAME).open("ab")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another `cache build` is writing {out}: wait for it, or stop it first") from error
        yield


def _new_manifest(
    config: CacheBuildConfig,
    fingerprint: dict[str, Any],
    responses: Responses,
    shards: tuple[ShardPlan, ...],
    hidden_size: int,
) -> dict[str, Any]:
    """The manifest of a build of which no shard is finished."""
    record = make_record("cache build", config)
    layers = list(config.capture_layers or ())
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint | {"capture_layers": layers, "features_dtype": config.features},
        "config": record.pop("config"),
        "records": [record],
        "responses_sha256": responses.sha256,
        "hidden_size": hidden_size,
        "capture_layers": layers,
        "position_offsets": list(config.position_offsets),
        "features_dtype": config.features,
        "prompt_sets": list(responses.prompt_sets),
        "max_new_tokens": responses.max_new_tokens,
        "max_length": int(responses.lengths.max()),
        "num_shards": len(shards),
        "num_sequences": sum(shard.sequences for shard in shards),
        "num_tokens": sum(shard.tokens for shard in shards),
        "shards": [],
        "complete": False,
    }


def _settings(manifest: dict[str, Any]) -> dict[str, Any]:
    """What must not change between the runs of one build."""
    return {
        **{name: value for name, value in manifest["config"].items() if name not in _PATHS},
        **manifest["fingerprint"],
        **{name: manifest[name] for name in ("format_version", "hidden_size", "responses_sha256", "max_new_tokens")},
    }


def _resume(out: Path, new: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the manifest to go on with, holding only shards that are intact, and the number that were not.

    Raises:
        InputError: the folder holds something else, or a build with other settings.
    """
    if not (out / MANIFEST_NAME).exists():
        foreign = [path.name for path in out.iterdir() if path.name != LOCK_NAME and not path.name.endswith(".partial")]
        if foreign:
            raise InputError(f"{out} holds files and is not a cache ({sorted(foreign)[0]}): choose another --out")
        stored, intact, damaged = new, [], 0
    else:
        stored = read_manifest(out)
        was, now = _settings(stored), _settings(new)
        changed = [f"{k} was {was.get(k)!r}, now {now.get(k)!r}" for k in sorted(was | now) if was.get(k) != now.get(k)]
        if changed:
            raise InputError(
                f"{out} was begun with other settings: {'; '.join(changed)}: keep them or choose another --out"
            )
        intact = [entry for entry in stored["shards"] if file_problem(out / entry["file"], entry) is None]
        damaged = len(stored["shards"]) - len(intact)
        if stored["complete"] and not damaged:
            return stored, 0
        stored = stored | {"shards": intact, "complete": False, "records": stored["records"] + new["records"]}
    for stray in out.glob(".*.partial"):
        stray.unlink()
    write_manifest(out, stored)
    return stored, damaged


def resolve_layers(config: CacheBuildConfig, num_layers: int) -> tuple[int, ...]:
    """Return the capture layers of a build.

    Raises:
        InputError: one of them is not in the target.
    """
    layers = config.capture_layers or default_capture_layers(num_layers, DEFAULT_CAPTURE_COUNT)
    if max(layers) >= num_layers:
        raise InputError(
            f"--capture-layers names layer {max(layers)}, the target {config.target} has 0 to {num_layers - 1}"
        )
    return layers


def _launch(step: Step, responses: Responses, capture: Capture) -> tuple[Any, Any]:
    """Start a step's forward. Rows past the last sequence are one token long and forgotten."""
    tokens = np.zeros((step.padded_rows, step.padded_length), np.int32)
    lengths = np.ones(step.padded_rows, np.int32)
    for i, row in enumerate(step.rows):
        ids = responses.tokens(int(row))
        tokens[i, : len(ids)], lengths[i] = ids, len(ids)
    return capture(tokens, lengths, np.full(step.padded_rows, step.position_offset, np.int32))


def _captured(
    shards: list[ShardPlan], responses: Responses, capture: Capture
) -> Iterator[tuple[ShardPlan, Step, np.ndarray, np.ndarray]]:
    """Every step with its results, one launched ahead so that the device computes while the host copies and writes."""

    def fetch(shard: ShardPlan, step: Step, results: tuple[Any, Any]) -> tuple[ShardPlan, Step, np.ndarray, np.ndarray]:
        return shard, step, np.asarray(results[0]), np.asarray(results[1])

    pending = None
    for shard in shards:
        for step in shard.steps:
            launched = shard, step, _launch(step, responses, capture)
            if pending:
                yield fetch(*pending)
            pending = launched
    if pending:
        yield fetch(*pending)


def _shard_layout(shard: ShardPlan, manifest: dict[str, Any]) -> Layout:
    return tensor_layout(
        version=FORMAT_VERSION,
        tokens=shard.tokens,
        sequences=shard.sequences,
        features=feature_layout(manifest),
    )


def _begin_shard(shard: ShardPlan, responses: Responses, layout: Layout) -> dict[str, np.ndarray]:
    """A shard's tensors with everything that is known before the forward."""
    tensors = empty_tensors(layout)
    rows = np.concatenate([step.rows for step in shard.steps])
    lengths = responses.lengths[rows]
    tensors["seq_starts"][:] = np.cumsum([0, *lengths])
    tensors["position_offset"][:] = np.repeat(
        [step.position_offset for step in shard.steps], [len(s.rows) for s in shard.steps]
    )
    tensors["prompt_len"][:] = responses.prompt_len[rows]
    tensors["prompt_hash"][:] = responses.prompt_hash[rows]
    tensors["prompt_set"][:] = responses.prompt_set[rows]
    tensors["sequence_index"][:] = rows
    tensors["prefix_start"][:] = tensors["prefix_len"][:] = 0
    tensors["token_ids"][:] = np.concatenate([responses.tokens(int(row)) for row in rows])
    place = np.arange(shard.tokens) - np.repeat(tensors["seq_starts"][:-1], lengths)
    tensors["loss_mask"][:] = place >= np.repeat(responses.prompt_len[rows], lengths)
    return tensors


def first_not_finite(features: Float[np.ndarray, "seq features"]) -> int | None:
    """Row of the first NaN or infinity; None where all is finite. By exponent bits: numpy is slow on bfloat16."""
    bits, exponent = (np.uint16, 0x7F80) if features.dtype.itemsize == 2 else (np.uint32, 0x7F800000)
    largest = (features.view(bits) & bits(exponent)).max(axis=1)
    bad = np.flatnonzero(largest == exponent)
    return int(bad[0]) if bad.size else None


def _fill(
    tensors: dict[str, np.ndarray],
    first: int,
    step: Step,
    features: np.ndarray,
    next_ids: np.ndarray,
    responses: Responses,
) -> int:
    """Copy a step's valid rows into its shard from token `first`; return the token after them."""
    for i, row in enumerate(step.rows):
        length = int(responses.lengths[row])
        end = first + length
        tensors["features"][first:end] = features[i, :length]
        tensors["next_ids"][first:end] = next_ids[i, :length]
        token = first_not_finite(tensors["features"][first:end])
        if token is not None:
            raise InputError(
                f"the target gives NaN or infinite features for {responses.name(int(row))!r} of {responses.path} "
                f"(token {token}, position_offset {step.position_offset}): check its weights, or drop that row"
            )
        first = end
    return first


def _commit(out: Path, manifest: dict[str, Any], shard: ShardPlan, tensors: dict[str, np.ndarray]) -> None:
    """Write a shard aside, sync, rename, hash, then enter it in the ledger."""
    path = out / shard.file
    with _writing(out):
        size, digest = write_shard(path, _shard_layout(shard, manifest), tensors)
        entry = {
            "file": shard.file,
            "bytes": size,
            "sha256": digest,
            "sequences": shard.sequences,
            "tokens": shard.tokens,
        }
        # a rebuilt shard goes back to its place among those kept
        manifest["shards"] = sorted([*manifest["shards"], entry], key=lambda each: each["file"])
        write_manifest(out, manifest)


def _build_shards(
    out: Path,
    manifest: dict[str, Any],
    shards: list[ShardPlan],
    responses: Responses,
    capture: Capture,
    progress: Callable[[BuildProgress], None] | None,
) -> None:
    """Capture and write the given shards; at most one is being written while the next is filled."""
    per_token = bytes_per_token(feature_layout(manifest))
    total, done = manifest["num_tokens"], manifest["num_tokens"] - sum(shard.tokens for shard in shards)
    kept = done
    with ThreadPoolExecutor(max_workers=1) as writer:
        writing: Future[None] | None = None
        tensors: dict[str, np.ndarray] = {}
        filled = 0
        for shard, step, features, next_ids in _captured(shards, responses, capture):
            if step is shard.steps[0]:
                tensors, filled = _begin_shard(shard, responses, _shard_layout(shard, manifest)), 0
            before, filled = filled, _fill(tensors, filled, step, features, next_ids, responses)
            done += filled - before
            if step is shard.steps[-1]:
                if writing:
                    writing.result()
                writing = writer.submit(_commit, out, manifest, shard, tensors)
            if progress:
                progress(
                    BuildProgress(
                        tokens_done=done,
                        tokens_total=total,
                        tokens_kept=kept,
                        bytes_done=done * per_token,
                        bytes_total=total * per_token,
                    )
                )
        if writing:
            writing.result()


def build_cache(
    config: CacheBuildConfig,
    *,
    fingerprint: dict[str, Any],
    capture: Capture,
    progress: Callable[[BuildProgress], None] | None = None,
) -> dict[str, Any]:
    """Build a cache, or go on with one, and return what was done.

    Args:
        config: settings. Of the target only `config.json` is read here.
        fingerprint: what the target, its tokenizer and chat template are, as JSON values; `capture_layers` and
            `features_dtype` are added.
        capture: the forward.
        progress: called after every batch.

    Returns:
        `cache`, `num_sequences`, `num_tokens`, `num_shards`, `bytes`, `shards_kept` (finished by an earlier run),
        `shards_damaged` (finished once, no longer intact, built again), `seconds`, `tokens_per_s` (tokens captured by
        this run; 0 where nothing was left to do).

    Raises:
        InputError: bad responses, layers or offsets (before anything is written); another builder at work; other
            settings than those the folder was begun with; a folder that holds something else; features that are not
            finite; a full disk.
    """
    started = time.perf_counter()
    target = read_target_config(config.target)
    config = replace(config, capture_layers=resolve_layers(config, target.num_layers))
    responses = read_responses(config.responses, vocab_size=target.vocab_size, max_length=target.max_positions)
    longest = int(responses.lengths.max())
    if max(config.position_offsets) + longest > MAX_POSITION:
        raise InputError(
            f"--position-offsets {max(config.position_offsets)} + the longest sequence's {longest} tokens are "
            f"more than {MAX_POSITION}: lower the offset"
        )
    shards = plan_shards(
        responses.lengths,
        position_offsets=config.position_offsets,
        tokens_per_batch=config.tokens_per_batch,
        tokens_per_shard=config.tokens_per_shard,
    )
    new = _new_manifest(config, fingerprint, responses, shards, target.hidden_size)
    with _locked(config.out):
        with _writing(config.out):
            manifest, damaged = _resume(config.out, new)
        kept = {entry["file"] for entry in manifest["shards"]}
        missing = [shard for shard in shards if shard.file not in kept]
        _build_shards(config.out, manifest, missing, responses, capture, progress)
        if not manifest["complete"]:
            with _writing(config.out):
                write_manifest(config.out, manifest | {"complete": True})
        (config.out / LOCK_NAME).unlink(missing_ok=True)
    seconds = time.perf_counter() - started
    return {
        "cache": str(config.out),
        **{name: manifest[name] for name in ("num_sequences", "num_tokens", "num_shards")},
        "bytes": sum(entry["bytes"] for entry in manifest["shards"]),
        "shards_kept": len(kept),
        "shards_damaged": damaged,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(sum(shard.tokens for shard in missing) / seconds, 1),
    }
