"""Decoding as compiled loops: plain, and speculative with a DFlash drafter.

Indices, for a sequence whose text so far is `tokens[0 .. start]`:

    tokens      0 ... start-1 | start  | start+1 ...
                cached rows   | anchor | free
    features    rows < start  |   -    |             the anchor has not been through the target yet

A step drafts from the anchor, verifies anchor and drafts in one target forward, commits the accepted drafts and the
target's own next token, and moves `start` there. Finished rows stay where they are; what is computed for them is
written past their end.

The target's own token is its argmax or, with a sampler, the sample that belongs to the token's index: a drafted token
is accepted where it is that token, either way.
"""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32

from dflash_jax.decode.accept import accept_len
from dflash_jax.decode.sampler import Sampler, choose_tokens
from dflash_jax.drafter import (
    ContextKV,
    Drafter,
    context_kv,
    draft_head,
    draft_hidden,
    drafted_tokens,
    embed_inputs,
)
from dflash_jax.nn import write_rows
from dflash_jax.targets import KVCache, Target, constrain, extend, next_ids, pin_cache, prefill


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
        accepted: how many of those tokens were drafted; the others, at most one a block, are the target's own.
        num_blocks: target passes made for each sequence after its prompt.
        stop_ids: token ids that end a sequence.
        sampler: how the target chooses; None: greedily.
        draft_head: the head's rows that drafts are chosen among, whole on every device; None: the target's head.
    """

    tokens: Int32[Array, "batch capacity"]
    start: Int32[Array, " batch"]
    limit: Int32[Array, " batch"]
    done: Bool[Array, " batch"]
    kv: KVCache
    context: tuple[ContextKV, ...] | None
    committed: Int32[Array, "batch blocks"]
    accepted: Int32[Array, "batch blocks"]
    num_blocks: Int32[Array, " batch"]
    stop_ids: Int32[Array, " stops"]
    sampler: Sampler | None
    draft_head: Float[Array, "draft_vocab hidden"] | None


_PER_ROW = ("tokens", "start", "limit", "done", "kv", "context", "committed", "accepted", "num_blocks", "sampler")


def _pinned(state: DecodeState, mesh: Mesh | None) -> DecodeState:
    """The state, its rows split over the mesh: programs hand it to each other as it is. A mesh of None pins nothing."""
    one = lambda leaf: constrain(leaf, ("batch", *[None] * (leaf.ndim - 1)), mesh)
    parts = {name: jax.tree_util.tree_map(one, getattr(state, name)) for name in _PER_ROW if name != "kv"}
    whole = lambda leaf: constrain(leaf, (None, None), mesh)
    return replace(
        state, kv=pin_cache(state.kv, mesh), draft_head=jax.tree_util.tree_map(whole, state.draft_head), **parts
    )


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
    sampler: Sampler | None = None,
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
        sampler: how the target chooses tokens; None: greedily.
    """
    layers = () if drafter is None else drafter.config.capture_layers
    out = prefill(
        target, prompts, lengths=lengths, position_offset=position_offset, capture_layers=layers, capacity=capacity
    )
    last = jnp.take_along_axis(out.hidden, (lengths - 1)[:, None, None], axis=1)
    first = choose_tokens(target, last, sampler, lengths[:, None])[:, 0]
    batch, seq = prompts.shape
    tokens = jnp.pad(prompts, ((0, 0), (0, capacity - seq)))
    tokens = jnp.where(jnp.arange(capacity, dtype=jnp.int32)[None] == lengths[:, None], first[:, None], tokens)
    context = head_rows = None
    if drafter is not None:
        positions = position_offset[:, None] + jnp.arange(seq, dtype=jnp.int32)[None]
        pad = ((0, 0), (0, 0), (0, capacity - seq), (0, 0))
        rows = jax.vmap(context_kv, in_axes=(None, 0, 0))(drafter, out.features, positions)
        context = tuple(ContextKV(k=jnp.pad(row.k, pad), v=jnp.pad(row.v, pad)) for row in rows)
        # taken here once, not in every step of a loop
        head_rows = None if drafter.draft_ids is None else draft_head(drafter, target.head)
    state = DecodeState(
        tokens=tokens,
        start=lengths,
        limit=limit,
        done=jnp.isin(first, stop_ids) | (lengths + 1 >= limit),
        kv=out.kv,
        context=context,
        committed=jnp.zeros((batch, max_new_tokens), jnp.int32),
        accepted=jnp.zeros((batch, max_new_tokens), jnp.int32),
        num_blocks=jnp.zeros(batch, jnp.int32),
        stop_ids=stop_ids,
        sampler=sampler,
        draft_head=head_rows,
    )
    return _pinned(state, target.mesh)


