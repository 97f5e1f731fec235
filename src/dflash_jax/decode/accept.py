"""The accept rule. There is no other copy: decoding and the offline check both call it."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32


def accept_len(
    drafted: Int32[Array, "*blocks drafted"],
    greedy: Int32[Array, "*blocks drafted"],
    *,
    num_drafted: Int32[Array, "*blocks"],
) -> Int32[Array, "*blocks"]:
    """Return how many leading drafted tokens equal the target's greedy tokens, 0 to `num_drafted`, bonus excluded.

    Worked, B = 5: drafted [7, 8, 9, 4], greedy [7, 8, 1, 4], all four drafted: 2. With `num_drafted` 1: 1.

    Args:
        drafted: slots 1 to B-1 of each block.
        greedy: the target's token at the same slots, given the text before them.
        num_drafted: slots that count, at most B-1 (a block is shortened at the token budget, labels end with the text).

    **Source:** z-lab/dflash@44947fb:dflash/model.py `dflash_generate`, which adds the bonus token afterwards.
    """
    counts = lax.broadcasted_iota(jnp.int32, drafted.shape, drafted.ndim - 1) < num_drafted[..., None]
    return jnp.cumprod((drafted == greedy) & counts, axis=-1, dtype=jnp.int32).sum(axis=-1, dtype=jnp.int32)
