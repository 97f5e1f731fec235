"""Progress goes to stderr: lines in a log, a bar on a terminal."""

import os
import pty
import subprocess
import sys

import pytest

from dflash_jax.core import progress_bar

WORK = """
from dflash_jax.core import progress_bar
with progress_bar("train") as move:
    move(1, 2, "3 tokens/s")
    {end}
"""


def test_lines_without_a_terminal_come_first_last_and_seldom(capsys: pytest.CaptureFixture[str]):
    with progress_bar("train") as move:
        for done in (1, 2, 3, 4):
            move(done, 4, f"loss {done}")
    assert capsys.readouterr() == ("", "train 25% loss 1\ntrain 100% loss 4\n")


def test_nothing_is_written_when_the_work_fails_at_once(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(RuntimeError), progress_bar("train"):
        raise RuntimeError
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("end", "stays"), [("move(2, 2, 'done')", True), ("raise SystemExit", False)])
def test_bar_on_a_terminal_stays_unless_the_work_fails(end: str, stays: bool):
    ours, theirs = pty.openpty()
    try:
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
        subprocess.run([sys.executable, "-c", WORK.format(end=end)], stderr=theirs, env=environment, check=True)
        screen = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "train" in screen
    # What follows the last clearing of the line (ESC [2K) is what stays on the screen.
    assert ("train" in screen.rpartition("\x1b[2K")[2]) is stays
