"""When a run is stopped."""

import json

import pytest

from dflash_jax.train.watch import FIRST_STEPS, SPIKE_STEPS, LossWatch


def troubles(losses, *, factor=3.0, curve=None):
    watch = LossWatch(factor, curve=curve)
    return [watch.see(step, loss=loss, grad_norm=1.0) for step, loss in enumerate(losses, start=1)]


def test_a_loss_that_stays_up_is_a_spike_that_began_with_its_first_step():
    found = troubles([2.0] * 100 + [6.5, 7.0, 9.0, 8.0, 7.0])
    assert found[:-1] == [None] * 104
    assert found[-1] is not None
    assert found[-1].step == 101
    assert found[-1].what == ("the loss spikes at step 101: 6.5 and above 6.5 since, 2 before (--spike-factor)")


@pytest.mark.parametrize(
    "losses",
    [
        [2.0] * 100 + [9.0, 9.0, 9.0, 9.0, 2.0] * 3,  # hard batches
        [2.0] * 100 + [5.9] * 50,  # not three times
        [0.01] * 100 + [1.4] * 20,  # a memorised text, then another one
        [11.0 * 0.97**step for step in range(300)],  # learning
        [1.0] * (FIRST_STEPS - 1) + [10.0] * SPIKE_STEPS,  # too early for a median
    ],
)  # fmt: skip
def test_a_healthy_run_goes_on(losses):
    assert troubles(losses) == [None] * len(losses)


def test_the_same_with_the_watch_off():
    assert troubles([2.0] * 100 + [50.0] * 20, factor=0.0) == [None] * 120


@pytest.mark.parametrize(("loss", "grad_norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))])
def test_what_is_not_finite_stops_at_once(loss, grad_norm):
    found = LossWatch(0.0).see(7, loss=loss, grad_norm=grad_norm)
    assert found is not None
    assert (found.step, found.what) == (7, "loss or gradient is not finite at step 7")


def test_a_resumed_run_remembers(tmp_path):
    losses = [2.0] * 40 + [8.0] * 2
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "loss": loss}) + "\n" for i, loss in enumerate(losses, start=1)))
    watch = LossWatch(3.0, curve=path)
    found = [watch.see(43 + i, loss=8.0, grad_norm=1.0) for i in range(3)]
    assert found[:2] == [None, None]
    assert found[2] is not None
    assert found[2].step == 41
