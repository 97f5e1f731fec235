"""The `check` command: caches and drafters in, the check's JSON out."""

from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from dflash_jax import targets, text
from dflash_jax.accept import (
    SequenceResult,
    by_context_length,
    by_offset,
    by_prompt_set,
    by_slot,
    check_block_size,
    check_fit,
    compare,
    evaluate_cache,
    offset_differences,
    parse_anchors,
    summarise,
)
from dflash_jax.cache import Cache, check_fingerprint, open_cache
from dflash_jax.check.config import CheckConfig
from dflash_jax.check.warn import warnings_of
from dflash_jax.core import RECORD_NAME, InputError, Move, make_record, no_progress, read_json
from dflash_jax.drafter import drafter_fingerprint, load_drafter, read_drafter_config

# what must be equal between the cache a drafter was trained on and the one it is checked on
_SHARED_FIELDS = ("target_weights", "target_config", "tokenizer_sha256", "chat_template_sha256", "capture_layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drafter:
    """A drafter's folder, its record (None for a foreign one), the block size to check it with, what it drafts of."""

    path: Path
    record: dict[str, Any] | None
    block_size: int
    draft_vocab_size: int | None

    @property
    def trained_hashes(self) -> frozenset[int] | None:
        """prompt_hash of every prompt it was trained on; None where nobody knows."""
        hashes = (self.record or {}).get("trained_prompt_hashes")
        return None if hashes is None else frozenset(int(value, 16) for value in hashes)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """One drafter on one cache."""

    drafter: _Drafter
    cache: Cache


def _read_drafter(path: Path, config: CheckConfig) -> _Drafter:
    """A drafter that fits the target.

    Raises:
        InputError: no drafter, or what does not fit.
    """
    sizes = read_drafter_config(path)
    check_fit(sizes, targets.read_target_config(config.target), where=path)
    record = path / RECORD_NAME
    return _Drafter(
        path=path,
        record=read_json(record, what="the drafter's record") if record.is_file() else None,
        block_size=check_block_size(config.block_size, sizes),
        draft_vocab_size=sizes.draft_vocab_size,
    )


def _check_pair(pair: _Pair) -> None:
    """Hold a cache against the drafter that is to be checked on it.

    Raises:
        InputError: what differs, by name.
    """
    manifest, path, record = pair.cache.manifest, pair.drafter.path, pair.drafter.record
    layers = {"capture_layers": list(read_drafter_config(path).capture_layers)}
    check_fingerprint(manifest, layers, what=f"the drafter {path}")
    if record is not None and "cache_fingerprint" in record:
        trained_on = {name: record["cache_fingerprint"].get(name) for name in _SHARED_FIELDS}
        check_fingerprint(manifest, trained_on, what=f"the drafter {path}")


def _open_all(config: CheckConfig) -> list[_Pair]:
    """Every drafter on every cache, the named pair first, all of them held against the target and each other.

    Raises:
        InputError: bad target, cache or drafter; a mismatch between them; an offset that no cache has.
    """
    wanted = targets.fingerprint(config.target) | text.load_tokenizer(config.target).fingerprint()
    caches = [open_cache(path) for path in (config.cache, *config.compare_caches)]
    for cache in caches:
        check_fingerprint(cache.manifest, wanted, what=f"the target {config.target}")
        stored = cache.manifest["position_offsets"]
        missing = [offset for offset in config.position_offsets or () if offset not in stored]
        if missing:
            raise InputError(f"--position-offsets names {missing[0]}: {cache.path} holds {', '.join(map(str, stored))}")
    drafters = [_read_drafter(path, config) for path in (config.drafter, *config.compare_drafters)]
    pairs = [_Pair(drafter=drafter, cache=cache) for drafter in drafters for cache in caches]
    for pair in pairs:
        _check_pair(pair)
    return pairs


def _document(pair: _Pair, results: list[SequenceResult], config: CheckConfig) -> dict[str, Any]:
    """The JSON of one drafter on one cache.

    Raises:
        InputError: no anchor has labels at all its slots.
    """
    settings = {"samples": config.bootstrap_samples, "seed": config.seed}
    overall = summarise(results, **settings)
    if overall is None:
        size = pair.drafter.block_size
        raise InputError(f"no response in {pair.cache.path} is long enough for one whole block of {size} positions")
    trained = pair.drafter.trained_hashes
    seen = [result for result in results if trained is not None and result.prompt_hash in trained]
    unseen = [result for result in results if trained is not None and result.prompt_hash not in trained]
    return {
        **overall,
        "seen": summarise(seen, **settings),
        "unseen": summarise(unseen, **settings),
        "by_ctx_pos_start": by_offset(results, **settings),
        "by_context_length": by_context_length(results, **settings),
        "by_prompt_set": by_prompt_set(results, **settings),
        "by_slot": by_slot(results),
        "accept_len_by_offset_difference": offset_differences(results, **settings),
        "anchors": config.anchors,
        "num_departures": sum(result.num_departures for result in results),
        "num_response_tokens": sum(result.length - result.prompt_len for result in results),
        "block_size": pair.drafter.block_size,
        "draft_vocab_size": pair.drafter.draft_vocab_size,
        "cache": str(pair.cache.path),
        "drafter": str(pair.drafter.path),
        "warnings": warnings_of(results, trained=trained),
        "record": make_record(
            "check",
            config,
            seed=config.seed,
            drafter_sha256=drafter_fingerprint(pair.drafter.path),
            cache_fingerprint=pair.cache.manifest["fingerprint"],
        ),
    }


def _comparison(pairs: list[_Pair], results: list[list[SequenceResult]], config: CheckConfig) -> list[dict[str, Any]]:
    """Every two checks that share their drafter or their cache; two that share neither differ in two things at once."""
    found = []
    for (a, results_a), (b, results_b) in combinations(zip(pairs, results, strict=True), 2):
        if a.drafter is not b.drafter and a.cache is not b.cache:
            continue
        difference = compare(results_a, results_b, samples=config.bootstrap_samples, seed=config.seed)
        if a.drafter.block_size != b.drafter.block_size:
            sizes = f"{a.drafter.block_size} and {b.drafter.block_size}"
            difference["verdict"] += f"; blocks of {sizes} positions: tau compares them, accept_len does not"
        names = [{"drafter": str(side.drafter.path), "cache": str(side.cache.path)} for side in (a, b)]
        found.append({"a": names[0], "b": names[1], **difference})
    return found


def _evaluate(config: CheckConfig, pairs: list[_Pair], progress: Move) -> list[list[SequenceResult]]:
    """Per-anchor results of every pair; the target is loaded once, a drafter once for all its caches."""
    # blocks are drafted from what the cache holds: of the target its two ends are needed, and no layer
    target = targets.with_screen(targets.load_target(config.target, layers=()), for_few_rows=False)
    results = []
    for path, own in groupby(pairs, key=lambda pair: pair.drafter.path):
        drafter = load_drafter(path)
        for pair in own:

            def move(done: int, total: int, note: str, before: int = len(results)) -> None:
                progress(before * total + done, len(pairs) * total, note)

            found = evaluate_cache(
                drafter,
                target.embed_tokens,
                target.head,
                pair.cache,
                max_positions=target.config.max_positions,
                block_size=pair.drafter.block_size,
                anchors_per_chunk=config.anchors_per_chunk,
                position_offsets=config.position_offsets,
                progress=move,
                anchors=parse_anchors(config.anchors, seed=config.seed),
                screen=target.screen,
            )
            results.append(found)
    return results


def check(config: CheckConfig, *, progress: Move = no_progress) -> dict[str, Any]:
    """Check drafters offline at the chosen anchors of caches.

    Returns:
        The check's JSON (design, section 5; docs/design/005; estimators in `accept.summarise`) of the named drafter on
        the named cache, and beside it `comparison` and `checks`: with further drafters or caches, every two that share
        one or the other compared, and the JSON of each.

    Raises:
        InputError: bad target, cache or drafter; a mismatch between them; a block size a drafter was not trained for;
            nothing to check.
    """
    pairs = _open_all(config)
    results = _evaluate(config, pairs, progress)
    documents = [_document(pair, found, config) for pair, found in zip(pairs, results, strict=True)]
    return {
        **documents[0],
        "comparison": _comparison(pairs, results, config),
        "checks": documents if len(documents) > 1 else [],
    }
