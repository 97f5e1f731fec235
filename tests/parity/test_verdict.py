"""The equivalence test on numbers worked by hand, and what it promises of further prompts."""

import numpy as np
import pytest

from dflash_jax.parity.verdict import MIN_PROMPTS, judge, worst


def sums(means, anchors=10):
    """Prompts with so many anchors each, and a mean difference."""
    return np.array([[mean * anchors, anchors] for mean in means], float)


def judged(means, **changes):
    return judge(sums(means), **{"margin": 0.1, "samples": 4000, "seed": 0} | changes)


def test_equal_chains_hold():
    found = judged([0.0] * 8)
    assert (found.mean, found.ci95, found.verdict, found.more_prompts_needed) == (0, (0, 0), "holds", None)


def test_fewer_prompts_than_five_decide_nothing():
    found = judged([0.0] * (MIN_PROMPTS - 1))
    assert (found.verdict, found.more_prompts_needed) == ("undecided", 1)
    assert judged([-2.0] * 2).verdict == "undecided"
    assert judged([-2.0] * 2).more_prompts_needed == 3
    assert judged([-2.0] * MIN_PROMPTS).verdict == "broken"


def test_prompts_without_an_anchor_do_not_count():
    found = judge(np.vstack([sums([0.0] * 4), np.zeros((9, 2))]), margin=0.1, samples=100, seed=0)
    assert (found.verdict, found.more_prompts_needed) == ("undecided", 1)


@pytest.mark.parametrize(
    ("means", "verdict"),
    [
        ([-0.05, 0.05] * 10, "holds"),  # interval within the margin, around 0
        ([0.03, 0.04] * 10, "holds"),  # a difference there is, and it is small
        ([-1.0, -0.4] * 5, "broken"),
        ([1.0, 0.4] * 5, "broken"),  # more than the reference is not the same either
        ([-1.0, 1.0] * 5, "undecided"),  # too wide
        ([-0.02, -0.16] * 5, "undecided"),  # the interval leaves out 0, but its centre is within the margin
        ([-0.5, -0.5, -0.5, 0.9, -0.6], "undecided"),  # the centre is outside, the interval has 0
    ],
)
def test_verdicts(means, verdict):
    assert judged(means).verdict == verdict


def test_the_margin_decides():
    means = [-0.3, -0.1] * 10
    assert judged(means, margin=0.1).verdict == "broken"
    assert judged(means, margin=0.3).verdict == "holds"


def test_the_mean_is_over_anchors_and_the_interval_over_prompts():
    uneven = np.array([[30.0, 30], [0.0, 10], [0, 10], [0, 10], [0, 10], [0, 10]])
    found = judge(uneven, margin=0.1, samples=2000, seed=0)
    assert found.mean == 30 / 80
    # one prompt of six carries it all: with a third of the resamples it is absent
    assert found.ci95[0] == 0
    assert found.verdict == "undecided"


@pytest.mark.parametrize("means", [[-0.3, 0.4] * 5, [-1.0, 0.7] * 5, [-1.1, 0.3, 0.1, -0.9, 0.4] * 2])
def test_with_as_many_more_prompts_of_the_kind_it_is_decided(means):
    """The number is neither wishful nor wasteful: as many more decide, half as many do not."""
    few = judged(means)
    assert few.verdict == "undecided"
    assert few.more_prompts_needed is not None
    total = len(means) + few.more_prompts_needed
    again = [means[i % len(means)] for i in range(round(1.15 * total / len(means)) * len(means))]
    assert judged(again).verdict != "undecided"
    half = [means[i % len(means)] for i in range(max(len(means), total // 2 // len(means) * len(means)))]
    assert judged(half).verdict == "undecided"


def test_more_prompts_worked():
    """It is n (w / gap)^2 with w the half-width, worked from the interval that is reported."""
    found = judged([-0.3, 0.4] * 5)
    half_width = max(found.ci95[1] - found.mean, found.mean - found.ci95[0])
    assert found.mean == pytest.approx(0.05)
    assert found.more_prompts_needed == int(np.ceil(10 * (half_width / 0.05) ** 2)) - 10


def test_the_worst_verdict():
    assert worst(["holds", "undecided", "holds"]) == "undecided"
    assert worst(["holds", "undecided", "broken"]) == "broken"
    assert worst(["holds"]) == "holds"
