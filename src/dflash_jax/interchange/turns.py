"""Rows of a conversation as sequences of a cache: one per response, sharing what comes before."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from dflash_jax.cache import Sequence, TextGroup, hash_prompt
from dflash_jax.interchange.speculators import SpeculatorsRow
from dflash_jax.interchange.target_side import as_bits


def responses(loss_mask: np.ndarray) -> list[tuple[int, int]]:
    """Return start and end of every run of ones; a run at index 0 loses its first token, which no prompt precedes.

    Worked: [1, 1, 0, 1, 0, 0, 1, 1, 1] gives (1, 2), (3, 4) and (6, 9).
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loss_mask, [0]])))
    return [(max(1, int(first)), int(end)) for first, end in edges.reshape(-1, 2) if end > max(1, first)]


def _continues(row: SpeculatorsRow, before: SpeculatorsRow) -> bool:
    """Whether a row begins with all of the row before it, bit for bit."""
    length = len(before.token_ids)
    return (
        len(row.token_ids) > length
        and np.array_equal(row.token_ids[:length], before.token_ids)
        and np.array_equal(as_bits(row.aux[:length]), as_bits(before.aux))
        and np.array_equal(as_bits(row.last[:length]), as_bits(before.last))
    )


def merge_rows(rows: Iterable[SpeculatorsRow]) -> Iterator[tuple[SpeculatorsRow, int]]:
    """Give rows, each with the number of rows it stands for: one that goes on the row before it takes its place.

    Data with a row per turn repeats each conversation's beginning; the masks of the rows are joined.
    """
    held, count = None, 0
    for row in rows:
        if held is not None and _continues(row, held):
            mask = row.loss_mask.copy()
            mask[: len(held.loss_mask)] |= held.loss_mask
            held, count = replace(row, loss_mask=mask), count + 1
            continue
        if held is not None:
            yield held, count
        held, count = row, 1
    if held is not None:
        yield held, count


def text_group(row: SpeculatorsRow, next_ids: np.ndarray, *, first_index: int, prompt_set: str) -> TextGroup:
    """Return a row's sequences, the last response's first; empty where it has no response.

    Args:
        row: the conversation.
        next_ids: the target's token after each of its tokens.
        first_index: `sequence_index` of the first of them.
        prompt_set: name of the set.
    """
    sequences = []
    for number, (start, end) in enumerate(reversed(responses(row.loss_mask))):
        mask = np.zeros(end, np.uint8)
        mask[start:] = 1
        sequences.append(
            Sequence(
                stored_features=row.aux[:end],
                feature_scales=None,
                token_ids=row.token_ids[:end],
                next_ids=next_ids[:end],
                loss_mask=mask,
                position_offset=0,
                prompt_len=start,
                prompt_hash=hash_prompt(row.token_ids[:start]),
                sequence_index=first_index + number,
                prompt_set=prompt_set,
                features_len=end,
            )
        )
    return tuple(sequences)
