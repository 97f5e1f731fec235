"""The vocabulary head without the logits: greedy tokens and cross-entropy in one pass over vocabulary chunks.

Nothing of size rows x vocabulary is made: a chunk of `VOCAB_CHUNK` columns at a time, with running maxima and sums.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from dflash_jax.nn.head_sample import Sample, draw_sample, named_tokens
from dflash_jax.nn.head_screens import Screen, can_screen, make_screen, screened_tokens
from dflash_jax.nn.product import has_fast_16_bit_products, on_one_cpu, product, rows_product

VOCAB_CHUNK = 8192
# Up to this many logits (64 MiB of float32) the head is one product: a scan would copy the head's chunks once more,
# which costs more than it saves when a few rows of a decoding step meet the head.
DIRECT_LOGITS = 2**24
# On a CPU that many rows meet the whole head at a time where `DIRECT_LOGITS` allows it: chunks of the head are copies
# there, and logits of all rows of a prefill are fresh memory, chunk by chunk.
ROWS_PER_BLOCK_ON_CPU = 256
# From so many float32 rows on a CPU with fast 16-bit products makes a screen of the head first: it costs what half of
# them save.
ROWS_FOR_A_SCREEN = 2048
# Rows that a screen leaves open meet the whole head so many at a time: there are few.
OPEN_ROWS_PER_BLOCK = 16
# Columns whose maximum is looked for first, on a CPU: a maximum takes a ninth of the time that its place does there.
COLUMNS_PER_PART = 128


def _fold_chunks(step, carry, head):  # noqa: ANN001, ANN202  (carry is any pytree)
    """Fold `step(carry, chunk, first_column)` over equal chunks of the head in order, and the rest where there is one.

    `head` is an array or a pytree of arrays with a row per column of the logits; chunks are views of it.
    """
    vocab = jax.tree.leaves(head)[0].shape[0]
    whole = vocab // VOCAB_CHUNK
    if whole:
        chunks = jax.tree.map(lambda x: x[: whole * VOCAB_CHUNK].reshape(whole, VOCAB_CHUNK, *x.shape[1:]), head)
        starts = jnp.arange(whole, dtype=jnp.int32) * VOCAB_CHUNK
        carry, _ = lax.scan(lambda c, x: (step(c, *x), None), carry, (chunks, starts))
    if vocab % VOCAB_CHUNK == 0:
        return carry
    rest = jax.tree.map(lambda x: x[whole * VOCAB_CHUNK :], head)
    return step(carry, rest, jnp.int32(whole * VOCAB_CHUNK))


def _logits(hidden: Float[Array, "row hidden"], weights: Float[Array, "vocab hidden"]) -> Float[Array, "row vocab"]:
    return rows_product(hidden, weights, out=jnp.float32)


def best_columns(logits: Float[Array, "row chunk"]) -> tuple[Float[Array, " row"], Int32[Array, " row"]]:
    """The largest of each row and its first column."""
    rows, columns = logits.shape
    if jax.default_backend() == "cpu" and columns % COLUMNS_PER_PART == 0:
        parts = logits.reshape(rows, -1, COLUMNS_PER_PART)
        part = jnp.argmax(parts.max(axis=-1), axis=-1).astype(jnp.int32)
        nearby = jnp.take_along_axis(parts, part[:, None, None], axis=1)[:, 0]
        index = jnp.argmax(nearby, axis=-1).astype(jnp.int32)
        return jnp.take_along_axis(nearby, index[:, None], axis=-1)[:, 0], part * COLUMNS_PER_PART + index
    index = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.take_along_axis(logits, index[:, None], axis=-1)[:, 0], index


def _fold_best(
    best: tuple[Float[Array, " row"], Int32[Array, " row"]], logits: Float[Array, "row chunk"], start: Int32[Array, ""]
) -> tuple[Float[Array, " row"], Int32[Array, " row"]]:
    """The running maximum and its column; a tie keeps the lower column, as argmax does."""
    score, token = best
    top, index = best_columns(logits)
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
    rows, block = flat.shape[0], ROWS_PER_BLOCK_ON_CPU
    if rows * head.shape[0] <= DIRECT_LOGITS:
        score, token = best_columns(_logits(flat, head))
    elif on_one_cpu() and block * head.shape[0] <= DIRECT_LOGITS:
        blocks = jnp.pad(flat, ((0, -rows % block), (0, 0))).reshape(-1, block, flat.shape[1])
        score, token = lax.map(lambda some: best_columns(_logits(some, head)), blocks)
        score, token = score.reshape(-1)[:rows], token.reshape(-1)[:rows]
    else:
        start = (jnp.full(flat.shape[:1], -jnp.inf, jnp.float32), jnp.zeros(flat.shape[:1], jnp.int32))
        score, token = _fold_chunks(lambda best, weights, at: _fold_best(best, _logits(flat, weights), at), start, head)
    return score.reshape(hidden.shape[:-1]), token.reshape(hidden.shape[:-1])


def greedy_tokens(
    hidden: Float[Array, "*rows hidden"], head: Float[Array, "vocab hidden"], *, screen: Screen | None = None
) -> Int32[Array, "*rows"]:
    """Return the argmax of `hidden @ head.T` for every row; the lowest id wins a tie. Logits are float32.

    Args:
        hidden: rows after the model's final norm.
        head: the vocabulary head, one row per token.
        screen: of this head, by `make_screen`, where there is one; many rows make one where that is faster.
    """
    rows = hidden.size // hidden.shape[-1]
    if screen is None and rows >= ROWS_FOR_A_SCREEN and screen_pays(hidden.dtype, head):
        screen = make_screen(head, for_few_rows=False)
    if screen is None or (rows == 1 and screen.eight is None):  # a matrix-vector product is as fast as 16 bits
        return best_tokens(hidden, head)[1]
    return _greedy_by_screen(hidden.reshape(rows, -1), head, screen).reshape(hidden.shape[:-1])


def screen_pays(dtype: jnp.dtype, head: Float[Array, "vocab hidden"]) -> bool:
    """Whether a screen of this head, once it is made, is faster for rows of `dtype`: float32 on one CPU with AMX."""
    return dtype == head.dtype == jnp.float32 and on_one_cpu() and has_fast_16_bit_products() and can_screen(head)


def _greedy_by_screen(
    hidden: Float[Array, "row hidden"], head: Float[Array, "vocab hidden"], screen: Screen
) -> Int32[Array, " row"]:
    """`greedy_tokens`: the screen settles most rows, and the whole head the others."""
    rows = hidden.shape[0]
    size = min(rows, OPEN_ROWS_PER_BLOCK)
    block = min(rows, ROWS_PER_BLOCK_ON_CPU, max(1, DIRECT_LOGITS // head.shape[0]))
    if rows <= min(block, size):
        tokens, settled = screened_tokens(hidden, head, screen)
        # not a loop: XLA takes what is the same in each of its rounds out of it, and always does it
        return lax.cond(settled.all(), lambda: tokens, lambda: best_tokens(hidden, head)[1])
    blocks = jnp.pad(hidden, ((0, -rows % block), (0, 0))).reshape(-1, block, hidden.shape[1])
    tokens, settled = lax.map(lambda some: screened_tokens(some, head, screen), blocks)
    tokens, settled = tokens.reshape(-1)[:rows], settled.reshape(-1)[:rows]
    open_first = jnp.argsort(settled, stable=True)  # rows that are settled fill the last block

    def settle(done: tuple[Int32[Array, ""], Int32[Array, " row"]]) -> tuple[Int32[Array, ""], Int32[Array, " row"]]:
        at, tokens = done
        some = lax.dynamic_slice_in_dim(open_first, jnp.minimum(at, rows - size), size)
        return at + size, tokens.at[some].set(best_tokens(hidden[some], head)[1])

    num_open = rows - settled.sum(dtype=jnp.int32)
    return lax.while_loop(lambda done: done[0] < num_open, settle, (jnp.int32(0), tokens))[1]


class TopPart(eqx.Module):
    """The likeliest tokens of some rows of the head, for every row of hidden states: enough to join a split vocabulary.

    Attributes:
        scores: the largest logits, largest first; -inf beyond the rows that there are.
        tokens: their indices in this part; where some tie, the lower comes first.
        total: sum of `exp(logit - scores[0])` over all rows of the part.
    """

    scores: Float[Array, "row count"]
    tokens: Int32[Array, "row count"]
    total: Float[Array, " row"]

    def log_probabilities(self) -> Float[Array, "row count"]:
        """Of a softmax over the part, nats."""
        return self.scores - self.scores[:, :1] - jnp.log(self.total)[:, None]


def fold_top(hidden: Float[Array, "row hidden"], head: Float[Array, "vocab hidden"], *, count: int) -> TopPart:
    """Return the largest logits that a head, or a part of one, gives every row.

    Args:
        hidden: rows after the model's final norm.
        head: rows of the head.
        count: how many.
    """
    rows = hidden.shape[0]

    def step(carry, weights, first):  # noqa: ANN001, ANN202
        scores, tokens, total = carry
        logits = _logits(hidden, weights)
        best, index = lax.top_k(logits, min(count, weights.shape[0]))
        # what is there already has lower ids, and of equal scores top_k takes the first
        merged, place = lax.top_k(jnp.concatenate([scores, best], axis=-1), count)
        tokens = jnp.concatenate([tokens, index.astype(jnp.int32) + first], axis=-1)
        shrink = jnp.exp(scores[:, 0] - merged[:, 0])
        total = total * shrink + jnp.exp(logits - merged[:, :1]).sum(axis=-1)
        return merged, jnp.take_along_axis(tokens, place, axis=-1), total

    start = jnp.full((rows, count), -jnp.inf, jnp.float32), jnp.zeros((rows, count), jnp.int32), jnp.zeros(rows)
    scores, tokens, total = _fold_chunks(step, start, head)
    return TopPart(scores=scores, tokens=tokens, total=total)


def top_tokens(
    hidden: Float[Array, "*rows hidden"], head: Float[Array, "vocab hidden"], *, count: int
) -> tuple[Int32[Array, "*rows {count}"], Float[Array, "*rows {count}"]]:
    """Return the likeliest tokens of `softmax(hidden @ head.T)` for every row, likeliest first, and log-probabilities.

    Where some tie, the lower id comes first. Log-probabilities are float32, in nats, of the whole softmax.

    Args:
        hidden: rows after the model's final norm.
        head: the vocabulary head, one row per token.
        count: how many, at most the vocabulary.
    """
    part = fold_top(hidden.reshape(-1, hidden.shape[-1]), head, count=count)
    rows = hidden.shape[:-1]
    return part.tokens.reshape(*rows, count), part.log_probabilities().reshape(*rows, count)


class LinearCrossEntropy(eqx.Module):
    """What the head says of every row.

    Attributes:
        loss: `logsumexp(logits) - sum of probability * logit over the row's labels`, nats.
        tokens: the argmax, the lowest id where some tie.
    """

    loss: Float[Array, " row"]
    tokens: Int32[Array, " row"]


def _expected_labels(
    hidden: Float[Array, "row hidden"],
    head: Float[Array, "vocab hidden"],
    ids: Int32[Array, "row label"],
    probabilities: Float[Array, "row label"],
) -> tuple[Float[Array, " row"], Float[Array, "row hidden"]]:
    """The sums over a row's labels of probability times logit and times head row, float32, a label at a time."""

    def add(carry: tuple[Array, Array], label: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        logit, row = carry
        label_ids, weights = label
        label_rows = head[label_ids].astype(hidden.dtype)
        label_logits = product("rh,rh->r", hidden, label_rows, out=jnp.float32)
        return (logit + weights * label_logits, row + weights[:, None] * label_rows.astype(jnp.float32)), None

    zeros = jnp.zeros(hidden.shape[:1], jnp.float32), jnp.zeros(hidden.shape, jnp.float32)
    if ids.shape[1] == 1:
        return add(zeros, (ids[:, 0], probabilities[:, 0]))[0]
    return lax.scan(add, zeros, (ids.T, probabilities.T))[0]


class HeadPart(eqx.Module):
    """What some rows of the head say of every row of hidden states: enough to join the parts of a split vocabulary.

    Attributes:
        top: the largest logit.
        token: its index in this part, the lowest where some tie.
        total: sum of `exp(logit - top)`.
        expected: sum of `exp(logit - top) * head row`.
        label_logit: sum over the labels of probability times logit.
        label_row: sum over the labels of probability times head row.
    """

    top: Float[Array, " row"]
    token: Int32[Array, " row"]
    total: Float[Array, " row"]
    expected: Float[Array, "row hidden"]
    label_logit: Float[Array, " row"]
    label_row: Float[Array, "row hidden"]


def fold_head(
    hidden: Float[Array, "row hidden"],
    head: Float[Array, "vocab hidden"],
    ids: Int32[Array, "row label"],
    probabilities: Float[Array, "row label"],
    *,
    sample: Sample | None = None,
) -> HeadPart:
    """Return what a head, or a part of one, says of every row; each chunk's logits are computed once.

    Args:
        hidden: rows after the drafter's final norm.
        head: rows of the head; with a sample they may be wider than `hidden`, and are narrowed as they are taken.
        ids: labels, in range of `head`.
        probabilities: of the labels; 0 for one that is in another part.
        sample: the rows of the head that sums are taken over, weighed, and the argmax is looked for in; None: all.
    """
    rows = hidden.shape[0]

    def step(carry, chunk, first):  # noqa: ANN001, ANN202
        best, total, expected = carry
        weights, counts = chunk
        logits = _logits(hidden, weights)
        new_best = _fold_best(best, logits, first)
        shrink = jnp.exp(best[0] - new_best[0])
        exponentials = jnp.exp(logits - new_best[0][:, None])
        if counts is not None:
            exponentials *= counts[None]
        expected = expected * shrink[:, None] + product(
            "rv,vh->rh", exponentials.astype(weights.dtype), weights, out=jnp.float32
        )
        return new_best, total * shrink + exponentials.sum(axis=-1), expected

    best = (jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.int32))
    start = (best, jnp.zeros(rows, jnp.float32), jnp.zeros(hidden.shape, jnp.float32))
    columns = (head, None) if sample is None else (head[sample.tokens].astype(hidden.dtype), sample.weights)
    (top, token), total, expected = _fold_chunks(step, start, columns)
    token = token if sample is None else sample.tokens[token]
    label_logit, label_row = _expected_labels(hidden, head, ids, probabilities)
    return HeadPart(top=top, token=token, total=total, expected=expected, label_logit=label_logit, label_row=label_row)


