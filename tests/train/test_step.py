"""New weights, the schedule, the optimizer step."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.drafter import StoredSequence
from dflash_jax.targets import load_target
from dflash_jax.train.init import drafter_config, new_drafter
from dflash_jax.train.optimizer import learning_rate_schedule
from dflash_jax.train.step import frozen_ends, make_step, new_state
from support import tiny, tiny_chain


@pytest.fixture(scope="module")
def target(target_folder):
    return load_target(target_folder)


@pytest.fixture(scope="module")
def shape(target):
    """Captured in another order than the layers': the deepest comes first."""
    return drafter_config(target, capture_layers=(3, 1), num_layers=2, block_size=5, mask_token_id=tiny.MASK_ID)


@pytest.fixture(scope="module")
def warm(shape, target):
    return new_drafter(shape, target, init="target", key=jax.random.key(0))


@pytest.fixture(scope="module")
def random(shape, target):
    return new_drafter(shape, target, init="random", key=jax.random.key(0))


def some_config(**changes):
    return tiny_chain.train_config(Path(), Path(), Path(), **changes)


def rates(**changes):
    config = some_config(learning_rate=0.8, **changes)
    return [float(np.asarray(learning_rate_schedule(config)(step))) for step in range(config.steps)]


def test_schedule_by_hand():
    # two steps of warm-up, then 0.4 (1 + cos(pi i / 8))
    assert rates(steps=10, warmup_ratio=0.2) == pytest.approx(
        [0.0, 0.4, 0.8, 0.7695518, 0.6828427, 0.5530734, 0.4, 0.2469266, 0.1171573, 0.0304482], rel=1e-5
    )
    assert float(np.asarray(learning_rate_schedule(some_config(steps=10))(10))) == pytest.approx(0.0, abs=1e-9)


def test_schedule_of_short_runs_warms_up_for_one_step():
    assert rates(steps=2, warmup_ratio=0.0) == pytest.approx([0.0, 0.8])
    assert rates(steps=1, warmup_ratio=0.04) == [0.0]


def test_drafter_is_shaped_like_its_target(shape, target):
    names = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "rms_norm_eps", "rope_theta",
             "max_positions", "vocab_size")  # fmt: skip
    assert [getattr(shape, name) for name in names] == [getattr(target.config, name) for name in names]
    assert (shape.num_layers, shape.num_target_layers, shape.block_size) == (2, 5, 5)


def test_random_weights_have_the_public_spread(random):
    matrices = [leaf for leaf in jax.tree_util.tree_leaves(random) if leaf.ndim == 2]
    assert len(matrices) == 2 * 7 + 1
    for leaf in matrices:
        assert leaf.dtype == jnp.float32
        # four standard errors of a standard deviation of n draws
        assert float(leaf.std()) == pytest.approx(0.02, rel=4 / np.sqrt(2 * leaf.size))
        assert abs(float(leaf.mean())) < 4 * 0.02 / np.sqrt(leaf.size)
    assert all((leaf == 1).all() for leaf in jax.tree_util.tree_leaves(random) if leaf.ndim == 1)
    assert len({float(leaf[0, 0]) for leaf in matrices}) == len(matrices)


