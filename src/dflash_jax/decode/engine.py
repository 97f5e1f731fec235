"""Batches of prompts in, tokens out: bucketed shapes, compiled once each, timed apart from compiling."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.decode.loop import (
    DecodeState,
    decode_capacity,
    idle_rows,
    place_rows,
    plain_blocks,
    plain_loop,
    plain_until,
    speculative_blocks,
    speculative_loop,
    speculative_until,
    start_decoding,
)
from dflash_jax.decode.sampler import Sampler, Sampling
from dflash_jax.drafter import Drafter
from dflash_jax.targets import Target, padded_rows, put_batch, with_screen

PROMPT_BUCKET = 64
# A queue's rows are refilled by this part of the batch at a time: fewer at once would make many small prompts' passes,
# more would leave rows idle for longer (on average half of a part).
REFILL = 4

_start = jax.jit(start_decoding, static_argnames=("capacity", "max_new_tokens"))
_plain = jax.jit(plain_loop, donate_argnames=("state",))
_speculative = jax.jit(speculative_loop, static_argnames=("block_size",), donate_argnames=("state",))
_until = jax.jit(plain_until, donate_argnames=("state",))
_speculative_until = jax.jit(speculative_until, static_argnames=("block_size",), donate_argnames=("state",))
_idle = jax.jit(idle_rows, static_argnames=("rows", "mesh"))
_place = jax.jit(place_rows, static_argnames=("mesh",), donate_argnames=("state",))
_plain_blocks = jax.jit(plain_blocks, donate_argnames=("state",))
_speculative_blocks = jax.jit(speculative_blocks, static_argnames=("block_size",), donate_argnames=("state",))


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """One prompt's outcome.

    Attributes:
        tokens: new tokens, the first one from the prompt's own pass; a stop id is included.
        committed: tokens committed by each target pass after it, 1 to B; their sum is `len(tokens) - 1`.
        stopped: whether a stop id ended it, rather than the limit.
        accepted: how many of each pass's tokens were drafted, the first ones; any other is the target's own.
    """

    tokens: list[int]
    committed: list[int]
    stopped: bool
    accepted: list[int] = field(default_factory=list)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Streamed:
    """What a few blocks added.

    Attributes:
        rows: for every prompt, in order, what is new of it: the first time its first token, which no block committed.
            A row that was done before has no tokens.
        done: whether each prompt has ended, its last tokens being among these.
    """

    rows: list[Decoded]
    done: list[bool]


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
        rows that it splits evenly. Where 8- and 16-bit products are fast a float32 target gets a screen of its head,
        three quarters of the head's bytes; it changes no token.
        """
        self._prompt_bucket = prompt_bucket
        self._target = with_screen(target)
        self._stop_ids = jnp.asarray(np.array(stop_ids, np.int32))
        self._max_new_tokens = max_new_tokens
        self._batch_size = padded_rows(target.mesh, batch_size)
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def _executable(
        self, jitted: jax.stages.Wrapped, dynamic: dict[str, Any], static: dict[str, Any]
    ) -> jax.stages.Compiled:
        """The executable of a jitted function for arguments of these shapes, compiled when it is met first."""
        leaves, structure = jax.tree_util.tree_flatten(dynamic)
        key = (jitted, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), tuple(static.items()))
        if key not in self._compiled:
            self._compiled[key] = jitted.lower(**dynamic, **static).compile()
        return self._compiled[key]

    def _call(
        self, jitted: jax.stages.Wrapped, dynamic: dict[str, Any], static: dict[str, int]
    ) -> tuple[DecodeState, float]:
        """Run a jitted function; returns its result and seconds, compiling apart."""
        run = self._executable(jitted, dynamic, static)
        begin = time.perf_counter()
        state = jax.block_until_ready(run(**dynamic))
        return state, time.perf_counter() - begin

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        drafter: Drafter | None = None,
        block_size: int | None = None,
        position_offset: int | Sequence[int] = 0,
        sampling: Sampling | None = None,
        streams: Sequence[int] | None = None,
    ) -> DecodedBatch:
        """Decode at most `batch_size` prompts; with a drafter speculatively, to the same tokens, sampled ones too.

        Args:
            prompts: token ids, at least one each, each shorter than the target's context.
            drafter: the drafter; None decodes plainly.
            block_size: positions per block; default the drafter's own.
            position_offset: absolute position of every prompt's first token, or of each one's.
            sampling: how the target chooses tokens; None: greedily.
            streams: what tells each prompt's randomness from the others', 0 to 2^31 - 1: a prompt's samples depend on
                the seed and its own stream, not on its batch. Default: its place in the batch.
        """
        block_size = 1 if drafter is None else block_size or drafter.config.block_size
        inputs, lengths = self._inputs(prompts, block_size, position_offset, sampling, streams)
        state, prefill_s = self._start(inputs, drafter)
        if drafter is None:
            state, loop_s = self._call(_plain, {"target": self._target, "state": state}, {})
        else:
            loop_inputs = {"target": self._target, "drafter": drafter, "state": state}
            state, loop_s = self._call(_speculative, loop_inputs, {"block_size": block_size})
        rows = _rows(_fetch(_shown(state)), np.asarray(state.stop_ids), lengths, np.zeros_like(lengths))
        return DecodedBatch(rows=rows[: len(prompts)], prefill_s=prefill_s, loop_s=loop_s)

    def queue(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        drafter: Drafter | None = None,
        block_size: int | None = None,
        sampling: Sampling | None = None,
        streams: Sequence[int] | None = None,
    ) -> Iterator[list[tuple[int, Decoded]]]:
        """Decode any number of prompts, to the tokens of `decode`, and give them as they end.

        Rows that are done take the next prompts, in the order given, as soon as a quarter of the batch is: a batch does
        not wait for its longest text. All prompts are padded to the longest one's bucket, so a queue should be of
        prompts of similar length. Prompts' passes are of a quarter of the batch each, so that every prompt meets the
        same shapes wherever it stands.

        Args:
            prompts: see `decode`.
            drafter: see `decode`.
            block_size: see `decode`.
            sampling: see `decode`.
            streams: see `decode`; by default a prompt's place among all of them.

        Yields:
            Places of prompts, and their outcomes; every prompt once.
        """
        part = padded_rows(self._target.mesh, -(-self._batch_size // REFILL))
        size = -(-self._batch_size // part) * part
        longest = max(map(len, prompts))
        numbers = list(range(len(prompts)) if streams is None else streams)
        on = {"mesh": self._target.mesh}
        block_size = 1 if drafter is None else block_size or drafter.config.block_size
        if drafter is None:
            until, models, static = _until, {"target": self._target}, {}
        else:
            until, models = _speculative_until, {"target": self._target, "drafter": drafter}
            static = {"block_size": block_size}
        waiting, free, owners = 0, list(range(size)), dict[int, int]()
        state: DecodeState | None = None
        while waiting < len(prompts) or owners:
            while waiting < len(prompts) and len(free) >= part:
                taken = range(waiting, min(waiting + part, len(prompts)))
                chosen = [prompts[place] for place in taken]
                some = [numbers[place] for place in taken]
                inputs, _ = self._inputs(chosen, block_size, 0, sampling, some, rows=part, longest=longest)
                new, _ = self._start(inputs, drafter)
                if state is None:
                    state = self._executable(_idle, {"state": new}, {"rows": size} | on)(state=new)
                rows, free = free[:part], free[part:]
                placed = {"state": state, "new": new, "rows": jnp.asarray(rows, jnp.int32)}
                state = self._executable(_place, placed, on)(**placed)
                owners |= dict(zip(rows, taken, strict=False))
                free += rows[len(taken) :]
                waiting += len(taken)
            assert state is not None
            enough = jnp.int32(min(len(free) + part, size))
            told = models | {"state": state, "enough": enough}
            now: DecodeState = self._executable(until, told, static)(**told)
            state, found = now, _fetch(_shown(now))
            ended = [row for row in owners if found.done[row]]
            lengths = np.zeros(size, np.int32)
            lengths[ended] = [len(prompts[owners[row]]) for row in ended]
            outcomes = _rows(found, np.asarray(self._stop_ids), lengths, np.zeros_like(lengths))
            free += ended
            yield [(owners.pop(row), outcomes[row]) for row in ended]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        drafter: Drafter | None = None,
        block_size: int | None = None,
        position_offset: int | Sequence[int] = 0,
        sampling: Sampling | None = None,
        streams: Sequence[int] | None = None,
        blocks_per_step: int = 1,
    ) -> Iterator[Streamed]:
        """Decode as `decode` does, to the same tokens, and give them while they come: first those of the prompts' pass.

        The device runs `blocks_per_step` blocks by itself, one call for all of them, and begins the next ones before
        the last ones are fetched: it never waits for the reader.

        Args:
            prompts: see `decode`.
            drafter: see `decode`.
            block_size: see `decode`.
            position_offset: see `decode`.
            sampling: see `decode`.
            streams: see `decode`.
            blocks_per_step: blocks (tokens, without a drafter) between two looks at the device, at least 1.
        """
        block_size = 1 if drafter is None else block_size or drafter.config.block_size
        inputs, lengths = self._inputs(prompts, block_size, position_offset, sampling, streams)
        state, _ = self._start(inputs, drafter)
        stop_ids, seen = np.asarray(state.stop_ids), np.zeros_like(lengths)
        num_blocks = jnp.int32(blocks_per_step)
        if drafter is None:
            function, models, static = _plain_blocks, {"target": self._target}, {}
        else:
            function, models = _speculative_blocks, {"target": self._target, "drafter": drafter}
            static = {"block_size": block_size}
        while True:
            snapshot = _copies(_shown(state))  # before the state's buffers are given away
            run = self._executable(function, models | {"state": state, "num_blocks": num_blocks}, static)
            state = run(**models, state=state, num_blocks=num_blocks)
            found = _fetch(snapshot)
            rows = _rows(found, stop_ids, lengths, seen)[: len(prompts)]
            yield Streamed(rows=rows, done=found.done[: len(prompts)].tolist())
            if found.done.all():
                return
            lengths, seen = found.start + 1, found.num_blocks

    def _inputs(
        self,
        prompts: Sequence[Sequence[int]],
        block_size: int,
        position_offset: int | Sequence[int],
        sampling: Sampling | None,
        streams: Sequence[int] | None,
        *,
        rows: int | None = None,
        longest: int = 0,
    ) -> tuple[dict[str, Any], np.ndarray]:
        """What `start_decoding` is given but for the models, with the capacity, and the prompts' lengths.

        Rows past the prompts are done from the start. `rows` is the batch's size, by default the decoder's own;
        prompts are padded as if one had `longest` tokens.
        """
        bucket = -(-max(longest, 1) // self._prompt_bucket) * self._prompt_bucket
        tokens, lengths = pad_prompts(prompts, rows=rows or self._batch_size, bucket=bucket)
        limit = np.minimum(lengths + self._max_new_tokens, self._target.config.max_positions).astype(np.int32)
        limit[len(prompts) :] = lengths[len(prompts) :] + 1
        batch = {
            "prompts": tokens,
            "lengths": lengths,
            "position_offset": _filled(position_offset, prompts, len(lengths), what="position offsets"),
            "limit": limit,
        }
        inputs: dict[str, Any] = put_batch(self._target.mesh, batch)
        if sampling is not None:
            numbers = range(len(prompts)) if streams is None else streams
            fields = sampling.rows(_filled(numbers, prompts, len(lengths), what="streams").tolist())
            given: dict[str, Any] = dict.fromkeys(fields)
            given |= put_batch(self._target.mesh, {name: value for name, value in fields.items() if value is not None})
            inputs["sampler"] = Sampler(**given)
        return inputs | {"capacity": decode_capacity(tokens.shape[1], self._max_new_tokens, block_size)}, lengths

    def _start(self, inputs: dict[str, Any], drafter: Drafter | None) -> tuple[DecodeState, float]:
        """The state after the prompts' pass, and its seconds."""
        static = {"capacity": inputs.pop("capacity"), "max_new_tokens": self._max_new_tokens}
        models = {"target": self._target, "drafter": drafter, "stop_ids": self._stop_ids}
        return self._call(_start, models | inputs, static)


def _filled(values: int | Sequence[int], prompts: Sequence[Sequence[int]], rows: int, *, what: str) -> np.ndarray:
    """A number per row of the batch; rows past the prompts repeat the first prompt's.

    Raises:
        ValueError: there is not one number, nor one per prompt.
    """
    if isinstance(values, int):
        return np.full(rows, values, np.int32)
    if len(values) != len(prompts):
        raise ValueError(f"{len(values)} {what} for {len(prompts)} prompts: give one for all or one for each")
    return np.array([*values, *[values[0]] * (rows - len(values))], np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """What is fetched of a state: see `DecodeState`."""

    tokens: Any
    start: Any
    committed: Any
    accepted: Any
    num_blocks: Any
    done: Any


@jax.jit
def _copies(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.copy(part) for part in state)


def _shown(state: DecodeState) -> tuple[jax.Array, ...]:
    """What `_Found` holds, on the device."""
    return state.tokens, state.start, state.committed, state.accepted, state.num_blocks, state.done


def _fetch(shown: tuple[jax.Array, ...]) -> _Found:
    tokens, start, committed, accepted, num_blocks, done = jax.device_get(shown)
    return _Found(tokens=tokens, start=start, committed=committed, accepted=accepted, num_blocks=num_blocks, done=done)


def _rows(found: _Found, stop_ids: np.ndarray, lengths: np.ndarray, seen: np.ndarray) -> list[Decoded]:
    """Every row's tokens from index `lengths` on, and its blocks from number `seen` on."""
    rows = []
    for row, (length, first) in enumerate(zip(lengths, seen, strict=True)):
        new = found.tokens[row, length : found.start[row] + 1].tolist()
        blocks = slice(first, found.num_blocks[row])
        rows.append(
            Decoded(
                tokens=new,
                committed=found.committed[row, blocks].tolist(),
                stopped=bool(np.isin(found.tokens[row, found.start[row]], stop_ids)),
                accepted=found.accepted[row, blocks].tolist(),
            )
        )
    return rows
