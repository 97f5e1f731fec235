"""Building a cache: plan, capture, write. It can be killed at any instant and started again, to the same bytes."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dflash_jax.cache.config import MAX_POSITION, CacheBuildConfig
from dflash_jax.cache.forward import Capture, begin_shard, fill, forwards
from dflash_jax.cache.ledger import Share, check_settings, commit, locked, resume
from dflash_jax.cache.manifest import FORMAT, FORMAT_VERSION, read_manifest
from dflash_jax.cache.plan import ShardPlan, group_prompts, plan_sha256, plan_shards
from dflash_jax.cache.responses import Responses, read_responses
from dflash_jax.cache.shards import Layout, bytes_per_token, tensor_layout
from dflash_jax.core import InputError, make_record
from dflash_jax.targets import TargetConfig, default_capture_layers, read_target_config

DEFAULT_CAPTURE_COUNT = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildProgress:
    """How far a build is; of a build by several processes, this one's share.

    Attributes:
        tokens_done: tokens captured, those of shards kept from an earlier run included.
        tokens_total: tokens to be captured in all.
        tokens_kept: tokens of shards kept from an earlier run.
        bytes_done: what tokens_done take in shards, a thousandth at most left out.
        bytes_total: the same for tokens_total.
        seconds: since this run began to capture.
    """

    tokens_done: int
    tokens_total: int
    tokens_kept: int
    bytes_done: int
    bytes_total: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens captured a second by this run, compiling included."""
        return (self.tokens_done - self.tokens_kept) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """Time that the rest takes at the rate so far. Batches are longest first, so that it errs on the safe side."""
        return (self.tokens_total - self.tokens_done) / max(self.tokens_per_s, 1e-9)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """Everything of a build that is known before the target is loaded.

    Attributes:
        config: settings, capture layers resolved.
        target: the target's architecture.
        responses: where the texts are.
        shards: all shards of the build.
        extends: whether any batch is extended by further responses to its prompts.
    """

    config: CacheBuildConfig
    target: TargetConfig
    responses: Responses
    shards: tuple[ShardPlan, ...]
    extends: bool

    def layout(self, shard: ShardPlan) -> Layout:
        """Return the tensors of a shard."""
        features = self.config.feature_layout(self.target.hidden_size)
        return tensor_layout(version=FORMAT_VERSION, tokens=shard.tokens, sequences=shard.sequences, features=features)


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


