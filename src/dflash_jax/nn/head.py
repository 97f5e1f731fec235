"""The vocabulary head without the logits: greedy tokens and cross-entropy in one pass over vocabulary chunks.

Nothing of size rows x vocabulary is made: a chunk of `VOCAB_CHUNK` columns at a time, with running maxima and sums.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

VOCAB_CHUNK = 8192
# Up to this many logits (64 MiB of float32) the head is one product: a scan would copy the head's chunks once more,
# which costs more than it saves when a few rows of a decoding step meet the head.
DIRECT_LOGITS = 2**24


def _chunks(
    head: Float[Array, "vocab hidden"],
) -> tuple[Float[Array, "chunk rows hidden"], Float[Array, "rest hidden"]]:
    """The head as equal chunks and the rest (possibly empty), views without a copy of the whole."""
    vocab, hidden = head.shape
    whole = vocab // VOCAB_CHUNK * VOCAB_CHUNK
    return head[:whole].reshape(-1, VOCAB_CHUNK, hidden), head[whole:]


def _fold_chunks(step, carry, head):  # noqa: ANN001, ANN202  (carry is any pytree)
    """Fold `step(carry, weights, first_column)` over the head's chunks in order."""
    whole, rest = _chunks(head)
    if whole.shape[0]:
        starts = jnp.arange(whole.shape[0], dtype=jnp.int32) * VOCAB_CHUNK
        carry, _ = lax.scan(lambda c, x: (step(c, *x), None), carry, (whole, starts))
    return step(carry, rest, jnp.int32(whole.shape[0] * VOCAB_CHUNK)) if rest.shape[0] else carry


def _logits(hidden: Float[Array, "row hidden"], weights: Float[Array, "vocab hidden"]) -> Float[Array, "row vocab"]:
    return jnp.einsum("rh,vh->rv", hidden, weights, preferred_element_type=jnp.float32)


def _best_columns(logits: Float[Array, "row chunk"]) -> tuple[Float[Array, " row"], Int32[Array, " row"]]:
    """The largest of each row and its first column."""
    index = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.take_along_axis(logits, index[:, None], axis=-1)[:, 0], index


def _fold_best(
    best: tuple[Float[Array, " row"], Int32[Array, " row"]], logits: Float[Array, "row chunk"], start: Int32[Array, ""]
) -> tuple[Float[Array, " row"], Int32[Array, " row"]]:
    """The running maximum and its column; a tie keeps the lower column, as argmax does."""
    score, token = best
    top, index = _best_columns(logits)
    return jnp.maximum(score, top), jnp.where(top > score, index + start, token)


def best_tokens(
    hidden: Float[Array, "*rows hidden"], head: Float[Array, "vocab hidden"]
) -> tuple[Float[Array, "*rows"], Int32[Array, "*rows"]]:
    """Return the largest of `hidden @ head.T` for every row, float32, and its index; the lowest index wins a tie.

    Args:
        hidden: rows after the model's final norm.
        head: the vocabulary head or a part of it, one row per token.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    if flat.shape[0] * head.shape[0] <= DIRECT_LOGITS:
        score, token = _best_columns(_logits(flat, head))
    else:
        start = (jnp.full(flat.shape[:1], -jnp.inf, jnp.float32), jnp.zeros(flat.shape[:1], jnp.int32))
        score, token = _fold_chunks(lambda best, weights, at: _fold_best(best, _logits(flat, weights), at), start, head)
    return score.reshape(hidden.shape[:-1]), token.reshape(hidden.shape[:-1])


def greedy_tokens(hidden: Float[Array, "*rows hidden"], head: Float[Array, "vocab hidden"]) -> Int32[Array, "*rows"]:
    """Return the argmax of `hidden @ head.T` for every row; the lowest id wins a tie. Logits are float32.

    Args:
        hidden: rows after the model's final norm.
        head: the vocabulary head, one row per token.
    """
    return best_tokens(hidden, head)[1]


class LinearCrossEntropy(eqx.Module):
    """What the head says of every row.

    Attributes:
        loss: `logsumexp(logits) - logits[label]`, nats.
        correct: whether the label is the argmax.
    """

    loss: Float[Array, " row"]
    correct: Bool[Array, " row"]


def _online_pass(
    hidden: Float[Array, "row hidden"], head: Float[Array, "vocab hidden"], labels: Int32[Array, " row"]
) -> tuple[LinearCrossEntropy, Float[Array, "row hidden"]]:
    """Loss, hits and d loss / d hidden of every row, each chunk's logits computed once.

    The gradient is `sum_v softmax_v head_v - head_label`: an expectation that accumulates beside the running softmax
    sum, as the values do in flash attention.
    """
    rows = hidden.shape[0]

    def step(carry, weights, first):  # noqa: ANN001, ANN202
        best, total, expected = carry
        logits = _logits(hidden, weights)
        new_best = _fold_best(best, logits, first)
        shrink = jnp.exp(best[0] - new_best[0])
        probabilities = jnp.exp(logits - new_best[0][:, None])
        expected = expected * shrink[:, None] + jnp.einsum(
            "rv,vh->rh", probabilities.astype(weights.dtype), weights, preferred_element_type=jnp.float32
        )
        return new_best, total * shrink + probabilities.sum(axis=-1), expected

    best = (jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.int32))
    start = (best, jnp.zeros(rows, jnp.float32), jnp.zeros(hidden.shape, jnp.float32))
    (top, token), total, expected = _fold_chunks(step, start, head)
    label_rows = head[labels]
    label_logits = jnp.einsum("rh,rh->r", hidden, label_rows, preferred_element_type=jnp.float32)
    result = LinearCrossEntropy(loss=top + jnp.log(total) - label_logits, correct=token == labels)
    return result, expected / total[:, None] - label_rows.astype(jnp.float32)


@jax.custom_vjp
def linear_cross_entropy(
    hidden: Float[Array, "row hidden"], head: Float[Array, "vocab hidden"], labels: Int32[Array, " row"]
) -> LinearCrossEntropy:
    """Return each row's cross-entropy against its label over a frozen head; differentiable in `hidden` alone.

    Cost: `4 * rows * hidden * vocab` FLOPs for the loss and its gradient together (the least there is), in memory
    `rows * (VOCAB_CHUNK + hidden)` float32 twice over. The head receives no gradient.

    Args:
        hidden: rows after the drafter's final norm.
        head: the target's frozen head.
        labels: token ids, in range.
    """
    return _online_pass(hidden, head, labels)[0]


def _forward(hidden, head, labels):  # noqa: ANN001, ANN202
    result, gradient = _online_pass(hidden, head, labels)
    return result, gradient.astype(hidden.dtype)


def _backward(gradient, cotangent: LinearCrossEntropy):  # noqa: ANN001, ANN202
    return gradient * cotangent.loss[:, None].astype(gradient.dtype), None, None


linear_cross_entropy.defvjp(_forward, _backward)
