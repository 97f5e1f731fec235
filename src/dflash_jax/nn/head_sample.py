"""A sample of the vocabulary, drawn anew for every training step, that a softmax's sum is estimated from."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray


class Sample(eqx.Module):
    """Rows of the head that stand for all of them in a sum over the vocabulary.

    Attributes:
        tokens: which rows.
        weights: how many tokens a row stands for, itself included.
    """

    tokens: Int32[Array, " sample"]
    weights: Float[Array, " sample"]


def draw_sample(named: Bool[Array, " vocab"], count: int, *, key: PRNGKeyArray) -> Sample:
    """Draw `count` tokens that stand for the vocabulary: the named ones, each for itself, and some of the others.

    The others are drawn uniformly without replacement and share out all that were not drawn, so that a sum over the
    sample, weighed, has the sum over the vocabulary as its mean. An eighth of `count` is for others
    however many are named: of too many, some are drawn alike, and share out all of them.

    Args:
        named: tokens that matter, such as those that the target finds likely.
        count: at most the vocabulary.
        key: draws.
    """
    total = named.sum(dtype=jnp.int32)
    draw = jax.random.uniform(key, named.shape)
    place = jnp.arange(count, dtype=jnp.int32)
    _, first = lax.top_k(jnp.where(named, draw, -1.0), count)
    _, others = lax.top_k(jnp.where(named, -1.0, draw), count)
    num_others = named.shape[0] - total
    num_named = jnp.minimum(total, count - jnp.minimum(num_others, count // 8))
    tokens = jnp.where(place < num_named, first, others[place - num_named]).astype(jnp.int32)
    shares = jnp.stack([total, num_others]) / jnp.maximum(jnp.stack([num_named, count - num_named]), 1)
    weights = jnp.where(place < num_named, shares[0], shares[1])
    return Sample(tokens=tokens, weights=weights.astype(jnp.float32))


def named_tokens(
    ids: Int32[Array, "row label"], probabilities: Float[Array, "row label"], vocab_size: int
) -> Bool[Array, " {vocab_size}"]:
    """Return which tokens are some row's label with a probability."""
    there = jnp.where(probabilities > 0, ids, vocab_size)
    return jnp.zeros(vocab_size, bool).at[there.ravel()].set(True, mode="drop")
