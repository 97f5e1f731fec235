"""Greedy decoding as compiled loops: plain, and speculative with a DFlash drafter.

Indices, for a sequence whose text so far is `tokens[0 .. start]`:

    tokens      0 ... start-1 | start  | start+1 ...
                cached rows   | anchor | free
    features    rows < start  |   -    |             the anchor has not been through the target yet

A step drafts from the anchor, verifies anchor and drafts in one target forward, commits the accepted drafts and the
target's own next token, and moves `start` there. Finished rows stay where they are; what is computed for them is
written past their end.
"""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from dflash_jax.decode.accept import accept_len
from dflash_jax.drafter import ContextKV, Drafter, context_kv, draft_hidden, embed_slots
from dflash_jax.nn import greedy_tokens, write_rows
from dflash_jax.targets import KVCache, Target, extend, next_ids, prefill


class DecodeState(eqx.Module):
    """A batch in the middle of decoding.

    Attributes:
        tokens: text by index; past `start` it is not defined.
        start: index of the last committed token, the anchor of the next block.
        limit: most tokens a sequence may have, its prompt included (token budget or context end).
        done: whether a stop id was committed or the limit reached.
        kv: the target's cache; rows below `start` are in use.
        context: the drafter's context keys and values per layer; rows below `start` are in use. None when decoding
            plainly.
        committed: tokens each block committed, in order, 1 to B; 0 past a sequence's last block. Their mean is tau.
        num_blocks: target passes made for each sequence after its prompt.
        stop_ids: token ids that end a sequence.
    """

    tokens: Int32[Array, "batch capacity"]
    start: Int32[Array, " batch"]
    limit: Int32[Array, " batch"]
    done: Bool[Array, " batch"]
    kv: KVCache
    context: tuple[ContextKV, ...] | None
    committed: Int32[Array, "batch blocks"]
    num_blocks: Int32[Array, " batch"]
    stop_ids: Int32[Array, " stops"]


