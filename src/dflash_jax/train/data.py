"""Where a step's sequences come from: a batch depends on its number alone; each process makes its own rows of it."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from dflash_jax.cache import Cache, HostBatch, epoch_order, load_features, stack_on_host
from dflash_jax.core import sha256_json
from dflash_jax.drafter import StoredSequence
from dflash_jax.train.grouping import make_groups
from dflash_jax.train.sharding import local_rows, put_rows


@runtime_checkable
class Source(Protocol):
    """Sequences to train on."""

    @property
    def capture_layers(self) -> tuple[int, ...]:
        """Layers whose outputs are the features."""
        ...

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the features are of, as a cache's manifest has it."""
        ...

    @property
    def identity(self) -> dict[str, str]:
        """What tells this source from another, by name: of its content, not of its place."""
        ...

    def prompt_hashes(self) -> list[int]:
        """Return the hash of every prompt; what is read later is verified here where it can be."""
        ...

    def batches(
        self, *, sequences_per_step: int, max_positions: int, seed: int, mesh: Mesh | None, widths: int = 1
    ) -> Callable[[int], Any]:
        """Return the function that gives a step's batch on the devices; of `widths`, see `make_groups`."""
        ...


class CachedSource:
    """Sequences of a feature cache, their features read."""

    def __init__(self, cache: Cache) -> None:
        """Take an open cache."""
        self._cache = cache

    @property
    def capture_layers(self) -> tuple[int, ...]:
        """Those of the cache."""
        return tuple(self._cache.manifest["capture_layers"])

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The cache's own."""
        return self._cache.manifest["fingerprint"]

    @property
    def identity(self) -> dict[str, str]:
        """The hash of the shards' hashes."""
        return {"cache_sha256": sha256_json([entry["sha256"] for entry in self._cache.manifest["shards"]])}

    def prompt_hashes(self) -> list[int]:
        """Return every sequence's; every shard is verified."""
        return self._cache.prompt_hashes().tolist()

    def batches(
        self, *, sequences_per_step: int, max_positions: int, seed: int, mesh: Mesh | None, widths: int = 1
    ) -> Callable[[int], StoredSequence]:
        """Return the function that gives a step's batch; see `make_batches`."""
        return make_batches(
            self._cache,
            sequences_per_step=sequences_per_step,
            max_positions=max_positions,
            seed=seed,
            mesh=mesh,
            widths=widths,
        )


def make_batches(
    cache: Cache,
    *,
    sequences_per_step: int,
    max_positions: int,
    seed: int,
    mesh: Mesh | None = None,
    widths: int = 1,
) -> Callable[[int], StoredSequence]:
    """Return the function that gives a step's batch: shuffled epochs without end, by random access.

    Batches have few widths, one unless more are asked for, so that few steps are compiled: see `make_groups`. Blocks
    are shortened at the target's `max_positions` too, as decoding does. Of several processes each reads its own rows.
    """
    rows, count = local_rows(mesh, sequences_per_step), cache.num_sequences

    def sequence_of(element: int) -> int:
        return int(epoch_order(count, seed, element // count)[element % count])

    groups = make_groups(
        cache.lengths(),
        sequence_of,
        per_epoch=count,
        sequences_per_step=sequences_per_step,
        widths=widths,
        seed=seed,
    )

    def batch(step: int) -> StoredSequence:
        elements, width = groups(step)
        stored = [cache.sequence(sequence_of(elements[index])) for index in rows]
        host = stack_on_host(stored, width=width, max_new_tokens=cache.manifest["max_new_tokens"])
        values = {field.name: getattr(host, field.name) for field in fields(HostBatch)}
        values["limit"] = np.minimum(host.limit, np.int32(max_positions))
        arrays = {name: value for name, value in values.items() if value is not None}
        placed = put_rows(mesh, arrays, first=rows[0], batch=sequences_per_step)
        if "feature_scales" in placed:
            placed["features"] = load_features(placed["features"], placed.pop("feature_scales"))
        return StoredSequence(**placed)

    return batch


class Prefetch:
    """Makes the next batch in a thread while the device works on this one; random access makes it restartable."""

    def __init__(self, batches: Callable[[int], Any], *, first: int, end: int) -> None:
        """Begin with step `first`; there is no batch at `end`."""
        self._batches, self._end = batches, end
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="input")
        self._next = self._begin(first)

    def _begin(self, step: int) -> Future[Any] | None:
        return self._thread.submit(self._batches, step) if step < self._end else None

    def take(self, step: int) -> tuple[Any, float]:
        """Return the batch of a step, asked for in order, and the seconds that were waited for it."""
        started = time.perf_counter()
        assert self._next is not None
        batch = self._next.result()
        waited = time.perf_counter() - started
        self._next = self._begin(step + 1)
        return batch, waited

    def close(self) -> None:
        """End the thread; a batch under way is finished and forgotten."""
        self._thread.shutdown(cancel_futures=True)
