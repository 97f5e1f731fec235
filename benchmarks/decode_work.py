"""What `decode.py` times: whole runs of both loops, drafts from an oracle, and single passes taken apart.

An oracle's drafts are the target's own tokens, so that acceptance is what one asks for. The drafter runs all the same,
and is not listened to.
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from dflash_jax.decode import (
    DecodeState,
    decode_capacity,
    draft,
    plain_step,
    speculative_loop,
    start_decoding,
    verify,
)
from dflash_jax.drafter import Drafter
from dflash_jax.nn import Screen, greedy_tokens
from dflash_jax.targets import Target

KINDS = ("t_plain", "t_draft", "t_verify", "t_head")
"""Passes that are measured apart: a plain step, a draft, a verify, and the head alone over a draft's slots."""
NO_STOP = -1  # an id that no target says: every prompt gets all of its tokens

start = jax.jit(start_decoding, static_argnames=("capacity", "max_new_tokens"))


@partial(jax.jit, donate_argnames=("state",))
def run_plain(target: Target, state: DecodeState) -> DecodeState:
    """Decode plainly to the end."""
    return lax.while_loop(lambda s: ~s.done.all(), lambda s: plain_step(target, s), state)


run_speculative = jax.jit(speculative_loop, static_argnames=("block_size",), donate_argnames=("state",))


def oracle_drafts(
    drafted: Int32[Array, "batch drafted"],
    state: DecodeState,
    text: Int32[Array, "batch capacity"],
    accept: Int32[Array, ""],
    vocab_size: int,
) -> Int32[Array, "batch drafted"]:
    """Return drafts that are right at slots 1 to `accept` and wrong after it; what was drafted, where it is below 0."""
    slot = jnp.arange(1, drafted.shape[1] + 1, dtype=jnp.int32)[None]
    at = jnp.minimum(state.start[:, None] + slot, text.shape[1] - 1)
    right = jnp.take_along_axis(text, at, axis=1)
    told = jnp.where(slot <= accept, right, (right + 1) % vocab_size)
    return jnp.where(accept < 0, drafted, told)


@partial(jax.jit, static_argnames=("block_size",), donate_argnames=("state",))
def run_oracle(
    target: Target,
    drafter: Drafter,
    state: DecodeState,
    text: Int32[Array, "batch capacity"],
    accept: Int32[Array, ""],
    *,
    block_size: int,
) -> DecodeState:
    """Decode with an oracle's drafts to the end; the drafter runs too."""

    def step(s: DecodeState) -> DecodeState:
        drafted = draft(target, drafter, s, block_size=block_size)
        return verify(target, drafter, s, oracle_drafts(drafted, s, text, accept, target.config.vocab_size))

    return lax.while_loop(lambda s: ~s.done.all(), step, state)


def _again(new: DecodeState, old: DecodeState, anchor: Int32[Array, " batch"]) -> DecodeState:
    """The state as it was, but for a new anchor token (so that no pass is the last one's) and what was written."""
    rows = jnp.arange(anchor.shape[0])
    return replace(
        new,
        tokens=new.tokens.at[rows, old.start].set(anchor),
        start=old.start,
        done=old.done,
        committed=old.committed,
        num_blocks=old.num_blocks,
        kv=replace(new.kv, lengths=old.kv.lengths),
    )


def _first(state: DecodeState, old: DecodeState) -> Int32[Array, " batch"]:
    """The token after the old anchor."""
    return jnp.take_along_axis(state.tokens, old.start[:, None] + 1, axis=1)[:, 0]


@partial(jax.jit, static_argnames=("passes",))
def plain_passes(target: Target, state: DecodeState, *, passes: int) -> Int32[Array, "batch capacity"]:
    """Make plain steps at one place."""

    def one(_: Array, s: DecodeState) -> DecodeState:
        new = plain_step(target, s)
        return _again(new, s, _first(new, s))

    return lax.fori_loop(0, passes, one, state).tokens


@partial(jax.jit, static_argnames=("passes", "block_size"))
def draft_passes(
    target: Target, drafter: Drafter, state: DecodeState, *, passes: int, block_size: int
) -> Int32[Array, "batch capacity"]:
    """Draft blocks at one place."""

    def one(_: Array, s: DecodeState) -> DecodeState:
        return _again(s, s, draft(target, drafter, s, block_size=block_size)[:, 0])

    return lax.fori_loop(0, passes, one, state).tokens


@partial(jax.jit, static_argnames=("passes", "block_size"))
def verify_passes(
    target: Target, drafter: Drafter, state: DecodeState, *, passes: int, block_size: int
) -> Int32[Array, "batch capacity"]:
    """Verify blocks at one place, each time what the target said the last time."""

    def one(_: Array, s: DecodeState) -> DecodeState:
        at = s.start[:, None] + jnp.arange(1, block_size, dtype=jnp.int32)[None]
        new = verify(target, drafter, s, jnp.take_along_axis(s.tokens, at, axis=1))
        return _again(new, s, _first(new, s))

    return lax.fori_loop(0, passes, one, state).tokens


