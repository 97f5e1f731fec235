"""What screens of a head share: picking candidates by their bounds, and their logits in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from dflash_jax.nn.product import product


def row_norms(rows: Float[Array, "*some hidden"]) -> Float[Array, "*some"]:
    """Return every row's norm; squares of entries below 1e-19 underflow."""
    return jnp.sqrt(jnp.square(rows).sum(axis=-1))


def take_best(
    values: Float[Array, "row place"], count: int
) -> tuple[Int32[Array, "row {count}"], Float[Array, "row place"]]:
    """Return the places of the `count` largest values of every row, largest first, and the values without them (-inf).

    Of equal ones the first. A maximum at a time, which for a few is faster on a CPU than a sort.
    """
    taken = []
    for _ in range(count):
        place = jnp.argmax(values, axis=-1).astype(jnp.int32)
        taken.append(place)
        values = jnp.where(jnp.arange(values.shape[1], dtype=jnp.int32)[None] == place[:, None], -jnp.inf, values)
    return jnp.stack(taken, axis=-1), values


def best_candidate(
    hidden: Float[Array, "row hidden"], head: Float[Array, "vocab hidden"], columns: Int32[Array, "row candidate"]
) -> tuple[Float[Array, " row"], Int32[Array, " row"]]:
    """Return the largest logit among each row's candidate columns, and its column; the lowest wins a tie."""
    logits = product("rch,rh->rc", head[columns], hidden)
    best = logits.max(axis=-1)
    return best, jnp.where(logits == best[:, None], columns, head.shape[0]).min(axis=-1)
