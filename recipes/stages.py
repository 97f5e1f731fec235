"""What the recipes share: stages that are commands of the program, each run once and kept by its record."""

import contextlib
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dflash_jax.core import InputError, read_json, write_json

CRASHED = -1
PROGRAM = "import sys; from dflash_jax.cli import main; sys.exit(main())"
KEEPS_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(8 * 10**9),
}
"""What tells glibc to keep what a step frees for the next one, in large pages (docs/training.md, "On a CPU"). Other
systems do not read these."""


class StageError(InputError):
    """A stage did not end as it should."""


class Stages:
    """Runs commands of the program, one record each; a stage whose record is there is not run again.

    Records lie in `OUT/records`: `NAME.json`, the command's JSON, and `NAME.stage.json`, its command line and seconds.
    """

    def __init__(self, out: Path, *, in_process: bool = False) -> None:
        """Take the folder of everything that is made.

        Args:
            out: records and logs are written below it.
            in_process: run commands in this process, so that imports and what is compiled are paid once; what they
                print goes to `OUT/logs/NAME.log`.
        """
        self.out = out
        self.in_process = in_process
        self.seconds: dict[str, float] = {}
        self.commands: dict[str, str] = {}

    def run(
        self,
        name: str,
        *arguments: str | Path | int | float,
        allowed: Sequence[int] = (0,),
        resumes: Path | None = None,
        made: Path | None = None,
    ) -> dict[str, Any]:
        """Return a command's JSON, from its record where an earlier run left it.

        Args:
            name: of the stage.
            arguments: of the program.
            allowed: exit codes that are no failure; 1 is a violation found, which some stages are there to find.
            resumes: a run folder; where it was begun the command gets `--resume`.
            made: what the command makes, whole or not at all; where it is there without a record it counts as made.

        Raises:
            StageError: the command ended with another exit code, or the record is of another command line.
        """
        record, told = self.out / "records" / f"{name}.json", self.out / "records" / f"{name}.stage.json"
        words = [str(argument) for argument in arguments]
        self.commands[name] = shlex.join(["dflash-jax", *words])
        if not (record.exists() and told.exists()):
            record.parent.mkdir(parents=True, exist_ok=True)
            seconds = 0.0
            if made is not None and made.exists():
                sys.stderr.write(f"\n[{name}] {made} is there already\n")
                write_json(record, {"made": str(made)})
            else:
                seconds = self._execute(name, words, record, allowed=allowed, resumes=resumes)
            write_json(told, {"command": self.commands[name], "seconds": seconds})
        stage = read_json(told, what="a stage's command")
        if stage["command"] != self.commands[name]:
            raise StageError(
                f"stage {name} of {self.out} was run as `{stage['command']}`, now it is `{self.commands[name]}`: "
                "choose another --out, or keep the settings"
            )
        self.seconds[name] = stage["seconds"]
        return read_json(record, what="a stage's record")

    def _execute(
        self, name: str, words: list[str], record: Path, *, allowed: Sequence[int], resumes: Path | None
    ) -> float:
        """Run a command and return its seconds."""
        is_begun = resumes is not None and (resumes / "config.json").exists()
        words = [*words, *(["--resume"] if is_begun else []), "--json", str(record)]
        sys.stderr.write(f"\n[{name}] {self.commands[name]}\n")
        sys.stderr.flush()
        start = time.monotonic()
        code = self._here(name, words) if self.in_process else self._apart(words)
        seconds = time.monotonic() - start
        if code not in allowed:
            where = f"{self.out / 'logs' / name}.log" if self.in_process else "above"
            raise StageError(f"stage {name} ended with exit code {code}: see {where}, then run this again")
        if self.in_process:
            sys.stderr.write(f"[{name}] {seconds:.1f} s\n")
        return seconds

    @staticmethod
    def _apart(words: list[str]) -> int:
        command = [sys.executable, "-c", PROGRAM, *words]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False, env=KEEPS_MEMORY | os.environ)
        return done.returncode

    def _here(self, name: str, words: list[str]) -> int:
        from jax.errors import JaxRuntimeError

        from dflash_jax.cli import main

        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with (
            log.open("w", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            try:
                code = main(words)
            except JaxRuntimeError:  # such as no memory left: a process of its own would have ended so too
                traceback.print_exc()
                code = CRASHED
        if code != 0:
            sys.stderr.write("".join(f"    {line}\n" for line in log.read_text(encoding="utf-8").splitlines()[-5:]))
        return code