def _write_tokens(
    tokens: Int32[Array, "batch capacity"], new: Int32[Array, "batch block"], starts: Int32[Array, " batch"]
) -> Int32[Array, "batch capacity"]:
    return jax.vmap(lambda row, values, start: lax.dynamic_update_slice(row, values, (start,)))(tokens, new, starts)


def _commit(
    state: DecodeState, kv: KVCache, accepted: Int32[Array, " batch"], chosen: Int32[Array, "batch block"]
) -> tuple[DecodeState, Int32[Array, " batch"]]:
    """Commit accepted drafts and the target's next token; cut at the limit and behind the first stop id.

    Accepted drafts equal the target's tokens, so the target's tokens alone are written. Returns the state without its
    new context rows, and the old start, where those rows belong.
    """
    slot = jnp.arange(chosen.shape[1], dtype=jnp.int32)[None]
    produced = jnp.minimum(accepted + 1, state.limit - state.start - 1)
    is_stop = jnp.isin(chosen, state.stop_ids) & (slot < produced[:, None])
    stopped = is_stop.any(axis=1)
    produced = jnp.where(stopped, jnp.argmax(is_stop, axis=1).astype(jnp.int32) + 1, produced)
    produced = jnp.where(state.done, 0, produced)
    start = state.start + produced
    block = jnp.arange(state.committed.shape[1], dtype=jnp.int32)[None] == state.num_blocks[:, None]
    here = block & ~state.done[:, None]
    new = replace(
        state,
        tokens=_write_tokens(state.tokens, chosen, state.start + 1),
        start=start,
        done=state.done | stopped | (start + 1 >= state.limit),
        kv=replace(kv, lengths=start),
        committed=jnp.where(here, produced[:, None], state.committed),
        accepted=jnp.where(here, jnp.minimum(accepted, produced)[:, None], state.accepted),
        num_blocks=state.num_blocks + (~state.done).astype(jnp.int32),
    )
    return new, state.start


def plain_step(target: Target, state: DecodeState) -> DecodeState:
    """Commit one token of every unfinished sequence."""
    anchor = jnp.take_along_axis(state.tokens, state.start[:, None], axis=1)
    out = extend(target, state.kv, anchor)
    chosen = choose_tokens(target, out.hidden, state.sampler, state.start[:, None] + 1)
    new, _ = _commit(state, out.kv, jnp.zeros_like(state.start), chosen)
    return new


def draft(target: Target, drafter: Drafter, state: DecodeState, *, block_size: int) -> Int32[Array, "batch drafted"]:
    """Return every sequence's drafted tokens, slots 1 to B-1; slots past the limit mean nothing."""
    assert state.context is not None
    slot = jnp.arange(block_size, dtype=jnp.int32)
    anchor = jnp.take_along_axis(state.tokens, state.start[:, None], axis=1)
    first = state.kv.position_offset + state.start
    hidden = draft_hidden(
        drafter,
        state.context,
        embed_inputs(target.embed_tokens, anchor, drafter.config),
        positions=first[:, None, None] + slot[None, None],
        context_lengths=state.start[:, None],
        block_lengths=(state.limit - state.start)[:, None],
    )
    hidden = hidden[:, 0].astype(target.head.dtype)
    return next_ids(target, hidden) if state.draft_head is None else drafted_tokens(drafter, hidden, state.draft_head)


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
    slot = jnp.arange(block_size, dtype=jnp.int32)[None]
    chosen = choose_tokens(target, out.hidden, state.sampler, state.start[:, None] + 1 + slot)
    num_drafted = jnp.minimum(block_size, state.limit - state.start) - 1
    new, old_start = _commit(state, out.kv, accept_len(drafted, chosen[:, :-1], num_drafted=num_drafted), chosen)
    positions = (state.kv.position_offset + old_start)[:, None] + slot
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


def _some_steps(
    step: Callable[[DecodeState], DecodeState], state: DecodeState, num_steps: Int32[Array, ""]
) -> DecodeState:
    """At most so many steps, fewer where every sequence is done before."""
    state, _ = lax.while_loop(
        lambda carry: ~carry[0].done.all() & (carry[1] < num_steps),
        lambda c: (step(c[0]), c[1] + 1),
        (state, jnp.int32(0)),
    )
    return state


