"""Batches of prompts in, tokens out: bucketed shapes, compiled once each, timed apart from compiling."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.decode.loop import DecodeState, decode_capacity, plain_loop, speculative_loop, start_decoding
from dflash_jax.drafter import Drafter
from dflash_jax.targets import Target, padded_rows, put_batch

PROMPT_BUCKET = 64

_start = jax.jit(start_decoding, static_argnames=("capacity", "max_new_tokens"))
_plain = jax.jit(plain_loop, donate_argnames=("state",))
_speculative = jax.jit(speculative_loop, static_argnames=("block_size",), donate_argnames=("state",))


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """One prompt's outcome.

    Attributes:
        tokens: new tokens, the first one from the prompt's own pass; a stop id is included.
        committed: tokens committed by each target pass after it, 1 to B; their sum is `len(tokens) - 1`.
        stopped: whether a stop id ended it, rather than the limit.
    """

    tokens: list[int]
    committed: list[int]
    stopped: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedBatch:
    """A batch's outcome and what it took.

    Attributes:
        rows: one per prompt, in order.
        prefill_s: seconds for the prompts' pass, compiling excluded.
        loop_s: seconds for the decoding loop, compiling excluded.
    """

    rows: list[Decoded]
    prefill_s: float
    loop_s: float


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, rows: int, bucket: int = PROMPT_BUCKET
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as `[rows, bucket]` ids, and their lengths; missing rows repeat the first prompt (dropped later)."""
    filled = [*prompts, *[prompts[0]] * (rows - len(prompts))]
    width = -(-max(map(len, filled)) // bucket) * bucket
    tokens = np.zeros((rows, width), np.int32)
    for row, prompt in enumerate(filled):
        tokens[row, : len(prompt)] = prompt
    return tokens, np.array([len(prompt) for prompt in filled], np.int32)


class Decoder:
    """Decodes batches with one target, plainly or with a drafter.

    A shape met for the first time is compiled ahead, outside the timed calls. Shapes are few: prompts are padded to
    multiples of `prompt_bucket` tokens, batches to `batch_size` rows.
    """

    def __init__(
        self,
        target: Target,
        *,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        batch_size: int,
        prompt_bucket: int = PROMPT_BUCKET,
    ) -> None:
        """Bind what all batches share; `stop_ids` may be empty.

        A `prompt_bucket` as wide as the longest prompt gives one shape for all. On a mesh the batch is filled up to
        rows that it splits evenly.
        """
        self._prompt_bucket = prompt_bucket
        self._target = target
        self._stop_ids = jnp.asarray(np.array(stop_ids, np.int32))
        self._max_new_tokens = max_new_tokens
        self._batch_size = padded_rows(target.mesh, batch_size)
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def _call(
        self, jitted: jax.stages.Wrapped, dynamic: dict[str, Any], static: dict[str, int]
    ) -> tuple[DecodeState, float]:
        """Run a jitted function through an executable compiled ahead; returns its result and seconds."""
        leaves, structure = jax.tree_util.tree_flatten(dynamic)
        key = (jitted, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), tuple(static.items()))
        if key not in self._compiled:
            self._compiled[key] = jitted.lower(**dynamic, **static).compile()
        begin = time.perf_counter()
        state = jax.block_until_ready(self._compiled[key](**dynamic))
        return state, time.perf_counter() - begin

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        drafter: Drafter | None = None,
        block_size: int | None = None,
        position_offset: int = 0,
    ) -> DecodedBatch:
        """Decode at most `batch_size` prompts greedily; with a drafter speculatively, to the same tokens.

        Args:
            prompts: token ids, at least one each, each shorter than the target's context.
            drafter: the drafter; None decodes plainly.
            block_size: positions per block; default the drafter's own.
            position_offset: absolute position of every prompt's first token.
        """
        block_size = 1 if drafter is None else block_size or drafter.config.block_size
        tokens, lengths = pad_prompts(prompts, rows=self._batch_size, bucket=self._prompt_bucket)
        limit = np.minimum(lengths + self._max_new_tokens, self._target.config.max_positions).astype(np.int32)
        capacity = decode_capacity(tokens.shape[1], self._max_new_tokens, block_size)
        batch = {
            "prompts": tokens,
            "lengths": lengths,
            "position_offset": np.full(lengths.shape, position_offset, np.int32),
            "limit": limit,
        }
        inputs = {
            "target": self._target,
            "drafter": drafter,
            **put_batch(self._target.mesh, batch),
            "stop_ids": self._stop_ids,
        }
        state, prefill_s = self._call(_start, inputs, {"capacity": capacity, "max_new_tokens": self._max_new_tokens})
        if drafter is None:
            state, loop_s = self._call(_plain, {"target": self._target, "state": state}, {})
        else:
            loop_inputs = {"target": self._target, "drafter": drafter, "state": state}
            state, loop_s = self._call(_speculative, loop_inputs, {"block_size": block_size})
        return DecodedBatch(rows=_rows(state, lengths)[: len(prompts)], prefill_s=prefill_s, loop_s=loop_s)


def _rows(state: DecodeState, lengths: np.ndarray) -> list[Decoded]:
    """Per-sequence results, fetched from the device once."""
    tokens, start, committed, num_blocks = (
        np.asarray(part) for part in (state.tokens, state.start, state.committed, state.num_blocks)
    )
    stop_ids = set(np.asarray(state.stop_ids).tolist())
    rows = []
    for row, length in enumerate(lengths):
        new = tokens[row, length : start[row] + 1].tolist()
        blocks = committed[row, : num_blocks[row]].tolist()
        rows.append(Decoded(tokens=new, committed=blocks, stopped=new[-1] in stop_ids))
    return rows