def plan_sequences(config: CacheBuildConfig, target: TargetConfig, responses: Responses) -> BuildPlan:
    """Plan the build of some sequences.

    Args:
        config: settings, capture layers resolved.
        target: the target's architecture.
        responses: the texts; only their lengths and prompt hashes count.

    Raises:
        InputError: an offset that is too high for the longest sequence; a top_k above the vocabulary; more than 100000
            shards.
    """
    if config.top_k > target.vocab_size:
        raise InputError(
            f"--top-k is {config.top_k}, the target {config.target} has {target.vocab_size} tokens: lower it"
        )
    longest = int(responses.lengths.max())
    if max(config.position_offsets) + longest > MAX_POSITION:
        raise InputError(
            f"--position-offsets {max(config.position_offsets)} + the longest sequence's {longest} tokens are "
            f"more than {MAX_POSITION}: lower the offset"
        )
    # a group's own tokens are at most `most` batches, so that a batch with its extensions fits a shard
    most = max(1, config.tokens_per_shard // config.tokens_per_batch) if config.share_prompts else 1
    shards = plan_shards(
        responses.lengths,
        prompt_len=responses.prompt_len,
        groups=group_prompts(responses.lengths, responses.prompt_len, responses.prompt_hash, most=most),
        position_offsets=config.position_offsets,
        tokens_per_batch=config.tokens_per_batch,
        tokens_per_shard=config.tokens_per_shard,
    )
    extends = any(step.extensions for shard in shards for step in shard.steps)
    return BuildPlan(config=config, target=target, responses=responses, shards=shards, extends=extends)


def plan_build(config: CacheBuildConfig) -> BuildPlan:
    """Read the responses and plan a build. Of the target only `config.json` is read, and nothing is written.

    Raises:
        InputError: bad responses, layers or offsets.
    """
    target = read_target_config(config.target, rope=config.rope)
    config = replace(config, capture_layers=resolve_layers(config, target.num_layers))
    responses = read_responses(config.responses, vocab_size=target.vocab_size, max_length=target.max_positions)
    return plan_sequences(config, target, responses)


def new_manifest(plan: BuildPlan, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a build of which no shard is finished.

    Args:
        plan: the build.
        fingerprint: what the target, its tokenizer and chat template are; `capture_layers` and `features_dtype` are
            added.
    """
    config, responses = plan.config, plan.responses
    record = make_record("cache build", config)
    layers = list(config.capture_layers or ())
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint | {"capture_layers": layers, "features_dtype": config.features},
        "config": record.pop("config"),
        "records": [record],
        "responses_sha256": responses.sha256,
        "plan_sha256": plan_sha256(plan.shards),
        "hidden_size": plan.target.hidden_size,
        "capture_layers": layers,
        "position_offsets": list(config.position_offsets),
        "features_dtype": config.features,
        **({"top_k": config.top_k} if config.top_k else {}),
        "prompt_sets": list(responses.prompt_sets),
        "max_new_tokens": responses.max_new_tokens,
        "max_length": int(responses.lengths.max()),
        "num_shards": len(plan.shards),
        "num_sequences": sum(shard.sequences for shard in plan.shards),
        "num_tokens": sum(shard.tokens for shard in plan.shards),
        "shards": [],
        "complete": False,
    }


class _Meter:
    """Counts tokens and tells the progress."""

    def __init__(self, plan: BuildPlan, *, kept: int, total: int, tell: Callable[[BuildProgress], None] | None) -> None:
        self._per_token = bytes_per_token(plan.config.feature_layout(plan.target.hidden_size))
        self._done = self._kept = kept
        self._total, self._tell, self._began = total, tell, time.perf_counter()

    def add(self, tokens: int) -> None:
        self._done += tokens
        if self._tell:
            progress = BuildProgress(
                tokens_done=self._done,
                tokens_total=self._total,
                tokens_kept=self._kept,
                bytes_done=self._done * self._per_token,
                bytes_total=self._total * self._per_token,
                seconds=time.perf_counter() - self._began,
            )
            self._tell(progress)


def _build_shards(plan: BuildPlan, shards: list[ShardPlan], capture: Capture, meter: _Meter) -> None:
    """Capture and write the given shards; at most one is being written while the next is filled."""
    out, responses = plan.config.out, plan.responses
    tensors: dict[str, np.ndarray] = {}
    filled = 0
    with ThreadPoolExecutor(max_workers=1) as writer:
        writing: Future[None] | None = None
        for forward in forwards(shards, responses, capture, keep=plan.extends):
            if not tensors:
                tensors, filled = begin_shard(forward.shard, responses, plan.layout(forward.shard)), 0
            before, filled = filled, fill(tensors, filled, forward, responses)
            if forward.ends_shard:
                if writing:
                    writing.result()
                writing = writer.submit(commit, out, forward.shard, plan.layout(forward.shard), tensors)
                tensors = {}
            meter.add(filled - before)
        if writing:
            writing.result()


def build_cache(
    config: CacheBuildConfig,
    *,
    fingerprint: dict[str, Any],
    capture: Capture,
    progress: Callable[[BuildProgress], None] | None = None,
    before: Callable[[BuildPlan], None] | None = None,
) -> dict[str, Any]:
    """Build a cache, or go on with one, and return what was done.

    Args:
        config: settings. Of the target only `config.json` is read here.
        fingerprint: what the target, its tokenizer and chat template are, as JSON values; `capture_layers` and
            `features_dtype` are added.
        capture: the forward.
        progress: called after every batch.
        before: called once where there is something to build, before anything is written; an error of it stops the
            build.

    Returns:
        `cache`, `complete` (false while shares of other processes are missing), `num_sequences`, `num_tokens`,
        `num_tokens_shared` (tokens of prompts that were neither computed nor stored again), `num_shards`, `bytes`,
        `shards_kept` (finished by an earlier run), `shards_damaged` (finished once, no longer intact, built again),
        `seconds`, `tokens_per_s` (tokens captured by this run; 0 where nothing was left to do).

    Raises:
        InputError: bad responses, layers or offsets (before anything is written); another builder at work; other
            settings than those the folder was begun with; a folder that holds something else; features that are not
            finite; a full disk.
    """
    started = time.perf_counter()
    plan = plan_build(config)
    config, share = plan.config, Share(index=config.process_index or 0, count=config.process_count or 1)
    mine = share.of(plan.shards)
    new = new_manifest(plan, fingerprint)
    finished = check_settings(config.out, new)
    if before and any(shard.file not in finished for shard in mine):
        before(plan)
    with locked(config.out, share):
        manifest, damaged = resume(config.out, new, mine, share)
        kept = {entry["file"] for entry in manifest["shards"]}
        missing = [shard for shard in mine if shard.file not in kept]
        total = sum(shard.tokens for shard in mine)
        captured = sum(shard.tokens for shard in missing)
        _build_shards(plan, missing, capture, _Meter(plan, kept=total - captured, total=total, tell=progress))
        manifest = read_manifest(config.out)
    seconds = time.perf_counter() - started
    own_tokens = int(plan.responses.lengths.sum()) * len(config.position_offsets)
    return {
        "cache": str(config.out),
        **{name: manifest[name] for name in ("complete", "num_sequences", "num_tokens")},
        "num_tokens_shared": own_tokens - manifest["num_tokens"],
        "num_shards": manifest["num_shards"],
        "bytes": sum(entry["bytes"] for entry in manifest["shards"]),
        "shards_kept": len(kept),
        "shards_damaged": damaged,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(captured / seconds, 1),
    }
