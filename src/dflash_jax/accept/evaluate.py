"""Every anchor of a stored sequence in one compiled pass: what is drafted there, and accepted."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from dflash_jax.cache import Cache, stack_sequences
from dflash_jax.core import Move
from dflash_jax.decode import accept_len
from dflash_jax.drafter import Drafter, StoredSequence, block_labels, draft_blocks
from dflash_jax.nn import greedy_tokens

LENGTH_BUCKET = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceResult:
    """One sequence, every eligible anchor: `anchors[i]` is `prompt_len + i`.

    Attributes:
        prompt_hash: the prompt's identity.
        sequence_index: the text's identity: equal at every offset.
        position_offset: absolute position of token 0.
        prompt_len: tokens of the prompt, also the first anchor.
        length: tokens in all.
        accepted: accept_len over the labelled slots of each block, 0 to B-1.
        correct: whether the drafted token is the label, by slot; False where there is no label.
        labelled: whether a slot has a label.
    """

    prompt_hash: int
    sequence_index: int
    position_offset: int
    prompt_len: int
    length: int
    accepted: Int32[np.ndarray, " anchor"]
    correct: Bool[np.ndarray, "anchor drafted"]
    labelled: Bool[np.ndarray, "anchor drafted"]


def evaluate_anchors(
    drafter: Drafter,
    embed_tokens: Float[Array, "vocab hidden"],
    head: Float[Array, "vocab hidden"],
    sequence: StoredSequence,
    anchors: Int32[Array, " anchor"],
    *,
    block_size: int,
    anchors_per_chunk: int,
) -> tuple[Int32[Array, " anchor"], Bool[Array, "anchor drafted"], Bool[Array, "anchor drafted"]]:
    """Return accept_len, hits and labelled slots of the blocks at some anchors, drafted as decoding drafts them.

    Memory beyond the inputs: `anchors_per_chunk * block_size * (context + vocab)` float32 at most.

    Args:
        drafter: the drafter.
        embed_tokens: the target's embedding.
        head: the target's head.
        sequence: one stored sequence.
        anchors: a multiple of `anchors_per_chunk`; anchors outside the sequence give results that mean nothing.
        block_size: positions per block.
        anchors_per_chunk: blocks drafted at a time.
    """

    def chunk(some: Int32[Array, " chunk"]):  # noqa: ANN202
        target = block_labels(sequence, some, block_size=block_size)
        hidden = draft_blocks(
            drafter,
            embed_tokens,
            sequence.features,
            sequence.token_ids,
            some,
            block_lengths=target.lengths,
            block_size=block_size,
            position_offset=sequence.position_offset,
        )
        drafted = greedy_tokens(hidden[:, 1:], head)
        num_drafted = target.labelled.sum(axis=1, dtype=jnp.int32)
        accepted = accept_len(drafted, target.labels, num_drafted=num_drafted)
        return accepted, (drafted == target.labels) & target.labelled, target.labelled

    accepted, correct, labelled = lax.map(chunk, anchors.reshape(-1, anchors_per_chunk))
    return accepted.reshape(-1), correct.reshape(-1, block_size - 1), labelled.reshape(-1, block_size - 1)


_evaluate = jax.jit(evaluate_anchors, static_argnames=("block_size", "anchors_per_chunk"))


def evaluate_cache(
    drafter: Drafter,
    embed_tokens: Float[Array, "vocab hidden"],
    head: Float[Array, "vocab hidden"],
    cache: Cache,
    *,
    max_positions: int,
    block_size: int,
    anchors_per_chunk: int,
    position_offsets: tuple[int, ...] | None,
    progress: Move,
) -> list[SequenceResult]:
    """Evaluate every eligible anchor of every sequence; sequences without one (a response of one token) are left out.

    Blocks are shortened at the token budget and at the target's `max_positions`, as decoding does. `position_offsets`
    leaves out sequences stored at other offsets; None keeps all.
    """
    width = -(-cache.max_length // LENGTH_BUCKET) * LENGTH_BUCKET
    results = []
    for index in range(cache.num_sequences):
        stored = cache.sequence(index)
        length, first = len(stored.token_ids), stored.prompt_len
        count = length - 1 - first
        progress(index + 1, cache.num_sequences, f"{sum(len(r.accepted) for r in results):,} anchors")
        if count < 1 or (position_offsets is not None and stored.position_offset not in position_offsets):
            continue
        batch = stack_sequences([stored], width=width, max_new_tokens=cache.manifest["max_new_tokens"])
        one = jax.tree_util.tree_map(lambda leaf: leaf[0], batch)
        padded = -(-count // anchors_per_chunk) * anchors_per_chunk
        anchors = np.minimum(first + np.arange(padded), length - 2).astype(np.int32)
        accepted, correct, labelled = _evaluate(
            drafter,
            embed_tokens,
            head,
            replace(one, limit=jnp.minimum(one.limit, max_positions)),
            jnp.asarray(anchors),
            block_size=block_size,
            anchors_per_chunk=anchors_per_chunk,
        )
        results.append(
            SequenceResult(
                prompt_hash=stored.prompt_hash,
                sequence_index=stored.sequence_index,
                position_offset=stored.position_offset,
                prompt_len=first,
                length=length,
                accepted=np.asarray(accepted)[:count],
                correct=np.asarray(correct)[:count],
                labelled=np.asarray(labelled)[:count],
            )
        )
    return results
