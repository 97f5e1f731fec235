"""One optimizer step, compiled once: loss, gradient, clip, update, with donated state."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from dflash_jax.drafter import Drafter, StoredSequence
from dflash_jax.train.config import TrainConfig
from dflash_jax.train.loss import StepStatistics, loss_gradient
from dflash_jax.train.optimizer import make_optimizer
from dflash_jax.train.sharding import MOMENTS, WHOLE, pin, put


class TrainState(eqx.Module):
    """All that training carries from step to step; saved and restored whole.

    Attributes:
        drafter: float32 master weights.
        optimizer: its moments and the schedule's count.
        step: optimizer steps done.
    """

    drafter: Drafter
    optimizer: Any
    step: Int32[Array, ""]


def put_state(state: TrainState, mesh: Mesh | None) -> TrainState:
    """Return the state on the devices of a mesh, as `make_step` keeps it there."""
    return TrainState(
        drafter=put(state.drafter, WHOLE, mesh),
        optimizer=put(state.optimizer, MOMENTS, mesh),
        step=put(state.step, WHOLE, mesh),
    )


def new_state(drafter: Drafter, config: TrainConfig) -> TrainState:
    """Return the state before the first step."""
    return TrainState(drafter=drafter, optimizer=make_optimizer(config).init(drafter), step=jnp.int32(0))  # pyright: ignore[reportArgumentType]


class StepResult(eqx.Module):
    """What one step reports.

    Attributes:
        statistics: of the batch, before the update.
        grad_norm: global norm before clipping.
    """

    statistics: StepStatistics
    grad_norm: Float[Array, ""]


def frozen_ends(
    embed_tokens: Float[Array, "vocab hidden"], head: Float[Array, "vocab hidden"], config: TrainConfig
) -> tuple[Float[Array, "vocab hidden"], Float[Array, "vocab hidden"]]:
    """Return the target's embedding and head as a step reads them: in its dtype, one array where they are tied.

    Of a 16-bit table XLA for CPUs widens all of it, in every step, to take a few rows. There a table that only rows are
    taken of, the embedding and a head whose vocabulary is sampled, stays as it is, and its rows are narrowed.
    """
    if jax.default_backend() == "cpu":
        return embed_tokens, head if config.objective.sampled_vocab else head.astype(config.dtype)
    narrow = head.astype(config.dtype)
    return (narrow if embed_tokens is head else embed_tokens.astype(config.dtype)), narrow


def make_step(config: TrainConfig, *, mesh: Mesh | None = None):  # noqa: ANN201  (a jitted function)
    """Return the compiled step `(state, embed_tokens, head, sequences) -> (state, StepResult)`; the state is donated.

    Anchors are drawn from `fold_in(key(seed), step)`, so a step depends on nothing but its number, the seed and the
    state.

    On a mesh, every device takes its sequences and blocks; what the optimizer remembers is split over all of them, the
    drafter's weights are whole everywhere.
    """
    optimizer = make_optimizer(config)

    def step(
        state: TrainState,
        embed_tokens: Float[Array, "vocab hidden"],
        head: Float[Array, "vocab hidden"],
        sequences: StoredSequence,
    ) -> tuple[TrainState, StepResult]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        gradient, statistics = loss_gradient(
            state.drafter,
            embed_tokens,
            head,
            sequences,
            parts=config.parts,
            anchors_per_sequence=config.anchors_per_sequence,
            objective=config.objective,
            key=key,
            compute=config.compute,
            mesh=mesh,
        )
        gradient = pin(gradient, MOMENTS, mesh)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to its int32 count
            updates, moments = optimizer.update(gradient, state.optimizer, state.drafter)  # pyright: ignore[reportArgumentType]
        drafter = optax.apply_updates(state.drafter, updates)  # pyright: ignore[reportArgumentType]
        drafter, moments = pin(drafter, WHOLE, mesh), pin(moments, MOMENTS, mesh)
        new = TrainState(drafter=drafter, optimizer=moments, step=state.step + 1)  # pyright: ignore[reportArgumentType]
        result = StepResult(statistics=statistics, grad_norm=optax.tree.norm(gradient))
        return new, pin(result, WHOLE, mesh)

    return jax.jit(step, donate_argnums=(0,))
