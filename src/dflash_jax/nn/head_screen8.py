"""The head's greedy tokens by a screen of 8 bits: exact, and what a few rows cost is a quarter of the head's bytes.

Hidden states are two numbers of 8 bits an entry, high and low: their rounding then hides a tenth of what the head's
does.

How large a logit can be at most differs little between columns of like size, so columns are sorted by their largest
entry and a part of neighbours shares one unit and one bound: nothing but products and their maxima is as large as the
vocabulary.
"""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int8, Int32

from dflash_jax.nn.head_candidates import best_candidate, row_norms, take_best
from dflash_jax.nn.product import product

# Columns of like size, with one unit and one bound.
COLUMNS_PER_PART8 = 64
# Parts of which the best column is multiplied in float32, and further columns of those parts, best first. Of SmolLM2's
# rows on code none of 1,366 has more than 16 columns that its bounds leave open.
PARTS_TRIED = 12
COLUMNS_MORE = 4
# An entry of a row counts for itself, and not in the norm of the others, from this share of the row's norm.
LARGE_SHARE = 0.1
# So many numbers of the low part make one of the high part.
LOW_STEPS = 128
# Up to so many rows the head comes first in their product: XLA repacks the second operand. 6 rows of 8 bits, of 3
# hidden states, take longer than 8.
ROWS_BEHIND_THE_HEAD = 4
_LEVELS = 127
_SMALLEST_UNIT = 2.0**-100
# Bounds are sums of a few products of float32 and are raised by more than those can be off.
_RAISED = 1 + 2**-10


class Screen8(eqx.Module):
    """A head rounded to 8 bits, and what the rounding can hide.

    Column `c` of the head, times `balance`, is about `units[part] * rows[i]` for the one `i` with `ids[i] == c`; the
    part of row `i` is `i % num_parts`.

    Attributes:
        rows: the columns in 8 bits.
        ids: which column each is.
        balance: what entries of the head are multiplied by and those of hidden states divided by, so that entries
            which are often large in hidden states take a smaller share of them.
        units: of each part.
        bounds: of each part: the largest norm of a column's error, the largest entry of one, the largest norm of a
            column, and the largest norm of any column of the head.
    """

    rows: Int8[Array, "vocab hidden"]
    ids: Int32[Array, " vocab"]
    balance: Float[Array, " hidden"]
    units: Float[Array, " part"]
    bounds: Float[Array, "bound part"]


class _Rows(eqx.Module):
    """Hidden states in two levels, and what bounds need of them.

    Attributes:
        high: balanced entries over `units`, rounded.
        low: what that leaves, in steps of 1 of `LOW_STEPS`.
        units: of each row.
        weights: of a screen's `bounds`.
    """

    high: Int8[Array, "row hidden"]
    low: Int8[Array, "row hidden"]
    units: Float[Array, " row"]
    weights: Float[Array, "row bound"]


def can_screen8(head: Float[Array, "vocab hidden"]) -> bool:
    """Whether a head has a shape that `make_screen8` takes."""
    vocab = head.shape[0]
    return vocab % COLUMNS_PER_PART8 == 0 and vocab // COLUMNS_PER_PART8 > PARTS_TRIED


def make_screen8(head: Float[Array, "vocab hidden"]) -> Screen8:
    """Return the 8-bit screen of a float32 head: a quarter of its bytes, and 4 more per token.

    Args:
        head: the vocabulary head, one row per token, float32.
    """
    vocab, hidden = head.shape
    parts = vocab // COLUMNS_PER_PART8
    # Entries of a head spread over a factor of 10 and more, and hidden states are large where it is. The root shares
    # that between the two; other powers leave more columns open.
    sizes = jnp.sqrt(jnp.square(head).mean(axis=0))
    sizes = jnp.where(sizes > 0, sizes, 1)
    balance = jnp.clip(jnp.sqrt(jnp.median(sizes) / sizes), 2**-8, 2**8)
    largest = jnp.abs(head * balance[None]).max(axis=-1)
    ids = jnp.argsort(largest).reshape(parts, COLUMNS_PER_PART8).T.reshape(-1).astype(jnp.int32)
    units = jnp.maximum(largest[ids].reshape(COLUMNS_PER_PART8, parts).max(axis=0) / _LEVELS, _SMALLEST_UNIT)
    # norms are of entries over their unit: squares of the entries could underflow
    scaled = (head[ids] * balance[None]).reshape(COLUMNS_PER_PART8, parts, hidden) / units[None, :, None]
    rounded = jnp.round(scaled)
    errors = scaled - rounded
    error_norms = units * row_norms(errors).max(axis=0)
    norms = units * row_norms(scaled).max(axis=0) + error_norms
    return Screen8(
        rows=rounded.astype(jnp.int8).reshape(vocab, hidden),
        ids=ids,
        balance=balance,
        units=units,
        bounds=jnp.stack(
            [error_norms, units * jnp.abs(errors).max(axis=(0, 2)), norms, jnp.broadcast_to(norms.max(), norms.shape)]
        ),
    )


