"""Progress on stderr, so that stdout holds the result alone."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Move = Callable[[int, int, str], None]
"""Takes how much is done, how much there is in all (in any one unit), and a note such as a rate."""

SECONDS_BETWEEN_LINES = 10.0
"""How often progress is told where there is no terminal to draw a bar on."""


def no_progress(done: int, total: int, note: str) -> None:
    """Show nothing: what library callers get unless they pass a `Move` of their own."""
    del done, total, note


def _lines(title: str) -> Move:
    """Progress as plain lines, for a log file: the first, one every ten seconds, and the last."""
    told = float("-inf")

    def move(done: int, total: int, note: str) -> None:
        nonlocal told
        now = time.monotonic()
        if done >= total or now - told >= SECONDS_BETWEEN_LINES:
            told = now
            sys.stderr.write(f"{title} {done / max(total, 1):.0%} {note}\n")
            sys.stderr.flush()

    return move


@contextmanager
def progress_bar(title: str) -> Iterator[Move]:
    """Show a bar with its share, a note and the time left; give the function that moves it.

    Without a terminal, plain lines are written instead. When the work fails the bar goes, so that what is left on the
    screen is the reason.
    """
    # Here and not above: the model rooms import core, and must run where rich is not installed.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title)
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}")
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(title, total=None, note="")
        try:
            yield lambda done, total, note: progress.update(task, completed=done, total=total, note=note)
        except BaseException:
            progress.live.transient = True
            raise
