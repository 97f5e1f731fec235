"""Rows on their way to other places, and what is said where a place is missing."""

import dataclasses
import json
import sys

import pytest

from dflash_jax.core import InputError
from dflash_jax.train import train
from dflash_jax.train.loop import progress_note
from dflash_jax.train.track import check_trackers, flat_row, open_trackers
from support import tiny_chain

# what wandb and trackio have in common, each call as a line of a file
SERVICE = """
import json, pathlib
def _say(name, /, *args, **given):
    with pathlib.Path({log!r}).open("a") as file:
        file.write(json.dumps([name, args, given]) + "\\n")
def init(**given): _say("init", **given)
def log(numbers, step): _say("log", numbers, step=step)
def finish(): _say("finish")
"""


def test_numbers_by_name():
    row = {"step": 3, "loss": 2.5, "accuracy_by_slot": [0.5, 0.25], "eval": {"tau_micro": 1.5, "num_prompts": 4}}
    assert flat_row(row) == {
        "loss": 2.5, "accuracy_by_slot/1": 0.5, "accuracy_by_slot/2": 0.25, "eval/tau_micro": 1.5,
        "eval/num_prompts": 4.0,
    }  # fmt: skip


def test_the_note_that_is_watched():
    row = {"loss": 3.41234, "accuracy": 0.3125, "accuracy_by_slot": [0.5, 0.25, 1.0], "anchors_per_s": 151.7}
    assert (
        progress_note(row, seconds_left=3725.4) == "loss 3.412  acc 0.312 [.50 .25 1.00]  152 anchors/s  1:02:05 left"
    )
    many = row | {"accuracy_by_slot": [0.5] * 9}
    assert "[.50 .50 .50 .50 .50 .50 .50 …]" in progress_note(many, seconds_left=0.0)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        InputError, match=r"^--track wandb needs the package wandb, which is not installed: pip install"
    ):
        check_trackers(tensorboard=False, track="wandb")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match=r"^--tensorboard needs the package tensorboardX, which is not installed"):
        check_trackers(tensorboard=True, track="none")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_every_row(tmp_path, monkeypatch, target_folder, cache, name):
    said = tmp_path / "said.jsonl"
    (tmp_path / f"{name}.py").write_text(SERVICE.format(log=str(said)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    config = tiny_chain.train_config(target_folder, cache, tmp_path / "run", num_layers=1, steps=3)
    train(dataclasses.replace(config, track=name))
    calls = [json.loads(line) for line in said.read_text().splitlines()]
    assert [call[0] for call in calls] == ["init", "log", "log", "log", "finish"]
    given = calls[0][2]
    assert (given["project"], given["name"], given["resume"]) == ("dflash-jax", "run", "allow")
    assert given["config"]["steps"] == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [call[1][0] for call in calls[1:4]] == [flat_row(row) for row in rows]
    assert [call[2]["step"] for call in calls[1:4]] == [1, 2, 3]


def test_event_files(tmp_path):
    pytest.importorskip("tensorboardX")
    (tracker,) = open_trackers(tmp_path, tensorboard=True, track="none", config={}, first=1)
    tracker.log({"loss": 2.5}, 1)
    tracker.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
