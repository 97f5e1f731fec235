"""A run's folder: the training state in orbax, drafters as z-lab folders, the curve, the config.

RUN/config.json        resolved config, fingerprint of the cache, record
RUN/metrics.jsonl      one row per step
RUN/run-<step>/        drafter folder + record.json
RUN/state/<step>/      orbax: drafter, optimizer, step
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dflash_jax.core import InputError, atomic_file, read_json, staged_folder, write_json, write_record
from dflash_jax.drafter import save_drafter
from dflash_jax.train.step import TrainState

KEPT_STATES = 2  # the newest, and the one before it should the newest be damaged
_RUN = re.compile(r"run-([0-9]+)")


class RunFolder:
    """Writes and reads one run's artefacts; every one is whole or absent at any instant."""

    def __init__(self, path: Path) -> None:
        """Bind the folder; nothing is read or written yet."""
        self.path = path
        self.metrics_path = path / "metrics.jsonl"

    def check_new(self) -> None:
        """Raise where a new run would mix with something.

        Raises:
            InputError: the folder holds something already.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path} exists already: give --resume to go on with it, or choose another --out")

    def create(self, config: dict[str, Any]) -> None:
        """Make the folder of a new run and write its config."""
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
    def _states(self) -> Iterator[ocp.CheckpointManager]:
        logging.getLogger("absl").setLevel(logging.ERROR)
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT_STATES, enable_async_checkpointing=False)
        with ocp.CheckpointManager((self.path / "state").absolute(), options=options) as manager:
            yield manager

    def save(self, state: TrainState, *, step: int, record: dict[str, Any]) -> None:
        """Write the drafter folder, then the state: a state on disk always has its drafter."""
        self.save_drafter(state, step=step, record=record)
        with self._states() as manager:
            manager.save(step, args=ocp.args.StandardSave(jax.tree_util.tree_leaves(state)))

    def save_drafter(self, state: TrainState, *, step: int, record: dict[str, Any]) -> None:
        """Write the drafter folder of a step, unless a run that was killed in between left it."""
        if not self.drafter_path(step).exists():
            with staged_folder(self.drafter_path(step)) as folder:
                save_drafter(state.drafter, folder)
                write_record(folder, record)

    def drafter_path(self, step: int) -> Path:
        """Where the drafter of a step lies."""
        return self.path / f"run-{step}"

    def drafter_steps(self) -> list[int]:
        """Steps whose drafters are kept, rising."""
        found = (_RUN.fullmatch(folder.name) for folder in self.path.glob("run-*"))
        return sorted(int(match[1]) for match in found if match)

    def restore(self, like: TrainState) -> tuple[TrainState, int]:
        """Return the newest state and its step, with curve and later drafters cut back to it; 0 where none was.

        Args:
            like: a state of the same shapes.

        Raises:
            InputError: the state on disk does not fit.
        """
        leaves, structure = jax.tree_util.tree_flatten(like)
        with self._states() as manager:
            step = manager.latest_step()
            if step is not None:
                try:
                    leaves = manager.restore(step, args=ocp.args.StandardRestore(leaves))
                except (ValueError, OSError) as error:
                    first = str(error).splitlines()[0]
                    raise InputError(
                        f"{self.path}/state/{step} cannot be restored ({first}): remove that folder"
                    ) from error
        step = step or 0
        for later in self.drafter_steps():
            if later > step:
                shutil.rmtree(self.drafter_path(later))
        for left in self.path.glob(".run-*.partial"):  # of a drafter whose writing was killed
            shutil.rmtree(left)
        self._cut_metrics(step)
        return jax.tree_util.tree_unflatten(structure, leaves), step

    def _cut_metrics(self, step: int) -> None:
        """Drop rows past a step and a last line cut by a kill."""
        if not self.metrics_path.exists():
            return
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with atomic_file(self.metrics_path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def last_metrics(self) -> dict[str, Any]:
        """Return the curve's last row; empty before the first."""
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines() if self.metrics_path.exists() else []
        return json.loads(lines[-1]) if lines else {}

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to the curve."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
