"""Whether labels are the head's argmax, without asking the whole head where a part of it settles the matter."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from dflash_jax.nn import Screen, greedy_tokens, product, rows_product

# Rows that meet the whole head at a time: the largest number while so many wait, at the end the least that holds the
# rest. On a CPU no more than `rows_product` takes in the order the head is stored in, and 16 rows cost half of 64. On
# an accelerator reading the head is what a block costs, however few its rows.
ROWS_PER_BLOCK = (256,)
ROWS_PER_BLOCK_ON_CPU = (16, 32, 48, 64)
# With a screen many rows at a time are cheaper still: a row takes 0.25 ms of 64 and 0.17 of 256.
ROWS_PER_SCREENED_BLOCK = (16, 32, 64, 128, 256)
MOST_LOGITS = 2**24
"""Logits that exist at a time at most: 64 MiB of float32, as `nn.greedy_tokens` allows itself."""


def _product_unit(hidden_size: int) -> float:
    """Bound on the error of a float32 product of rows, as a share of both rows' norms.

    Sums of n terms are off by n roundings at most. Accelerators round the factors first unless told otherwise: to TF32
    or, on TPUs, to bfloat16, 2**-8 each.
    """
    sums = hidden_size * float(jnp.finfo(jnp.float32).eps)
    return sums if jax.default_backend() == "cpu" else sums + 2**-7


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
    # tokens first, as `rows_product` makes them on a CPU: the comparison then reads them in the order they lie in
    logits = rows_product(hidden, head, out=jnp.float32).T
    own = jnp.take_along_axis(logits, labels[None], axis=0)
    higher = lax.broadcasted_iota(jnp.int32, logits.shape, 0) >= labels[None]
    return ((logits < own) | ((logits == own) & higher)).all(axis=0)


def _hits_of_block(
    hidden: Float[Array, "row hidden"],
    labels: Int32[Array, " row"],
    waits: Bool[Array, " row"],
    *,
    head: Float[Array, "vocab hidden"],
    screen: Screen | None,
) -> Bool[Array, " row"]:
    """`_is_argmax` of the rows that wait, of which the first does: by a screen where there is one."""
    if screen is None:
        return _is_argmax(hidden, labels, head)
    # what means nothing may be what no screen settles
    hidden = jnp.where(waits[:, None], hidden, hidden[:1])
    return (greedy_tokens(hidden, head, screen=screen) == labels) & ~jnp.isnan(hidden).any(axis=-1)


class OpenRows(eqx.Module):
    """Rows that rivals have left open, and that wait for the whole head until there are enough of them.

    Attributes:
        hidden: the rows; those past `count` mean nothing.
        labels: of each.
        places: where each one's answer goes.
        count: rows that wait.
    """

    hidden: Float[Array, "room hidden"]
    labels: Int32[Array, " room"]
    places: Int32[Array, " room"]
    count: Int32[Array, ""]


def _block_sizes(vocab_size: int, screen: Screen | None) -> list[int]:
    """Numbers of rows that may meet the whole head, or its screen, at a time, rising."""
    sizes = ROWS_PER_BLOCK_ON_CPU if jax.default_backend() == "cpu" else ROWS_PER_BLOCK
    sizes = ROWS_PER_SCREENED_BLOCK if screen is not None else sizes
    return sorted({max(1, min(size, MOST_LOGITS // vocab_size)) for size in sizes})


def no_open_rows(
    rows: int, *, head: Float[Array, "vocab hidden"], dtype: jnp.dtype, screen: Screen | None = None
) -> OpenRows:
    """Return an empty list with room for `rows` more than ever wait for a block; `dtype` is that of hidden rows."""
    room = rows + _block_sizes(head.shape[0], screen)[-1]
    zeros = jnp.zeros(room, jnp.int32)
    return OpenRows(hidden=jnp.zeros((room, head.shape[1]), dtype), labels=zeros, places=zeros, count=jnp.int32(0))


def add_open_rows(
    waiting: OpenRows,
    hidden: Float[Array, "row hidden"],
    labels: Int32[Array, " row"],
    asked: Bool[Array, " row"],
    places: Int32[Array, " row"],
    *,
    head: Float[Array, "vocab hidden"],
    rivals: Float[Array, "rival hidden"],
) -> OpenRows:
    """Add the rows whose label beats every rival, or may: of the others it is known that they are no hits.

    In the end a row is a hit where `asked & (labels == greedy_tokens(hidden, head))`. One that holds a NaN is none.

    Args:
        waiting: rows from before.
        hidden: rows after the drafter's final norm.
        labels: token ids, in range.
        asked: rows that matter.
        places: where each one's answer goes, as `settle_open_rows` has it.
        head: the vocabulary head.
        rivals: rows of the head that labels are held against first; those of frequent tokens settle most.
    """
    left = asked & ~_surely_wrong(hidden, labels, head, rivals)
    room = waiting.labels.shape[0]
    # one after the other behind those that wait; a row that is settled goes nowhere
    at = jnp.where(left, waiting.count + jnp.cumsum(left, dtype=jnp.int32) - 1, room)
    return OpenRows(
        hidden=waiting.hidden.at[at].set(hidden, mode="drop"),
        labels=waiting.labels.at[at].set(labels, mode="drop"),
        places=waiting.places.at[at].set(places, mode="drop"),
        count=waiting.count + left.sum(dtype=jnp.int32),
    )


def settle_open_rows(
    waiting: OpenRows,
    hits: Bool[Array, " place"],
    *,
    head: Float[Array, "vocab hidden"],
    all_: bool,
    screen: Screen | None = None,
) -> tuple[OpenRows, Bool[Array, " place"]]:
    """Meet the whole head with the rows that wait, and write at their places which of them are hits.

    Args:
        waiting: rows.
        hits: all answers; the others are left alone.
        head: the vocabulary head.
        all_: whether no row may wait on; else those stay that do not fill a block.
        screen: of the head; float32 rows meet it first.
    """
    sizes = _block_sizes(head.shape[0], screen)
    fewest = 1 if all_ else sizes[-1]

    def settle(size: int, count: Int32[Array, ""], hits: Bool[Array, " place"]):  # noqa: ANN202  (both, after it)
        # the last ones, so that none must move; a block that is not full has rows behind them that mean nothing
        start = jnp.maximum(count - size, 0)
        hidden, labels, places = (
            lax.dynamic_slice_in_dim(rows, start, size) for rows in (waiting.hidden, waiting.labels, waiting.places)
        )
        waits = start + jnp.arange(size, dtype=jnp.int32) < count
        found = _hits_of_block(hidden, labels, waits, head=head, screen=screen)
        return start, hits.at[jnp.where(waits, places, hits.shape[0])].set(found, mode="drop")

    def settle_some(done: tuple[Int32[Array, ""], Bool[Array, " place"]]):  # noqa: ANN202
        if not all_:
            return settle(sizes[-1], *done)
        size = jnp.searchsorted(jnp.array(sizes[:-1], jnp.int32), done[0])
        return lax.switch(size, [partial(settle, size) for size in sizes], *done)

    count, hits = lax.while_loop(lambda done: done[0] >= fewest, settle_some, (waiting.count, hits))
    return replace(waiting, count=count), hits
