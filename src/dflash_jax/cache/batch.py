"""Sequences of a cache as one padded batch on the device."""

from collections.abc import Sequence as SequenceOf

import jax.numpy as jnp
import numpy as np

from dflash_jax.cache.reader import Sequence
from dflash_jax.drafter import StoredSequence


def stack_sequences(sequences: SequenceOf[Sequence], *, width: int, max_new_tokens: int | None) -> StoredSequence:
    """Return sequences side by side, right-padded with zeros.

    Args:
        sequences: at least one.
        width: tokens per row, at least the longest sequence.
        max_new_tokens: the token budget the responses were generated with, from the cache's manifest; decoding
        shortens blocks
            there. None where it is not known: blocks are then never shortened.
    """
    first, rows = sequences[0], len(sequences)
    features = np.zeros((rows, width, first.features.shape[1]), first.features.dtype)
    token_ids, next_ids = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    for row, sequence in enumerate(sequences):
        length = len(sequence.token_ids)
        features[row, :length] = sequence.features
        token_ids[row, :length], next_ids[row, :length] = sequence.token_ids, sequence.next_ids
    prompt_len = np.array([sequence.prompt_len for sequence in sequences], np.int32)
    limit = np.full(rows, np.iinfo(np.int32).max, np.int32) if max_new_tokens is None else prompt_len + max_new_tokens
    return StoredSequence(
        features=jnp.asarray(features),
        token_ids=jnp.asarray(token_ids),
        next_ids=jnp.asarray(next_ids),
        length=jnp.asarray(np.array([len(sequence.token_ids) for sequence in sequences], np.int32)),
        prompt_len=jnp.asarray(prompt_len),
        limit=jnp.asarray(limit.astype(np.int32)),
        position_offset=jnp.asarray(np.array([sequence.position_offset for sequence in sequences], np.int32)),
    )
