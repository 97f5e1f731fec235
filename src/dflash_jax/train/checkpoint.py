"""A run's folder: the training state in orbax, drafters as z-lab folders, the curve, the config.

RUN/config.json        resolved config, fingerprint of the cache, record
RUN/metrics.jsonl      one row per step
RUN/run-<step>/        drafter folder + record.json
RUN/last, RUN/best     relative symlinks to the newest drafter, and to the one of the highest held-out tau
RUN/state/<step>/      orbax: drafter, optimizer, step
"""

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dflash_jax.core import InputError, atomic_file, read_json, staged_folder, sync_folder, write_json, write_record
from dflash_jax.drafter import Drafter, save_drafter
from dflash_jax.train.step import TrainState

KEPT_STATES = 2  # the newest, and the one before it should the newest be damaged
LAST, BEST = "last", "best"
_RUN = re.compile(r"run-([0-9]+)")


class _DrafterHandler(ocp.AsyncCheckpointHandler):
    """An item of a checkpoint that is committed when the drafter's folder is: orbax renames the state after that."""

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Return what the commit has to wait for."""
        del directory, args
        return [kwargs["args"].written]

    def save(self, directory: Any, *args: Any, **kwargs: Any) -> None:
        """Wait for the drafter's folder."""
        del directory, args
        kwargs["args"].written.result()

    def restore(self, directory: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing is stored here."""


@ocp.args.register_with_handler(_DrafterHandler, for_save=True, for_restore=True)
@dataclass
class _DrafterWritten(ocp.args.CheckpointArgs):
    written: Future[None]


def best_step(evaluations: dict[int, float]) -> int | None:
    """Return the step of the highest held-out tau, the earliest of equals; None where nothing was evaluated."""
    return min(evaluations, key=lambda step: (-evaluations[step], step)) if evaluations else None


class RunFolder:
    """Reads one run's artefacts and writes all but the checkpoints; every one is whole or absent at any instant."""

    def __init__(self, path: Path) -> None:
        """Bind the folder; nothing is read or written yet."""
        self.path = path
        self.metrics_path = path / "metrics.jsonl"

    @property
    def is_writer(self) -> bool:
        """Whether this process is the one that writes what all of them share."""
        return jax.process_index() == 0

    def check_new(self) -> None:
        """Raise where a new run would mix with something.

        Raises:
            InputError: the folder holds something already.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path} exists already: give --resume to go on with it, or choose another --out")

    def create(self, config: dict[str, Any]) -> None:
        """Make the folder of a new run and write its config."""
        if self.is_writer:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "config.json", config)

    def read_config(self) -> dict[str, Any]:
        """Return the config the run was begun with.

        Raises:
            InputError: there is no run here, or something else than a run.
        """
        if not (self.path / "config.json").is_file():
            raise InputError(f"--resume: no run at {self.path} (no config.json): start it without --resume")
        begun = read_json(self.path / "config.json", what="the run's config")
        if not isinstance(begun, dict) or begun.get("command") != "train":
            raise InputError(f"--resume: {self.path} is not a run: its config.json is of something else")
        return begun

    @contextmanager
    def states(self) -> Iterator[ocp.CheckpointManager]:
        """Give orbax's manager of the training states."""
        logging.getLogger("absl").setLevel(logging.ERROR)
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT_STATES, enable_async_checkpointing=True)
        folder = (self.path / "state").absolute()
        with ocp.CheckpointManager(folder, options=options, item_names=("default", "drafter")) as manager:
            yield manager

    def save_drafter(self, drafter: Drafter, *, step: int, record: dict[str, Any]) -> None:
        """Write the drafter folder of a step, unless a run that was killed in between left it."""
        if not self.drafter_path(step).exists():
            with staged_folder(self.drafter_path(step)) as folder:
                save_drafter(drafter, folder)
                write_record(folder, record)

    def drafter_path(self, step: int) -> Path:
        """Where the drafter of a step lies."""
        return self.path / f"run-{step}"

    def drafter_steps(self) -> list[int]:
        """Steps whose drafters are kept, rising."""
        found = (_RUN.fullmatch(folder.name) for folder in self.path.glob("run-*"))
        return sorted(int(match[1]) for match in found if match)

    def remove_drafter(self, step: int) -> None:
        """Remove the drafter of a step: gone by one rename, whatever comes in between."""
        aside = Path(tempfile.mkdtemp(prefix=f".run-{step}.", suffix=".partial", dir=self.path))
        self.drafter_path(step).replace(aside)
        shutil.rmtree(aside)

    def mark(self, name: str, step: int | None) -> None:
        """Let the link `last` or `best` point to a step's drafter, by one rename; None, or no such drafter: no link."""
        link, waiting = self.path / name, self.path / f".{name}.partial"
        waiting.unlink(missing_ok=True)
        if step is None or not self.drafter_path(step).exists():
            link.unlink(missing_ok=True)
            return
        waiting.symlink_to(self.drafter_path(step).name)
        waiting.replace(link)
        sync_folder(self.path)

    def restore(self, like: TrainState) -> tuple[TrainState, int]:
        """Return the newest state and its step, with curve and later drafters cut back to it; 0 where none was.

        Args:
            like: a state of the same shapes, on the devices that the run is to go on with.

        Raises:
            InputError: the state on disk does not fit.
        """
        leaves, structure = jax.tree_util.tree_flatten(like)
        with self.states() as manager:
            step = manager.latest_step()
            if step is not None:
                arguments = ocp.args.Composite(default=ocp.args.StandardRestore(leaves))
                try:
                    leaves = manager.restore(step, args=arguments)["default"]
                except (ValueError, OSError) as error:
                    first = str(error).splitlines()[0]
                    raise InputError(
                        f"{self.path}/state/{step} cannot be restored ({first}): remove that folder"
                    ) from error
        step = step or 0
        if self.is_writer:
            self._cut_back(step)
        return jax.tree_util.tree_unflatten(structure, leaves), step

    def _cut_back(self, step: int) -> None:
        """Remove what came after a step, and let the links point to what is left."""
        for later in self.drafter_steps():
            if later > step:
                self.remove_drafter(later)
        for left in self.path.glob(".run-*.partial"):  # of a drafter whose writing or removal was killed
            shutil.rmtree(left)
        self._cut_metrics(step)
        self.mark(LAST, step)
        self.mark(BEST, best_step(self.evaluations()))

    def _cut_metrics(self, step: int) -> None:
        """Drop rows past a step and a last line cut by a kill."""
        if not self.metrics_path.exists():
            return
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with atomic_file(self.metrics_path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of the curve."""
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines() if self.metrics_path.exists() else []
        return [json.loads(line) for line in lines]

    def evaluations(self) -> dict[int, float]:
        """Return the held-out replay tau by step, of every step that was evaluated."""
        return {row["step"]: row["eval"]["tau_micro"] for row in self.metrics() if "eval" in row}

    def evaluation(self, step: int) -> dict[str, Any]:
        """Return the held-out numbers of a step that was evaluated."""
        return next(row["eval"] for row in self.metrics() if row["step"] == step)

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to the curve."""
        if self.is_writer:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


class CheckpointWriter:
    """Writes checkpoints while training goes on; see `open_writer`."""

    def __init__(self, folder: RunFolder, states: ocp.CheckpointManager, *, keep: int | None) -> None:
        """Take the folder, its states, and how many drafters stay (None: all)."""
        self._folder, self._states, self._keep = folder, states, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="drafter-writer")
        self._evaluations = folder.evaluations()

    def save(self, state: TrainState, *, step: int, record: dict[str, Any], tau: float | None = None) -> None:
        """Begin to write the drafter folder, then the state: a state on disk always has its drafter.

        Returns when the state was copied to the host, so it may be donated; waits for the disk only where the
        checkpoint before is still being written.

        Args:
            state: after `step` steps.
            step: optimizer steps done.
            record: goes into the drafter's folder.
            tau: held-out replay tau of this drafter, where it was measured.

        Raises:
            OSError: the checkpoint before this one could not be written.
        """
        self.wait()
        if tau is not None:
            self._evaluations[step] = tau
        written: Future[None] = Future()
        if self._folder.is_writer:
            drafter = jax.tree_util.tree_map(np.asarray, state.drafter)
            written = self._thread.submit(self._write, drafter, step, record, self._outdated(step), self.best)
        else:
            written.set_result(None)
        leaves = jax.tree_util.tree_leaves(state)
        self._states.save(
            step, args=ocp.args.Composite(default=ocp.args.StandardSave(leaves), drafter=_DrafterWritten(written))
        )

    def _outdated(self, newest: int) -> list[int]:
        """Drafters that may go when that of step `newest` is there. A run killed now finds all it goes on from."""
        if self._keep is None:
            return []
        steps, states = sorted({*self._folder.drafter_steps(), newest}), self._states.all_steps()
        known = {step: tau for step, tau in self._evaluations.items() if step <= max(states, default=0)}
        stay = {0, self.best, best_step(known), *states, *steps[-self._keep :]}
        return [step for step in steps if step not in stay]

    def _write(
        self, drafter: Drafter, step: int, record: dict[str, Any], outdated: list[int], best: int | None
    ) -> None:
        for old in outdated:
            self._folder.remove_drafter(old)
        self._folder.save_drafter(drafter, step=step, record=record)
        self._folder.mark(LAST, step)
        self._folder.mark(BEST, best)

    @property
    def best(self) -> int | None:
        """Step of the best drafter; None where nothing was evaluated."""
        return best_step(self._evaluations)

    def wait(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            OSError: something could not be written.
        """
        self._states.wait_until_finished()

    def finish(self) -> None:
        """Wait, and let the last drafters go that may."""
        self.wait()
        if self._folder.is_writer:
            for old in self._outdated(max(self._states.all_steps(), default=0)):
                self._folder.remove_drafter(old)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


@contextmanager
def open_writer(folder: RunFolder, *, keep: int | None) -> Iterator[CheckpointWriter]:
    """Give the writer of a run's checkpoints; what it began is on the disk when the context is left.

    Args:
        folder: the run's.
        keep: newest drafters that stay, besides `best`, `run-0` and those of the states on disk; None: all.
    """
    with folder.states() as states:
        writer = CheckpointWriter(folder, states, keep=keep)
        try:
            yield writer
            writer.finish()
        finally:
            writer.close()
