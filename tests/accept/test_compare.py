"""Differences of two sets of results: by hand, against drawing prompts one by one, and how often intervals hold."""

from dataclasses import replace

import numpy as np
import pytest

from dflash_jax.accept import compare, difference_interval, pair_results
from oracles import acceptance
from support.results import some_result

A = [
    some_result([1, 0, 1, 1, 0], prompt_len=2, correct=[[1, 0, 1], [0, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]]),
    some_result([0, 2, 2, 1], prompt_len=1, prompt_hash=2, sequence_index=1),
]
B = [
    some_result([3, 0, 1, 1, 0], prompt_len=2, correct=[[1, 1, 1], [0, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]]),
    some_result([1, 2, 2, 1], prompt_len=1, prompt_hash=2, sequence_index=1),
]


def test_the_same_anchors_by_hand():
    found = compare(A, B, samples=2000, seed=0)
    assert (found["paired"], found["num_prompts"], found["num_anchors"]) == (True, 2, 5)
    # whole anchors: [1, 0, 1] and [0, 2] against [3, 0, 1] and [1, 2]
    assert found["accept_len"] == {
        "a": 0.8,
        "b": 1.4,
        "difference": pytest.approx(0.6),
        # the first prompt twice, both, the second twice
        "ci95": pytest.approx([1 / 2, 2 / 3]),
    }
    assert found["token_acc"]["a"] == pytest.approx(5 / 21)
    assert found["token_acc"]["b"] == pytest.approx(6 / 21)
    # chains [2, 2, 1] and [1, 3] against [4, 1] and [2, 2]
    assert (found["tau"]["a"], found["tau"]["b"]) == (9 / 5, 9 / 4)
    assert found["verdict"] == "b accepts 0.600 [0.500, 0.667] tokens more per block (only 2 prompts)"
    back = compare(B, A, samples=2000, seed=0)
    assert back["accept_len"]["difference"] == -found["accept_len"]["difference"]
    assert back["verdict"] == "a accepts 0.600 [0.500, 0.667] tokens more per block (only 2 prompts)"


def test_the_same_results_are_the_same():
    found = compare(A, A, samples=200, seed=0)
    assert found["accept_len"]["ci95"] == [0, 0]
    assert found["verdict"] == "a and b accept the same everywhere (only 2 prompts)"


def test_other_texts_are_not_paired():
    others = [replace(result, prompt_hash=9 + i, text_hash=9 + i) for i, result in enumerate(B)]
    found = compare(A, others, samples=500, seed=0)
    assert (found["paired"], found["num_prompts"], found["num_anchors"]) == (False, 4, 10)
    assert found["accept_len"]["difference"] == pytest.approx(0.6)
    low, high = found["accept_len"]["ci95"]
    # a is 2/3, 0.8 or 1, b is 4/3, 1.4 or 1.5, in any combination
    assert (low, high) == pytest.approx((1 / 3, 5 / 6))
    # the same prompt with another answer is another text, drawn together with it all the same
    answers = [replace(result, text_hash=9 + i) for i, result in enumerate(B)]
    again = compare(A, answers, samples=500, seed=0)
    assert again["paired"] is False
    assert again["accept_len"]["ci95"] == pytest.approx([1 / 2, 2 / 3])


def test_one_cache_among_another_s_texts_at_other_offsets():
    far = [replace(result, position_offset=offset) for result in B for offset in (4096, 70000)]
    more = some_result([3, 3, 3, 3, 2, 1], prompt_len=1, prompt_hash=5)
    found = compare(A, [*far, more], samples=500, seed=0)
    assert (found["paired"], found["num_prompts"], found["num_anchors"]) == (True, 2, 5)
    assert found["accept_len"]["difference"] == pytest.approx(0.6)
    assert found["tau"]["b"] == 9 / 4
    # where each has a text of its own, they are other texts
    assert compare([*A, replace(more, prompt_hash=6, text_hash=6)], [*far, more], samples=50, seed=0)["paired"] is False


def test_only_anchors_that_both_have_are_paired():
    some = [replace(A[0].at(np.array([0, 1, 1, 0, 1], bool)), on_chain=None), A[1]]
    pairs = pair_results(some, B)
    assert pairs is not None
    side_a, side_b = pairs
    assert [result.anchors.tolist() for result in side_a] == [[3, 4, 6], [1, 2, 3, 4]]
    assert [result.anchors.tolist() for result in side_b] == [[3, 4, 6], [1, 2, 3, 4]]
    found = compare(some, B, samples=50, seed=0)
    assert found["tau"] is None
    assert found["accept_len"]["difference"] == pytest.approx(1 / 4)
    # an anchor whose block is whole on one side only is compared on neither
    unlabelled = replace(B[0], labelled=B[0].labelled & (np.arange(5) != 1)[:, None])
    pairs = pair_results(A, [unlabelled, B[1]])
    assert pairs is not None
    side_a, side_b = pairs
    assert side_a[0].anchors.tolist() == side_b[0].anchors.tolist() == [2, 4, 5, 6]


def test_nothing_whole_is_no_comparison():
    short = [some_result([1, 0], prompt_len=1, prompt_hash=7)]
    found = compare(A, short, samples=50, seed=0)
    assert found["accept_len"] is None
    assert found["verdict"] == "nothing to compare: one side has no whole block"


@pytest.mark.parametrize("shared", [0, 12, 20])
def test_interval_is_that_of_prompts_drawn_one_by_one(shared):
    draw = np.random.default_rng(shared)
    hard = draw.normal(2, 1, 60)
    sides = []
    for first in (0, 20 - shared):
        counts = draw.integers(5, 15, 20)
        sums = (hard[first : first + 20] + draw.normal(0.3 * len(sides), 0.3, 20)) * counts
        sides.append({first + i: (float(sums[i]), float(counts[i])) for i in range(20)})
    found = difference_interval(
        *({key: np.array(pair) for key, pair in side.items()} for side in sides), samples=4000, seed=1
    )
    wanted = np.percentile(acceptance.resampled_difference(*sides, samples=1500, seed=2), [2.5, 97.5])
    assert found == pytest.approx(wanted, abs=0.12 * (wanted[1] - wanted[0]))


def test_pairing_narrows_the_interval():
    draw = np.random.default_rng(3)
    hard = draw.normal(2, 1, 40)
    a = {i: np.array([hard[i], 1.0]) for i in range(40)}
    b = {i: np.array([hard[i] + draw.normal(0, 0.1), 1.0]) for i in range(40)}
    paired = difference_interval(a, b, samples=1000, seed=0)
    apart = difference_interval(a, {i + 100: pair for i, pair in b.items()}, samples=1000, seed=0)
    assert paired[1] - paired[0] < 0.2 * (apart[1] - apart[0])
