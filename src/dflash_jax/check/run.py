"""The `check` command: a cache and a drafter in, the check's JSON out."""

from pathlib import Path
from typing import Any

from dflash_jax import targets, text
from dflash_jax.accept import (
    SequenceResult,
    check_block_size,
    check_fit,
    evaluate_cache,
    offset_differences,
    summarise,
)
from dflash_jax.cache import Cache, check_fingerprint, open_cache
from dflash_jax.check.config import CheckConfig
from dflash_jax.core import RECORD_NAME, InputError, Move, make_record, no_progress, read_json
from dflash_jax.drafter import DrafterConfig, drafter_fingerprint, load_drafter, read_drafter_config

# what must be equal between the cache a drafter was trained on and the one it is checked on
_SHARED_FIELDS = ("target_weights", "target_config", "tokenizer_sha256", "chat_template_sha256", "capture_layers")


def _read_record(drafter: Path) -> dict[str, Any] | None:
    """The record of a drafter trained here; None for a foreign one."""
    path = drafter / RECORD_NAME
    return read_json(path, what="the drafter's record") if path.is_file() else None


def _check_fit(config: CheckConfig, cache: Cache, drafter: DrafterConfig, record: dict[str, Any] | None) -> int:
    """Hold the cache against target and drafter; return the block size.

    Raises:
        InputError: what differs, by name.
    """
    wanted = targets.fingerprint(config.target) | text.load_tokenizer(config.target).fingerprint()
    check_fingerprint(cache.manifest, wanted, what=f"the target {config.target}")
    check_fingerprint(
        cache.manifest, {"capture_layers": list(drafter.capture_layers)}, what=f"the drafter {config.drafter}"
    )
    check_fit(drafter, targets.read_target_config(config.target), where=config.drafter)
    if record is not None and "cache_fingerprint" in record:
        trained_on = {name: record["cache_fingerprint"].get(name) for name in _SHARED_FIELDS}
        check_fingerprint(cache.manifest, trained_on, what=f"the drafter {config.drafter}")
    return check_block_size(config.block_size, drafter)


def _check_offsets(config: CheckConfig, cache: Cache) -> None:
    """Raise where an offset is asked for that the cache has not."""
    stored = cache.manifest["position_offsets"]
    missing = [offset for offset in config.position_offsets or () if offset not in stored]
    if missing:
        raise InputError(f"--position-offsets names {missing[0]}: {config.cache} holds {', '.join(map(str, stored))}")


def _warnings(seen: list[SequenceResult], unseen: list[SequenceResult], *, known: bool) -> list[str]:
    if not known:
        return ["the drafter has no record of its training prompts: seen and unseen cannot be told apart"]
    if seen and not unseen:
        return ["ONLY PROMPTS THE DRAFTER WAS TRAINED ON were checked: these numbers say nothing about new prompts"]
    return []


def check(config: CheckConfig, *, progress: Move = no_progress) -> dict[str, Any]:
    """Check a drafter offline on every eligible anchor of a cache.

    Returns:
        The check's JSON (design, section 5; estimators in `statistics.summarise`), and beside it:
        `accept_len_by_offset_difference` (`statistics.offset_differences`), `warnings`, `record`.

    Raises:
        InputError: bad target, cache or drafter; a mismatch between them; a block size the drafter was not trained for;
            nothing to check.
    """
    cache = open_cache(config.cache)
    drafter_config = read_drafter_config(config.drafter)
    record = _read_record(config.drafter)
    block_size = _check_fit(config, cache, drafter_config, record)
    _check_offsets(config, cache)
    target, drafter = targets.load_target(config.target), load_drafter(config.drafter)
    results = evaluate_cache(
        drafter,
        target.embed_tokens,
        target.head,
        cache,
        max_positions=target.config.max_positions,
        block_size=block_size,
        anchors_per_chunk=config.anchors_per_chunk,
        position_offsets=config.position_offsets,
        progress=progress,
    )

    def group(part: list[SequenceResult]) -> dict[str, Any] | None:
        return summarise(part, samples=config.bootstrap_samples, seed=config.seed)

    overall = group(results)
    if overall is None:
        raise InputError(f"no response in {config.cache} is long enough for one whole block of {block_size} positions")
    trained = {int(value, 16) for value in (record or {}).get("trained_prompt_hashes", [])}
    known = record is not None and "trained_prompt_hashes" in record
    seen = [result for result in results if result.prompt_hash in trained]
    unseen = [result for result in results if known and result.prompt_hash not in trained]
    offsets = sorted({result.position_offset for result in results})
    return {
        **overall,
        "seen": group(seen),
        "unseen": group(unseen),
        "by_ctx_pos_start": {str(o): group([r for r in results if r.position_offset == o]) for o in offsets},
        "accept_len_by_offset_difference": offset_differences(
            results, samples=config.bootstrap_samples, seed=config.seed
        ),
        "block_size": block_size,
        "cache": str(config.cache),
        "drafter": str(config.drafter),
        "warnings": _warnings(seen, unseen, known=known),
        "record": make_record(
            "check",
            config,
            seed=config.seed,
            drafter_sha256=drafter_fingerprint(config.drafter),
            cache_fingerprint=cache.manifest["fingerprint"],
        ),
    }
