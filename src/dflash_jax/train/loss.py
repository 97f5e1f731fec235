"""The DFlash loss: position-decayed cross-entropy of many blocks per sequence over the target's frozen head."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from dflash_jax.drafter import Drafter, StoredSequence, block_labels, draft_blocks, eligible_anchors
from dflash_jax.nn import linear_cross_entropy


class StepStatistics(eqx.Module):
    """What a batch of blocks came to.

    Attributes:
        loss: weighted mean cross-entropy, nats per weighted slot.
        accuracy: share of labelled slots whose label is the drafter's argmax (token_acc, pooled).
        accuracy_by_slot: the same for each slot 1 to B-1; 0 where a slot had no label.
        num_labels: labelled slots.
    """

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    accuracy_by_slot: Float[Array, " drafted"]
    num_labels: Int32[Array, ""]


def draw_anchors(
    eligible: Bool[Array, " seq"], count: int, *, key: PRNGKeyArray
) -> tuple[Int32[Array, " anchor"], Bool[Array, " anchor"]]:
    """Draw anchors uniformly without replacement; where fewer than `count` are eligible, the rest are marked invalid.

    **Source:** SpecForge@a6b6b02 `OnlineDFlashModel` draws the same way; it differs in that its rule asks for two
    response tokens in a row, which an eligible anchor has by definition.
    """
    score = jnp.where(eligible, jax.random.uniform(key, eligible.shape), -1.0)
    top, anchors = lax.top_k(score, count)
    return anchors.astype(jnp.int32), top >= 0


def slot_weights(block_size: int, gamma: float) -> Float[Array, " drafted"]:
    """Return `exp(-(k-1)/gamma)` for slots k = 1 to B-1. Worked, gamma 4: 1, 0.779, 0.607, ... (DFlash 3.3)."""
    return jnp.exp(-jnp.arange(block_size - 1, dtype=jnp.float32) / gamma)


def block_loss(
    drafter: Drafter,
    embed_tokens: Float[Array, "vocab hidden"],
    head: Float[Array, "vocab hidden"],
    sequences: StoredSequence,
    *,
    anchors_per_sequence: int,
    gamma: float,
    key: PRNGKeyArray,
) -> tuple[Float[Array, ""], StepStatistics]:
    """Return the loss of freshly drawn anchors of a batch of sequences, and its statistics.

    `loss = sum(w * CE) / sum(w)` over labelled slots with `w = exp(-(k-1)/gamma)`: the decay is in the denominator, as
    in SpecForge@a6b6b02, and both sums run over the whole batch (all devices).

    Args:
        drafter: differentiated.
        embed_tokens: the target's embedding, frozen.
        head: the target's head, frozen.
        sequences: a batch, axis 0.
        anchors_per_sequence: anchors drawn from each sequence.
        gamma: decay of the slots' weights.
        key: draws the anchors.
    """
    block_size = drafter.config.block_size
    count = min(anchors_per_sequence, sequences.token_ids.shape[1])

    def one(sequence: StoredSequence, key: PRNGKeyArray):  # noqa: ANN202
        anchors, valid = draw_anchors(eligible_anchors(sequence), count, key=key)
        target = block_labels(sequence, anchors, block_size=block_size)
        hidden = draft_blocks(
            drafter,
            embed_tokens,
            sequence.features,
            sequence.token_ids,
            anchors,
            block_lengths=target.lengths,
            block_size=block_size,
            position_offset=sequence.position_offset,
        )
        return hidden[:, 1:], target.labels, target.labelled & valid[:, None]

    hidden, labels, labelled = jax.vmap(one)(sequences, jax.random.split(key, sequences.token_ids.shape[0]))
    rows = linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), head, labels.reshape(-1))
    cross_entropy, correct = rows.loss.reshape(labels.shape), rows.correct.reshape(labels.shape)
    weight = jnp.where(labelled, slot_weights(block_size, gamma)[None, None], 0.0)
    loss = (weight * cross_entropy).sum() / jnp.maximum(weight.sum(), 1e-9)
    hits = (labelled & correct).sum(axis=(0, 1)).astype(jnp.float32)
    counts = labelled.sum(axis=(0, 1)).astype(jnp.float32)
    return loss, StepStatistics(
        loss=loss,
        accuracy=hits.sum() / jnp.maximum(counts.sum(), 1.0),
        accuracy_by_slot=hits / jnp.maximum(counts, 1.0),
        num_labels=labelled.sum(dtype=jnp.int32),
    )
