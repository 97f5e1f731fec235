"""The DFlash losses: weighted cross-entropy or KL of many blocks per sequence over the target's frozen head."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from dflash_jax.core import InputError
from dflash_jax.drafter import (
    AS_STORED,
    Compute,
    Drafter,
    StoredSequence,
    block_distributions,
    block_labels,
    draft_blocks,
    eligible_anchors,
)
from dflash_jax.nn import LinearCrossEntropy, linear_soft_cross_entropy
from dflash_jax.train.sharding import BLOCKS, MOMENTS, head_pass, pin, split_lookup

Loss = Literal["cross-entropy", "d-pace", "kl"]
Denominator = Literal["weights", "labels"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What is minimised.

    Attributes:
        loss: of a slot and its weight: "cross-entropy" against the label, weighed by `slot_weights`; "d-pace" the same
            weighed by `dpace_weights`; "kl", `KL(target || drafter)` weighed by `slot_weights`.
        denominator: what the weighted sum is divided by: the sum of the "weights" (SpecForge), or the number of
            "labels" + 1e-5 (speculators), which makes the loss smaller and leaves AdamW's steps nearly as they are.
        gamma: decay of `slot_weights`.
        alpha: smoothing of `dpace_weights`.
        sampled_vocab: tokens that the drafter's softmax is estimated from, drawn anew every step; None: all.
    """

    loss: Loss = "cross-entropy"
    denominator: Denominator = "weights"
    gamma: float = 4.0
    alpha: float = 0.5
    sampled_vocab: int | None = None

    def __post_init__(self) -> None:
        """Check the choices and the numbers."""
        for flag, value, choices in (
            ("--loss", self.loss, get_args(Loss)),
            ("--loss-denominator", self.denominator, get_args(Denominator)),
        ):
            if value not in choices:
                raise InputError(f"{flag} is {value!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")
        if not self.gamma > 0:
            raise InputError(f"--decay-gamma is {self.gamma}: a number above 0 is needed")
        if self.sampled_vocab is not None and self.sampled_vocab < 1:
            raise InputError(f"--sampled-vocab is {self.sampled_vocab}: a positive number is needed")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"--dpace-alpha is {self.alpha}: a number from 0 to 1 is needed")


class StepStatistics(eqx.Module):
    """What a batch of blocks came to.

    Attributes:
        loss: the objective, nats per weighted or per labelled slot.
        accuracy: share of labelled slots whose label is the drafter's argmax (token_acc, pooled); with a sampled
            vocabulary the argmax of the sample, which has every label.
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

    They come in text order, those that are invalid last: blocks side by side then see contexts of about one length.

    **Source:** SpecForge@a6b6b02 `OnlineDFlashModel` draws the same way; it differs in that its rule asks for two
    response tokens in a row, which an eligible anchor has by definition.
    """
    score = jnp.where(eligible, jax.random.uniform(key, eligible.shape), -1.0)
    top, anchors = lax.top_k(score, count)
    order = jnp.lexsort((anchors, top < 0))
    return anchors[order].astype(jnp.int32), top[order] >= 0


def slot_weights(block_size: int, gamma: float) -> Float[Array, " drafted"]:
    """Return `exp(-(k-1)/gamma)` for slots k = 1 to B-1. Worked, gamma 4: 1, 0.779, 0.607, ... (DFlash 3.3)."""
    return jnp.exp(-jnp.arange(block_size - 1, dtype=jnp.float32) / gamma)


def dpace_weights(
    probabilities: Float[Array, "*blocks drafted"], labelled: Bool[Array, "*blocks drafted"], alpha: float
) -> Float[Array, "*blocks drafted"]:
    """Return D-PACE's weight of every slot: what its being right adds to the length that is expected to be accepted.

    With `q_k` the drafter's probability of slot k's label, `s_k = (1 - alpha) q_k + alpha` (1 where there is no label)
    and `P_k = s_1 ... s_k`, slot k weighs the sum of `P_m` over labelled `m >= k`. Not differentiated. Worked, alpha
    0.5, q = [1, 0.5, 0], all labelled: s = [1, 0.75, 0.5], P = [1, 0.75, 0.375], weights [2.125, 1.125, 0.375].

    **Source:** D-PACE (arXiv 2605.18810) as speculators@c05b95b `dpace_loss_decay` has it; the same.
    """
    smooth = jnp.where(labelled, (1 - alpha) * lax.stop_gradient(probabilities) + alpha, 1.0)
    reached = jnp.where(labelled, jnp.cumprod(smooth, axis=-1), 0.0)
    return jnp.where(labelled, lax.cumsum(reached, axis=reached.ndim - 1, reverse=True), 0.0)


