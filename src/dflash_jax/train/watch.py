"""Whether a run is still healthy: no number that is not finite, no loss that has left its own past for good."""

import json
import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path

SPIKE_STEPS = 5  # a hard batch is one step; a run that diverges stays up
PAST_STEPS = 100  # whose median is what the loss is held against
FIRST_STEPS = 20  # so many are needed for a median that means something
SMALLEST_MEDIAN = 0.5  # nats: below it a run has all but memorised its data, and any new text is many times worse


@dataclass(frozen=True, kw_only=True, slots=True)
class Trouble:
    """Why a run must stop.

    Attributes:
        step: the first step that went wrong; the weights that gave it are those of the step before.
        what: in words.
    """

    step: int
    what: str


class LossWatch:
    """Looks at the losses of a run in order.

    A spike: each of the last `SPIKE_STEPS` losses is above `factor * max(m, SMALLEST_MEDIAN)`, with m the median of the
    up to `PAST_STEPS` losses before them. Worked, factor 3: losses about 2 for 100 steps, then 6.5, 7, 9, 8, 7 is a
    spike that began at the 6.5; 2, 2, 9, 2, 2 is none, and neither is 0.01 followed by 1.4 five times.
    """

    def __init__(self, factor: float, *, curve: Path | None = None) -> None:
        """Begin with the past that a run to be resumed has written.

        Args:
            factor: how many times the median is a spike; 0: nothing is.
            curve: `metrics.jsonl`, which need not be there.
        """
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=PAST_STEPS + SPIKE_STEPS)
        if curve is not None and curve.exists():
            lines = curve.read_text(encoding="utf-8").splitlines()
            self._losses.extend(json.loads(line)["loss"] for line in lines[-PAST_STEPS - SPIKE_STEPS :])

    def see(self, step: int, *, loss: float, grad_norm: float) -> Trouble | None:
        """Take the next step's numbers and return what is wrong with them; None where nothing is."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return Trouble(step=step, what=f"loss or gradient is not finite at step {step}")
        self._losses.append(loss)
        losses = list(self._losses)
        if self._factor == 0 or len(losses) < FIRST_STEPS + SPIKE_STEPS:
            return None
        past, last = losses[:-SPIKE_STEPS], losses[-SPIKE_STEPS:]
        median = statistics.median(past)
        if min(last) <= self._factor * max(median, SMALLEST_MEDIAN):
            return None
        first = step - SPIKE_STEPS + 1
        return Trouble(
            step=first,
            what=f"the loss spikes at step {first}: {last[0]:.3g} and above {min(last):.3g} since, {median:.3g} before "
            "(--spike-factor)",
        )
