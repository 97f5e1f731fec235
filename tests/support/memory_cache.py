"""A cache of sequences that were made up, without files."""

from pathlib import Path

import numpy as np

from dflash_jax.cache import Cache, Sequence


class MemoryCache(Cache):
    """Sequences that are given; everything else is the package's own cache."""

    def __init__(self, sequences, *, max_new_tokens=None):
        manifest = {
            "shards": [],
            "num_sequences": len(sequences),
            "num_tokens": sum(len(sequence.token_ids) for sequence in sequences),
            "max_length": max(len(sequence.token_ids) for sequence in sequences),
            "max_new_tokens": max_new_tokens,
            "position_offsets": sorted({sequence.position_offset for sequence in sequences}),
        }
        super().__init__(Path("memory"), manifest)
        self._sequences = list(sequences)

    def sequence(self, index):
        return self._sequences[index]


def random_sequence(
    draw,
    *,
    length,
    prompt_len,
    vocab,
    num_features,
    departures=0,
    position_offset=0,
    sequence_index=0,
    prompt_set="toy",
    features_len=None,
):
    """A text that follows `next_ids` but for `departures` response tokens; features are noise."""
    next_ids = draw.integers(0, vocab, length).astype(np.int32)
    token_ids = np.concatenate([draw.integers(0, vocab, 1), next_ids[:-1]]).astype(np.int32)
    # the prompt is the user's, not the target's
    token_ids[:prompt_len] = draw.integers(0, vocab, prompt_len)
    for place in draw.choice(np.arange(prompt_len, length), departures, replace=False):
        token_ids[place] = (token_ids[place] + 1) % vocab
    return Sequence(
        stored_features=draw.normal(0, 1, (length, num_features)).astype(np.float32),
        feature_scales=None,
        token_ids=token_ids,
        next_ids=next_ids,
        loss_mask=(np.arange(length) >= prompt_len).astype(np.uint8),
        position_offset=position_offset,
        prompt_len=prompt_len,
        prompt_hash=1000 + sequence_index,
        prompt_set=prompt_set,
        sequence_index=sequence_index,
        features_len=length if features_len is None else features_len,
    )