def online_pass(
    hidden: Float[Array, "row hidden"],
    head: Float[Array, "vocab hidden"],
    ids: Int32[Array, "row label"],
    probabilities: Float[Array, "row label"],
    key: PRNGKeyArray | None = None,
    *,
    sampled: int | None = None,
) -> tuple[LinearCrossEntropy, Float[Array, "row hidden"]]:
    """Return loss, argmax and d loss / d hidden of every row.

    The gradient is `sum_v softmax_v head_v - sum over labels of probability * head_label`: an expectation that
    accumulates beside the running softmax sum, as the values do in flash attention.

    Args:
        hidden: rows after the drafter's final norm.
        head: the target's frozen head.
        ids: tokens with a probability, in range.
        probabilities: of those tokens.
        key: draws the sample.
        sampled: tokens that the softmax is estimated from, all labels among them (see `draw_sample`); None: all.
    """
    sample = None
    if sampled is not None:
        assert key is not None
        sample = draw_sample(named_tokens(ids, probabilities, head.shape[0]), min(sampled, head.shape[0]), key=key)
    part = fold_head(hidden, head, ids, probabilities, sample=sample)
    result = LinearCrossEntropy(loss=part.top + jnp.log(part.total) - part.label_logit, tokens=part.token)
    return result, part.expected / part.total[:, None] - part.label_row


