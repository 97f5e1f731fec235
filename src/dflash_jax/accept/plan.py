"""How sequences and their anchors are packed: padded widths, batches, and items of equal size. numpy only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

WIDTH_STEP = 64
WIDTH_RATIO = 0.75
"""A width serves sequences down to this share of it; a compile costs more than the padding."""
FEWEST_ANCHORS = 8
MOST_PAIRS = 2**18
"""Anchors times context tokens that are scored at a time, for every slot and head: long contexts take fewer anchors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One sequence to evaluate.

    Attributes:
        index: of the sequence in its cache.
        length: tokens.
        text_hash: identity of the text.
        anchors: chosen ones, rising, at least one.
    """

    index: int
    length: int
    text_hash: int
    anchors: Int32[np.ndarray, " anchor"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Sequences side by side. Batches of one width have equal numbers, so that they share one compiled program.

    Attributes:
        width: tokens per row, padding included.
        num_rows: rows; those past `jobs` hold nothing.
        anchors_per_row: anchors of one sequence in an item.
        group: sequences in an item.
        most_items: items that any batch of this width may have.
        jobs: the sequences, by row.
    """

    width: int
    num_rows: int
    anchors_per_row: int
    group: int
    most_items: int
    jobs: tuple[Job, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """What one turn of the compiled loop drafts.

    Attributes:
        rows: of the batch, `group` of them; a row may stand there more than once.
        counts: how many anchors of each row are asked for; the others are padding.
        anchors: of each row.
    """

    rows: tuple[int, ...]
    counts: tuple[int, ...]
    anchors: Int32[np.ndarray, "group anchor"]


def _anchors_per_row(jobs: Sequence[Job], anchors_per_item: int) -> int:
    """`anchors_per_item` halved until the least is padded: a text with 8 anchors shall not fill an item of 64."""
    counts = np.array([len(job.anchors) for job in jobs])
    best, least, size = anchors_per_item, None, anchors_per_item
    while True:
        padded = int((-(-counts // size) * size).sum())
        # a larger size shares more of the context's reads: it stays unless a smaller one saves a tenth
        if least is None or padded < 0.9 * least:
            best, least = size, padded
        if size % 2 or size // 2 < FEWEST_ANCHORS:
            return best
        size //= 2


def plan_items(jobs: Sequence[Job], *, anchors_per_row: int, group: int) -> list[Item]:
    """Return the anchors of a batch cut into pieces of `anchors_per_row`, `group` pieces to an item."""
    pieces: list[tuple[int, np.ndarray]] = []
    for row, job in enumerate(jobs):
        pieces += [
            (row, job.anchors[start : start + anchors_per_row]) for start in range(0, len(job.anchors), anchors_per_row)
        ]
    items = []
    for start in range(0, len(pieces), group):
        some = pieces[start : start + group]
        anchors = np.zeros((group, anchors_per_row), np.int32)
        for place, (_, piece) in enumerate(some):
            # padding drafts the last anchor again: it is in range, and what comes out is cut off
            anchors[place] = np.pad(piece, (0, anchors_per_row - len(piece)), mode="edge")
        missing = group - len(some)
        items.append(
            Item(
                rows=(*(row for row, _ in some), *[0] * missing),
                counts=(*(len(piece) for _, piece in some), *[0] * missing),
                anchors=anchors,
            )
        )
    return items


def _by_width(jobs: Sequence[Job]) -> list[tuple[int, list[Job]]]:
    """Sequences by padded width, longest first."""
    groups: list[tuple[int, list[Job]]] = []
    for job in sorted(jobs, key=lambda job: -job.length):
        needed = -(-job.length // WIDTH_STEP) * WIDTH_STEP
        if not groups or needed < WIDTH_RATIO * groups[-1][0]:
            groups.append((needed, []))
        groups[-1][1].append(job)
    return groups


def plan_batches(jobs: Sequence[Job], *, tokens_per_batch: int, anchors_per_item: int) -> Iterator[Batch]:
    """Give every job once, in batches of similar length, longest first.

    Args:
        jobs: in any order.
        tokens_per_batch: most tokens of a batch, padding included; a longer sequence is a batch of its own.
        anchors_per_item: anchors drafted at a time, at most.
    """
    for width, some in _by_width(jobs):
        anchors = max(1, min(anchors_per_item, MOST_PAIRS // width))
        anchors_per_row = _anchors_per_row(some, anchors)
        group = anchors // anchors_per_row
        num_rows = max(1, min(tokens_per_batch // width, len(some)))
        batches = [tuple(some[start : start + num_rows]) for start in range(0, len(some), num_rows)]
        pieces = max(sum(-(-len(job.anchors) // anchors_per_row) for job in batch) for batch in batches)
        for batch in batches:
            yield Batch(
                width=width,
                num_rows=num_rows,
                anchors_per_row=anchors_per_row,
                group=group,
                most_items=-(-pieces // group),
                jobs=batch,
            )
