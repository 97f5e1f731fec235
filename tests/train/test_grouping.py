"""Which sequences share a step, and how wide their batches are."""

import itertools

import numpy as np
import pytest

from dflash_jax.cache import epoch_order
from dflash_jax.train.grouping import WINDOW_STEPS, bucket, choose_widths, make_groups

COUNT, PER_STEP, SEED = 331, 4, 3


def lengths_of(count=COUNT):
    draw = np.random.default_rng(0)
    return np.minimum(20 + draw.gamma(2.0, 80.0, count), 700).astype(np.int64)


def element_of(count):
    return lambda element: int(epoch_order(count, SEED, element // count)[element % count])


def groups_of(lengths, widths, per_step=PER_STEP):
    count = len(lengths)
    return make_groups(
        lengths, element_of(count), per_epoch=count, sequences_per_step=per_step, widths=widths, seed=SEED
    )


def padded(longest, widths):
    return sum(min(width for width in widths if width >= bucket(int(one))) for one in longest)


def test_widths_by_hand():
    longest = np.array([60, 100, 100, 500])
    assert choose_widths(longest, 1) == [512]
    assert choose_widths(longest, 2) == [128, 512]
    assert choose_widths(longest, 3) == [64, 128, 512]
    assert choose_widths(longest, 9) == [64, 128, 512]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_widths_pad_least(number):
    longest = np.random.default_rng(1).integers(1, 500, 40)
    found = choose_widths(longest, number)
    assert len(found) <= number
    candidates = sorted({bucket(int(one)) for one in longest})
    others = itertools.combinations(candidates[:-1], number - 1)
    assert padded(longest, found) == min(padded(longest, (*few, candidates[-1])) for few in others)


def test_one_width_takes_the_order_as_it_is():
    groups = groups_of(lengths_of(), 1)
    assert [groups(step) for step in (0, 7)] == [([0, 1, 2, 3], 704), ([28, 29, 30, 31], 704)]


def test_every_element_is_taken_once_by_steps_of_similar_lengths():
    lengths, steps = lengths_of(), 3 * WINDOW_STEPS
    groups, alone = groups_of(lengths, 3), element_of(COUNT)
    found = [groups(step) for step in range(steps)]
    for first in range(0, steps, WINDOW_STEPS):
        taken = sorted(itertools.chain(*(elements for elements, _ in found[first : first + WINDOW_STEPS])))
        assert taken == list(range(first * PER_STEP, (first + WINDOW_STEPS) * PER_STEP))
    longest = [max(int(lengths[alone(element)]) for element in elements) for elements, _ in found]
    widths = sorted({width for _, width in found})
    assert len(widths) == 3
    assert widths[-1] == 704
    for (_, width), most in zip(found, longest, strict=True):
        assert width == min(one for one in widths if one >= most)
    # as wide as the longest of all they would hold half as much again
    assert 1.5 * sum(width for _, width in found) < steps * 704
    # lengths do not rise through a window, which would be a curriculum
    rank = np.corrcoef(np.arange(WINDOW_STEPS), longest[:WINDOW_STEPS])[0, 1]
    assert abs(rank) < 0.5
    assert longest[:WINDOW_STEPS] != longest[WINDOW_STEPS : 2 * WINDOW_STEPS]


def test_a_step_depends_on_its_number_alone():
    forwards, backwards = groups_of(lengths_of(), 2), groups_of(lengths_of(), 2)
    steps = range(100)
    assert [forwards(step) for step in steps] == [backwards(step) for step in reversed(steps)][::-1]


@pytest.mark.parametrize("count", [1, 3, 9])
def test_few_sequences(count):
    groups = groups_of(lengths_of(count), 4)
    window = max(1, count // PER_STEP)
    for first in range(0, 6 * window, window):
        elements = list(itertools.chain(*(groups(first + step)[0] for step in range(window))))
        assert sorted(elements) == list(range(first * PER_STEP, (first + window) * PER_STEP))
