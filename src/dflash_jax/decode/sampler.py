"""Which token the target says next: its argmax, or a sample whose randomness hangs on where the token stands alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, Key

from dflash_jax.core import InputError
from dflash_jax.nn import DIRECT_LOGITS, sample_tokens
from dflash_jax.targets import Target, next_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are sampled; greedy decoding has none of this.

    Attributes:
        temperature: logits are divided by it, above 0.
        top_k: only so many best tokens; None: all.
        top_p: only the fewest best tokens of at least this share; None: all.
        seed: of all randomness, 0 to 2^31 - 1.
    """

    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"--temperature is {self.temperature}: a positive number is needed (0 is greedy decoding)")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k is {self.top_k}: at least 1 is needed")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p is {self.top_p}: a share above 0, at most 1, is needed")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"--sample-seed is {self.seed}: it must lie in 0..{2**31 - 1}")

    def rows(self, streams: Sequence[int]) -> dict[str, np.ndarray | None]:
        """Return a `Sampler`'s fields for rows whose randomness is told apart by `streams`, 0 to 2^31 - 1 each."""
        size = len(streams)
        return {
            "temperature": np.full(size, self.temperature, np.float32),
            "top_k": None if self.top_k is None else np.full(size, self.top_k, np.int32),
            "top_p": None if self.top_p is None else np.full(size, self.top_p, np.float32),
            "seed": np.full(size, self.seed, np.int32),
            "stream": np.asarray(streams, np.int32),
        }


class Sampler(eqx.Module):
    """A batch's sampling settings, each row its own.

    The token at index i of a row is drawn with the key of (seed, stream, i) and nothing else. So it does not depend on
    the row's place in the batch, on padding, or on how the text before it was cut into blocks: with the same key at
    every index, speculative decoding gives the very tokens of plain decoding (docs/design/013-decoding.md).

    Attributes:
        temperature: above 0.
        top_k: best tokens kept; None: no program for it is made.
        top_p: share kept; None likewise.
        seed: of all randomness.
        stream: what tells one sequence's randomness from another's.
    """

    temperature: Float[Array, " batch"]
    top_k: Int32[Array, " batch"] | None
    top_p: Float[Array, " batch"] | None
    seed: Int32[Array, " batch"]
    stream: Int32[Array, " batch"]


def token_keys(sampler: Sampler, index: Int32[Array, "batch query"]) -> Key[Array, "batch query"]:
    """Return the key of every token by its index in its sequence's text, prompt included."""

    def one(seed: Int32[Array, ""], stream: Int32[Array, ""], index: Int32[Array, " query"]) -> Key[Array, " query"]:
        # named, so that a user's setting of jax's default does not change texts
        row = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)
        return jax.vmap(lambda i: jax.random.fold_in(row, i))(index)

    return jax.vmap(one)(sampler.seed, sampler.stream, index)


def choose_tokens(
    target: Target,
    hidden: Float[Array, "batch query hidden"],
    sampler: Sampler | None,
    index: Int32[Array, "batch query"],
) -> Int32[Array, "batch query"]:
    """Return the target's own token after each row of its hidden states: greedy, or sampled.

    Sampling makes logits, at most 2^24 at a time, or one block's where those are more; on a mesh the whole batch's, of
    which each device has its part.

    Args:
        target: the target.
        hidden: `TargetOutput.hidden`.
        sampler: None is greedy.
        index: where the chosen tokens stand in their texts.
    """
    if sampler is None:
        return next_ids(target, hidden)

    def one(
        hidden: Float[Array, "query hidden"], sampler: Sampler, keys: Key[Array, " query"]
    ) -> Int32[Array, " query"]:
        each = lambda value: None if value is None else jnp.broadcast_to(value, keys.shape)
        return sample_tokens(
            hidden,
            target.head,
            keys,
            temperature=jnp.broadcast_to(sampler.temperature, keys.shape),
            top_k=each(sampler.top_k),
            top_p=each(sampler.top_p),
        )

    batch, query, _ = hidden.shape
    per_row = query * target.head.shape[0]
    rows = hidden, sampler, token_keys(sampler, index)
    if target.mesh is not None or batch * per_row <= DIRECT_LOGITS:
        return jax.vmap(one)(*rows)
    return lax.map(lambda row: one(*row), rows, batch_size=max(1, DIRECT_LOGITS // per_row))
