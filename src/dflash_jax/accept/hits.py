"""Whether labels are the head's argmax, without asking the whole head where a part of it settles the matter."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from dflash_jax.nn import product, rows_product

# Rows that meet the whole head at a time. On a CPU as many as `rows_product` takes in the order the head is stored in:
# a last block that is not full is a small loss then. On an accelerator reading the head is what a block costs.
ROWS_PER_BLOCK = 256
ROWS_PER_BLOCK_ON_CPU = 64
MOST_LOGITS = 2**24
"""Logits that exist at a time at most: 64 MiB of float32, as `nn.greedy_tokens` allows itself."""


def _product_unit(hidden_size: int) -> float:
    """Bound on the error of a float32 product of rows, as a share of both rows' norms.

    Sums of n terms are off by n roundings at most. Accelerators round the factors first unless told otherwise: to TF32
    or, on TPUs, to bfloat16, 2**-9 each.
    """
    sums = hidden_size * float(jnp.finfo(jnp.float32).eps)
    return sums if jax.default_backend() == "cpu" else sums + 2**-8


def _surely_wrong(
    hidden: Float[Array, "row hidden"],
    labels: Int32[Array, " row"],
    head: Float[Array, "vocab hidden"],
    rivals: Float[Array, "rival hidden"],
) -> Bool[Array, " row"]:
    """Rows whose label loses against some rival by more than the rounding of this product and of any other could be."""

    def norm(rows: Float[Array, "some hidden"]) -> Float[Array, " some"]:
        return jnp.sqrt(jnp.square(rows.astype(jnp.float32)).sum(axis=-1))

    label_rows = head[labels]
    own = product("rh,rh->r", hidden, label_rows, out=jnp.float32)
    best = product("rh,vh->rv", hidden, rivals, out=jnp.float32).max(axis=-1)
    error = _product_unit(hidden.shape[-1]) * norm(hidden) * (norm(label_rows) + norm(rivals).max())
    # NaN compares as False: such a row is left to the whole head
    return best - own > 2 * error


def _is_argmax(
    hidden: Float[Array, "row hidden"], labels: Int32[Array, " row"], head: Float[Array, "vocab hidden"]
) -> Bool[Array, " row"]:
    """Whether the label's column beats every other, all of one product; a lower id wins a tie, as in `greedy_tokens`.

    Asked so, and not whether no column beats it: a row of NaN, where no column beats any, is no hit.
    """
    logits = rows_product(hidden, head, out=jnp.float32)
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    higher = lax.broadcasted_iota(jnp.int32, logits.shape, 1) >= labels[:, None]
    return ((logits < own) | ((logits == own) & higher)).all(axis=-1)


def label_hits(
    hidden: Float[Array, "row hidden"],
    labels: Int32[Array, " row"],
    asked: Bool[Array, " row"],
    *,
    head: Float[Array, "vocab hidden"],
    rivals: Float[Array, "rival hidden"],
) -> Bool[Array, " row"]:
    """Return `asked & (labels == greedy_tokens(hidden, head))`, at the cost of the rows that rivals leave open.

    A row that holds a NaN is no hit, whatever its label.

    Args:
        hidden: rows after the drafter's final norm.
        labels: token ids, in range.
        asked: rows that matter.
        head: the vocabulary head.
        rivals: rows of the head that labels are held against first; those of frequent tokens settle most.
    """
    rows, vocab = hidden.shape[0], head.shape[0]
    most = ROWS_PER_BLOCK_ON_CPU if jax.default_backend() == "cpu" else ROWS_PER_BLOCK
    block = max(1, min(most, rows, MOST_LOGITS // vocab))
    left = asked & ~_surely_wrong(hidden, labels, head, rivals)
    num_left = left.sum(dtype=jnp.int32)
    # the rows that are left come first; a last block that is not full repeats row 0, whose answer is its own
    order = jnp.pad(jnp.argsort(~left, stable=True).astype(jnp.int32), (0, -rows % block))

    def settle(number: Int32[Array, ""], hits: Bool[Array, " row"]) -> Bool[Array, " row"]:
        at = lax.dynamic_slice(order, (number * block,), (block,))
        return hits.at[at].set(_is_argmax(hidden[at], labels[at], head))

    hits = lax.fori_loop(jnp.int32(0), (num_left + block - 1) // block, settle, jnp.zeros(rows, bool))
    return hits & left