class _Slots(eqx.Module):
    """The drafted slots of a batch: where they are, and what the target says there."""

    anchors: Int32[Array, "*batch anchor"]
    lengths: Int32[Array, "*batch anchor"]
    labels: Int32[Array, "*batch anchor drafted"]
    labelled: Bool[Array, "*batch anchor drafted"]
    ids: Int32[Array, "*batch anchor drafted top"]
    probabilities: Float[Array, "*batch anchor drafted top"]


def _draw_slots(
    sequences: StoredSequence, most: int, *, block_size: int, objective: Objective, key: PRNGKeyArray
) -> _Slots:
    count, is_soft = min(most, sequences.token_ids.shape[1]), objective.loss == "kl"

    def one(sequence: StoredSequence, key: PRNGKeyArray) -> _Slots:
        anchors, valid = draw_anchors(eligible_anchors(sequence), count, key=key)
        target = block_labels(sequence, anchors, block_size=block_size)
        if is_soft:
            ids, probabilities = block_distributions(sequence, anchors, block_size=block_size)
        else:
            ids, probabilities = target.labels[..., None], jnp.ones((*target.labels.shape, 1), jnp.float32)
        return _Slots(
            anchors=anchors,
            lengths=target.lengths,
            labels=target.labels,
            labelled=target.labelled & valid[:, None],
            ids=ids,
            probabilities=probabilities,
        )

    return jax.vmap(one)(sequences, jax.random.split(key, sequences.token_ids.shape[0]))


class _Sums(eqx.Module):
    """What the blocks of some sequences add up to; those of all sequences (all devices, all parts) are a step's.

    Attributes:
        weight: of the weighted slots.
        hits: slots whose label is the drafter's argmax, by slot.
        labels: labelled slots, by slot.
    """

    weight: Float[Array, ""]
    hits: Float[Array, " drafted"]
    labels: Float[Array, " drafted"]

    def denominator(self, objective: Objective) -> Float[Array, ""]:
        """What the weighted sum of the losses is divided by."""
        if objective.denominator == "labels":
            return self.labels.sum() + 1e-5
        return jnp.maximum(self.weight, 1e-9)

    def statistics(self, loss: Float[Array, ""]) -> StepStatistics:
        """What they say of the step."""
        return StepStatistics(
            loss=loss,
            accuracy=self.hits.sum() / jnp.maximum(self.labels.sum(), 1.0),
            accuracy_by_slot=self.hits / jnp.maximum(self.labels, 1.0),
            num_labels=self.labels.sum().astype(jnp.int32),
        )


def _weighted_sum(
    objective: Objective,
    compute: Compute,
    mesh: Mesh | None,
    drafter: Drafter,
    embed_tokens: Float[Array, "vocab hidden"],
    head: Float[Array, "vocab hidden"],
    sequences: StoredSequence,
    slots: _Slots,
    sample_key: PRNGKeyArray,
) -> tuple[Float[Array, ""], _Sums]:
    """The sum of `w * L` over the slots of some sequences, and what it is divided by and reported with."""
    slots = pin(slots, BLOCKS, mesh)
    hidden = draft_blocks(
        drafter,
        embed_tokens,
        sequences.features,
        sequences.token_ids,
        slots.anchors,
        block_lengths=slots.lengths,
        block_size=drafter.config.block_size,
        position_offset=sequences.position_offset,
        compute=compute,
        lookup=split_lookup(mesh, embed_tokens.shape[0]),
    )
    hidden = pin(hidden, BLOCKS, mesh)
    labels, labelled, probabilities = slots.labels, slots.labelled, slots.probabilities
    rows: LinearCrossEntropy = linear_soft_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        slots.ids.reshape(-1, slots.ids.shape[-1]),
        probabilities.reshape(-1, probabilities.shape[-1]),
        one_pass=head_pass(mesh, head.shape[0], sampled=objective.sampled_vocab),
        key=None if objective.sampled_vocab is None else sample_key,
    )
    per_slot, correct = rows.loss.reshape(labels.shape), rows.tokens.reshape(labels.shape) == labels
    if objective.loss == "kl":
        per_slot += (probabilities * jnp.log(jnp.maximum(probabilities, 1e-30))).sum(axis=-1)
    if objective.loss == "d-pace":
        weight = dpace_weights(jnp.exp(-per_slot), labelled, objective.alpha)
    else:
        weight = jnp.where(labelled, slot_weights(labelled.shape[-1] + 1, objective.gamma)[None, None], 0.0)
    return (weight * per_slot).sum(), _Sums(
        weight=weight.sum(),
        hits=(labelled & correct).sum(axis=(0, 1)).astype(jnp.float32),
        labels=labelled.sum(axis=(0, 1)).astype(jnp.float32),
    )


