"""What a verdict is made of: sentences with a mark, and key numbers as tiles."""

from dataclasses import dataclass
from typing import Literal

from dflash_jax.report.fields import Interval

Mark = Literal["good", "warn", "bad", "info"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentence:
    """One line of the verdict. `lead` names what it is about."""

    mark: Mark
    lead: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One key number: its name, its value as shown, and a line under it."""

    name: str
    value: str
    under: str
    mark: Mark = "info"


def interval_words(interval: Interval) -> str:
    """An interval in a sentence."""
    return f"95 % {interval.low:.2f} to {interval.high:.2f}"
