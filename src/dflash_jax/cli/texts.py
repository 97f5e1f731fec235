"""Decoded text on the terminal while it comes, accepted runs marked."""

import sys
from typing import Any

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from dflash_jax.generate import TextPiece

ACCEPTED = Style(color="green", underline=True)
HEADING = Style(dim=True)
BRACKETS = "⟦⟧"
# What a model writes must not steer the terminal: control characters are shown, but for line ends and tabs.
_SHOWN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    code: 0xFFFD for code in range(0x7F, 0xA0)
}


class TextPrinter:
    """Prints pieces of texts as they come, each text under its prompt's id.

    With `blocks`, what the drafter guessed and the target accepted is green and underlined, and where there are no
    colours stands in brackets; the rest is the target's own, one token a block. A line below counts them.
    """

    def __init__(self, file: Any, *, blocks: bool) -> None:
        """Print to the text file `file`, with colours where it is a terminal that has them and NO_COLOR is not set."""
        self._file = file
        self._blocks = blocks
        console = Console(file=file)
        self._colours = console.color_system is not None and not console.no_color
        self._id: str | None = None
        self._drafted = self._own = self._num_blocks = 0

    def __call__(self, piece: TextPiece) -> None:
        """Print one piece."""
        if piece.id != self._id:
            self._id, self._drafted, self._own, self._num_blocks = piece.id, 0, 0, -1  # the prompt's pass is no block
            self._write(f"--- {piece.id} ---\n", HEADING)
        self._drafted += piece.tokens if piece.drafted else 0
        self._own += 0 if piece.drafted else piece.tokens
        self._num_blocks += piece.ends_block
        text = piece.text.translate(_SHOWN)
        if not (self._blocks and piece.drafted and text):
            self._write(text)
        elif self._colours:
            self._write(text, ACCEPTED)
        else:
            self._write(f"{BRACKETS[0]}{text}{BRACKETS[1]}")
        if piece.ends_text:
            self._write("\n")
            if self._blocks:
                self._write(f"{self._counts()}\n", HEADING)
        self._file.flush()

    def _counts(self) -> str:
        tokens = self._drafted + self._own
        tau = f"{(tokens - 1) / self._num_blocks:.2f} tokens a block" if self._num_blocks else "no block"
        return f"(tokens: {tokens}, drafted and accepted: {self._drafted}; blocks: {self._num_blocks}, {tau})"

    def _write(self, text: str, style: Style | None = None) -> None:
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        if style is not None and self._colours:
            text = style.render(text, color_system=ColorSystem.STANDARD)
        self._file.write(text)


def stdout_printer(*, blocks: bool) -> TextPrinter:
    """A printer to stdout."""
    return TextPrinter(sys.stdout, blocks=blocks)
