"""Decoding's walk over a stored text, and what it would commit, as plain loops; imports nothing of the package."""

from collections.abc import Sequence


def replay(accepted: Sequence[int], *, prompt_len: int, length: int) -> list[int]:
    """Tokens that each block commits; `accepted[i]` belongs to the anchor `prompt_len + i`."""
    known = prompt_len + 1  # the prompt and the token that its own pass gives
    committed = []
    while known < length:
        anchor = known - 1
        new = 0
        for _ in range(accepted[anchor - prompt_len]):
            if known < length:
                known, new = known + 1, new + 1
        if known < length:  # the bonus
            known, new = known + 1, new + 1
        committed.append(new)
    return committed
