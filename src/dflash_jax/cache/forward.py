"""The forwards of a build, one launched ahead of the one that is fetched, and where their results go."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax import Array
from jaxtyping import Float, Int32, Int64, Shaped

from dflash_jax.cache.features import first_not_finite
from dflash_jax.cache.plan import Extension, ShardPlan, Step, stored_order
from dflash_jax.cache.responses import Responses
from dflash_jax.cache.shards import Layout, empty_tensors
from dflash_jax.core import InputError

Memory = Any
"""What a capture keeps of a batch to extend it: a KV cache, opaque here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Captured:
    """What a forward gives for every token it was fed; past a row's real tokens, anything.

    The arrays may still be computing on the device (jax arrays): they are fetched after the next forward was launched.

    Attributes:
        features: as they are stored.
        feature_scales: as they are stored; no columns where features have no scales.
        next_ids: the target's greedy token after each token.
        top_ids: the target's likeliest tokens after each token, likeliest first, the lowest id first where some tie;
            None where none are stored.
        top_logprobs: their log-probabilities, as they are stored.
    """

    features: Shaped[np.ndarray | Array, "batch seq features"]
    feature_scales: Float[np.ndarray | Array, "batch seq scales"]
    next_ids: Int32[np.ndarray | Array, "batch seq"]
    top_ids: Int32[np.ndarray | Array, "batch seq top"] | None = None
    top_logprobs: Float[np.ndarray | Array, "batch seq top"] | None = None