def _in_two_levels(hidden: Float[Array, "row hidden"], screen: Screen8) -> _Rows:
    """Hidden states in 8 bits, and how far above the product of rounded rows a logit can be.

    With `~` for what is rounded, `h.w = ~h.~w + h.(w - ~w) + (h - ~h).~w`. The last is at most the product of norms.
    Of the second, an entry of `h` that is large by itself counts with the largest entry of the error, and the others
    together with its norm; with all of `h` in one norm a large entry would count as if the whole error lay there.
    """
    balanced = hidden / screen.balance[None]
    units = jnp.maximum(jnp.abs(balanced).max(axis=-1) / _LEVELS, _SMALLEST_UNIT)
    scaled = balanced / units[:, None]
    high = jnp.round(scaled)
    low = jnp.round((scaled - high) * LOW_STEPS)
    norms = row_norms(scaled)
    large = jnp.abs(scaled) > LARGE_SHARE * norms[:, None]
    small_norms = row_norms(jnp.where(large, 0, scaled))
    large_sums = jnp.where(large, jnp.abs(scaled), 0).sum(axis=-1)
    # Of two float32 logits, one by this product and one by any other, each is off by one rounding per term at most;
    # as much again, for a candidate's own is, and for the sums made here.
    rounding = 2 * (hidden.shape[1] + 32) * 2.0**-23 * norms
    errors = row_norms(scaled - high - low / LOW_STEPS)
    return _Rows(
        high=high.astype(jnp.int8),
        low=low.astype(jnp.int8),
        units=units,
        weights=(_RAISED * units)[:, None] * jnp.stack([small_norms, large_sums, errors, rounding], axis=-1),
    )


def _slack(weights: Float[Array, "row bound"], bounds: Float[Array, "bound part"]) -> Float[Array, "row part"]:
    """What a logit of each part can be above the product of rounded rows, at most."""
    return product("rb,bp->rp", weights, bounds)


def _int_product(x: Int8[Array, "row hidden"], rows: Int8[Array, "vocab hidden"]) -> Int32[Array, "row vocab"]:
    last = (((1,), (1,)), ((), ()))
    count = x.shape[0]
    if count <= 2 * ROWS_BEHIND_THE_HEAD:
        x = jnp.pad(x, ((0, 2 * ROWS_BEHIND_THE_HEAD - count), (0, 0))) if count > ROWS_BEHIND_THE_HEAD else x
        # the barrier keeps XLA from swapping the operands back
        return lax.optimization_barrier(lax.dot_general(rows, x, last, preferred_element_type=jnp.int32))[:, :count].T
    return lax.dot_general(x, rows, last, preferred_element_type=jnp.int32)


class _Bounds(eqx.Module):
    """What logits can be at most: `products * scale + slack`, a row for each of the hidden states.

    Attributes:
        products: of rounded rows, of the column at each place of each part.
        scale: of each part's products.
        slack: of each part.
    """

    products: Float[Array, "row place part"]
    scale: Float[Array, "row part"]
    slack: Float[Array, "row part"]


def _bound(hidden: Float[Array, "row hidden"], screen: Screen8) -> _Bounds:
    rows = _in_two_levels(hidden, screen)
    products = _int_product(jnp.concatenate([rows.high, rows.low]), screen.rows)
    high, low = products.reshape(2, hidden.shape[0], COLUMNS_PER_PART8, screen.units.shape[0])
    return _Bounds(
        # float32, as int32 does not hold the sum for wide models
        products=high.astype(jnp.float32) * LOW_STEPS + low.astype(jnp.float32),
        scale=(rows.units / LOW_STEPS)[:, None] * screen.units[None],
        slack=_slack(rows.weights, screen.bounds),
    )


def bounds8(hidden: Float[Array, "row hidden"], screen: Screen8) -> Float[Array, "row place part"]:
    """Return how large every logit can be at most; `screen.ids` has the columns in this order.

    Args:
        hidden: rows after the model's final norm, float32.
        screen: of the head.
    """
    bound = _bound(hidden, screen)
    return bound.products * bound.scale[:, None] + bound.slack[:, None]


def screened_tokens8(
    hidden: Float[Array, "row hidden"], head: Float[Array, "vocab hidden"], screen: Screen8
) -> tuple[Int32[Array, " row"], Bool[Array, " row"]]:
    """Return `greedy_tokens` of every row where a few candidates settle them, and whether they do.

    Of the `PARTS_TRIED` parts with the highest bounds the best column is a candidate, and the `COLUMNS_MORE` best of
    their others. The best of them, in float32, is the argmax if no other column's bound reaches it. A row that holds a
    NaN is not settled.

    Cost: `4 * rows * vocab * hidden` operations in 8 bits; `2 * rows * vocab` int32 of memory, which the caller bounds.

    Args:
        hidden: rows after the model's final norm, float32.
        head: the vocabulary head, one row per token, float32.
        screen: of this head.
    """
    count, parts = hidden.shape[0], screen.units.shape[0]
    bound = _bound(hidden, screen)
    left = bound.products.max(axis=1) * bound.scale + bound.slack
    part, left = take_best(left, PARTS_TRIED)
    of_tried = lambda per_part: jnp.take_along_axis(per_part, part, axis=1)[:, None]
    inside = jnp.take_along_axis(bound.products, part[:, None], axis=2) * of_tried(bound.scale) + of_tried(bound.slack)
    place = jnp.argmax(inside, axis=1).astype(jnp.int32)
    is_place = jnp.arange(COLUMNS_PER_PART8, dtype=jnp.int32)[None, :, None] == place[:, None]
    inside = jnp.where(is_place, -jnp.inf, inside).reshape(count, -1)
    more, inside = take_best(inside, COLUMNS_MORE)
    part_of_more = jnp.take_along_axis(part, more % PARTS_TRIED, axis=1)
    rows = jnp.concatenate([place * parts + part, more // PARTS_TRIED * parts + part_of_more], axis=-1)
    others = jnp.maximum(left.max(axis=-1), inside.max(axis=-1))
    best, token = best_candidate(hidden, head, screen.ids[rows])
    return token, others < best
