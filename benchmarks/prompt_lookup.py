"""Prompt lookup on a cache's responses, and a drafter where texts repeat and where they do not.

Prompt lookup drafts what followed the last few tokens where they stood before: no weights, no time. On texts that
repeat their prompt or themselves it is hard to beat, so it is the least that a drafter should reach; and where the
lookup has a whole block right, the drafter says whether it copies. The last line of stdout is one JSON document.

    .venv-dev/bin/python benchmarks/prompt_lookup.py --target TARGET --cache CACHE --drafter RUN/best

**Source:** apoorvumang/prompt-lookup-decoding, which takes the first place where the tokens stand; this one takes the
last.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from common import machine, write_result
from dflash_jax.accept import (
    SequenceResult,
    check_block_size,
    check_fit,
    compare,
    evaluate_cache,
    parse_anchors,
    summarise,
    walk_chain,
)
from dflash_jax.cache import check_fingerprint, open_cache
from dflash_jax.core import InputError, no_progress
from dflash_jax.drafter import load_drafter
from dflash_jax.targets import fingerprint, load_target

Numbers = dict[str, Any]


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("target", "cache", "drafter"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--anchors", default="all", help="as check takes them; tau needs all")
    parser.add_argument("--longest", type=int, default=3, help="tokens that must stand before, tried first")
    parser.add_argument("--shortest", type=int, default=2, help="tokens that must stand before, tried last")
    parser.add_argument("--bootstrap-samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def look_up(tokens: Int32[np.ndarray, " known"], *, count: int, longest: int, shortest: int) -> Int32[np.ndarray, " _"]:
    """Return up to `count` tokens that followed the last ones where they stood last before; none where they did not.

    Worked, tokens [5, 6, 7, 5, 6], longest 3, shortest 2: [5, 6] stood at 0, so [7, 5, 6].
    """
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], size)
        found = np.flatnonzero((windows == tokens[len(tokens) - size :]).all(axis=1))
        if found.size:
            first = int(found[-1]) + size
            return tokens[first : first + count]
    return tokens[:0]


def looked_up(
    result: SequenceResult,
    tokens: Int32[np.ndarray, " seq"],
    next_ids: Int32[np.ndarray, " seq"],
    *,
    longest: int,
    shortest: int,
) -> SequenceResult:
    """Return a drafter's result with the lookup's guesses in place of the drafter's, at the same anchors and labels.

    Args:
        result: of any drafter: its anchors and which slots have labels are kept.
        tokens: the text.
        next_ids: the target's greedy token after each: slot k's label is `next_ids[anchor + k - 1]`.
        longest: see `look_up`.
        shortest: see `look_up`.
    """
    drafted = result.labelled.shape[1]
    correct = np.zeros_like(result.labelled)
    for row, anchor in enumerate(result.anchors):
        guess = look_up(tokens[: anchor + 1], count=drafted, longest=longest, shortest=shortest)
        labels = next_ids[anchor : anchor + len(guess)]
        correct[row, : len(labels)] = guess[: len(labels)] == labels
    correct &= result.labelled
    accepted = np.cumprod(correct, axis=1, dtype=np.int32).sum(axis=1, dtype=np.int32)
    on_chain = None
    if result.on_chain is not None:
        on_chain = walk_chain(accepted, prompt_len=result.prompt_len, length=result.length)
    return replace(result, accepted=accepted, correct=correct, on_chain=on_chain)


def _numbers(results: list[SequenceResult], options: argparse.Namespace) -> Numbers:
    found = summarise(results, samples=options.bootstrap_samples, seed=options.seed)
    if found is None:
        raise InputError(f"no response in {options.cache} is long enough for one whole block")
    replay = found["replay"] or {}
    return {key: found[key] for key in ("accept_len_mean", "accept_len_ci95")} | {
        key: replay.get(key) for key in ("tau_micro", "tau_ci95")
    }


def by_lookup(drafter: list[SequenceResult], lookup: list[SequenceResult]) -> list[Numbers]:
    """The drafter where the lookup has no token right, some of a block, or all of it; anchors of whole blocks only."""
    drafter, lookup = ([result.at(result.whole) for result in side] for side in (drafter, lookup))
    own, theirs = (np.concatenate([result.accepted for result in side]) for side in (drafter, lookup))
    correct = np.concatenate([result.correct for result in drafter])
    size = correct.shape[1]

    def row(name: str, chosen: Bool[np.ndarray, " anchor"]) -> Numbers:
        some = bool(chosen.any())
        return {
            "lookup_right": name,
            "share": float(chosen.mean()),
            "accept_len_mean": float(own[chosen].mean()) if some else None,
            "token_acc_by_slot": correct[chosen].mean(axis=0).tolist() if some else None,
        }

    return [
        row("no token", theirs == 0),
        row(f"1 to {size - 1}", (theirs > 0) & (theirs < size)),
        row(f"all {size}", theirs == size),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and one JSON line; 0."""
    options = read_arguments(arguments)
    if not 1 <= options.shortest <= options.longest:
        raise InputError(f"--shortest is {options.shortest}, --longest {options.longest}: 1 <= shortest <= longest")
    target, drafter, cache = (
        load_target(options.target, layers=()),
        load_drafter(options.drafter),
        open_cache(options.cache),
    )
    check_fit(drafter.config, target.config, where=options.drafter)
    layers = {"capture_layers": list(drafter.config.capture_layers)}
    check_fingerprint(cache.manifest, fingerprint(options.target) | layers, what="the target and the drafter")
    results = evaluate_cache(
        drafter,
        target.embed_tokens,
        target.head,
        cache,
        max_positions=target.config.max_positions,
        block_size=check_block_size(None, drafter.config),
        anchors_per_chunk=64,
        position_offsets=None,
        progress=no_progress,
        anchors=parse_anchors(options.anchors, seed=options.seed),
    )
    texts = {
        (sequence.sequence_index, sequence.position_offset): (sequence.token_ids, sequence.next_ids)
        for sequence in map(cache.sequence, range(cache.num_sequences))
    }
    lookup = [
        looked_up(
            result,
            *texts[result.sequence_index, result.position_offset],
            longest=options.longest,
            shortest=options.shortest,
        )
        for result in results
    ]
    better = [
        replace(own, accepted=np.maximum(own.accepted, theirs.accepted), on_chain=None)
        for own, theirs in zip(results, lookup, strict=True)
    ]
    found = {
        "benchmark": "prompt_lookup",
        "cache": options.cache.name,
        "num_prompts": len({result.prompt_hash for result in results}),
        "lookup": _numbers(lookup, options) | {"longest": options.longest, "shortest": options.shortest},
        "drafter": _numbers(results, options),
        "the_better_of_both": {
            key: value for key, value in _numbers(better, options).items() if key.startswith("accept_len")
        },
        "lookup_minus_drafter": compare(results, lookup, samples=options.bootstrap_samples, seed=options.seed),
        "drafter_by_lookup": by_lookup(results, lookup),
        "machine": machine(),
    }
    for row in found["drafter_by_lookup"]:
        accept = "-" if row["accept_len_mean"] is None else f"{row['accept_len_mean']:.2f}"
        sys.stdout.write(
            f"lookup right: {row['lookup_right']:>9}  {row['share']:6.1%} of anchors  drafter's accept_len {accept}\n"
        )
    write_result(found)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.stderr.write(f"prompt_lookup: {error}\n")
        sys.exit(2)
