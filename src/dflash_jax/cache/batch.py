"""Sequences of a cache as one padded batch: on the host in memory that is used again, then on the device.

A batch is large, and the first touch of fresh memory costs more than the copy into it (measured: 4.5 against 18 GB/s).
So the features of a batch lie in a buffer that goes back to a pool when nothing refers to it any more: no array of the
host, and no device array, which on a CPU is the very buffer.
"""

import mmap
import weakref
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Int32, Shaped

from dflash_jax.cache.features import load_features
from dflash_jax.cache.reader import Sequence
from dflash_jax.drafter import StoredSequence

MAX_FREE_BUFFERS = 4


@dataclass(kw_only=True, slots=True)
class _Buffer:
    """Memory for one batch's features, and what the last batch left in it.

    Attributes:
        memory: whole pages, so that jax on a CPU can take it as it is.
        row_bytes: of each row of the last batch; 0 for memory that was never used, which is all zeros.
        filled: bytes of each row that may be other than zero.
    """

    memory: mmap.mmap
    row_bytes: int = 0
    filled: tuple[int, ...] = ()


# appending and popping are atomic, so a buffer may come back in any thread and in the midst of a garbage collection
_FREE: deque[_Buffer] = deque(maxlen=MAX_FREE_BUFFERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class HostBatch:
    """Sequences side by side in host memory, right-padded with zeros. Do not write into it.

    Attributes:
        features: target features of every token as they are stored, in a pooled buffer: valid for as long as it is
            referred to.
        feature_scales: of features stored in 8 bits; else None.
        token_ids: the text.
        next_ids: the target's greedy token after each token.
        length: tokens that are real.
        features_len: tokens whose features are known.
        prompt_len: tokens of the prompt.
        limit: most tokens decoding would have allowed, prompt included.
        position_offset: absolute position of token 0.
        top_ids: the target's likeliest tokens after each token; None where the cache has none.
        top_logprobs: their log-probabilities, nats.
    """

    features: Shaped[np.ndarray, "batch seq features"]
    feature_scales: Float[np.ndarray, "batch seq scales"] | None
    token_ids: Int32[np.ndarray, "batch seq"]
    next_ids: Int32[np.ndarray, "batch seq"]
    length: Int32[np.ndarray, " batch"]
    features_len: Int32[np.ndarray, " batch"]
    prompt_len: Int32[np.ndarray, " batch"]
    limit: Int32[np.ndarray, " batch"]
    position_offset: Int32[np.ndarray, " batch"]
    top_ids: Int32[np.ndarray, "batch seq top"] | None = None
    top_logprobs: Float[np.ndarray, "batch seq top"] | None = None


def _take(num_bytes: int) -> _Buffer:
    """A free buffer of the pool that fits, or a new one."""
    for _ in range(len(_FREE)):
        try:
            buffer = _FREE.popleft()
        except IndexError:  # another thread was quicker
            break
        if num_bytes <= len(buffer.memory) <= 2 * num_bytes:
            return buffer
        _FREE.append(buffer)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return _Buffer(memory=memory)


def _stack_features(
    rows: SequenceOf[Shaped[np.ndarray, "_ features"]], width: int
) -> Shaped[np.ndarray, "batch {width} features"]:
    """Rows below one another, zeros after each, in a buffer that goes back to the pool when nothing views it."""
    dtype, columns = rows[0].dtype, rows[0].shape[1]
    row_bytes = width * columns * dtype.itemsize
    buffer = _take(len(rows) * row_bytes)
    # every view, whoever takes it, refers to this array and not to the memory: numpy ends a chain of views at an array
    root = np.frombuffer(buffer.memory, np.uint8)
    weakref.finalize(root, _FREE.append, buffer).atexit = False
    batch = root[: len(rows) * row_bytes].view(dtype).reshape(len(rows), width, columns)
    # bytes: filling bfloat16 takes ten times as long; and only where the last batch was longer than this one
    padding = root[: len(rows) * row_bytes].reshape(len(rows), row_bytes)
    fresh = buffer.row_bytes == 0
    known = buffer.filled if buffer.row_bytes == row_bytes else ()
    filled = tuple(row.nbytes for row in rows)
    for index, row in enumerate(rows):
        batch[index, : len(row)] = row
        dirty = known[index] if index < len(known) else 0 if fresh else row_bytes
        padding[index, filled[index] : dirty] = 0
    buffer.row_bytes, buffer.filled = row_bytes, filled
    return batch


def _stack_tops(
    sequences: SequenceOf[Sequence], width: int
) -> tuple[Int32[np.ndarray, "batch seq top"] | None, Float[np.ndarray, "batch seq top"] | None]:
    """The likeliest tokens and their log-probabilities side by side, zeros after each."""
    if sequences[0].top_ids is None:
        return None, None
    shape = (len(sequences), width, sequences[0].top_ids.shape[1])
    ids, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float16)
    for row, sequence in enumerate(sequences):
        assert sequence.top_ids is not None
        assert sequence.top_logprobs is not None
        length = len(sequence.token_ids)
        ids[row, :length], logprobs[row, :length] = sequence.top_ids, sequence.top_logprobs
    return ids, logprobs