def test_warm_layers_project_as_the_targets_first_and_last_ones(warm, target):
    residual = jnp.asarray(np.random.default_rng(2).normal(0, 3, (7, 24)), jnp.float32)
    for layer, source in zip(warm.layers, (target.layers[0], target.layers[4]), strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            # context rows come through hidden_norm, a block's slots through input_layernorm
            for norm in (warm.hidden_norm, layer.input_layernorm):
                ours = getattr(layer.self_attn, name)(norm(residual))
                theirs = getattr(source.self_attn, name)(source.input_layernorm(residual))
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert (layer.self_attn.o_proj.weight == source.self_attn.o_proj.weight).all()
        assert (layer.post_attention_layernorm.weight == source.post_attention_layernorm.weight).all()
        assert (layer.mlp(residual) == source.mlp(residual)).all()
    assert (warm.norm.weight == target.norm.weight).all()


def test_warm_head_norms_keep_the_typical_size_of_each_channel(warm, target):
    source = target.layers[0]
    for name, heads, norm in (("q_proj", 4, "q_norm"), ("k_proj", 2, "k_norm")):
        weight = np.asarray(getattr(source.self_attn, name).weight) * np.asarray(source.input_layernorm.weight)
        sizes = [np.sqrt(np.mean([(weight[head * 6 + c] ** 2).sum() for head in range(heads)])) for c in range(6)]
        np.testing.assert_allclose(getattr(warm.layers[0].self_attn, norm).weight, sizes, rtol=1e-5)


def test_warm_fc_reads_the_deepest_captured_layer(warm, random):
    added = np.asarray(warm.fc.weight - random.fc.weight)
    np.testing.assert_allclose(added, np.concatenate([np.eye(24), np.zeros((24, 24))], axis=1), atol=1e-6)


class TwoSteps(NamedTuple):
    """States before, after one step and after two on one batch with every anchor, and what three steps reported."""

    states: tuple
    results: tuple


def some_batch():
    draw = np.random.default_rng(1)
    return StoredSequence(
        features=jnp.asarray(draw.normal(0, 1, (3, 16, 48)), jnp.float32),
        token_ids=jnp.asarray(draw.integers(0, 53, (3, 16)), jnp.int32),
        next_ids=jnp.asarray(draw.integers(0, 53, (3, 16)), jnp.int32),
        length=jnp.array([16, 9, 12], jnp.int32),
        prompt_len=jnp.array([3, 1, 7], jnp.int32),
        limit=jnp.array([99, 99, 99], jnp.int32),
        position_offset=jnp.array([0, 0, 5], jnp.int32),
    )


@pytest.fixture(scope="module")
def two_steps(target, warm):
    settings = {"steps": 10, "warmup_ratio": 0.2, "weight_decay": 0.3, "clip_norm": 0.5}
    config = tiny_chain.train_config(Path(), Path(), Path(), anchors_per_sequence=64, **settings)
    batch = some_batch()
    # a copy: the step takes the state's own buffers
    state = new_state(jax.tree_util.tree_map(jnp.copy, warm), config)
    step, states, results = make_step(config), [], []
    for _ in range(3):
        states.append(jax.tree_util.tree_map(np.array, state))
        old = state
        state, result = step(state, target.embed_tokens, target.head, batch)
        assert old.drafter.fc.weight.is_deleted()
        results.append(result)
    return TwoSteps(tuple(states), tuple(results))


def leaves(tree):
    return jax.tree_util.tree_leaves(tree)


def clipped_gradient(state):
    """Of the first step, from the moments after it, and its squares."""
    adam = next(part for part in jax.tree_util.tree_leaves(state.optimizer, is_leaf=lambda x: hasattr(x, "mu"))
                if hasattr(part, "mu"))  # fmt: skip
    return [leaf / 0.1 for leaf in leaves(adam.mu)], [leaf / 0.001 for leaf in leaves(adam.nu)]


@pytest.mark.slow
@pytest.mark.usefixtures("two_steps")
def test_the_target_survives_a_step_that_takes_its_states_buffers(target, warm):
    assert not any(leaf.is_deleted() for leaf in jax.tree_util.tree_leaves((target, warm)))


@pytest.mark.slow
def test_first_step_warms_up_and_clips(two_steps):
    before, after = two_steps.states[:2]
    assert (int(before.step), int(after.step)) == (0, 1)
    # the schedule begins at 0: moments alone have changed, by a tenth and a thousandth of the clipped gradient
    for ours, theirs in zip(leaves(after.drafter), leaves(before.drafter), strict=True):
        assert (ours == theirs).all()
    assert float(two_steps.results[0].grad_norm) > 1.0
    gradient, squares = clipped_gradient(after)
    assert np.sqrt(sum((leaf**2).sum() for leaf in gradient)) == pytest.approx(0.5, rel=1e-4)
    for leaf, square in zip(gradient, squares, strict=True):
        np.testing.assert_allclose(square, leaf**2, rtol=1e-3, atol=1e-12)


@pytest.mark.slow
def test_second_step_moves_by_adam_and_decays_matrices_alone(two_steps):
    before, after, last = two_steps.states
    gradient, _ = clipped_gradient(after)
    # same weights, same anchors, same gradient twice: both bias-corrected moments are the gradient's own
    for old, new, slope in zip(leaves(before.drafter), leaves(last.drafter), gradient, strict=True):
        move = slope / (np.abs(slope) + 1e-8) + (0.3 * old if old.ndim == 2 else 0.0)
        np.testing.assert_allclose(new, old - 3e-3 / 2 * move, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_statistics_are_of_the_weights_before_the_update(two_steps):
    first, second, third = (float(result.statistics.loss) for result in two_steps.results)
    assert second == pytest.approx(first, rel=1e-6)
    assert third < second


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it is XLA for CPUs that widens 16-bit tables")
@pytest.mark.slow
def test_a_bfloat16_step_widens_no_whole_table_to_take_rows_of_it(target, warm):
    config = some_config(anchors_per_sequence=4, dtype="bfloat16", sampled_vocab=16)
    ends = frozen_ends(target.embed_tokens, target.head, config)
    text = str(make_step(config).lower(new_state(warm, config), *ends, some_batch()).compile().as_text())
    vocab, hidden = target.embed_tokens.shape
    assert f"f32[{vocab},{hidden}]" in text
    assert f"bf16[{vocab},{hidden}]" not in text
