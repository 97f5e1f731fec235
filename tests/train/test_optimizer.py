"""Schedules by hand, and what each optimizer does to which weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.train.optimizer import MUON_RMS, learning_rate_schedule, make_optimizer
from support import tiny_chain


def some_config(**changes):
    return tiny_chain.train_config(Path(), Path(), Path(), **changes)


def rates(**changes):
    config = some_config(learning_rate=0.8, steps=10, warmup_ratio=0.2, **changes)
    return [float(np.asarray(learning_rate_schedule(config)(step))) for step in range(config.steps + 1)]


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("linear", [0.0, 0.4, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]),
        ("constant", [0.0, 0.4] + [0.8] * 9),
        ("wsd", [0.0, 0.4, 0.8, 0.8, 0.8, 0.8, 0.64, 0.48, 0.32, 0.16, 0.0]),
        # 0.4 (1 + cos(pi i / 8)) after the warm-up
        ("cosine", [0.0, 0.4, 0.8, 0.7695518, 0.6828427, 0.5530734, 0.4, 0.2469266, 0.1171573, 0.0304482, 0.0]),
    ],
)
def test_schedules_by_hand(schedule, wanted):
    assert rates(schedule=schedule, decay_ratio=0.5) == pytest.approx(wanted, rel=1e-5, abs=1e-8)


def test_wsd_that_is_all_decay_and_a_run_of_one_step():
    assert rates(schedule="wsd", decay_ratio=0.99) == pytest.approx(rates(schedule="linear"), rel=1e-6, abs=1e-8)
    for schedule in ("linear", "constant", "wsd", "cosine"):
        config = some_config(schedule=schedule, steps=1)
        assert float(np.asarray(learning_rate_schedule(config)(0))) == 0.0


@pytest.fixture(scope="module")
def update():
    """Weights, gradients, and what one step of an optimizer subtracts at a rate of 1."""
    draw = np.random.default_rng(0)
    weights = {"tall": draw.normal(size=(40, 12)), "wide": draw.normal(size=(12, 30)), "norm": draw.normal(size=12)}
    weights, gradient = (
        {name: jnp.asarray(value * scale, jnp.float32) for name, value in weights.items()} for scale in (1.0, 1e-3)
    )
    gradient["norm"] = gradient["norm"][::-1]

    def step(**changes):
        config = some_config(learning_rate=1.0, steps=3, warmup_ratio=0.0, schedule="constant", **changes)
        optimizer = make_optimizer(config)

        @jax.jit
        def both(weights, gradient):
            state = optimizer.init(weights)
            _, state = optimizer.update(gradient, state, weights)  # the first step's rate is 0
            return optimizer.update(gradient, state, weights)[0]

        with jax.numpy_dtype_promotion("standard"):
            return jax.tree.map(np.asarray, both(weights, gradient))

    return weights, gradient, step


def test_muon_turns_matrices_into_orthogonal_ones_of_adamws_size(update):
    _, gradient, step = update
    moved = step(optimizer="muon")
    for name in ("tall", "wide"):
        values = np.linalg.svd(-moved[name], compute_uv=False) / (MUON_RMS * np.sqrt(max(moved[name].shape)))
        # five Newton-Schulz iterations bring every singular value near 1, none to it
        assert 0.6 < values.min() < values.max() < 1.3
        # a full-rank orthogonal matrix of n entries a column has root mean square 1 / sqrt(the longer side)
        assert np.sqrt((moved[name] ** 2).mean()) == pytest.approx(MUON_RMS, rel=0.25)
        # and its singular vectors are the gradient's
        u, _, vt = np.linalg.svd(np.asarray(gradient[name]), full_matrices=False)
        turned = u.T @ -moved[name] @ vt.T
        off = turned - np.diag(np.diag(turned))
        assert np.abs(off).max() < 1e-3 * np.abs(np.diag(turned)).max()
    # the norm is AdamW's with Nesterov momentum. Of a gradient that does not change the mean after two steps is 0.19,
    # corrected for three, and the gradient itself corrected for two
    size = 0.9 * 0.19 / (1 - 0.9**3) + 0.1 / 0.19
    np.testing.assert_allclose(moved["norm"], -size * np.sign(gradient["norm"]), rtol=1e-3)


def test_weight_decay_is_of_matrices_alone(update):
    weights, _, step = update
    for optimizer in ("adamw", "muon"):
        plain, decayed = step(optimizer=optimizer), step(optimizer=optimizer, weight_decay=0.25)
        for name in ("tall", "wide"):
            np.testing.assert_allclose(plain[name] - decayed[name], 0.25 * np.asarray(weights[name]), atol=1e-5)
        np.testing.assert_array_equal(plain["norm"], decayed["norm"])
