"""Two sets of results against each other: the difference of their means, with an interval over prompts. numpy only."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from jaxtyping import Float

from dflash_jax.accept.evaluate import SequenceResult
from dflash_jax.accept.statistics import (
    Sums,
    accept_len_sums,
    resample_prompts,
    sums_by_prompt,
    tau_sums,
    token_acc_sums,
)

FEW_PROMPTS = 5


def difference_interval(
    a: dict[int, Float[np.ndarray, " 2"]], b: dict[int, Float[np.ndarray, " 2"]], *, samples: int, seed: int
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of b's ratio of sums minus a's.

    Prompts that both have are resampled together, so that what is hard for both cancels; prompts of one side alone are
    resampled by themselves.

    Args:
        a: numerator and denominator of each prompt, by prompt_hash; one denominator at least is above 0.
        b: likewise.
        samples: resamples.
        seed: of the resampling.
    """
    draw = np.random.default_rng(seed)
    none = np.zeros(2)
    a, b = ({key: pair for key, pair in side.items() if pair[1] > 0} for side in (a, b))
    strata = (a.keys() & b.keys(), a.keys() - b.keys(), b.keys() - a.keys())
    totals = np.zeros((samples, 4))
    for stratum in filter(None, strata):
        rows = np.array([[*a.get(key, none), *b.get(key, none)] for key in stratum])
        rows = rows[np.lexsort(rows.T)]
        totals += resample_prompts(len(rows), samples=samples, draw=draw) @ rows
    low, high = np.percentile(totals[:, 2] / totals[:, 3] - totals[:, 0] / totals[:, 1], [2.5, 97.5])
    return float(low), float(high)


def _metric(
    a: Sequence[SequenceResult], b: Sequence[SequenceResult], sums: Sums, *, samples: int, seed: int
) -> dict[str, Any] | None:
    """Both means, b minus a, and its interval; None where a side has nothing to average."""
    sides = [sums_by_prompt(results, sums) for results in (a, b)]
    totals = [sum(side.values(), np.zeros(2)) for side in sides]
    if any(total[1] == 0 for total in totals):
        return None
    means = [float(total[0] / total[1]) for total in totals]
    return {
        "a": means[0],
        "b": means[1],
        "difference": means[1] - means[0],
        "ci95": list(difference_interval(*sides, samples=samples, seed=seed)),
    }


def _by_text(results: Sequence[SequenceResult]) -> dict[int, list[SequenceResult]]:
    texts: dict[int, list[SequenceResult]] = {}
    for result in results:
        texts.setdefault(result.text_hash, []).append(result)
    return texts


def pair_results(
    a: Sequence[SequenceResult], b: Sequence[SequenceResult]
) -> tuple[list[SequenceResult], list[SequenceResult]] | None:
    """Return both sides cut down to the anchors that both have; None where the texts are not the same.

    They are the same where one side's texts are all among the other's, at whatever offsets: a base cache and an offset
    cache of its texts are compared on those texts. An anchor must be whole on either both sides or none.
    """
    texts_a, texts_b = _by_text(a), _by_text(b)
    shared = texts_a.keys() & texts_b.keys()
    if not shared or len(shared) < min(len(texts_a), len(texts_b)):
        return None
    kept: tuple[list[SequenceResult], list[SequenceResult]] = ([], [])
    for text in sorted(shared):
        everyone = texts_a[text] + texts_b[text]
        common = reduce(np.intersect1d, (result.anchors for result in everyone))
        # labels may differ where a text leaves the greedy path at one offset only: such anchors are on one side alone
        whole = np.array([result.whole[np.searchsorted(result.anchors, common)] for result in everyone])
        agreed = common[(whole == whole[0]).all(axis=0)]
        for side, results in zip(kept, (texts_a[text], texts_b[text]), strict=True):
            side.extend(result.at(np.isin(result.anchors, agreed)) for result in results)
    return kept


def _verdict(accept: dict[str, Any] | None, num_prompts: int) -> str:
    """What the interval of accept_len's difference allows to say."""
    if accept is None:
        return "nothing to compare: one side has no whole block"
    (low, high), difference = accept["ci95"], accept["difference"]
    few = f" (only {num_prompts} prompts)" if num_prompts < FEW_PROMPTS else ""
    if low == high == 0:
        return f"a and b accept the same everywhere{few}"
    if low <= 0 <= high:
        return f"no difference can be told: b minus a is {difference:+.3f} [{low:+.3f}, {high:+.3f}] of accept_len{few}"
    more, ends = ("b", (low, high)) if low > 0 else ("a", (-high, -low))
    return f"{more} accepts {abs(difference):.3f} [{ends[0]:.3f}, {ends[1]:.3f}] tokens more per block{few}"


def compare(a: Sequence[SequenceResult], b: Sequence[SequenceResult], *, samples: int, seed: int) -> dict[str, Any]:
    """Return how b's results differ from a's: `paired`, counts, and per metric both means, `b - a` and its interval.

    - `accept_len`, `token_acc`: as in `summarise`; where the texts are the same (`pair_results`), over the anchors that
      both sides have, and `paired` is true.
    - `tau`: tau_micro over each side's own chains, since the two walk different ones; of the shared texts where paired.
      None where a chain is not known.
    - `num_prompts`, `num_anchors`: of what was compared; unpaired, of both sides together.
    """
    cut = pair_results(a, b)
    some_a, some_b = cut if cut is not None else (list(a), list(b))
    chain_a, chain_b = a, b
    if cut is not None:
        shared = {result.text_hash for result in some_a}
        chain_a, chain_b = ([r for r in side if r.text_hash in shared] for side in (a, b))
    known = all(result.on_chain is not None for result in (*chain_a, *chain_b))
    settings = {"samples": samples, "seed": seed}
    accept = _metric(some_a, some_b, accept_len_sums, **settings)
    prompts = {result.prompt_hash for result in (*some_a, *some_b)}
    anchors = [sum(int(result.whole.sum()) for result in side) for side in (some_a, some_b)]
    return {
        "paired": cut is not None,
        "num_prompts": len(prompts),
        "num_anchors": min(anchors) if cut is not None else sum(anchors),
        "accept_len": accept,
        "token_acc": _metric(some_a, some_b, token_acc_sums, **settings),
        "tau": _metric(chain_a, chain_b, tau_sums, **settings) if known else None,
        "verdict": _verdict(accept, len(prompts)),
    }
