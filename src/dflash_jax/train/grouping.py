"""Which sequences make a step, and how wide it is: texts of similar length together, in a few widths."""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int64

from dflash_jax.cache import epoch_order

LENGTH_BUCKET = 64
WINDOW_STEPS = 32
"""Steps whose sequences are dealt out together: few enough that a step still has texts from all over the data."""


def bucket(length: int) -> int:
    """Return the width of batches whose longest sequence has `length` tokens."""
    return -(-length // LENGTH_BUCKET) * LENGTH_BUCKET


def choose_widths(longest: Int64[np.ndarray, " batch"], number: int) -> list[int]:
    """Return at most `number` widths, rising, that batches are padded to with the fewest tokens in all.

    Worked: batches whose longest sequences have 60, 100, 100 and 500 tokens take 64, 128, 128 and 512; in two widths,
    128 and 512 (896 tokens in all; 64 and 512 would be 1,600).

    Args:
        longest: tokens of every batch's longest sequence.
        number: most widths.
    """
    widths, counts = np.unique([bucket(int(one)) for one in longest], return_counts=True)
    # best[i]: (tokens, chosen) of the batches up to width i, which is chosen last
    best = [(int(counts[: i + 1].sum() * width), [int(width)]) for i, width in enumerate(widths)]
    for _ in range(number - 1):
        best = [
            min(
                [best[i]]
                + [
                    (tokens + int(counts[j + 1 : i + 1].sum() * widths[i]), [*chosen, int(widths[i])])
                    for j, (tokens, chosen) in enumerate(best[:i])
                ]
            )
            for i in range(len(widths))
        ]
    return best[-1][1]


def make_groups(
    lengths: Int64[np.ndarray, " sequence"],
    sequence_of: Callable[[int], int],
    *,
    per_epoch: int,
    sequences_per_step: int,
    widths: int,
    seed: int,
) -> Callable[[int], tuple[list[int], int]]:
    """Return the function that gives a step's elements of the endless shuffled order, and the width of its batch.

    With one width a step takes the next elements, and its batch is as wide as the longest sequence of all. With more,
    `WINDOW_STEPS` steps share the elements that are theirs (fewer where an epoch has fewer): sorted by length, a step
    takes neighbours, and which step takes which is drawn anew in every window. All elements are taken once either way,
    a step depends on its number and the seed alone, and every process finds the same.

    Args:
        lengths: tokens of every sequence.
        sequence_of: index into `lengths` of an element.
        per_epoch: elements of an epoch.
        sequences_per_step: elements of a step.
        widths: most widths of batches; each is compiled once.
        seed: of the order.
    """
    if widths == 1:
        widest = bucket(int(lengths.max()))
        return lambda step: (list(range(step * sequences_per_step, (step + 1) * sequences_per_step)), widest)
    # the last group of an epoch that has no whole number of them counts as one: its longest is the longest of all
    ordered = np.sort(lengths)
    ends = np.arange(sequences_per_step - 1, len(ordered) + sequences_per_step - 1, sequences_per_step)
    chosen = np.array(choose_widths(ordered[np.minimum(ends, len(ordered) - 1)], widths))
    window_steps = min(WINDOW_STEPS, max(1, per_epoch // sequences_per_step))

    @functools.lru_cache(maxsize=2)  # the step that is made and the one that is made ahead of it
    def window(number: int) -> list[list[int]]:
        size = window_steps * sequences_per_step
        elements = np.arange(number * size, (number + 1) * size)
        own = lengths[[sequence_of(int(element)) for element in elements]]
        groups = elements[np.argsort(own, kind="stable")].reshape(window_steps, sequences_per_step)
        return groups[epoch_order(window_steps, seed, number)].tolist()

    def group(step: int) -> tuple[list[int], int]:
        elements = window(step // window_steps)[step % window_steps]
        longest = max(int(lengths[sequence_of(element)]) for element in elements)
        return elements, int(chosen[np.searchsorted(chosen, longest)])

    return group
