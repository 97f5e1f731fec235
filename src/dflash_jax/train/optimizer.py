"""Optimizers and schedules, all of them optax's: what `--optimizer` and `--schedule` name."""

from typing import Any

import jax
import optax

from dflash_jax.train.config import TrainConfig

# Muon's orthogonal updates are scaled to the root mean square that AdamW's have (arXiv 2502.16982, section 2.2): one
# learning rate then fits both, and every matrix whatever its shape.
MUON_RMS = 0.2


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Return the learning rate by step: linear warm-up from 0 over `warmup_ratio` of the steps, then the schedule.

    "cosine" and "linear" fall to 0 at the last step, "wsd" stays and falls linearly to 0 over the last `decay_ratio` of
    the steps, "constant" stays. Worked, 10 steps, warm-up 0.2, decay 0.5, "wsd": 0, 1/2, 1, 1, 1, 1, 4/5, 3/5, 2/5, 1/5
    of `learning_rate`.
    """
    peak, warmup = config.learning_rate, max(1, round(config.warmup_ratio * config.steps))
    steps = max(config.steps, warmup + 1)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0, peak_value=peak, warmup_steps=warmup, decay_steps=steps
        )
    rise = optax.linear_schedule(0.0, peak, warmup)
    if config.schedule == "linear":
        return optax.join_schedules([rise, optax.linear_schedule(peak, 0.0, steps - warmup)], [warmup])
    if config.schedule == "constant":
        return optax.join_schedules([rise, optax.constant_schedule(peak)], [warmup])
    decay = min(max(1, round(config.decay_ratio * config.steps)), steps - warmup)
    fall = optax.linear_schedule(peak, 0.0, decay)
    return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, steps - decay])


def _matrices(weights: Any) -> Any:
    """Whether each leaf is a matrix; the others are norms and biases."""
    return jax.tree_util.tree_map(lambda leaf: leaf.ndim >= 2, weights)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Return clip by global norm, then the optimizer; weight decay on matrices alone.

    - "adamw": betas 0.9 and `adam_b2`.
    - "muon": every matrix (fc, projections, MLP: the head and the embedding are the target's and not trained) by Muon,
      momentum 0.95, Nesterov, 5 Newton-Schulz iterations, updates of root mean square `MUON_RMS`; norms and biases by
      AdamW with the same betas and Nesterov momentum. Both at `learning_rate`.

    **Source:** Muon is optax.contrib's; the scale is Moonlight's (arXiv 2502.16982). speculators@c05b95b has 10 times
    its base rate for Muon instead, and no such scale.
    """
    rate = learning_rate_schedule(config)
    if config.optimizer == "muon":
        update = optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            consistent_rms=MUON_RMS,
            adam_b2=config.adam_b2,
            adam_weight_decay=0.0,
        )
    else:
        update = optax.adamw(rate, b2=config.adam_b2, weight_decay=config.weight_decay, mask=_matrices)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