OnlinePass = Callable[[Array, Array, Array, Array, Array | None], tuple[LinearCrossEntropy, Array]]


def _result(
    one_pass: OnlinePass,
    hidden: Float[Array, "row hidden"],
    head: Float[Array, "vocab hidden"],
    ids: Int32[Array, "row label"],
    probabilities: Float[Array, "row label"],
    key: PRNGKeyArray | None,
) -> LinearCrossEntropy:
    return one_pass(hidden, head, ids, probabilities, key)[0]


def _forward(one_pass, hidden, head, ids, probabilities, key):  # noqa: ANN001, ANN202
    result, gradient = one_pass(hidden, head, ids, probabilities, key)
    # an empty array carries the dtype of the rows: the gradient stays float32 until the row's weight is in it
    return result, (gradient, jnp.zeros(0, hidden.dtype))


def _backward(one_pass, kept, cotangent: LinearCrossEntropy):  # noqa: ANN001, ANN202
    del one_pass
    gradient, like = kept
    return (gradient * cotangent.loss[:, None]).astype(like.dtype), None, None, None, None


_with_slope = jax.custom_vjp(_result, nondiff_argnums=(0,))
_with_slope.defvjp(_forward, _backward)


def linear_soft_cross_entropy(
    hidden: Float[Array, "row hidden"],
    head: Float[Array, "vocab hidden"],
    ids: Int32[Array, "row label"],
    probabilities: Float[Array, "row label"],
    *,
    one_pass: OnlinePass = online_pass,
    key: PRNGKeyArray | None = None,
) -> LinearCrossEntropy:
    """Return each row's cross-entropy against a distribution over some tokens; differentiable in `hidden` alone.

    `loss = logsumexp(logits) - sum over labels of probability * logit`, the softmax being over the whole vocabulary,
    or estimated where `one_pass` samples it.

    Cost: `4 * rows * hidden * vocab` FLOPs for the loss and its gradient together (the least there is; `sampled` in
    place of `vocab` where it is sampled), in memory `rows * (VOCAB_CHUNK + hidden)` float32 twice over. Neither the
    head nor the distribution receives a gradient.

    Args:
        hidden: rows after the drafter's final norm.
        head: the target's frozen head.
        ids: tokens with a probability, in range; several labels of a row are different ones.
        probabilities: of those tokens, float32; they sum to 1.
        one_pass: how the head is met, where it is not whole on every device or is sampled.
        key: for `one_pass` to draw with.
    """
    return _with_slope(one_pass, hidden, head, ids, probabilities, key)


def linear_cross_entropy(
    hidden: Float[Array, "row hidden"], head: Float[Array, "vocab hidden"], labels: Int32[Array, " row"]
) -> LinearCrossEntropy:
    """Return each row's cross-entropy against its label: `linear_soft_cross_entropy` with one label of probability 1.

    Args:
        hidden: rows after the drafter's final norm.
        head: the target's frozen head.
        labels: token ids, in range.
    """
    return linear_soft_cross_entropy(hidden, head, labels[:, None], jnp.ones((labels.shape[0], 1), jnp.float32))
