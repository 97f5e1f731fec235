"""The head's greedy tokens by a screen of 16 bits: exact, and faster where 16-bit products are.

A 16-bit product of hidden states and head says of every logit how large it can be at most; only the few columns that
can be the largest are multiplied in float32.
"""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Bool, Float, Int32

from dflash_jax.nn.head_candidates import best_candidate, row_norms, take_best
from dflash_jax.nn.product import rows_product

# Columns of a part, of which only the best can be a candidate. They lie apart from each other: neighbours in a
# vocabulary (digits, single bytes) are often likely together.
COLUMNS_PER_SCREEN_PART = 128
# Parts of which the best column is multiplied in float32. Of SmolLM2's rows on code 1 in 800 needs more, on random
# tokens 1 in 42.
CANDIDATES = 8


class Screen16(eqx.Module):
    """A head rounded to 16 bits, and what the rounding can hide.

    Attributes:
        rows: the head's rows; behind each a bound on the norm of its error and one on its own norm, so that the product
            with rows made by `bounded_rows` is at least the logit.
    """

    rows: BFloat16[Array, "vocab bounded"]


def _above(x: Float[Array, "*some"]) -> BFloat16[Array, "*some"]:
    """Positive numbers, rounded to something not below them."""
    return (x * (1 + 2**-7)).astype(jnp.bfloat16)


def _rounded(x: Float[Array, "*some"]) -> Float[Array, "*some"]:
    """`x` as bfloat16 has it, in float32; XLA would take a conversion there and back for nothing."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def can_screen16(head: Float[Array, "vocab hidden"]) -> bool:
    """Whether a head has a shape that `make_screen16` takes."""
    vocab = head.shape[0]
    return vocab % COLUMNS_PER_SCREEN_PART == 0 and vocab // COLUMNS_PER_SCREEN_PART > CANDIDATES


def make_screen16(head: Float[Array, "vocab hidden"]) -> Screen16:
    """Return the 16-bit screen of a float32 head: half its bytes.

    Entries below 1e-16 count as 0 in the norms (their squares underflow): no trained head is all of such.

    Args:
        head: the vocabulary head, one row per token, float32.
    """
    low = _rounded(head)
    norm = row_norms(low)
    # Two float32 sums of as many terms, this product's and that of a candidate, are off by `terms` roundings each at
    # most; the eight cover the two columns of bounds and that the norms are those of rounded rows.
    sums = (head.shape[1] + 8) * 2.0**-23 * norm
    bounds = _above(jnp.stack([row_norms(head - low) + sums, norm], axis=-1))
    return Screen16(rows=jnp.concatenate([low.astype(jnp.bfloat16), bounds], axis=-1))


def bounded_rows(hidden: Float[Array, "row hidden"]) -> BFloat16[Array, "row bounded"]:
    """Rows whose product with a screen's is at least the logit.

    With `~` for what is rounded: `h.w = ~h.~w + h.(w - ~w) + (h - ~h).~w`, of which the last two are at most
    `|h| |w - ~w|` and `|h - ~h| |~w|`.
    """
    low = _rounded(hidden)
    bounds = _above(jnp.stack([row_norms(hidden), row_norms(hidden - low)], axis=-1))
    return jnp.concatenate([low.astype(jnp.bfloat16), bounds], axis=-1)


def screened_tokens16(
    hidden: Float[Array, "row hidden"], head: Float[Array, "vocab hidden"], screen: Screen16
) -> tuple[Int32[Array, " row"], Bool[Array, " row"]]:
    """Return `greedy_tokens` of every row where a few candidates settle them, and whether they do.

    A part of the columns is a candidate by its highest bound. The best of `CANDIDATES` of them, in float32, is the
    argmax if no other column's bound reaches it. A row that holds a NaN is not settled.

    Cost: `2 * rows * vocab * hidden` FLOPs in 16 bits; `rows * vocab` float32 of memory, which the caller bounds.

    Args:
        hidden: rows after the model's final norm, float32.
        head: the vocabulary head, one row per token, float32.
        screen: of this head.
    """
    rows, parts = hidden.shape[0], head.shape[0] // COLUMNS_PER_SCREEN_PART
    bounds = rows_product(bounded_rows(hidden), screen.rows, out=jnp.float32).reshape(rows, -1, parts)
    part, left = take_best(bounds.max(axis=1), CANDIDATES)
    inside = jnp.take_along_axis(bounds, part[:, None], axis=2)
    place = jnp.argmax(inside, axis=1).astype(jnp.int32)
    is_place = jnp.arange(COLUMNS_PER_SCREEN_PART, dtype=jnp.int32)[None, :, None] == place[:, None]
    others = jnp.maximum(left.max(axis=-1), jnp.where(is_place, -jnp.inf, inside).max(axis=(1, 2)))
    best, token = best_candidate(hidden, head, place * parts + part)
    return token, others < best
