"""Decoded text cut into the blocks that committed it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dflash_jax.report.records import Sample

Kind = Literal["prefill", "drafted", "target"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """The tokens that one target pass committed. Number 0 is the prefill; `tokens` are (text, who wrote it)."""

    number: int
    tokens: tuple[tuple[str, Kind], ...]

    @property
    def tooltip(self) -> str:
        """The block's number and lengths in words."""
        if self.number == 0:
            return "prefill: the first token, the target's own"
        drafted = sum(kind == "drafted" for _, kind in self.tokens)
        own = len(self.tokens) - drafted
        length = len(self.tokens)
        committed = f"{length} token{'s' * (length != 1)} committed"
        return f"block {self.number}: {committed} = {drafted} drafted + {own} target's own"


def cut_into_blocks(sample: Sample) -> list[Block]:
    """The prefill's token, then the blocks in order.

    The last committed token of a block is the target's own (the bonus), the others were drafted and accepted:

        pieces      0 | 1 2 3 | 4 | 5 6
        accepted          3     1    2
        written by  P   d d T   T   d T        P prefill, d drafted, T target's own

    A stop token that ends the text inside a block stands last in it and is shown as the target's own.
    """
    blocks = [Block(number=0, tokens=((sample.pieces[0], "prefill"),))]
    start = 1
    for number, length in enumerate(sample.accepted, start=1):
        kinds: list[Kind] = [*("drafted" for _ in range(length - 1)), "target"]
        pieces = sample.pieces[start : start + length]
        blocks.append(Block(number=number, tokens=tuple(zip(pieces, kinds, strict=True))))
        start += length
    return blocks


def spread_by_tau(samples: Sequence[Sample], *, count: int) -> list[Sample]:
    """At most `count` samples, evenly spaced in the order of tau, so that none is picked by hand.

    Samples that differ from plain decoding come before all others, the highest tau first in each group.
    """
    ordered = sorted(samples, key=lambda sample: (sample.tokens_equal is not False, -(sample.tau or 0), sample.id))
    if len(ordered) <= count:
        return ordered
    return [ordered[round(place * (len(ordered) - 1) / (count - 1))] for place in range(count)]
