"""A cache as a grain dataset."""

import grain

from dflash_jax.cache.reader import Cache, Sequence


class _Sequences:
    """grain's random-access protocol over a cache."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def __len__(self) -> int:
        return self._cache.num_sequences

    def __getitem__(self, index: int) -> Sequence:
        return self._cache.sequence(int(index))


def sequence_source(cache: Cache, *, seed: int, shuffle: bool) -> grain.MapDataset:
    """Return the cache's sequences without end, in an order that depends on nothing but the seed.

    Element i is a `Sequence`, found by random access: a run that did `steps` steps of n sequences goes on at element
    `steps * n`. Every epoch of `num_sequences` elements holds each sequence once; shuffled, each epoch has its own
    order. Slicing shards it by
    process: `source[process_index::process_count]`.

    Args:
        cache: what to read.
        seed: of the order, 0 to 2^32 - 1.
        shuffle: False keeps the cache's order.
    """
    source = grain.MapDataset.source(_Sequences(cache))
    return (source.shuffle(seed=seed) if shuffle else source).repeat()
