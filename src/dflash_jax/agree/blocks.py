"""Two chains of blocks over one text: where they are the same, where they part, where they meet again. numpy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Int32

Kind = Literal["draft", "token", "end"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parting:
    """Where decoding first does something else than the replay.

    Attributes:
        anchor: of the block in which it does; for a prompt's first response token `prompt_len - 1`.
        slot: the first slot that is not the same, 1 to B.
        kind: "draft": both are at the anchor and accept differently; "token": decoding commits a token that is not the
            stored text's; "end": decoding is at its end and the stored text is not.
        num_blocks: decoding's blocks that are not the replay's because of it.
    """

    anchor: int
    slot: int
    kind: Kind
    num_blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A text's blocks, offline and online.

    Attributes:
        online: tokens that each compared block of decoding commits, cut where the stored text ends.
        num_equal: those that are the replay's.
        partings: in order; their `num_blocks` and `num_equal` add up to the blocks in `online`.
    """

    online: tuple[int, ...]
    num_equal: int
    partings: tuple[Parting, ...]


def _first_difference(text: Int32[np.ndarray, " seq"], tokens: Sequence[int], prompt_len: int) -> int | None:
    """Index of the first decoded token that is not the text's; None where one is the beginning of the other."""
    stored = text[prompt_len : prompt_len + len(tokens)]
    wrong = np.flatnonzero(stored != np.array(tokens[: len(stored)], np.int32))
    return prompt_len + int(wrong[0]) if wrong.size else None


class _Walk:
    """The comparison while it is made."""

    def __init__(self) -> None:
        self.partings: list[Parting] = []
        self.num_equal = 0

    def part(self, anchor: int, slot: int, kind: Kind, *, num_blocks: int) -> None:
        """Enter a new parting."""
        self.partings.append(Parting(anchor=anchor, slot=slot, kind=kind, num_blocks=num_blocks))

    def apart(self) -> None:
        """Count one block more to the last parting."""
        self.partings[-1] = replace(self.partings[-1], num_blocks=self.partings[-1].num_blocks + 1)

    def block(self, anchor: int, online: int, offline: int | None, wrong_slot: int | None, *, last: bool) -> None:
        """Compare one block of decoding.

        Args:
            anchor: where it starts.
            online: tokens it commits.
            offline: tokens that the replay's block there commits; None where it has none there.
            wrong_slot: first slot whose token is not the text's; None where all are.
            last: whether decoding ended in it, before the text does.
        """
        if wrong_slot is None and offline == online:
            self.num_equal += 1
        elif offline is not None and (wrong_slot is None or offline < wrong_slot) and not (last and offline > online):
            self.part(anchor, min(offline, online), "draft", num_blocks=1)
        elif wrong_slot is None and not last:
            self.apart()
        if wrong_slot is not None:
            counted = bool(self.partings) and self.partings[-1].anchor == anchor
            self.part(anchor, wrong_slot, "token", num_blocks=0 if counted else 1)
        elif last:
            self._end(anchor, online, offline)

    def _end(self, anchor: int, online: int, offline: int | None) -> None:
        """Decoding ended with this block, and the text goes on."""
        counted = offline == online or (bool(self.partings) and self.partings[-1].anchor == anchor)
        self.part(anchor, online + 1, "end", num_blocks=0 if counted else 1)


def compare_chains(
    offline: Mapping[int, int],
    text: Int32[np.ndarray, " seq"],
    *,
    prompt_len: int,
    tokens: Sequence[int],
    committed: Sequence[int],
) -> Comparison:
    """Compare a text's replay with its decoding.

    Worked: prompt_len 3, text of 12 tokens, the replay commits {3: 2, 5: 1, 6: 3, 9: 2}, decoding the same tokens in
    blocks of [2, 2, 2, 2]: anchors 3, 5, 7, 9. Equal are 3 and 9; they part at anchor 5, slot 1 (one of them accepts
    the token drafted there), which costs the blocks at 5 and 7.

    Args:
        offline: tokens that each block of the replay commits, by anchor.
        text: the stored tokens, prompt and response, as far as the replay goes.
        prompt_len: tokens of the prompt, and the first anchor.
        tokens: decoding's new tokens; the first one is the prompt's own pass's.
        committed: tokens of each of decoding's blocks after it.
    """
    walk, online = _Walk(), []
    wrong = _first_difference(text, tokens, prompt_len)
    if wrong == prompt_len:
        walk.part(prompt_len - 1, 1, "token", num_blocks=len(committed))
        return Comparison(online=tuple(committed), num_equal=0, partings=tuple(walk.partings))
    end, anchor = len(text) - 1, prompt_len
    ends_early = wrong is None and prompt_len + len(tokens) - 1 < end
    for number, count in enumerate(committed):
        if wrong is not None and anchor >= wrong:
            walk.apart()
            online.append(count)
            continue
        if anchor >= end:
            break  # decoding goes on where the stored text does not
        inside = min(count, end - anchor)
        wrong_slot = wrong - anchor if wrong is not None and wrong <= anchor + count else None
        last = ends_early and number == len(committed) - 1
        walk.block(anchor, inside, offline.get(anchor), wrong_slot, last=last)
        online.append(inside)
        anchor += count
    if ends_early and not committed:
        walk.part(anchor, 1, "end", num_blocks=0)
    return Comparison(online=tuple(online), num_equal=walk.num_equal, partings=tuple(walk.partings))