def block_loss(
    drafter: Drafter,
    embed_tokens: Float[Array, "vocab hidden"],
    head: Float[Array, "vocab hidden"],
    sequences: StoredSequence,
    *,
    anchors_per_sequence: int,
    objective: Objective,
    key: PRNGKeyArray,
    compute: Compute = AS_STORED,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], StepStatistics]:
    """Return the loss of freshly drawn anchors of a batch of sequences, and its statistics.

    `loss = sum(w * L) / D` over labelled slots, with `w` and `D` as the objective says. `L` is the cross-entropy
    against the label, or for "kl" the forward KL from the target's distribution over its stored likeliest tokens, made
    to sum to 1 (what was not stored is left out), to the drafter's over the whole vocabulary: `sum p (log p - log q)`.
    Its least value is 0, where the drafter has all its mass on those tokens in the target's ratios.

    With `objective.sampled_vocab` the sum under log q is an estimate from all labels of the step and some other tokens
    (docs/design/018-sampled-head.md): unbiased, its logarithm a little low.

    Args:
        drafter: differentiated.
        embed_tokens: the target's embedding, frozen.
        head: the target's head, frozen; of the computation's dtype.
        sequences: a batch, axis 0; for "kl" with `top_ids` and `top_logprobs`.
        anchors_per_sequence: anchors drawn from each sequence.
        objective: what is minimised.
        key: draws the anchors and the sampled vocabulary.
        compute: how the drafter is computed; the loss is float32.
        mesh: devices that the sequences, blocks and the head are split over; None is one device.
    """
    block_size, weighted = drafter.config.block_size, partial(_weighted_sum, objective, compute, mesh)
    slots = _draw_slots(sequences, anchors_per_sequence, block_size=block_size, objective=objective, key=key)
    total, sums = weighted(drafter, embed_tokens, head, sequences, slots, jax.random.fold_in(key, 1))
    loss = total / sums.denominator(objective)
    return loss, sums.statistics(loss)


def loss_gradient(
    drafter: Drafter,
    embed_tokens: Float[Array, "vocab hidden"],
    head: Float[Array, "vocab hidden"],
    sequences: StoredSequence,
    *,
    parts: int,
    anchors_per_sequence: int,
    objective: Objective,
    key: PRNGKeyArray,
    compute: Compute = AS_STORED,
    mesh: Mesh | None = None,
) -> tuple[Drafter, StepStatistics]:
    """Return the gradient of `block_loss`, and its statistics, the sequences taken in parts one after the other.

    Anchors are those of one part. Activations are those of a part's sequences; the gradient that is added to is there
    besides. A sampled vocabulary is drawn for every part.

    Args:
        drafter: differentiated.
        embed_tokens: see `block_loss`, as for all that is not named here.
        head: likewise.
        sequences: a batch, whose size `parts` divides.
        parts: how many.
        anchors_per_sequence: likewise.
        objective: likewise.
        key: likewise.
        compute: likewise.
        mesh: likewise; every device takes some sequences of every part.
    """
    if parts == 1:
        settings = {"objective": objective, "key": key, "compute": compute, "mesh": mesh}
        (_, statistics), gradient = jax.value_and_grad(block_loss, has_aux=True)(
            drafter, embed_tokens, head, sequences, anchors_per_sequence=anchors_per_sequence, **settings
        )
        return gradient, statistics
    block_size, weighted = drafter.config.block_size, partial(_weighted_sum, objective, compute, mesh)
    slots = _draw_slots(sequences, anchors_per_sequence, block_size=block_size, objective=objective, key=key)
    # part p has sequences p, p + parts, ...: where the batch is split over devices, each has its share of all parts
    apart = jax.tree_util.tree_map(lambda leaf: leaf.reshape(-1, parts, *leaf.shape[1:]), (sequences, slots))

    def one(added: Any, part: Int32[Array, ""]) -> tuple[Any, None]:
        some, own = jax.tree_util.tree_map(lambda leaf: lax.dynamic_index_in_dim(leaf, part, 1, keepdims=False), apart)
        sample_key = jax.random.fold_in(jax.random.fold_in(key, 1), part)
        (total, sums), gradient = jax.value_and_grad(weighted, has_aux=True)(
            drafter, embed_tokens, head, pin(some, BLOCKS[:1], mesh), own, sample_key
        )
        new = pin(gradient, MOMENTS, mesh), total, sums
        return jax.tree_util.tree_map(jnp.add, added, new), None

    zeros = jax.tree_util.tree_map(jnp.zeros_like, drafter)
    none = jnp.zeros(block_size - 1, jnp.float32)
    start = pin(zeros, MOMENTS, mesh), jnp.float32(0), _Sums(weight=jnp.float32(0), hits=none, labels=none)
    (gradient, total, sums), _ = lax.scan(one, start, jnp.arange(parts, dtype=jnp.int32))
    divided_by = sums.denominator(objective)
    return jax.tree_util.tree_map(lambda leaf: leaf / divided_by, gradient), sums.statistics(total / divided_by)
