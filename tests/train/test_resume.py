"""Whole runs: interrupted, fine-tuned, overfitted, blown up."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dflash_jax.check import CheckConfig, check
from dflash_jax.core import InputError
from dflash_jax.decode import Decoder
from dflash_jax.drafter import load_drafter
from dflash_jax.targets import load_target
from dflash_jax.text import load_tokenizer
from dflash_jax.train import train
from dflash_jax.train.checkpoint import RunFolder
from dflash_jax.train.step import new_state
from support import tiny, tiny_chain

pytestmark = pytest.mark.slow


def curve(out) -> list[dict[str, Any]]:
    """Rows of the curve without what is measured by the clock."""

    def still(row: dict[str, Any]) -> dict[str, Any]:
        told = {name: value for name, value in row.items() if name not in ("seconds", "anchors_per_s", "input_s")}
        return told | ({"eval": still(told["eval"])} if "eval" in told else {})

    return [still(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_states(one, other, *, steps, config):
    """Whether the newest states of two runs are equal, bit for bit."""
    states = []
    for out in (one, other):
        like = new_state(load_drafter(out / f"run-{steps}"), config)
        state, step = RunFolder(out).restore(like)
        assert step == steps
        states.append([np.asarray(leaf) for leaf in jax.tree_util.tree_leaves(state)])
    return all(a.tobytes() == b.tobytes() for a, b in zip(*states, strict=True))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory, target_folder):
    """A cache of two prompts that no run here is trained on, and of one that all are."""
    texts = ("never seen", "nor this one (7)", tiny.TEXTS[1])
    return tiny_chain.make_cache(tmp_path_factory.mktemp("held-out") / "chain", target_folder, texts)


def contents(out):
    """Names in a run's folder and in its state's, and where its links point."""
    links = {path.name: str(path.readlink()) for path in out.iterdir() if path.is_symlink()}
    return links, {str(path.relative_to(out)) for path in (*out.iterdir(), *(out / "state").iterdir())}


def test_killed_runs_equal_the_one_left_alone(tmp_path, target_folder, cache, held_out):
    path = os.pathsep.join([str(Path(tiny_chain.__file__).parents[1]), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, tiny_chain.__file__, target_folder, cache, held_out, tmp_path, "4", "3"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    # the kills fell at different places, the first before anything could be resumed
    assert seen[0]["newest"] == 0 < seen[1]["newest"] < seen[2]["newest"] < seen[3]["newest"] < 40, seen
    assert all(set(kill["states"]) <= set(kill["drafters"]) for kill in seen), seen
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rows = curve(whole)
    assert curve(killed) == rows
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert contents(killed) == contents(whole)
    taus = {row["step"]: row["eval"]["tau_micro"] for row in rows if "eval" in row}
    assert list(taus) == [*range(6, 37, 6), 40]
    best = max(taus, key=lambda step: taus[step])
    # three newest, the best, and those of the two states, which are among them
    kept = {36, 38, 40, best}
    assert contents(whole)[0] == {"last": "run-40", "best": f"run-{best}"}
    assert {name for name in contents(whole)[1] if name.startswith("run-")} == {f"run-{step}" for step in kept}
    for step in kept:
        weights = [(out / f"run-{step}" / "model.safetensors").read_bytes() for out in (whole, killed)]
        assert weights[0] == weights[1], step
    assert same_states(whole, killed, steps=40, config=tiny_chain.train_config(target_folder, cache, whole, steps=40))


@pytest.fixture(scope="module")
def parent(tmp_path_factory, target_folder):
    """A short run on two texts, and its cache."""
    folder = tmp_path_factory.mktemp("parent")
    cache = tiny_chain.make_cache(folder / "chain", target_folder, tiny.TEXTS[1:3])
    config = tiny_chain.train_config(target_folder, cache, folder / "run", steps=8, num_layers=1)
    train(config)
    return folder / "run" / "run-8", cache


def hashes_of(drafter):
    return set(json.loads((drafter / "record.json").read_text())["trained_prompt_hashes"])


class StoppedError(Exception):
    pass


def test_fine_tuning_goes_on_from_the_weights_and_resumes(tmp_path, target_folder, cache, parent):
    drafter, _ = parent
    settings = {"steps": 8, "block_size": None, "num_layers": None, "keep_initial": True}
    config = tiny_chain.train_config(target_folder, cache, tmp_path / "run", init_from=drafter, **settings)

    def stop(done, *_):
        if done == 8:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(config, progress=stop)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (drafter, tmp_path / "run" / "run-0")]
    assert weights[0] == weights[1]
    # run-0 is no untrained drafter: it has seen what its parent has
    assert hashes_of(tmp_path / "run" / "run-0") == hashes_of(drafter)
    assert len(curve(tmp_path / "run")) == 8
    # without --init-from, which the run's own config names
    resumed = tiny_chain.train_config(target_folder, cache, tmp_path / "run", resume=True, **settings)
    said = train(resumed)
    assert (said["steps_this_run"], said["num_prompts"]) == (4, 8)
    assert len(curve(tmp_path / "run")) == 8
    assert hashes_of(tmp_path / "run" / "run-8") == hashes_of(tmp_path / "run" / "run-4") > hashes_of(drafter)
    again = train(resumed)
    assert (again["steps_this_run"], again["loss"]) == (0, said["loss"])
    with pytest.raises(InputError, match=r"init_from was '.*run-8', now '.*run-0'$"):
        train(tiny_chain.train_config(
            target_folder, cache, tmp_path / "run", resume=True, init_from=tmp_path / "run" / "run-0", **settings
        ))  # fmt: skip


def test_damaged_state_is_named_and_the_one_before_serves(tmp_path, target_folder, cache):
    settings = {"steps": 6, "num_layers": 1, "checkpoint_every": 3}
    config = tiny_chain.train_config(target_folder, cache, tmp_path / "run", **settings)
    train(config)
    weights, rows = (tmp_path / "run" / "run-6" / "model.safetensors").read_bytes(), curve(tmp_path / "run")
    for file in (tmp_path / "run" / "state" / "6" / "default").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    resumed = tiny_chain.train_config(target_folder, cache, tmp_path / "run", resume=True, **settings)
    with pytest.raises(InputError, match=r"run/state/6 cannot be restored \(.*\): remove that folder$") as error:
        train(resumed)
    assert "\n" not in str(error.value)
    shutil.rmtree(tmp_path / "run" / "state" / "6")
    assert train(resumed)["steps_this_run"] == 3
    assert (tmp_path / "run" / "run-6" / "model.safetensors").read_bytes() == weights
    assert curve(tmp_path / "run") == rows


def test_one_prompt_is_learned_by_heart(tmp_path, target_folder):
    text = tiny.TEXTS[1]
    cache = tiny_chain.make_cache(tmp_path / "chain", target_folder, [text], max_new_tokens=25)
    config = tiny_chain.train_config(
        target_folder, cache, tmp_path / "run", steps=200, learning_rate=1e-2, num_layers=1, block_size=8,
        anchors_per_sequence=30, sequences_per_step=1, checkpoint_every=200,
    )  # fmt: skip
    said = train(config)
    assert said["accuracy"] == 1.0
    drafter = tmp_path / "run" / "run-200"
    checked = check(CheckConfig(target=target_folder, cache=cache, drafter=drafter))
    assert (checked["accept_len_mean"], checked["accept_len_p50"]) == (7.0, 7.0)
    tokenizer = load_tokenizer(target_folder)
    decoder = Decoder(load_target(target_folder), stop_ids=tokenizer.stop_ids, max_new_tokens=25, batch_size=1)
    # 25 tokens: one from the prompt's own pass, 24 in blocks of 8: tau 8
    decoded = decoder.decode([tokenizer.encode(text)], drafter=load_drafter(drafter)).rows[0]
    assert decoded.committed == [8, 8, 8]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, target_folder, cache):
    settings = {"steps": 6, "num_layers": 1, "checkpoint_every": 1, "learning_rate": 1e30}
    config = tiny_chain.train_config(target_folder, cache, tmp_path / "run", **settings)
    # the first step's learning rate is 0, the second ruins the weights, the third sees it
    message = (
        r"^loss or gradient is not finite at step 3: the last good checkpoint is .*run-1; start again with a lower"
    )
    with pytest.raises(InputError, match=message):
        train(config)
    rows = curve(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert np.isfinite([row["loss"] for row in rows]).all()
