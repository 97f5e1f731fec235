"""Where live sequences lie: a list of position offsets, or offsets that are drawn."""

from dataclasses import dataclass

from dflash_jax.core import InputError

_MAX_POSITION = 2**31 - 1  # positions are int32


@dataclass(frozen=True, kw_only=True, slots=True)
class Offsets:
    """Where sequences lie.

    Attributes:
        fixed: every sequence is seen at each of these; empty where offsets are drawn.
        largest: they are drawn from 0 to this.
    """

    fixed: tuple[int, ...]
    largest: int


def parse_offsets(text: str) -> Offsets:
    """Return what `0,4096` or `random:131072` says.

    Raises:
        InputError: neither of the two, or a position outside 0 to 2^31 - 1.
    """
    draws = text.startswith("random:")
    words = [word.strip() for word in text.removeprefix("random:").split(",")]
    numbers = tuple(int(word) for word in words if word.isascii() and word.isdigit())
    if len(numbers) != len(words) or len(set(numbers)) != len(words) or (draws and len(words) != 1):
        raise InputError(f"--position-offsets is {text!r}: give different positions such as 0,4096, or random:MAX")
    if max(numbers) > _MAX_POSITION:
        raise InputError(f"--position-offsets is {text!r}: positions go from 0 to {_MAX_POSITION}")
    return Offsets(fixed=() if draws else numbers, largest=max(numbers))