def plain_loop(target: Target, state: DecodeState) -> DecodeState:
    """Decode plainly until every sequence is done: one compiled loop, no host round trip."""
    return lax.while_loop(lambda s: ~s.done.all(), lambda s: plain_step(target, s), state)


def plain_blocks(target: Target, state: DecodeState, num_blocks: Int32[Array, ""]) -> DecodeState:
    """`plain_loop` for at most `num_blocks` steps."""
    return _pinned(_some_steps(lambda s: plain_step(target, s), state, num_blocks), target.mesh)


def plain_until(target: Target, state: DecodeState, enough: Int32[Array, ""]) -> DecodeState:
    """Decode plainly until `enough` sequences of the batch are done, counting those that were: what a queue is made of.

    It stops after the step in which they are there, so several may have ended with the last of them.
    """
    found = lax.while_loop(lambda s: s.done.sum() < enough, lambda s: plain_step(target, s), state)
    return _pinned(found, target.mesh)


def speculative_until(
    target: Target, drafter: Drafter, state: DecodeState, enough: Int32[Array, ""], *, block_size: int
) -> DecodeState:
    """`plain_until`, a block of every sequence at a time."""
    step = lambda s: speculative_step(target, drafter, s, block_size=block_size)
    return _pinned(lax.while_loop(lambda s: s.done.sum() < enough, step, state), target.mesh)


def idle_rows(state: DecodeState, *, rows: int, mesh: Mesh | None) -> DecodeState:
    """Return a state of so many rows, all of them done and empty, with the capacity and settings of a given state."""
    blank = lambda leaf: jnp.zeros((rows, *leaf.shape[1:]), leaf.dtype)
    parts = {name: jax.tree_util.tree_map(blank, getattr(state, name)) for name in _PER_ROW}
    return _pinned(replace(state, **parts | {"done": jnp.ones(rows, jnp.bool_)}), mesh)


def place_rows(state: DecodeState, new: DecodeState, rows: Int32[Array, " new"], *, mesh: Mesh | None) -> DecodeState:
    """Return the state with sequences of another one, of the same capacity, in the given rows.

    Args:
        state: where they go; what was in these rows is gone.
        new: just started, or anywhere in decoding.
        rows: one for each of its sequences, no row twice.
        mesh: the target's.
    """
    put = lambda old, part: old.at[rows].set(part, unique_indices=True)
    parts = {name: jax.tree_util.tree_map(put, getattr(state, name), getattr(new, name)) for name in _PER_ROW}
    return _pinned(replace(state, **parts), mesh)


def speculative_loop(target: Target, drafter: Drafter, state: DecodeState, *, block_size: int) -> DecodeState:
    """Decode speculatively until every sequence is done: one compiled loop, no host round trip.

    The tokens are those of `plain_loop`: a drafted token is committed only where it is the target's own choice.
    """
    return lax.while_loop(
        lambda s: ~s.done.all(), lambda s: speculative_step(target, drafter, s, block_size=block_size), state
    )


def speculative_blocks(
    target: Target, drafter: Drafter, state: DecodeState, num_blocks: Int32[Array, ""], *, block_size: int
) -> DecodeState:
    """`speculative_loop` for at most `num_blocks` blocks of every sequence: what a stream is made of."""
    step = lambda s: speculative_step(target, drafter, s, block_size=block_size)
    return _pinned(_some_steps(step, state, num_blocks), target.mesh)


def guided_loop(
    target: Target, drafter: Drafter, state: DecodeState, guesses: Int32[Array, "batch capacity"], *, block_size: int
) -> DecodeState:
    """Decode with drafts from given texts until every sequence is done.

    With the target's own text an oracle's run (B tokens a block), with any other text at most as fast as plain
    decoding, and the same tokens.

    Args:
        target: the target.
        drafter: whose context is kept, as in `verify`; it drafts nothing.
        state: after `start_decoding`.
        guesses: the token guessed for every index of each sequence's text.
        block_size: positions per block.
    """
    take = jax.vmap(lambda row, start: lax.dynamic_slice(row, (start,), (block_size - 1,)))
    return lax.while_loop(
        lambda s: ~s.done.all(), lambda s: verify(target, drafter, s, take(guesses, s.start + 1)), state
    )
