"""Curves elsewhere: TensorBoard, wandb or trackio get the rows of `metrics.jsonl` while they are written."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dflash_jax.core import InputError

TrackerName = Literal["none", "wandb", "trackio"]
PROJECT = "dflash-jax"
TENSORBOARD_FOLDER = "tensorboard"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracker:
    """Something that is told every row.

    Attributes:
        log: takes numbers by name, and the step they are of.
        close: is called when the run ends, however it ends.
    """

    log: Callable[[Mapping[str, float], int], object]
    close: Callable[[], object]


def flat_row(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row by name: lists as `name/1`, `name/2`, ... (slots count from 1), mappings `name/key`.

    Worked: `{"step": 3, "accuracy_by_slot": [0.5, 0.25], "eval": {"tau_micro": 1.5}}` is `accuracy_by_slot/1` 0.5,
    `accuracy_by_slot/2` 0.25 and `eval/tau_micro` 1.5; the step is no number of its own.
    """
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{key}": number for key, number in flat_row(value).items()}
        elif isinstance(value, list):
            flat |= {f"{name}/{place}": float(number) for place, number in enumerate(value, start=1)}
        elif name != "step":
            flat[name] = float(value)
    return flat


def _load(module: str, *, flag: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{flag} needs the package {module}, which is not installed: pip install {module}") from error


def _tensorboard(folder: Path, first: int) -> Tracker:
    """Event files in RUN/tensorboard; rows of a run that was cut back by a kill are purged from its first step on."""
    module = _load("tensorboardX", flag="--tensorboard")
    writer = module.SummaryWriter(logdir=str(folder / TENSORBOARD_FOLDER), purge_step=first)

    def log(numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, global_step=step)

    return Tracker(log=log, close=writer.close)


def _service(name: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """A run of wandb or trackio, by the folder's name: a run that is resumed goes on there."""
    module = _load(name, flag=f"--track {name}")
    label = folder.resolve().name
    more = {"id": label, "dir": str(folder)} if name == "wandb" else {}
    module.init(project=PROJECT, name=label, config=dict(config), resume="allow", **more)
    return Tracker(log=lambda numbers, step: module.log(dict(numbers), step=step), close=module.finish)


def open_trackers(
    folder: Path, *, tensorboard: bool, track: TrackerName, config: Mapping[str, Any], first: int
) -> list[Tracker]:
    """Return what is to be told every row.

    Args:
        folder: the run's.
        tensorboard: whether event files are written.
        track: a service, or none.
        config: the run's settings.
        first: the first step that will be logged.

    Raises:
        InputError: a package is not installed.
    """
    trackers = [_tensorboard(folder, first)] if tensorboard else []
    return trackers + ([] if track == "none" else [_service(track, folder, config)])


def check_trackers(*, tensorboard: bool, track: TrackerName) -> None:
    """Refuse trackers that are not installed, before anything is loaded.

    Raises:
        InputError: a package is not installed.
    """
    if tensorboard:
        _load("tensorboardX", flag="--tensorboard")
    if track != "none":
        _load(track, flag=f"--track {track}")