def stack_on_host(sequences: SequenceOf[Sequence], *, width: int, max_new_tokens: int | None) -> HostBatch:
    """Return sequences side by side in host memory: every stored byte is copied once, from the mapped file to its row.

    Args:
        sequences: at least one.
        width: tokens per row, at least the longest sequence.
        max_new_tokens: the token budget the responses were generated with, from the cache's manifest; decoding
            shortens blocks there. None where it is not known: blocks are then never shortened.
    """
    rows = len(sequences)
    features = _stack_features([sequence.stored_features for sequence in sequences], width)
    scales = [sequence.feature_scales for sequence in sequences if sequence.feature_scales is not None]
    token_ids, next_ids = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    for row, sequence in enumerate(sequences):
        length = len(sequence.token_ids)
        token_ids[row, :length], next_ids[row, :length] = sequence.token_ids, sequence.next_ids
    prompt_len = np.array([sequence.prompt_len for sequence in sequences], np.int32)
    limit = np.full(rows, np.iinfo(np.int32).max, np.int32) if max_new_tokens is None else prompt_len + max_new_tokens
    top_ids, top_logprobs = _stack_tops(sequences, width)
    return HostBatch(
        features=features,
        feature_scales=_stack_features(scales, width) if scales else None,
        token_ids=token_ids,
        next_ids=next_ids,
        length=np.array([len(sequence.token_ids) for sequence in sequences], np.int32),
        features_len=np.array([sequence.features_len for sequence in sequences], np.int32),
        prompt_len=prompt_len,
        limit=limit.astype(np.int32),
        position_offset=np.array([sequence.position_offset for sequence in sequences], np.int32),
        top_ids=top_ids,
        top_logprobs=top_logprobs,
    )


def stack_sequences(sequences: SequenceOf[Sequence], *, width: int, max_new_tokens: int | None) -> StoredSequence:
    """Return sequences side by side on the device, right-padded with zeros; see `stack_on_host` for the arguments.

    On a CPU nothing is copied again; elsewhere the transfer may still be under way. Features stored in 8 bits cross to
    the device as such, and become bfloat16 there.
    """
    host = stack_on_host(sequences, width=width, max_new_tokens=max_new_tokens)
    # device_put and not jnp.asarray, which copies, at a twentieth of the speed of the copy above
    features = jax.device_put(host.features)
    if host.feature_scales is not None:
        features = load_features(features, jax.device_put(host.feature_scales))
    return StoredSequence(
        features=features,
        token_ids=jax.device_put(host.token_ids),
        next_ids=jax.device_put(host.next_ids),
        length=jax.device_put(host.length),
        features_len=jax.device_put(host.features_len),
        prompt_len=jax.device_put(host.prompt_len),
        limit=jax.device_put(host.limit),
        position_offset=jax.device_put(host.position_offset),
        top_ids=None if host.top_ids is None else jax.device_put(host.top_ids),
        top_logprobs=None if host.top_logprobs is None else jax.device_put(host.top_logprobs),
    )