@runtime_checkable
class Capture(Protocol):
    """The numerics of a build."""

    def start(
        self,
        tokens: Int32[np.ndarray, "batch seq"],
        lengths: Int32[np.ndarray, " batch"],
        position_offset: Int32[np.ndarray, " batch"],
        *,
        keep: bool,
    ) -> tuple[Captured, Memory]:
        """Run whole sequences, right-padded; where `keep`, remember their keys and values, `seq` rows of them."""
        ...

    def extend(
        self,
        memory: Memory,
        sources: Int32[np.ndarray, " batch"],
        starts: Int32[np.ndarray, " batch"],
        tokens: Int32[np.ndarray, "batch query"],
    ) -> Captured:
        """Run further tokens after the first `starts` of the remembered sequences `sources`; the memory stays."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Forward:
    """A launched forward.

    Attributes:
        shard: what it is part of.
        step: and where in it.
        rows: rows of the responses file it computes.
        starts: place in its sequence of the first token that each row was fed.
        skips: how many of these a row computed again: the shared prompt's, which are stored with another sequence.
        captured: its results, maybe still computing.
        ends_shard: whether it is the shard's last.
    """

    shard: ShardPlan
    step: Step
    rows: Int64[np.ndarray, " rows"]
    starts: Int32[np.ndarray, " rows"]
    skips: Int32[np.ndarray, " rows"]
    captured: Captured
    ends_shard: bool


def _start(step: Step, responses: Responses, capture: Capture, *, keep: bool) -> tuple[Captured, Memory, np.ndarray]:
    """Launch a batch. Rows past the last sequence are one token long and forgotten."""
    tokens = np.zeros((step.padded_rows, step.padded_length), np.int32)
    lengths = np.ones(step.padded_rows, np.int32)
    for i, row in enumerate(step.rows):
        ids = responses.tokens(int(row))
        tokens[i, : len(ids)], lengths[i] = ids, len(ids)
    offsets = np.full(step.padded_rows, step.position_offset, np.int32)
    return *capture.start(tokens, lengths, offsets, keep=keep), tokens


def _extend(
    step: Step,
    extension: Extension,
    responses: Responses,
    capture: Capture,
    memory: Memory,
    whole: Int32[np.ndarray, "batch seq"],
) -> tuple[Captured, Int32[np.ndarray, " rows"]]:
    """Launch an extension; return where its rows start.

    A row starts behind its prompt, or as much before as the compiled shape is longer than what is left of the memory.
    """
    tokens = np.zeros((step.padded_rows, extension.padded_length), np.int32)
    sources, starts = np.zeros(step.padded_rows, np.int32), np.zeros(step.padded_rows, np.int32)
    last = step.padded_length - extension.padded_length
    for i, (row, source) in enumerate(zip(extension.rows.tolist(), extension.sources.tolist(), strict=True)):
        ids, prompt_len = responses.tokens(row), int(responses.prompt_len[row])
        if not np.array_equal(ids[:prompt_len], whole[source, :prompt_len]):
            raise InputError(
                f"{responses.path}: the prompts of {responses.name(row)!r} and "
                f"{responses.name(int(step.rows[source]))!r} differ and have one hash: drop one, or --no-share-prompts"
            )
        sources[i], starts[i] = source, min(prompt_len, last)
        fed = ids[starts[i] :]
        tokens[i, : len(fed)] = fed
    captured = capture.extend(memory, sources, starts, tokens)
    return captured, starts[: len(extension.rows)]


def _launched(shards: list[ShardPlan], responses: Responses, capture: Capture, *, keep: bool) -> Iterator[Forward]:
    """Every forward of the shards, each launched when it is asked for."""
    for shard in shards:
        for step in shard.steps:
            left = len(step.extensions) if step is shard.steps[-1] else -1
            captured, memory, whole = _start(step, responses, capture, keep=keep)
            none = np.zeros(len(step.rows), np.int32)
            yield Forward(
                shard=shard, step=step, rows=step.rows, starts=none, skips=none, captured=captured, ends_shard=left == 0
            )
            for number, extension in enumerate(step.extensions, start=1):
                captured, starts = _extend(step, extension, responses, capture, memory, whole)
                yield Forward(
                    shard=shard,
                    step=step,
                    rows=extension.rows,
                    starts=starts,
                    skips=responses.prompt_len[extension.rows] - starts,
                    captured=captured,
                    ends_shard=left == number,
                )


def forwards(shards: list[ShardPlan], responses: Responses, capture: Capture, *, keep: bool) -> Iterator[Forward]:
    """Give every forward of the shards, in order, one launched ahead: the device computes while the host copies.

    Args:
        shards: what to compute.
        responses: the texts.
        capture: the numerics.
        keep: whether any batch of the whole build is extended. Then all are computed by the program that remembers, one
            per shape, and a build that goes on uses the programs it was begun with.

    Raises:
        InputError: the responses file changed while it was in use.
    """
    before = None
    for forward in _launched(shards, responses, capture, keep=keep):
        if before:
            yield before
        before = forward
    if before:
        yield before


def begin_shard(shard: ShardPlan, responses: Responses, layout: Layout) -> dict[str, np.ndarray]:
    """Return a shard's tensors with everything that is known before the forwards."""
    tensors = empty_tensors(layout)
    order = stored_order(shard)
    shared = order.source >= 0
    prompt_len = responses.prompt_len[order.rows]
    own_from = np.where(shared, prompt_len, 0)
    own = responses.lengths[order.rows] - own_from
    tensors["seq_starts"][:] = np.cumsum([0, *own])
    tensors["prefix_start"][:] = np.where(shared, tensors["seq_starts"][order.source], 0)
    tensors["prefix_len"][:] = own_from
    tensors["position_offset"][:] = order.position_offset
    tensors["prompt_len"][:] = prompt_len
    tensors["prompt_hash"][:] = responses.prompt_hash[order.rows]
    tensors["prompt_set"][:] = responses.prompt_set[order.rows]
    tensors["sequence_index"][:] = order.rows
    tokens = [responses.tokens(int(row))[first:] for row, first in zip(order.rows, own_from, strict=True)]
    tensors["token_ids"][:] = np.concatenate(tokens)
    place = np.arange(shard.tokens) - np.repeat(tensors["seq_starts"][:-1] - own_from, own)
    tensors["loss_mask"][:] = place >= np.repeat(prompt_len, own)
    return tensors


def fill(tensors: dict[str, np.ndarray], first: int, forward: Forward, responses: Responses) -> int:
    """Copy a forward's own tokens into its shard from token `first`; return the token after them.

    Raises:
        InputError: features are NaN or infinite; the sequence is named.
    """
    results = {
        name: np.asarray(getattr(forward.captured, name))
        for name in ("features", "feature_scales", "next_ids", "top_ids", "top_logprobs")
        if name in tensors
    }
    # an 8-bit feature cannot be infinite, and its scale says what it was made of
    judged = "feature_scales" if "feature_scales" in tensors else "features"
    for i, row in enumerate(forward.rows.tolist()):
        place, skip = int(forward.starts[i]), int(forward.skips[i])
        count = int(responses.lengths[row]) - place - skip
        end = first + count
        for name, values in results.items():
            tensors[name][first:end] = values[i, skip : skip + count]
        token = first_not_finite(tensors[judged][first:end])
        if token is not None:
            raise InputError(
                f"the target gives NaN or infinite features for {responses.name(row)!r} of {responses.path} "
                f"(token {place + skip + token}, position_offset {forward.step.position_offset}): check its weights, "
                "or drop that row"
            )
        first = end
    return first
