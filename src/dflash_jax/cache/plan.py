"""Which sequences are computed together and which shard they go to: a pure function of lengths and settings.

Sequences are taken longest first (equal lengths in file order), cut into batches, and every batch is captured at each
position offset in turn before the next. Shards are runs of whole batches, so a shard's bytes depend on nothing outside
it: a killed build computes the missing shards again with the very batches it would have used.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from dflash_jax.cache.manifest import shard_name
from dflash_jax.core import InputError

LENGTH_MULTIPLE = 64
# A batch keeps the compiled length of the one before it until its own bucket is this much shorter: each length is one
# compile. Prompts and responses of 100 to 400 tokens take 5 shapes; 1 to 8192 tokens take about 30.
_SHORTER = 0.9
_MAX_SHARDS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One forward: response rows side by side at one position offset, in a compiled shape.

    Attributes:
        rows: rows of the responses file, 0-based.
        padded_rows: batch size of the compiled shape, a power of two.
        padded_length: sequence length of the compiled shape, tokens.
        position_offset: absolute position of every row's token 0.
    """

    rows: Int64[np.ndarray, " rows"]
    padded_rows: int
    padded_length: int
    position_offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """The steps of one shard, in the order in which their sequences are stored.

    Attributes:
        file: the shard's name.
        steps: its forwards.
        sequences: how many it stores.
        tokens: how many it stores.
    """

    file: str
    steps: tuple[Step, ...]
    sequences: int
    tokens: int


def plan_batches(
    lengths: Int64[np.ndarray, " rows"], *, tokens_per_batch: int
) -> list[tuple[Int64[np.ndarray, " batch"], int, int]]:
    """Return batches of (rows, padded_rows, padded_length), longest sequences first.

    `padded_length` is a multiple of 64; `padded_rows` the largest power of two with `padded_rows * padded_length <=
    tokens_per_batch` (at least 1), or a smaller one where fewer sequences are left.

    Worked: lengths [60, 130, 70, 100], 256 tokens per batch: ([1], 1, 192), then ([3, 2], 2, 128), then ([0], 1, 64).
    """
    order = np.argsort(-lengths, kind="stable")
    batches, first, padded_length = [], 0, 0
    while first < len(order):
        bucket = -(-int(lengths[order[first]]) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        if padded_length == 0 or bucket <= _SHORTER * padded_length:
            padded_length = bucket
        left = len(order) - first
        padded_rows = 1 << (max(1, tokens_per_batch // padded_length).bit_length() - 1)
        padded_rows = min(padded_rows, 1 << (left - 1).bit_length())
        batches.append((order[first : first + padded_rows], padded_rows, padded_length))
        first += padded_rows
    return batches


def plan_shards(
    lengths: Int64[np.ndarray, " rows"],
    *,
    position_offsets: tuple[int, ...],
    tokens_per_batch: int,
    tokens_per_shard: int,
) -> tuple[ShardPlan, ...]:
    """Return every shard of a build.

    Args:
        lengths: tokens per response row.
        position_offsets: each batch is captured at all of them, in this order.
        tokens_per_batch: most tokens per forward, padding included.
        tokens_per_shard: most tokens per shard; a batch that alone is larger has a shard of its own.

    Raises:
        InputError: there would be more than 100000 shards.
    """
    shards: list[ShardPlan] = []
    steps: list[Step] = []
    tokens = 0

    def close() -> None:
        sequences = sum(len(step.rows) for step in steps)
        shards.append(ShardPlan(file=shard_name(len(shards)), steps=tuple(steps), sequences=sequences, tokens=tokens))

    for rows, padded_rows, padded_length in plan_batches(lengths, tokens_per_batch=tokens_per_batch):
        for offset in position_offsets:
            added = int(lengths[rows].sum())
            if steps and tokens + added > tokens_per_shard:
                close()
                steps, tokens = [], 0
            steps.append(Step(rows=rows, padded_rows=padded_rows, padded_length=padded_length, position_offset=offset))
            tokens += added
    close()
    if len(shards) > _MAX_SHARDS:
        raise InputError(f"{len(shards)} shards are more than {_MAX_SHARDS}: raise --tokens-per-shard")
    return tuple(shards)