def decode_capacity(prompt_bucket: int, max_new_tokens: int, block_size: int) -> int:
    """Cache rows a batch needs: a last block may be written whole past the last token."""
    return -(-(prompt_bucket + max_new_tokens + block_size) // 64) * 64


def start_decoding(
    target: Target,
    drafter: Drafter | None,
    prompts: Int32[Array, "batch seq"],
    lengths: Int32[Array, " batch"],
    *,
    position_offset: Int32[Array, " batch"],
    limit: Int32[Array, " batch"],
    stop_ids: Int32[Array, " stops"],
    capacity: int,
    max_new_tokens: int,
) -> DecodeState:
    """Prefill prompts and commit each one's first token.

    Args:
        target: the target.
        drafter: the drafter whose context is filled too, or None for plain decoding.
        prompts: token ids, right-padded; at least one token each.
        lengths: real tokens per prompt.
        position_offset: absolute position of each prompt's token 0.
        limit: most tokens of each sequence, prompt included; above its length, at most length + max_new_tokens.
        stop_ids: token ids that end a sequence.
        capacity: see `decode_capacity`.
        max_new_tokens: room for the record of committed blocks.
    """
    layers = () if drafter is None else drafter.config.capture_layers
    out = prefill(
        target, prompts, lengths=lengths, position_offset=position_offset, capture_layers=layers, capacity=capacity
    )
    last = jnp.take_along_axis(out.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    first = next_ids(target, last)
    batch, seq = prompts.shape
    tokens = jnp.pad(prompts, ((0, 0), (0, capacity - seq)))
    tokens = jnp.where(jnp.arange(capacity, dtype=jnp.int32)[None] == lengths[:, None], first[:, None], tokens)
    context = None
    if drafter is not None:
        positions = position_offset[:, None] + jnp.arange(seq, dtype=jnp.int32)[None]
        pad = ((0, 0), (0, 0), (0, capacity - seq), (0, 0))
        rows = jax.vmap(context_kv, in_axes=(None, 0, 0))(drafter, out.features, positions)
        context = tuple(ContextKV(k=jnp.pad(row.k, pad), v=jnp.pad(row.v, pad)) for row in rows)
    return DecodeState(
        tokens=tokens,
        start=lengths,
        limit=limit,
        done=jnp.isin(first, stop_ids) | (lengths + 1 >= limit),
        kv=out.kv,
        context=context,
        committed=jnp.zeros((batch, max_new_tokens), jnp.int32),
        num_blocks=jnp.zeros(batch, jnp.int32),
        stop_ids=stop_ids,
    )


def _write_tokens(
    tokens: Int32[Array, "batch capacity"], new: Int32[Array, "batch block"], starts: Int32[Array, " batch"]
) -> Int32[Array, "batch capacity"]:
    return jax.vmap(lambda row, values, start: lax.dynamic_update_slice(row, values, (start,)))(tokens, new, starts)


def _commit(
    state: DecodeState, kv: KVCache, accepted: Int32[Array, " batch"], greedy: Int32[Array, "batch block"]
) -> tuple[DecodeState, Int32[Array, " batch"]]:
    """Commit accepted drafts and the target's next token; cut at the limit and behind the first stop id.

    Accepted drafts equal the target's tokens, so the target's tokens alone are written. Returns the state without its
    new context rows, and the old start, where those rows belong.
    """
    slot = jnp.arange(greedy.shape[1], dtype=jnp.int32)[None]
    produced = jnp.minimum(accepted + 1, state.limit - state.start - 1)
    is_stop = jnp.isin(greedy, state.stop_ids) & (slot < produced[:, None])
    stopped = is_stop.any(axis=1)
    produced = jnp.where(stopped, jnp.argmax(is_stop, axis=1).astype(jnp.int32) + 1, produced)
    produced = jnp.where(state.done, 0, produced)
    start = state.start + produced
    block = jnp.arange(state.committed.shape[1], dtype=jnp.int32)[None] == state.num_blocks[:, None]
    new = replace(
        state,
        tokens=_write_tokens(state.tokens, greedy, state.start + 1),
        start=start,
        done=state.done | stopped | (start + 1 >= state.limit),
        kv=replace(kv, lengths=start),
        committed=jnp.where(block & ~state.done[:, None], produced[:, None], state.committed),
        num_blocks=state.num_blocks + (~state.done).astype(jnp.int32),
    )
    return new, state.start


def plain_step(target: Target, state: DecodeState) -> DecodeState:
    """Commit one greedy token of every unfinished sequence."""
    anchor = jnp.take_along_axis(state.tokens, state.start[:, None], axis=1)
    out = extend(target, state.kv, anchor)
    new, _ = _commit(state, out.kv, jnp.zeros_like(state.start), next_ids(target, out.hidden))
    return new


def draft(target: Target, drafter: Drafter, state: DecodeState, *, block_size: int) -> Int32[Array, "batch drafted"]:
    """Return every sequence's drafted tokens, slots 1 to B-1; slots past the limit mean nothing."""
    assert state.context is not None
    slot = jnp.arange(block_size, dtype=jnp.int32)
    anchor = jnp.take_along_axis(state.tokens, state.start[:, None], axis=1)
    slots = embed_slots(target.embed_tokens, anchor, drafter.config, block_size=block_size)
    first = state.kv.position_offset + state.start
    hidden = draft_hidden(
        drafter,
        state.context,
        slots,
        positions=first[:, None, None] + slot[None, None],
        context_lengths=state.start[:, None],
        block_lengths=(state.limit - state.start)[:, None],
    )
    return greedy_tokens(hidden[:, 0, 1:], target.head)


def verify(target: Target, drafter: Drafter, state: DecodeState, drafted: Int32[Array, "batch drafted"]) -> DecodeState:
    """Verify drafted tokens in one target forward, commit 1 to B tokens of every unfinished sequence.

    Args:
        target: the target.
        drafter: whose context is extended by what was committed.
        state: before the step.
        drafted: slots 1 to B-1, wherever they come from; those past a sequence's limit are not looked at.
    """
    assert state.context is not None
    block_size = drafted.shape[1] + 1
    anchor = jnp.take_along_axis(state.tokens, state.start[:, None], axis=1)
    block = jnp.concatenate([anchor, drafted], axis=1)
    out = extend(target, state.kv, block, capture_layers=drafter.config.capture_layers)
    greedy = next_ids(target, out.hidden)
    num_drafted = jnp.minimum(block_size, state.limit - state.start) - 1
    new, old_start = _commit(state, out.kv, accept_len(drafted, greedy[:, :-1], num_drafted=num_drafted), greedy)
    positions = (state.kv.position_offset + old_start)[:, None] + jnp.arange(block_size, dtype=jnp.int32)[None]
    rows = jax.vmap(context_kv, in_axes=(None, 0, 0))(drafter, out.features, positions)
    context = tuple(
        ContextKV(
            k=write_rows(old.k, row.k.swapaxes(1, 2), old_start), v=write_rows(old.v, row.v.swapaxes(1, 2), old_start)
        )
        for old, row in zip(state.context, rows, strict=True)
    )
    return replace(new, context=context)


def speculative_step(target: Target, drafter: Drafter, state: DecodeState, *, block_size: int) -> DecodeState:
    """Draft a block, verify it, commit 1 to B tokens of every unfinished sequence."""
    return verify(target, drafter, state, draft(target, drafter, state, block_size=block_size))


def plain_loop(target: Target, state: DecodeState) -> DecodeState:
    """Decode plainly until every sequence is done: one compiled loop, no host round trip."""
    return lax.while_loop(lambda s: ~s.done.all(), lambda s: plain_step(target, s), state)


def speculative_loop(target: Target, drafter: Drafter, state: DecodeState, *, block_size: int) -> DecodeState:
    """Decode speculatively until every sequence is done: one compiled loop, no host round trip.

    The tokens are those of `plain_loop`: a drafted token is committed only where it is the target's own choice.
    """
    return lax.while_loop(
        lambda s: ~s.done.all(), lambda s: speculative_step(target, drafter, s, block_size=block_size), state
    )
