"""Real decoding of stored prompts: as the `decode` command runs it, and again step by step to see what it drafts."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from dflash_jax.core import Move
from dflash_jax.decode import Decoded, Decoder, decode_capacity, draft, start_decoding, verify
from dflash_jax.drafter import Drafter
from dflash_jax.targets import Target

PROMPT_BUCKET = 64

_start = jax.jit(start_decoding, static_argnames=("capacity", "max_new_tokens"))
_draft = jax.jit(draft, static_argnames=("block_size",))
_verify = jax.jit(verify)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A stored prompt where it is to be decoded."""

    ids: tuple[int, ...]
    position_offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Online:
    """What decodes.

    Attributes:
        target: with the angles it decodes with.
        drafter: the drafter that decodes.
        block_size: positions per block.
        stop_ids: token ids that end a sequence.
        max_new_tokens: token budget of every prompt.
        batch_size: prompts side by side.
    """

    target: Target
    drafter: Drafter
    block_size: int
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    batch_size: int

    def decode(self, prompts: Sequence[Prompt], *, progress: Move) -> list[Decoded]:
        """Decode every prompt at its own offset; outcomes in the prompts' order."""
        decoder = Decoder(
            self.target,
            stop_ids=self.stop_ids,
            max_new_tokens=self.max_new_tokens,
            batch_size=min(self.batch_size, len(prompts)),
            prompt_bucket=self.width(prompts),
        )
        done: dict[int, Decoded] = {}
        for offset in sorted({prompt.position_offset for prompt in prompts}):
            places = [place for place, prompt in enumerate(prompts) if prompt.position_offset == offset]
            for first in range(0, len(places), self.batch_size):
                some = places[first : first + self.batch_size]
                rows = decoder.decode(
                    [list(prompts[place].ids) for place in some],
                    drafter=self.drafter,
                    block_size=self.block_size,
                    position_offset=offset,
                ).rows
                done |= dict(zip(some, rows, strict=True))
                progress(len(done), len(prompts), f"decoded at offset {offset:,}")
        return [done[place] for place in range(len(prompts))]

    def width(self, prompts: Sequence[Prompt]) -> int:
        """Return one padded width for all prompts, so that one shape is compiled."""
        return -(-max(len(prompt.ids) for prompt in prompts) // PROMPT_BUCKET) * PROMPT_BUCKET

    def drafts(self, prompt: Prompt, anchors: Sequence[int], *, width: int) -> dict[int, Int32[np.ndarray, " drafted"]]:
        """Decode one prompt step by step and return what is drafted at some anchors, as far as it visits them.

        Args:
            prompt: the prompt.
            anchors: indices in its text.
            width: tokens that the prompt is padded to.
        """
        tokens, length = np.zeros((1, width), np.int32), len(prompt.ids)
        tokens[0, :length] = prompt.ids
        limit = min(length + self.max_new_tokens, self.target.config.max_positions)
        state = _start(
            self.target,
            self.drafter,
            jnp.asarray(tokens),
            jnp.array([length], jnp.int32),
            position_offset=jnp.array([prompt.position_offset], jnp.int32),
            limit=jnp.array([limit], jnp.int32),
            stop_ids=jnp.asarray(np.array(self.stop_ids, np.int32)),
            capacity=decode_capacity(width, self.max_new_tokens, self.block_size),
            max_new_tokens=self.max_new_tokens,
        )
        found: dict[int, np.ndarray] = {}
        while not bool(state.done[0]) and int(state.start[0]) <= max(anchors, default=-1):
            drafted = _draft(self.target, self.drafter, state, block_size=self.block_size)
            if int(state.start[0]) in anchors:
                found[int(state.start[0])] = np.asarray(drafted[0])
            state = _verify(self.target, self.drafter, state, drafted)
        return found
