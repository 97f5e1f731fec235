"""The program: find the command, run it, print its result, turn what went wrong into one line and an exit code."""

import _thread
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from dflash_jax import __version__
from dflash_jax.cli.commands import COMMANDS, Command, Result
from dflash_jax.cli.parsing import PROGRAM, did_you_mean, parse
from dflash_jax.cli.tables import show
from dflash_jax.core import InputError, start_processes, write_json

OK, VIOLATION, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def _usage() -> str:
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [--flag value ...]",
            "",
            "Train, check and decode with DFlash speculative-decoding drafters in JAX.",
            "",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help tells a command's flags. Every command takes --config RECIPE.yaml and",
            "--json FILE; its last line on stdout is one JSON document. Exit codes: 0 fine, 1 a check found a",
            "violation, 2 bad input, 130 interrupted.",
        ]
    )


def _find(arguments: Sequence[str]) -> tuple[Command, Sequence[str]] | None:
    """The command that the arguments name, and the arguments after its name; None when help is asked for instead.

    Raises:
        InputError: no command has that name.
    """
    for words in (2, 1):
        for command in COMMANDS:
            if command.name == " ".join(arguments[:words]):
                return command, arguments[words:]
    first = arguments[0]
    if first in ("-h", "--help"):
        return None
    group = [command.name for command in COMMANDS if command.name.startswith(first + " ")]
    if group and arguments[1:2] in (["-h"], ["--help"]):
        return None
    if group and len(arguments) == 1:
        raise InputError(f"{first} needs one word more: {' or '.join(group)}")
    name = " ".join(argument for argument in arguments[:2] if not argument.startswith("-")) or first
    known = [*group, *(command.name for command in COMMANDS)]
    raise InputError(f"unknown command {name}{did_you_mean(name, known)} (see {PROGRAM} --help)")


def _check_writable(path: Path) -> None:
    """Learn before the work, not after it, that the file of `--json` cannot be written."""
    if path.is_dir():
        raise InputError(f"--json {path} is a folder: give a file's name")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"--json {path} cannot be written: {nearest} is not a folder that one may write into")


def _print(command: Command, result: Result, *, markdown: bool) -> None:
    """Print a result for people: as Markdown where it is asked for or is what the command makes, else as tables."""
    text = command.markdown(result) if markdown and command.markdown else command.text(result)
    if text is None:
        show(command.name, result, console=Console(markup=False, emoji=False, highlight=False))
    else:
        sys.stdout.write(f"{text}\n")


def _run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; raises what the command raises."""
    if arguments and arguments[0] == "--version":
        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        return OK
    found = _find(arguments or ["--help"])
    if found is None:
        sys.stdout.write(_usage() + "\n")
        return OK
    command, rest = found
    config_class, function = command.load()
    flag = command.markdown is not None
    config, json_path, markdown = parse(config_class, rest, command=command.name, markdown=flag)
    if json_path is not None:
        _check_writable(json_path)
    start_processes()
    try:
        result = function(config)
    except OSError as error:
        # A full disk says nothing about where: the command's output is the place to look at.
        error.filename = error.filename or getattr(config, "out", None)
        raise
    _print(command, result, markdown=markdown)
    sys.stdout.write(json.dumps(result, allow_nan=False, separators=(",", ":")) + "\n")
    sys.stdout.flush()
    if json_path is not None:
        write_json(json_path, result)
    return OK if command.holds(result) else VIOLATION


def _complain(line: str) -> None:
    sys.stderr.write(f"{PROGRAM}: {line}\n")


@contextmanager
def _no_interrupt_is_lost() -> Iterator[None]:
    """Within it, an interrupt that lands in a finaliser or a garbage collector's callback comes again.

    Python can raise nothing from there: it prints the exception and goes on, and so would the command, to its end.
    """
    before = sys.unraisablehook

    def hook(lost: "sys.UnraisableHookArgs") -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            before(lost)
            return
        again = threading.Timer(0.05, _thread.interrupt_main)  # not from here: it would be lost once more
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code.

    Args:
        arguments: the command line after the program's name; default: this process's own.

    Returns:
        0 fine, 1 a check found a violation, 2 bad input or an operating-system error (one line on stderr), 130
        interrupted. Anything else that goes wrong is our mistake and raises.
    """
    try:
        with _no_interrupt_is_lost():
            return _run(sys.argv[1:] if arguments is None else arguments)
    except SystemExit as leaving:
        # The parser leaves so after --help; rich does when whoever read stdout has left, with our code for a violation.
        return OK if leaving.code in (None, 0) else BAD_INPUT
    except InputError as error:
        _complain(" ".join(str(error).split()))
    except BrokenPipeError:
        # Whoever read stdout has left (`| head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _complain(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except KeyboardInterrupt:
        _complain("interrupted: run the same command again (with --resume for train) to go on")
        return INTERRUPTED
    return BAD_INPUT
