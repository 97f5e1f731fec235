"""Whether two chains accept as much: an equivalence test on paired differences. numpy only."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from dflash_jax.accept import bootstrap_interval

MIN_PROMPTS = 5
"""Fewer prompts than these say nothing about others, however equal they are."""
Verdict = Literal["holds", "broken", "undecided"]
_WORST_FIRST: tuple[Verdict, ...] = ("broken", "undecided", "holds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A mean difference of accept_len between two chains on the same anchors, and what it decides.

    Attributes:
        mean: accepted tokens per block more than the other chain, pooled over anchors.
        ci95: bootstrap interval over prompts.
        verdict: see `judge`.
        more_prompts_needed: further prompts at which the interval would decide, if the spread stays; None where it
            does already.
    """

    mean: float
    ci95: tuple[float, float]
    verdict: Verdict
    more_prompts_needed: int | None


def judge(sums: Float[np.ndarray, "prompts pair"], *, margin: float, samples: int, seed: int) -> Difference:
    """Return what paired differences decide.

    *holds*: the 95 % interval lies within +-margin. *broken*: it leaves out 0 and the mean is outside +-margin. Else
    *undecided*, as with fewer than `MIN_PROMPTS` prompts. An interval's half-width w shrinks as 1/sqrt(prompts), so
    `n * (w / gap)^2` prompts are needed, where gap is what the mean keeps from the margin when it lies within, and from
    0 when it lies outside. Worked: 10 prompts, mean 0.05, interval [-0.05, 0.15], margin 0.1: w 0.1, gap 0.05, so 40
    prompts, 30 more.

    Args:
        sums: for each prompt, the sum of its anchors' differences and their number; at least one number is above 0.
        margin: accepted tokens per block.
        samples: resamples.
        seed: of the resampling.
    """
    counted = sums[sums[:, 1] > 0]
    prompts, mean = len(counted), float(counted[:, 0].sum() / counted[:, 1].sum())
    low, high = bootstrap_interval(counted, samples=samples, seed=seed)
    enough = prompts >= MIN_PROMPTS
    verdict: Verdict = "undecided"
    if enough and -margin <= low and high <= margin:
        verdict = "holds"
    elif enough and abs(mean) > margin and (low > 0 or high < 0):
        verdict = "broken"
    more = None
    if verdict == "undecided":
        half_width = max(high - mean, mean - low)
        gap = abs(mean) if abs(mean) > margin else max(margin - abs(mean), 0.01 * margin)
        more = max(math.ceil(prompts * (half_width / gap) ** 2), MIN_PROMPTS, prompts + 1) - prompts
    return Difference(mean=mean, ci95=(low, high), verdict=verdict, more_prompts_needed=more)


def worst(verdicts: list[Verdict]) -> Verdict:
    """Return the worst of some verdicts: broken, then undecided, then holds."""
    return min(verdicts, key=_WORST_FIRST.index)
