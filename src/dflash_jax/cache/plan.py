"""Which sequences are computed together and which shard they go to: a pure function of lengths and settings.

Sequences are taken longest first (equal lengths in file order), cut into batches, and every batch is captured at each
position offset in turn before the next. Responses to one prompt are computed from one prefill of it: the longest is a
row of a batch, the others extend that row's memory. Shards are runs of whole batches, so a shard's bytes depend on
nothing outside it: a killed build computes the missing shards again with the very batches it would have used.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from dflash_jax.cache.manifest import shard_name
from dflash_jax.core import InputError

LENGTH_MULTIPLE = 64
# What a compiled shape must save: a part of a batch, which is what a compile takes on a CPU (SmolLM2 on two cores: 3 s,
# a batch of 4096 tokens 9 s), and a share of the build's tokens, since on an accelerator it takes a minute.
_SHAPES_PER_BATCH = 3
_SHAPE_SHARE = 0.01
_MAX_SHARDS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Extension:
    """One forward of responses that continue prompts a batch has just computed.

    Attributes:
        rows: rows of the responses file, 0-based.
        sources: for each, the place in the batch of the row whose prompt it shares.
        padded_length: new tokens per row in the compiled shape.
    """

    rows: Int64[np.ndarray, " rows"]
    sources: Int64[np.ndarray, " rows"]
    padded_length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One batch at one position offset, in a compiled shape, and what extends it.

    Attributes:
        rows: rows of the responses file, 0-based.
        padded_rows: batch size of the compiled shape, a power of two; that of its extensions too.
        padded_length: sequence length of the compiled shape, tokens; also the rows of its KV cache.
        position_offset: absolute position of every row's token 0.
        extensions: further responses to its prompts.
    """

    rows: Int64[np.ndarray, " rows"]
    padded_rows: int
    padded_length: int
    position_offset: int
    extensions: tuple[Extension, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """The steps of one shard, in the order in which their sequences are stored.

    Attributes:
        file: the shard's name.
        steps: its forwards. A step's rows are stored first, then those of its extensions.
        sequences: how many it stores.
        tokens: how many it stores; a shared prompt counts once.
    """

    file: str
    steps: tuple[Step, ...]
    sequences: int
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredOrder:
    """The sequences of a shard as they lie in it.

    Attributes:
        rows: rows of the responses file.
        position_offset: of each sequence.
        source: the place in the shard of the sequence that stores its prompt; -1 where that is itself.
    """

    rows: Int64[np.ndarray, " sequences"]
    position_offset: Int32[np.ndarray, " sequences"]
    source: Int64[np.ndarray, " sequences"]


def plan_sha256(shards: tuple[ShardPlan, ...]) -> str:
    """Return the hash of which rows are computed together, in which shapes, and which shard they go to.

    Two runs may finish one build only where it is equal: another version of this module may plan otherwise.
    """
    digest = hashlib.sha256()
    for shard in shards:
        for step in shard.steps:
            head = [len(shard.steps), step.padded_rows, step.padded_length, step.position_offset, len(step.rows)]
            digest.update(np.array([*head, *step.rows, len(step.extensions)], "<i8").tobytes())
            for more in step.extensions:
                numbers = [more.padded_length, len(more.rows), *more.rows, *more.sources]
                digest.update(np.array(numbers, "<i8").tobytes())
    return digest.hexdigest()


def stored_order(shard: ShardPlan) -> StoredOrder:
    """Return which sequences a shard stores, in order."""
    rows, offsets, sources, first = [], [], [], 0
    for step in shard.steps:
        rows += [step.rows, *(extension.rows for extension in step.extensions)]
        sources += [np.full(len(step.rows), -1), *(extension.sources + first for extension in step.extensions)]
        added = len(step.rows) + sum(len(extension.rows) for extension in step.extensions)
        offsets.append(np.full(added, step.position_offset, np.int32))
        first += added
    return StoredOrder(
        rows=np.concatenate(rows), position_offset=np.concatenate(offsets), source=np.concatenate(sources)
    )


def group_prompts(
    lengths: Int64[np.ndarray, " rows"],
    prompt_len: Int32[np.ndarray, " rows"],
    prompt_hash: UInt64[np.ndarray, " rows"],
    *,
    most: int,
) -> dict[int, list[int]]:
    """Return the rows that are computed whole, each with the rows that share its prompt.

    Rows of equal prompts are taken longest first (equal lengths in file order) and cut into groups of at most `most`;
    the first of a group is computed whole.

    Worked: lengths [5, 9, 7], all of one prompt, most 2: {1: [2], 0: []}.
    """
    groups: dict[int, list[int]] = {}
    open_groups: dict[tuple[int, int], int] = {}
    for row in np.argsort(-lengths, kind="stable").tolist():
        key = (int(prompt_hash[row]), int(prompt_len[row]))
        first = open_groups.get(key)
        if first is not None and len(groups[first]) + 1 < most:
            groups[first].append(row)
        else:
            open_groups[key] = row
            groups[row] = []
    return groups


def _power_below(number: int) -> int:
    return 1 << (max(1, number).bit_length() - 1)


def _power_above(number: int) -> int:
    return 1 << (number - 1).bit_length()


def choose_lengths(
    lengths: Int64[np.ndarray, " rows"], *, tokens_per_batch: int, copies: int, tokens_per_shape: int
) -> list[int]:
    """Return the padded lengths to compile, longest first: those that cost least.

    The cost is the padded tokens of all batches plus `tokens_per_shape` for every length that is compiled.

    Args:
        lengths: tokens of the sequences, longest first; at least one.
        tokens_per_batch: most tokens per forward, padding included.
        copies: how often every batch is computed (position offsets).
        tokens_per_shape: what a compiled shape costs, in tokens.

    Worked: lengths [130, 70, 60], 256 tokens per batch (so 1, 2 or 4 rows), one copy. A shape for nothing: [192, 128,
    64], 384 tokens. At 200 tokens per shape: [192], 3 * 192 + 200 = 776, where [192, 128] costs 448 + 400.
    """
    buckets = -(-lengths // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    padded, counts = np.unique(-buckets, return_counts=True)
    padded, ends = -padded, np.cumsum(counts)
    rows = np.array([_power_below(tokens_per_batch // int(length)) for length in padded])
    best, chosen = np.zeros(len(padded) + 1), np.zeros(len(padded) + 1, np.int64)
    for end in range(1, len(padded) + 1):
        # bucket `first` to bucket `end - 1` at the length of `first`, for every first
        held = ends[end - 1] - np.concatenate([[0], ends[: end - 1]])
        batch = np.minimum(rows[:end], [_power_above(int(count)) for count in held])
        cost = best[:end] + tokens_per_shape + copies * -(-held // batch) * batch * padded[:end]
        chosen[end] = np.argmin(cost)
        best[end] = cost[chosen[end]]
    picked, end = [], len(padded)
    while end:
        end = int(chosen[end])
        picked.append(int(padded[end]))
    return picked[::-1]


def plan_batches(
    lengths: Int64[np.ndarray, " rows"], *, tokens_per_batch: int, copies: int = 1, tokens_per_shape: int = 0
) -> list[tuple[Int64[np.ndarray, " batch"], int, int]]:
    """Return batches of (rows, padded_rows, padded_length), longest sequences first.

    `padded_length` is one of `choose_lengths`, the shortest that holds the batch's first row; `padded_rows` the largest
    power of two with `padded_rows * padded_length <= tokens_per_batch` (at least 1). The last batch keeps the shape of
    the one before it where a smaller one would not save what a compile costs.

    Worked: lengths [60, 130, 70, 100], 256 tokens per batch: ([1], 1, 192), then ([3, 2], 2, 128), then ([0], 1, 64).
    """
    order = np.argsort(-lengths, kind="stable")
    choices = choose_lengths(
        lengths[order], tokens_per_batch=tokens_per_batch, copies=copies, tokens_per_shape=tokens_per_shape
    )
    batches: list[tuple[Int64[np.ndarray, " batch"], int, int]] = []
    first = 0
    while first < len(order):
        padded_length = min(length for length in choices if length >= lengths[order[first]])
        padded_rows = _power_below(tokens_per_batch // padded_length)
        fewer = min(padded_rows, _power_above(len(order) - first))
        known = bool(batches) and batches[-1][1:] == (padded_rows, padded_length)
        if not known or copies * (padded_rows - fewer) * padded_length > tokens_per_shape:
            padded_rows = fewer
        batches.append((order[first : first + padded_rows], padded_rows, padded_length))
        first += padded_rows
    return batches


def _extensions(
    rows: Int64[np.ndarray, " batch"], groups: dict[int, list[int]], own: Int64[np.ndarray, " rows"], batch: int
) -> list[tuple[Int64[np.ndarray, " part"], Int64[np.ndarray, " part"]]]:
    """Rows that share a prompt with a batch's, and their sources, in parts of a batch, most new tokens first."""
    pairs = [(row, source) for source, first in enumerate(rows.tolist()) for row in groups[first]]
    pairs.sort(key=lambda pair: -own[pair[0]])
    parts = [pairs[first : first + batch] for first in range(0, len(pairs), batch)]
    return [(np.array([row for row, _ in part]), np.array([source for _, source in part])) for part in parts]


def _plan_steps(
    lengths: Int64[np.ndarray, " rows"],
    prompt_len: Int32[np.ndarray, " rows"],
    groups: dict[int, list[int]],
    *,
    copies: int,
    tokens_per_batch: int,
) -> list[Step]:
    """Every batch with its extensions, at position offset 0."""
    firsts = np.array(sorted(groups))
    tokens_per_shape = max(tokens_per_batch // _SHAPES_PER_BATCH, int(_SHAPE_SHARE * copies * lengths[firsts].sum()))
    own = lengths - prompt_len
    batches = [
        (firsts[places], padded_rows, padded_length)
        for places, padded_rows, padded_length in plan_batches(
            lengths[firsts], tokens_per_batch=tokens_per_batch, copies=copies, tokens_per_shape=tokens_per_shape
        )
    ]
    parts = [_extensions(rows, groups, own, padded_rows) for rows, padded_rows, _ in batches]
    # all extensions of one compiled batch shape share their few lengths
    longest: dict[tuple[int, int], list[int]] = {}
    for (_, *shape), extensions in zip(batches, parts, strict=True):
        longest.setdefault((shape[0], shape[1]), []).extend(int(own[rows].max()) for rows, _ in extensions)
    choices = {
        shape: choose_lengths(
            -np.sort(-np.array(needed)),
            tokens_per_batch=1,  # a part of a batch is one row here
            copies=copies * shape[0],
            tokens_per_shape=tokens_per_shape,
        )
        for shape, needed in longest.items()
        if needed
    }
    return [
        Step(
            rows=rows,
            padded_rows=padded_rows,
            padded_length=padded_length,
            position_offset=0,
            extensions=tuple(
                Extension(
                    rows=more,
                    sources=sources,
                    padded_length=min(n for n in choices[padded_rows, padded_length] if n >= own[more].max()),
                )
                for more, sources in extensions
            ),
        )
        for (rows, padded_rows, padded_length), extensions in zip(batches, parts, strict=True)
    ]


def plan_shards(
    lengths: Int64[np.ndarray, " rows"],
    *,
    prompt_len: Int32[np.ndarray, " rows"],
    groups: dict[int, list[int]],
    position_offsets: tuple[int, ...],
    tokens_per_batch: int,
    tokens_per_shard: int,
) -> tuple[ShardPlan, ...]:
    """Return every shard of a build.

    Args:
        lengths: tokens per response row.
        prompt_len: of these, the prompt's.
        groups: rows that are computed whole, each with those that share its prompt; see `group_prompts`.
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
        sequences = sum(len(part.rows) for step in steps for part in (step, *step.extensions))
        shards.append(ShardPlan(file=shard_name(len(shards)), steps=tuple(steps), sequences=sequences, tokens=tokens))

    own = lengths - prompt_len
    for step in _plan_steps(
        lengths, prompt_len, groups, copies=len(position_offsets), tokens_per_batch=tokens_per_batch
    ):
        for offset in position_offsets:
            added = int(lengths[step.rows].sum() + sum(own[extension.rows].sum() for extension in step.extensions))
            if steps and tokens + added > tokens_per_shard:
                close()
                steps, tokens = [], 0
            steps.append(replace(step, position_offset=offset))
            tokens += added
    close()
    if len(shards) > _MAX_SHARDS:
        raise InputError(f"{len(shards)} shards are more than {_MAX_SHARDS}: raise --tokens-per-shard")
    return tuple(shards)
