"""What of a run's folder stays, and where its links point."""

import jax.numpy as jnp
import pytest

from dflash_jax.accept import evaluate_cache, summarise
from dflash_jax.cache import open_cache
from dflash_jax.core import InputError, no_progress
from dflash_jax.drafter import load_drafter
from dflash_jax.targets import load_target
from dflash_jax.train.checkpoint import RunFolder, best_step, open_writer
from dflash_jax.train.evaluate import open_held_out
from dflash_jax.train.step import TrainState
from support import tiny


def test_the_best_is_the_earliest_of_the_highest():
    assert best_step({2: 1.5, 4: 1.75, 6: 1.75, 8: 1.25}) == 4
    assert best_step({}) is None


@pytest.fixture(scope="module")
def state():
    drafter = tiny.random_drafter(tiny.tiny_drafter_config())
    return TrainState(drafter=drafter, optimizer={"moment": jnp.ones(3)}, step=jnp.int32(0))


def drafters(folder):
    return RunFolder(folder).drafter_steps()


def write_rows(folder, taus):
    RunFolder(folder).append_metrics(
        [{"step": step} | ({} if tau is None else {"eval": {"tau_micro": tau}}) for step, tau in taus]
    )


def test_the_newest_stay_with_the_best_and_the_first(tmp_path, state):
    folder = RunFolder(tmp_path / "run")
    folder.create({"command": "train"})
    folder.save_drafter(state.drafter, step=0, record={})
    taus = {1: 1.25, 2: 1.5, 3: 1.5, 4: None, 5: 1.0, 6: 1.125}
    with open_writer(folder, keep=1) as writer:
        for step, tau in taus.items():
            write_rows(folder.path, [(step, tau)])
            writer.save(state, step=step, record={"step": step}, tau=tau)
            # what a run that is killed now would find
            writer.wait()
            states = {int(path.name) for path in (folder.path / "state").iterdir()}
            assert states <= {step - 1, step}
            assert states <= set(drafters(folder.path))
            assert load_drafter(folder.path / "last").config == state.drafter.config
    # 5 and 6 have states
    assert drafters(folder.path) == [0, 2, 5, 6]
    assert {name: str((folder.path / name).readlink()) for name in ("last", "best")} == {
        "last": "run-6",
        "best": "run-2",
    }
    assert not list(folder.path.glob(".*"))


def test_a_resumed_run_goes_back_to_the_best_of_its_state(tmp_path, state):
    folder = RunFolder(tmp_path / "run")
    folder.create({"command": "train"})
    with open_writer(folder, keep=None) as writer:
        for step, tau in ((1, 1.5), (2, 1.25)):
            write_rows(folder.path, [(step, tau)])
            writer.save(state, step=step, record={}, tau=tau)
    # killed after the drafter of step 3, the best so far, and before its state
    write_rows(folder.path, [(3, 1.75)])
    folder.save_drafter(state.drafter, step=3, record={})
    folder.mark("last", 3)
    folder.mark("best", 3)
    restored, step = folder.restore(state)
    assert (step, float(restored.optimizer["moment"].sum())) == (2, 3.0)
    assert drafters(folder.path) == [1, 2]
    assert {name: str((folder.path / name).readlink()) for name in ("last", "best")} == {
        "last": "run-2",
        "best": "run-1",
    }
    assert folder.evaluations() == {1: 1.5, 2: 1.25}


def test_a_drafter_that_cannot_be_written_leaves_no_state(tmp_path, state):
    folder = RunFolder(tmp_path / "run")
    folder.create({"command": "train"})
    with pytest.raises(ValueError, match="not JSON compliant"), open_writer(folder, keep=None) as writer:
        writer.save(state, step=1, record={"loss": float("nan")})
    assert drafters(folder.path) == []
    assert not list((folder.path / "state").glob("[0-9]"))


@pytest.mark.slow
def test_held_out_prompts_must_be_unseen_and_of_the_same_target(cache):
    opened = open_cache(cache)
    hashes = frozenset(opened.prompt_hashes().tolist())
    settings = {"max_positions": 160, "where": "the target here"}
    with pytest.raises(InputError, match=r"^--eval-cache .* has no prompt that the drafter was not trained on: choose"):
        open_held_out(cache, fingerprint={}, seen=hashes, **settings)
    with pytest.raises(InputError, match=r"the cache was not made for the target here: capture_layers is \[1, 3\]"):
        open_held_out(cache, fingerprint={"capture_layers": [0, 2]}, seen=frozenset(), **settings)
    some = frozenset(sorted(hashes)[:5])
    held_out = open_held_out(cache, fingerprint={"capture_layers": [1, 3]}, seen=some, **settings)
    target = load_target(tiny.tiny_target())
    told = held_out.measure(tiny.random_drafter(tiny.tiny_drafter_config()), target.embed_tokens, target.head)
    assert (told["num_prompts"], told["num_seen"]) == (3, 5)
    assert 1 <= told["tau_micro"] <= 5


@pytest.mark.slow
def test_held_out_tau_and_its_interval_are_those_of_a_check(cache):
    target, drafter = load_target(tiny.tiny_target()), tiny.random_drafter(tiny.tiny_drafter_config())
    held_out = open_held_out(cache, fingerprint={}, seen=frozenset(), max_positions=160, where="the target here")
    results = evaluate_cache(
        drafter,
        target.embed_tokens,
        target.head,
        open_cache(cache),
        max_positions=160,
        block_size=drafter.config.block_size,
        anchors_per_chunk=64,
        position_offsets=None,
        progress=no_progress,
    )
    replay = (summarise(results, samples=2000, seed=0) or {})["replay"]
    told = held_out.measure(drafter, target.embed_tokens, target.head)
    low, high = told["tau_ci95"]
    assert low < told["tau_micro"] < high
    assert told["tau_micro"] == pytest.approx(replay["tau_micro"], abs=1e-12)
    assert told["tau_ci95"] == pytest.approx(replay["tau_ci95"], abs=1e-12)
