"""A step's batch of cached sequences, which depends on the step number alone."""

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp

from dflash_jax.cache import Cache, sequence_source, stack_sequences
from dflash_jax.drafter import StoredSequence

LENGTH_BUCKET = 64


def make_batches(
    cache: Cache, *, sequences_per_step: int, max_positions: int, seed: int
) -> Callable[[int], StoredSequence]:
    """Return the function that gives a step's batch: shuffled epochs without end, by random access.

    Every batch has one width, the cache's longest sequence rounded up, so that one step is compiled. Blocks are
    shortened at the target's `max_positions` too, as decoding does.
    """
    source = sequence_source(cache, seed=seed, shuffle=True)
    width = -(-cache.max_length // LENGTH_BUCKET) * LENGTH_BUCKET

    def batch(step: int) -> StoredSequence:
        first = step * sequences_per_step
        rows = [row for index in range(sequences_per_step) if (row := source[first + index]) is not None]
        stored = stack_sequences(rows, width=width, max_new_tokens=cache.manifest["max_new_tokens"])
        return replace(stored, limit=jnp.minimum(stored.limit, max_positions))

    return batch
