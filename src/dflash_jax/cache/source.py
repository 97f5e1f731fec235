"""A cache as a grain dataset."""

import functools
import sys

import grain
import numpy as np
from jaxtyping import Int64

from dflash_jax.cache.reader import Cache, Sequence

ENDLESS = sys.maxsize
"""Length of an endless dataset, as grain's own `repeat` has it."""


@functools.lru_cache(maxsize=4)  # a batch may reach into the next epoch, and so may that of another process
def epoch_order(count: int, seed: int, epoch: int) -> Int64[np.ndarray, " count"]:
    """Return a permutation of 0 to count - 1 by seed and epoch: the order of random 64-bit keys.

    The keys are Philox's raw stream, which numpy promises not to change; its `permutation` it may.
    """
    keys = np.random.Philox(key=(epoch << 32) + seed).random_raw(count)
    return np.argsort(keys, kind="stable")


class _Sequences:
    """grain's random-access protocol over the epochs of a cache."""

    def __init__(self, cache: Cache, seed: int | None) -> None:
        self._cache, self._seed = cache, seed

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Sequence:
        epoch, place = divmod(int(index), self._cache.num_sequences)
        if self._seed is not None:
            place = int(epoch_order(self._cache.num_sequences, self._seed, epoch)[place])
        return self._cache.sequence(place)


def sequence_source(cache: Cache, *, seed: int, shuffle: bool) -> grain.MapDataset:
    """Return the cache's sequences without end, in an order that depends on nothing but the seed.

    Element i is a `Sequence`, found by random access: a run that did `steps` steps of n sequences goes on at element
    `steps * n`, and grain's iterators over it (`to_iter_dataset`) save and restore their state. Every epoch of
    `num_sequences` elements holds each sequence once; shuffled, each epoch has its own order. Slicing shards it by
    process: of `source[process_index::process_count]` the processes together read the epoch, each sequence once.

    Args:
        cache: what to read.
        seed: of the order, 0 to 2^32 - 1.
        shuffle: False keeps the cache's order.

    Raises:
        ValueError: a seed out of range.

    **Source:** the protocol is grain's. Its own `shuffle` permutes at least 2^16 numbers and walks until it meets one
    within the cache: 180 us an element for 160 sequences, twice as long as the copy into the batch.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"the seed of a cache's order is {seed}: 0 to 2^32 - 1 is needed")
    return grain.MapDataset.source(_Sequences(cache, seed if shuffle else None))
