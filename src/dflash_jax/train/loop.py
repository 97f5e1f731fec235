"""The steps of one call: batches in, curve and checkpoints out, the host never waiting where it need not."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from dflash_jax.core import InputError, Move, give_back_freed
from dflash_jax.train.checkpoint import CheckpointWriter, RunFolder
from dflash_jax.train.config import TrainConfig
from dflash_jax.train.data import Prefetch
from dflash_jax.train.evaluate import HeldOut
from dflash_jax.train.optimizer import learning_rate_schedule
from dflash_jax.train.step import StepResult, TrainState
from dflash_jax.train.track import Tracker, flat_row
from dflash_jax.train.watch import LossWatch

FLUSH_EVERY = 10  # steps between looks at the device's results: the host waits for nothing in between
MOST_SLOTS_TOLD = 7
Step = Callable[[TrainState, Any], tuple[TrainState, StepResult]]


def metrics_row(step: int, result: StepResult, *, learning_rate: float) -> dict[str, Any]:
    """Return the row of the curve that a step gives, without what is measured by the clock."""
    statistics = result.statistics
    return {
        "step": step,
        "loss": float(statistics.loss),
        "accuracy": float(statistics.accuracy),
        "accuracy_by_slot": np.asarray(statistics.accuracy_by_slot).tolist(),
        "num_labels": int(statistics.num_labels),
        "learning_rate": learning_rate,
        "grad_norm": float(result.grad_norm),
    }


def progress_note(row: dict[str, Any], *, seconds_left: float) -> str:
    """Return the line a user watches: loss, accuracy and that of the first slots, speed, time left."""
    slots = " ".join(f"{share:.2f}".removeprefix("0") for share in row["accuracy_by_slot"][:MOST_SLOTS_TOLD])
    more = " …" if len(row["accuracy_by_slot"]) > MOST_SLOTS_TOLD else ""
    return (
        f"loss {row['loss']:.3f}  acc {row['accuracy']:.3f} [{slots}{more}]  {row['anchors_per_s']:.0f} anchors/s  "
        f"{timedelta(seconds=round(seconds_left))} left"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Done:
    """A step that was launched: what it will report, and how long the loop waited for its batch."""

    result: StepResult
    input_s: float


@dataclass(kw_only=True)
class Loop:
    """The steps of one call: what they need, and what they leave.

    Attributes:
        config: of the run.
        folder: where it goes.
        record: goes into every drafter's folder.
        progress: told of every flush.
        step: one compiled step.
        batches: the batch of every step.
        embed_tokens: the target's embedding, for held-out measurement.
        head: the target's head, likewise.
        held_out: prompts to measure on; None for none.
        watch: looks at every loss.
        trackers: told every row of the curve.
        input_s: seconds waited for batches so far.
        seconds: of all steps so far, checkpoints and evaluations included.
    """

    config: TrainConfig
    folder: RunFolder
    record: dict[str, Any]
    progress: Move
    step: Step
    batches: Callable[[int], Any]
    embed_tokens: Float[Array, "vocab hidden"]
    head: Float[Array, "vocab hidden"]
    held_out: HeldOut | None
    watch: LossWatch
    trackers: list[Tracker]
    input_s: float = 0.0
    seconds: float = 0.0
    _pending: list[_Done] = field(default_factory=list)
    _last: float = 0.0
    _tau: float | None = None

    def run(self, state: TrainState, done: int, writer: CheckpointWriter) -> TrainState:
        """Train from step `done` to the last one, with checkpoints on the way.

        Raises:
            InputError: a loss is not finite, or spikes; the last good checkpoint is named.
        """
        config, started = self.config, time.perf_counter()
        self._last = started
        with closing(Prefetch(self.batches, first=done, end=config.steps)) as batches:
            for step in range(done, config.steps):
                batch, waited = batches.take(step)
                state, result = self.step(state, batch)
                del batch
                if step == done:  # the step was compiled just now
                    give_back_freed()
                self._pending.append(_Done(result=result, input_s=waited))
                self.input_s += waited
                is_checkpoint = config.is_checkpoint(step + 1)
                if is_checkpoint or len(self._pending) == FLUSH_EVERY:
                    self._flush(state, step + 1, writer, started)
                if is_checkpoint:
                    writer.save(state, step=step + 1, record=self.record | {"step": step + 1}, tau=self._tau)
                    self._last = time.perf_counter()
        self.seconds = time.perf_counter() - started
        return state

    def _flush(self, state: TrainState, step: int, writer: CheckpointWriter, started: float) -> None:
        """Wait for the steps that were launched, measure if it is time, and write both to the curve."""
        jax.block_until_ready(self._pending[-1].result.grad_norm)
        now = time.perf_counter()
        rate, pending = len(self._pending) / (now - self._last), self._pending
        self._pending, self._last = [], now
        rows = self._rows(pending, step, rate=rate, seconds=now - started, writer=writer)
        self._tau = None
        if self.held_out is not None and self.config.is_evaluated(step):
            rows[-1]["eval"] = self.held_out.measure(state.drafter, self.embed_tokens, self.head)
            self._tau = rows[-1]["eval"]["tau_micro"]
            self._last = time.perf_counter()
        self.folder.append_metrics(rows)
        for tracker in self.trackers:
            for row in rows:
                tracker.log(flat_row(row), row["step"])
        self.progress(step, self.config.steps, progress_note(rows[-1], seconds_left=(self.config.steps - step) / rate))

    def _rows(
        self, done: list[_Done], step: int, *, rate: float, seconds: float, writer: CheckpointWriter
    ) -> list[dict[str, Any]]:
        """The rows of finished steps, the last of which is `step`.

        Raises:
            InputError: a loss is not finite, or spikes; the last good checkpoint is named.
        """
        schedule = learning_rate_schedule(self.config)
        anchors = self.config.sequences_per_step * self.config.anchors_per_sequence
        rows = []
        for index, one in enumerate(done):
            number = step - len(done) + 1 + index
            row = metrics_row(number, one.result, learning_rate=float(np.asarray(schedule(number - 1))))
            if trouble := self.watch.see(number, loss=row["loss"], grad_norm=row["grad_norm"]):
                self.folder.append_metrics(rows)
                writer.wait()
                # the weights that gave this loss are those of the step before: its checkpoint is no good one
                good = [self.folder.drafter_path(s) for s in self.folder.drafter_steps() if s < trouble.step - 1]
                where = f"the last good checkpoint is {good[-1]}" if good else "no good checkpoint was written yet"
                raise InputError(
                    f"{trouble.what}: {where}; start again with a lower --learning-rate, from there with --init-from "
                    "or anew"
                )
            rows.append(row | {"anchors_per_s": rate * anchors, "seconds": seconds, "input_s": one.input_s})
        return rows
