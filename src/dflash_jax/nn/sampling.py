"""Sampling from the head's logits: temperature, top-k, top-p, and the token as the winner of a race.

A token is drawn as an argmax of scores with noise (Gumbel-max), so that a draw is a function of logits and key alone:
the same key over the same logits gives the same token, whichever program computed them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Key, UInt32

from dflash_jax.nn.head import best_columns
from dflash_jax.nn.product import rows_product

_FLOAT_BITS = 32


def _ranks(scores: Float[Array, "row vocab"]) -> UInt32[Array, "row vocab"]:
    """Floats as unsigned integers of the same order: a negative float's bits count downwards."""
    bits = lax.bitcast_convert_type(scores, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _smallest_top(
    ranks: UInt32[Array, "row vocab"], weights: Float[Array, "row vocab"], wanted: Float[Array, " row"]
) -> UInt32[Array, " row"]:
    """The highest rank such that it and all above it weigh at least `wanted` together; the lowest where none do.

    Bisection over the bits, exact: 32 passes over the vocabulary, where sorting 50,000 floats takes many more.
    """

    def halve(
        _: Int32[Array, ""], bounds: tuple[UInt32[Array, " row"], UInt32[Array, " row"]]
    ) -> tuple[UInt32[Array, " row"], UInt32[Array, " row"]]:
        low, high = bounds
        middle = high - (high - low) // 2
        enough = jnp.where(ranks >= middle[:, None], weights, 0.0).sum(axis=-1) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - (low < high).astype(jnp.uint32))

    bounds = ranks.min(axis=-1), ranks.max(axis=-1)
    low, _ = lax.fori_loop(0, _FLOAT_BITS, halve, bounds)
    return low


def filter_scores(
    logits: Float[Array, "row vocab"],
    *,
    temperature: Float[Array, " row"],
    top_k: Int32[Array, " row"] | None,
    top_p: Float[Array, " row"] | None,
) -> Float[Array, "row vocab"]:
    """Return log-probabilities up to a constant per row: `logits / temperature`, and -inf for what is left out.

    In this order: temperature; `top_k` keeps the k best; `top_p` keeps, of what is left and renormalised, the fewest
    best whose share is at least p. Tokens of equal logits are kept or left out together.

    Worked, at temperature 1: shares [.5, .3, .2] and top_p .5 keep the first, .51 the first two, and top_p .6 after
    top_k 2 (shares [.625, .375]) the first alone.

    Args:
        logits: of every token, float32.
        temperature: above 0.
        top_k: tokens kept, at least 1; None: all.
        top_p: share kept, in (0, 1]; None: all.

    **Source:** order and rules are those of huggingface/transformers `generation/logits_process.py`
    (`TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`), except for ties at top-p's edge, of which a
    sort takes some.
    """
    best = logits.max(axis=-1, keepdims=True)
    scores = (logits - best) / temperature[:, None]  # the best first: a tiny temperature must not make inf - inf
    if top_k is None and top_p is None:
        return scores
    ranks = _ranks(scores)
    if top_k is not None:
        edge = _smallest_top(ranks, jnp.ones_like(scores), top_k.astype(jnp.float32))
        scores = jnp.where(ranks >= edge[:, None], scores, -jnp.inf)
    if top_p is not None:
        shares = jax.nn.softmax(scores, axis=-1)
        edge = _smallest_top(ranks, shares, top_p)
        scores = jnp.where(ranks >= edge[:, None], scores, -jnp.inf)
    return scores


def gumbel_of(bits: UInt32[Array, "row vocab"]) -> Float[Array, "row vocab"]:
    """Return Gumbel noise, `-log(E)` of exponential E, from random bits.

    E is `-log(1 - u)`, which is finest where E is small and the noise large, the side that decides: tokens are drawn
    with their right probability down to about 1e-9 (jax.random.gumbel of as many bits: 1e-7). Bits 0 give 22.9, the
    most there is, and all bits set -2.8.
    """
    uniform = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24)))


def gumbel_noise(keys: Key[Array, " row"], vocab_size: int) -> Float[Array, "row {vocab_size}"]:
    """Return Gumbel noise, each row from its own key."""
    return gumbel_of(jax.vmap(lambda key: jax.random.bits(key, (vocab_size,), jnp.uint32))(keys))


def noisy_scores(
    logits: Float[Array, "row vocab"],
    keys: Key[Array, " row"],
    *,
    temperature: Float[Array, " row"],
    top_k: Int32[Array, " row"] | None = None,
    top_p: Float[Array, " row"] | None = None,
) -> Float[Array, "row vocab"]:
    """Return `filter_scores` with each row's noise: the largest of a row is its sample.

    The argmax of `log p + Gumbel noise` is distributed as p. Arguments are those of `filter_scores`, and a key per row.
    """
    scores = filter_scores(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    return scores + gumbel_noise(keys, logits.shape[-1])


def sample_tokens(
    hidden: Float[Array, "row hidden"],
    head: Float[Array, "vocab hidden"],
    keys: Key[Array, " row"],
    *,
    temperature: Float[Array, " row"],
    top_k: Int32[Array, " row"] | None = None,
    top_p: Float[Array, " row"] | None = None,
) -> Int32[Array, " row"]:
    """Return one sample per row from the head's filtered distribution.

    Makes float32 logits and noise of `rows x vocab`: the caller bounds the rows.

    Args:
        hidden: rows after the model's final norm.
        head: the vocabulary head.
        keys: one per row; the same key over the same logits gives the same token.
        temperature: see `filter_scores`.
        top_k: see `filter_scores`.
        top_p: see `filter_scores`.
    """
    logits = rows_product(hidden, head, out=jnp.float32)
    scores = noisy_scores(logits, keys, temperature=temperature, top_k=top_k, top_p=top_p)
    return best_columns(scores)[1]
