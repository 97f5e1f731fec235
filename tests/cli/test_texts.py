"""Texts on a terminal and in a file: what was drafted can be told in both."""

import io

import pytest

from dflash_jax.cli.texts import TextPrinter
from dflash_jax.generate import TextPiece


def piece(prompt, text, tokens=1, **kind):
    return TextPiece(id=prompt, text=text, tokens=tokens, **kind)


PIECES = [
    piece("p0", "He", ends_block=True),  # the prompt's own pass
    piece("p0", "llo wor", tokens=3, drafted=True),
    piece("p0", "ld", ends_block=True),
    piece("p0", "!\x1b[31m\t\n", ends_block=True),
    piece("p0", "", drafted=True, ends_block=True),  # half of a character
    piece("p0", "", tokens=0, ends_text=True),
    piece("p1", "é", ends_block=True),
    piece("p1", "", tokens=0, ends_text=True),
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def printed(file, *, blocks):
    printer = TextPrinter(file, blocks=blocks)
    for one in PIECES:
        printer(one)
    return file.getvalue()


def test_text_alone_is_printed_as_it_is():
    assert printed(io.StringIO(), blocks=False) == "--- p0 ---\nHello world!␛[31m\t\n\n--- p1 ---\né\n"


def test_accepted_runs_stand_in_brackets_where_there_is_no_colour():
    assert printed(io.StringIO(), blocks=True) == (
        "--- p0 ---\nHe⟦llo wor⟧ld!␛[31m\t\n\n"
        "(tokens: 7, drafted and accepted: 4; blocks: 3, 2.00 tokens a block)\n"
        "--- p1 ---\né\n(tokens: 1, drafted and accepted: 0; blocks: 0, no block)\n"
    )


def test_accepted_runs_are_green_and_underlined_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = printed(Terminal(), blocks=True)
    assert "He\x1b[4;32mllo wor\x1b[0mld!␛[31m" in text
    assert "⟦" not in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "He⟦llo wor⟧ld" in printed(Terminal(), blocks=True)


@pytest.mark.parametrize(("encoding", "text"), [("ascii", "He?llo wor?ld"), ("latin-1", "--- p1 ---\né")])
def test_what_a_terminal_cannot_show_does_not_end_the_run(encoding, text):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="")
    printer = TextPrinter(file, blocks=True)
    for one in PIECES:
        printer(one)
    assert text in raw.getvalue().decode(encoding)