@partial(jax.jit, static_argnames=("passes",))
def head_passes(
    head: Float[Array, "draft_vocab hidden"],
    hidden: Float[Array, "batch drafted hidden"],
    screen: Screen | None,
    *,
    passes: int,
) -> Float[Array, "batch drafted hidden"]:
    """Find the best rows of the head for drafted slots, the head alone: a part of a draft."""

    def one(_: Array, rows: Float[Array, "batch drafted hidden"]) -> Float[Array, "batch drafted hidden"]:
        return rows.at[..., 0].add(greedy_tokens(rows, head, screen=screen).astype(rows.dtype))

    return lax.fori_loop(0, passes, one, hidden)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Prompts side by side, padded to one width."""

    tokens: Int32[Array, "batch seq"]
    lengths: Int32[Array, " batch"]
    limit: Int32[Array, " batch"]

    @classmethod
    def of(cls, prompts: list[list[int]], *, width: int, new_tokens: int) -> "Batch":
        """Pad prompts to a width."""
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        return cls(
            tokens=jnp.asarray(tokens), lengths=jnp.asarray(lengths), limit=jnp.asarray(lengths + np.int32(new_tokens))
        )


class Runs:
    """Every contestant of one batch size, over the same prompts in batches."""

    def __init__(
        self, target: Target, drafter: Drafter, batches: list[Batch], *, new_tokens: int, block_size: int, passes: int
    ) -> None:
        """Bind models and prompts; nothing is compiled yet."""
        self.target, self.drafter, self.batches = target, drafter, batches
        self.new_tokens, self.block_size, self.passes = new_tokens, block_size, passes
        self.capacity = decode_capacity(batches[0].tokens.shape[1], new_tokens, block_size)

    def begin(self, batch: Batch, drafter: Drafter | None) -> DecodeState:
        """The state after the prompts' pass."""
        return start(
            self.target,
            drafter,
            batch.tokens,
            batch.lengths,
            position_offset=jnp.zeros_like(batch.lengths),
            limit=batch.limit,
            stop_ids=jnp.array([NO_STOP], jnp.int32),
            capacity=self.capacity,
            max_new_tokens=self.new_tokens,
        )

    def prefill(self, *, speculative: bool) -> list[DecodeState]:
        """The prompts' passes alone, which whole runs hold too."""
        return [self.begin(batch, self.drafter if speculative else None) for batch in self.batches]

    def plain(self) -> list[DecodeState]:
        """Decode all prompts plainly."""
        return [run_plain(self.target, self.begin(batch, None)) for batch in self.batches]

    def speculative(self) -> list[DecodeState]:
        """Decode all prompts with the drafter."""
        return [
            run_speculative(self.target, self.drafter, self.begin(batch, self.drafter), block_size=self.block_size)
            for batch in self.batches
        ]

    def oracle(self, accept: int) -> list[DecodeState]:
        """Decode all prompts with drafts that are right at so many slots."""
        return [
            run_oracle(
                self.target,
                self.drafter,
                self.begin(batch, self.drafter),
                text,
                jnp.int32(accept),
                block_size=self.block_size,
            )
            for batch, text in zip(self.batches, self.texts, strict=True)
        ]

    @cached_property
    def texts(self) -> list[Int32[Array, "batch capacity"]]:
        """The target's own text of every batch, decoded plainly once."""
        return [state.tokens for state in self.plain()]

    def passes_of(self, kind: str) -> Array:
        """`passes` passes of one of `KINDS` on the first batch, after its prompts."""
        state = self._prompts_done
        if kind == "t_head":
            head, screen = self.target.head, self.target.screen
            if state.draft_head is not None:
                head, screen = state.draft_head, None
            hidden = self.target.embed_tokens[state.tokens[:, 1 : self.block_size]]
            return head_passes(head, hidden, screen, passes=self.passes)
        if kind == "t_plain":
            return plain_passes(self.target, state, passes=self.passes)
        run = draft_passes if kind == "t_draft" else verify_passes
        return run(self.target, self.drafter, state, passes=self.passes, block_size=self.block_size)

    @cached_property
    def _prompts_done(self) -> DecodeState:
        return self.begin(self.batches[0], self.drafter)


def new_tokens_of(states: list[DecodeState], batches: list[Batch]) -> list[list[int]]:
    """Every prompt's new tokens."""
    return [
        np.asarray(state.tokens)[row, int(length) : int(state.start[row]) + 1].tolist()
        for state, batch in zip(states, batches, strict=True)
        for row, length in enumerate(np.asarray(batch.lengths))
    ]


def tau_of(states: list[DecodeState]) -> float:
    """tau_micro: tokens committed per block, pooled."""
    committed = sum(int(np.asarray(state.committed).sum()) for state in states)
    return committed / sum(int(np.asarray(state.num_blocks).sum()) for state in states)


def passes_made(states: list[DecodeState]) -> int:
    """Target passes that a run made after the prompts': of each batch as many as its slowest row needs."""
    return sum(int(np.asarray(state.num_blocks).max()) for state in states)


def weight_bytes(model: Target | Drafter) -> int:
    """Bytes of a model's weights, a tied head once; a target's screen is none of them."""
    if isinstance(model, Target):
        model = replace(model, screen=None)
    return sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(model) if hasattr(leaf, "nbytes"))
