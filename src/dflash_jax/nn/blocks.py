"""Attention of drafted blocks over the shared context of their sequence, forward and backward, a few blocks at a time.

Scores and masks exist for a chunk of blocks only. The backward pass makes them anew from what the forward pass left:
its output and each query's logsumexp, as flash attention does (arXiv 2205.14135, section 3.1 and appendix B.2).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from dflash_jax.nn.product import can_turn, has_fast_16_bit_products, on_one_cpu, product, turned

# Scores over the context that one sequence has at once, float32: 8 MiB, which a CPU's caches still soften. An
# accelerator, where launching a chunk costs as much as computing a small one, has 256 MiB of them.
SCORES_PER_CHUNK = 2**21
_ON_ACCELERATORS = 32
_MASKED = -1e30  # finite, so that a query that sees nothing gives zeros through its zero weights and not NaN


def anchors_per_chunk(anchors: int, *, block: int, heads: int, context: int) -> int:
    """Return how many blocks' scores exist at once on this backend: one block's at least.

    The largest number that divides the anchors, unless it is less than half of the possible: then the last chunk is
    filled up.
    """
    scores = SCORES_PER_CHUNK * (1 if jax.default_backend() == "cpu" else _ON_ACCELERATORS)
    most = max(1, scores // max(1, block * heads * context))
    if anchors <= most:
        return max(1, anchors)
    even = next(size for size in range(most, 0, -1) if anchors % size == 0)
    return even if 2 * even > most else -(-anchors // -(-anchors // most))


class _Blocks(NamedTuple):
    """What belongs to each block: axis 0 of every leaf is the anchor. Queries are grouped by the head they share."""

    q: Float[Array, "anchor kv_heads query head_dim"]  # query: slots times the heads of a group
    k: Float[Array, "anchor kv_heads block head_dim"]
    v: Float[Array, "anchor kv_heads block head_dim"]
    context_lengths: Int32[Array, " anchor"]
    block_lengths: Int32[Array, " anchor"]
    bias: Float[Array, "anchor 1 context"] | None = None  # what masks context rows, where it is made beforehand


class _Sight(NamedTuple):
    """Which keys the slots of a block may see beyond their lengths; settings, not data.

    Attributes:
        window: rows and slots at a distance of so many tokens or more are not seen; None: no limit.
        causal: whether a slot sees its own block up to itself alone.
        group: heads that share keys; queries are slots times these.
        looks: whether a chunk of blocks looks how far it reaches, and computes no more.
    """

    window: int | None = None
    causal: bool = False
    group: int = 1
    looks: bool = False


class _Context(NamedTuple):
    """What all blocks share."""

    k: Float[Array, "kv_heads context head_dim"]
    v: Float[Array, "kv_heads context head_dim"]


class _Output(NamedTuple):
    """The attention's result, and what its backward pass wants to know of the softmax."""

    values: Float[Array, "anchor kv_heads query head_dim"]
    logsumexp: Float[Array, "anchor kv_heads query"]


def _heads_first(tree: Any) -> Any:
    """Axes 0 and 1 turned round where both are there: products over the heads then need no transposed scores."""
    return jax.tree_util.tree_map(lambda leaf: leaf.swapaxes(0, 1) if leaf.ndim > 1 else leaf, tree)


# Products with the context that XLA for CPUs has in 16 bits too. It refuses the others, and these where they are small
# enough to be no product to it: rows, columns or the terms of a sum.
_NARROW_ON_CPU = ("kaqd,kcd->kaqc", "kaqc,kcd->kaqd")
_FEWEST = 32


def _is_narrow_on_cpu(operand: Float[Array, "..."], *sizes: int) -> bool:
    return operand.dtype.itemsize < 4 and min(sizes) >= _FEWEST and has_fast_16_bit_products()


def _product(terms: str, *operands: Float[Array, "..."]) -> Float[Array, "..."]:
    if jax.default_backend() == "cpu":
        (_, *rows, width), (_, *others) = operands[0].shape, operands[1].shape
        if terms not in _NARROW_ON_CPU or not _is_narrow_on_cpu(operands[0], math.prod(rows), width, *others):
            operands = tuple(operand.astype(jnp.float32) for operand in operands)
    return product(terms, *operands, out=jnp.float32)


def _over_rows(
    rows: Float[Array, "kv_heads anchor query head_dim"], weights: Float[Array, "kv_heads anchor query context"]
) -> Float[Array, "kv_heads head_dim context"]:
    """Sums over all queries, channels first: XLA for CPUs is half as fast at many rows and few columns."""
    if jax.default_backend() != "cpu":
        return _product("kaqd,kaqc->kdc", rows, weights)
    flat, others = (part.reshape(part.shape[0], -1, part.shape[-1]) for part in (rows, weights))
    if _is_narrow_on_cpu(rows, *flat.shape[1:], others.shape[-1]) and can_turn(flat):
        made = product("kdr,krc->kdc", turned(flat), others, out=jnp.float32)
    else:
        made = _product("kaqd,kaqc->kdc", rows, weights)
    # or XLA merges the product with what turns its result round, into one that is half as fast
    return lax.optimization_barrier(made)


def _masked(
    scores: Float[Array, "kv_heads anchor query key"],
    lengths: Int32[Array, " anchor"],
    seen_too: Bool[Array, "#anchor query key"] | None = None,
) -> Array:
    """Scores of the first `lengths` keys, of those that are `seen_too`; the others can take no weight."""
    seen = (jnp.arange(scores.shape[-1], dtype=jnp.int32)[None] < lengths[:, None])[:, None]
    return jnp.where((seen if seen_too is None else seen & seen_too)[None], scores, _MASKED)


def context_in_window(
    context_lengths: Int32[Array, " anchor"], slots: Int32[Array, " query"], *, rows: int, window: int
) -> Bool[Array, "anchor query context"]:
    """Which context rows are near enough: slot k behind `a` rows is the text's token a + k.

    Worked, window 3, a = 4: slot 0 sees rows 2 and 3, slot 1 row 3, slot 2 none.
    """
    here = context_lengths[:, None] + slots[None]
    return here[:, :, None] - jnp.arange(rows, dtype=jnp.int32)[None, None] < window


def slots_in_sight(
    slots: Int32[Array, " query"], *, block: int, window: int | None, causal: bool
) -> Bool[Array, "query block"]:
    """Which slots of its own block every slot may see."""
    ahead = jnp.arange(block, dtype=jnp.int32)[None] - slots[:, None]
    seen = ahead <= 0 if causal else jnp.ones(ahead.shape, bool)
    return seen if window is None else seen & (jnp.abs(ahead) < window)


def _scores(
    blocks: _Blocks, context: _Context, sight: _Sight
) -> tuple[Float[Array, "kv_heads anchor query context"], Float[Array, "kv_heads anchor query block"]]:
    """Scores over the context and over the block's own slots; blocks are heads-first."""
    scale = blocks.q.shape[-1] ** -0.5
    far = _product("kaqd,kcd->kaqc", blocks.q, context.k) * scale
    # a sum with what is not seen's -1e30 is -1e30, whatever the score
    far = far if blocks.bias is None else far + blocks.bias[:, :, None]
    near = _product("kaqd,kasd->kaqs", blocks.q, blocks.k) * scale
    slots = jnp.arange(blocks.q.shape[2], dtype=jnp.int32) // sight.group
    in_window = own = None
    if sight.window is not None:
        in_window = context_in_window(blocks.context_lengths, slots, rows=far.shape[-1], window=sight.window)
    if sight.window is not None or sight.causal:
        own = slots_in_sight(slots, block=near.shape[-1], window=sight.window, causal=sight.causal)[None]
    if blocks.bias is None:
        far = _masked(far, blocks.context_lengths, in_window)
    return far, _masked(near, blocks.block_lengths, own)


def _attend(blocks: _Blocks, context: _Context, sight: _Sight) -> _Output:
    blocks = _heads_first(blocks)
    far, near = _scores(blocks, context, sight)
    top = jnp.maximum(far.max(axis=-1, initial=_MASKED), near.max(axis=-1))
    # where nothing is seen every score is the mask's, and each weight must be zero all the same
    top = jnp.where(top == _MASKED, 0.0, top)
    far, near = jnp.exp(far - top[..., None]), jnp.exp(near - top[..., None])
    total = far.sum(axis=-1) + near.sum(axis=-1)
    total = jnp.where(total == 0, 1.0, total)
    values = _product("kaqc,kcd->kaqd", far.astype(context.v.dtype), context.v)
    values += _product("kaqs,kasd->kaqd", near.astype(blocks.v.dtype), blocks.v)
    values = (values / total[..., None]).astype(blocks.q.dtype)
    return _heads_first(_Output(values=values, logsumexp=top + jnp.log(total)))


class _Slopes(NamedTuple):
    """Gradients of what belongs to each block."""

    q: Float[Array, "anchor kv_heads query head_dim"]
    k: Float[Array, "anchor kv_heads block head_dim"]
    v: Float[Array, "anchor kv_heads block head_dim"]


def _attend_backward(
    blocks: _Blocks,
    context: _Context,
    output: _Output,
    slope: Float[Array, "anchor kv_heads query head_dim"],
    sight: _Sight,
) -> tuple[_Context, _Slopes]:
    """What some blocks add to the gradient of the context, float32 and channels first, and their own gradients.

    With weights P = exp(scores - logsumexp) and slope G of the output O: dV = P' G, dP = G V', and
    dscores = P * (dP - sum(G * O)).
    """
    blocks, output, slope = _heads_first((blocks, output, slope))
    scale, narrow = blocks.q.shape[-1] ** -0.5, blocks.q.dtype
    far, near = (jnp.exp(part - output.logsumexp[..., None]) for part in _scores(blocks, context, sight))
    common = _product("kaqd,kaqd->kaq", slope, output.values)[..., None]
    far_slope = far * (_product("kaqd,kcd->kaqc", slope, context.v) - common) * scale
    near_slope = near * (_product("kaqd,kasd->kaqs", slope, blocks.v) - common) * scale
    far, near, far_slope, near_slope = (part.astype(narrow) for part in (far, near, far_slope, near_slope))
    shared = _Context(k=_over_rows(blocks.q, far_slope), v=_over_rows(slope, far))
    mine = _Slopes(
        q=_product("kaqc,kcd->kaqd", far_slope, context.k) + _product("kaqs,kasd->kaqd", near_slope, blocks.k),
        k=_product("kaqs,kaqd->kasd", near_slope, blocks.q),
        v=_product("kaqs,kaqd->kasd", near, slope),
    )
    return shared, _heads_first(jax.tree_util.tree_map(lambda part: part.astype(narrow), mine))


def _chunked(tree: Any, size: int, num_chunks: int) -> Any:
    """Leaves with axis 0 cut into chunks; the last one is filled up with zeros, whose results are cut off."""

    def cut(leaf: Array) -> Array:
        pad = size * num_chunks - leaf.shape[0]
        filled = jnp.pad(leaf, ((0, pad), *[(0, 0)] * (leaf.ndim - 1)))
        return filled.reshape(num_chunks, size, *leaf.shape[1:])

    return jax.tree_util.tree_map(cut, tree)


def _in_chunks(step: Callable[[Any, Any], Any], carry: Any, tree: Any, *, queries: int, context: int) -> Any:
    """Scan `step` over chunks of axis 0 of a tree; `queries`: those of a block, over all heads."""
    anchors = jax.tree_util.tree_leaves(tree)[0].shape[0]
    size = anchors_per_chunk(anchors, block=queries, heads=1, context=context)
    if anchors <= size:
        return step(carry, tree)
    num_chunks = -(-anchors // size)
    carry, out = lax.scan(step, carry, _chunked(tree, size, num_chunks))
    return carry, jax.tree_util.tree_map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:anchors], out)


# Parts of the context that a chunk of blocks may stop at, where the chunk's own reach is looked at.
REACHES = 4


def _within_reach(compute: Callable[[_Blocks, _Context], Any], blocks: _Blocks, context: _Context) -> Any:
    """`compute` of the first part of the context that holds all that some blocks see: a choice made at run time."""
    rows = context.k.shape[1]
    parts = sorted({-(-rows * part // REACHES) for part in range(1, REACHES + 1)})
    longest = blocks.context_lengths.max()
    choice = sum((longest > part).astype(jnp.int32) for part in parts[:-1])

    def of(part: int) -> Callable[[], Any]:
        bias = None if blocks.bias is None else blocks.bias[..., :part]
        some = blocks._replace(bias=bias)
        return lambda: compute(some, _Context(k=context.k[:, :part], v=context.v[:, :part]))

    return lax.switch(choice, [of(part) for part in parts])


def _with_bias(blocks: _Blocks, *, rows: int, sight: _Sight) -> _Blocks:
    """The blocks with what masks their context rows, for a loop over chunks of them on a CPU.

    Made within the loop, XLA compares lengths anew for every head and slot, twice; with a sum the whole attention takes
    a sixth less time. An accelerator has these comparisons for nothing.
    """
    if jax.default_backend() != "cpu" or sight.window is not None:
        return blocks
    seen = jnp.arange(rows, dtype=jnp.int32)[None] < blocks.context_lengths[:, None]
    return blocks._replace(bias=jnp.where(seen, 0.0, _MASKED)[:, None])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(sight: _Sight, blocks: _Blocks, context: _Context) -> Float[Array, "anchor kv_heads query head_dim"]:
    """Attention of one sequence's blocks."""
    return _attention_forward(sight, blocks, context)[0]


def _attention_forward(sight: _Sight, blocks: _Blocks, context: _Context):  # noqa: ANN202  (a custom_vjp's pair)
    def step(carry: Any, chunk: _Blocks) -> Any:
        if sight.looks:
            return carry, _within_reach(lambda some, part: _attend(some, part, sight), chunk, context)
        return carry, _attend(chunk, context, sight)

    queries = blocks.q.shape[1] * blocks.q.shape[2]
    chunks = _with_bias(blocks, rows=context.k.shape[1], sight=sight)
    _, output = _in_chunks(step, (), chunks, queries=queries, context=context.k.shape[1])
    return output.values, (blocks, context, output)


def as_another_value(tree: Any, slope: Any) -> Any:
    """Return arrays with zero times a number of the backward pass added: the same, and another value to XLA.

    What the backward pass makes again of them is then not merged with what the forward pass made, and kept. XLA does
    merge equal computations, over `jax.checkpoint`'s barrier too on a CPU. Arrays of integers are left alone.
    """
    some = jax.tree_util.tree_leaves(slope)[0]
    zero = jnp.float32(0) * some[(0,) * some.ndim].astype(jnp.float32)

    def other(leaf: Array) -> Array:
        return leaf + zero.astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree_util.tree_map(other, tree)


def _attention_backward(sight: _Sight, kept: tuple[_Blocks, _Context, _Output], slope: Float[Array, "..."]):  # noqa: ANN202
    blocks, context, output = kept

    def step(total: _Context, chunk: tuple[_Blocks, _Output, Float[Array, "..."]]):  # noqa: ANN202
        def slopes(some: _Blocks, part: _Context) -> tuple[_Context, _Slopes]:
            shared, mine = _attend_backward(some, part, *chunk[1:], sight)
            rest = context.k.shape[1] - part.k.shape[1]
            return jax.tree_util.tree_map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, 0), (0, rest))), shared), mine

        shared, mine = _within_reach(slopes, chunk[0], context) if sight.looks else slopes(chunk[0], context)
        return jax.tree_util.tree_map(jnp.add, total, shared), mine

    zeros = _Context(*(jnp.zeros(part.swapaxes(1, 2).shape, jnp.float32) for part in context))
    queries = blocks.q.shape[1] * blocks.q.shape[2]
    if blocks.q.shape[0] <= anchors_per_chunk(
        blocks.q.shape[0], block=queries, heads=1, context=context.k.shape[1]
    ):  # no loop keeps the two passes' scores apart
        blocks = blocks._replace(q=as_another_value(blocks.q, slope))
    chunks = _with_bias(blocks, rows=context.k.shape[1], sight=sight)
    shared, mine = _in_chunks(step, zeros, (chunks, output, slope), queries=queries, context=context.k.shape[1])
    shared = jax.tree_util.tree_map(lambda part, like: part.swapaxes(1, 2).astype(like.dtype), shared, context)
    return _Blocks(*mine, context_lengths=None, block_lengths=None), shared  # pyright: ignore[reportArgumentType]


_attention.defvjp(_attention_forward, _attention_backward)


# Blocks that share a copy of the context where cuDNN does it: their own slots are keys of each other there, masked, and
# those are the keys in vain (256 of 3,328 at a context of 3,072 and blocks of 8).
BLOCKS_PER_GROUP = 32
FEWEST_BLOCKS = 8


def _has_flash(q: Float[Array, "*batch anchor block heads head_dim"]) -> bool:
    """Whether cuDNN's fused attention serves: an NVIDIA GPU, 16-bit activations, a head size and length it takes.

    A few blocks, as in decoding, would pay for keys that are copied to stand beside the context.
    """
    anchors, block, _, head_dim = q.shape[-4:]
    return (
        jax.default_backend() == "gpu"
        and q.dtype.itemsize == 2
        and q.ndim <= 5
        and anchors >= FEWEST_BLOCKS
        and head_dim <= 128
        and head_dim % 8 == 0
        and (min(anchors, BLOCKS_PER_GROUP) * block) % 2 == 0
    )


def _by_library(
    q: Float[Array, "batch anchor block heads head_dim"],
    context: tuple[Float[Array, "batch kv_heads context head_dim"], Float[Array, "batch kv_heads context head_dim"]],
    context_lengths: Int32[Array, "batch anchor"],
    own: tuple[
        Float[Array, "batch anchor block kv_heads head_dim"], Float[Array, "batch anchor block kv_heads head_dim"]
    ],
    block_lengths: Int32[Array, "batch anchor"],
    *,
    implementation: Literal["xla", "cudnn"],
    window: int | None = None,
    causal: bool = False,
) -> Float[Array, "batch anchor block heads head_dim"]:
    """`block_attention` by jax's own: groups of blocks, whose keys are their own slots, then a copy of the context.

    Masks are [groups, blocks of a group * block, keys]. Keys past the longest context of a group are left out by
    length, which serves where anchors come in order. The context's gradient is summed over the groups in float32.
    """
    batch, anchors, block, heads, head_dim = q.shape
    size = min(anchors, BLOCKS_PER_GROUP)
    groups = -(-anchors // size)
    queries, narrow = size * block, q.dtype

    def cut(part: Array) -> Array:
        filled = jnp.pad(part, ((0, 0), (0, size * groups - anchors), *[(0, 0)] * (part.ndim - 2)))
        return filled.reshape(batch * groups, size, *part.shape[2:])

    def keys_of(own: Array, context: Array) -> Array:
        """Own slots of a group, then the context, made even in number."""
        rows = context.shape[2] + context.shape[2] % 2
        shared = jnp.pad(context.swapaxes(1, 2), ((0, 0), (0, rows - context.shape[2]), (0, 0), (0, 0)))
        # float32 where the groups share it: that is the dtype its gradient is summed in
        shared = jnp.broadcast_to(shared.astype(jnp.float32)[:, None], (batch, groups, *shared.shape[1:]))
        shared = shared.reshape(batch * groups, *shared.shape[2:]).astype(narrow)
        return jnp.concatenate([cut(own).reshape(batch * groups, queries, -1, head_dim), shared], axis=1)

    keys, values = (keys_of(mine, all_) for mine, all_ in zip(own, context, strict=True))
    contexts, lengths = cut(context_lengths), cut(block_lengths)
    block_of, slot = jnp.divmod(jnp.arange(queries, dtype=jnp.int32), jnp.int32(block))
    key = jnp.arange(keys.shape[1] - queries, dtype=jnp.int32)
    near = (block_of[:, None] == block_of[None])[None] & (slot[None, None] < lengths[:, block_of][:, :, None])
    far = key[None, None] < contexts[:, block_of][:, :, None]
    if window is not None or causal:
        # keys of the group's own slots are its queries, in their order
        sight = slots_in_sight(slot, block=block, window=window, causal=causal)
        near &= sight[:, slot][None]
    if window is not None:
        near_enough = partial(context_in_window, slots=jnp.arange(block, dtype=jnp.int32), rows=len(key), window=window)
        far &= jax.vmap(near_enough)(contexts)[:, block_of, slot]
    out = jax.nn.dot_product_attention(
        cut(q).reshape(batch * groups, queries, heads, head_dim),
        keys,
        values,
        mask=jnp.concatenate([near, far], axis=-1)[:, None],
        key_value_seq_lengths=queries + contexts.max(axis=1),
        implementation=implementation,
    )
    seen = (lengths[:, block_of] > 0) | (contexts[:, block_of] > 0)
    if window is not None:  # a slot that does not exist may be past its window of the context, and sees not itself
        seen = near.any(axis=-1) | far.any(axis=-1)
    out = jnp.where(seen[:, :, None, None], out, 0)
    return out.reshape(batch, groups * size, block, heads, head_dim)[:, :anchors]


def block_attention(
    q: Float[Array, "*batch anchor block heads head_dim"],
    context_k: Float[Array, "*batch kv_heads context head_dim"],
    context_v: Float[Array, "*batch kv_heads context head_dim"],
    context_lengths: Int32[Array, "*batch anchor"],
    block_k: Float[Array, "*batch anchor block kv_heads head_dim"],
    block_v: Float[Array, "*batch anchor block kv_heads head_dim"],
    block_lengths: Int32[Array, "*batch anchor"],
    *,
    window: int | None = None,
    causal: bool = False,
) -> Float[Array, "*batch anchor block heads head_dim"]:
    """Attention of every block over the one context of its sequence and over its own slots, one softmax for both.

    The life of a slot's attention, for context 4, anchors 2 and 4, block 2 (`x` seen; columns: context rows, then the
    slots of block 0, then those of block 1):

        block 0 (anchor 2)   x x . .   x x   . .
        block 1 (anchor 4)   x x x x   . .   x x

    The context is not copied per block, no other block's slots are ever scored, and scores exist for
    `anchors_per_chunk` blocks of a sequence at a time, backward too; so do masks, but on a CPU without a window, where
    each block has one row of them throughout: `anchor * context` float32. Scores, softmax and sums are float32;
    products are of `q`'s dtype. Where nothing is seen the result is zero.

    On an NVIDIA GPU with 16-bit activations, cuDNN's fused attention does it: no score is ever stored, groups of
    `BLOCKS_PER_GROUP` blocks have a copy of the context each, and the backward pass adds in no fixed order.

    Args:
        q: queries of each block's slots, after q_norm and RoPE.
        context_k: keys of the context rows, shared by all blocks, after k_norm and RoPE.
        context_v: values of the context rows.
        context_lengths: how many context rows a block sees, the first ones: its anchor's index.
        block_k: keys of each block's own slots, after k_norm and RoPE.
        block_v: values of each block's own slots.
        block_lengths: how many slots of a block exist, the first ones (a block is shortened at the token budget).
        window: what is so many tokens away or more is not seen, slot k being `context_lengths + k` tokens into the
            text; None: no limit. Rows that are not seen are masked, not skipped.
        causal: whether a slot sees its own block up to itself alone.

    **Source:** DFlash paper (arXiv 2602.06036) section 3 and z-lab/dflash@44947fb:dflash/model.py, one block at a time
    there; window and causality as z-lab's dflash 0.1.0 `_attention_mask` has them.
    """
    if _has_flash(q):
        whole = (q, context_k, context_v, context_lengths, block_k, block_v, block_lengths)
        many = whole if q.ndim == 5 else tuple(part[None] for part in whole)
        q_, k, v, contexts, own_k, own_v, lengths = many
        return _by_library(
            q_, (k, v), contexts, (own_k, own_v), lengths, implementation="cudnn", window=window, causal=causal
        ).reshape(q.shape)
    *batch, anchors, block, heads, head_dim = q.shape
    kv_heads = context_k.shape[-3]

    def one(
        q: Array, block_k: Array, block_v: Array, contexts: Array, lengths: Array, k: Array, v: Array, *,
        looks: bool = False,
    ) -> Array:  # fmt: skip
        grouped = q.reshape(anchors, block, kv_heads, heads // kv_heads, head_dim).swapaxes(1, 2)
        blocks = _Blocks(
            q=grouped.reshape(anchors, kv_heads, -1, head_dim),
            k=block_k.swapaxes(1, 2),
            v=block_v.swapaxes(1, 2),
            context_lengths=contexts,
            block_lengths=lengths,
        )
        sight = _Sight(window=window, causal=causal, group=heads // kv_heads, looks=looks)
        out: Array = _attention(sight, blocks, _Context(k=k, v=v))
        return out.reshape(grouped.shape).swapaxes(1, 2).reshape(anchors, block, heads, head_dim)

    operands = (q, block_k, block_v, context_lengths, block_lengths, context_k, context_v)
    in_chunks = anchors > anchors_per_chunk(anchors, block=block, heads=heads, context=context_k.shape[-2])
    if len(batch) == 1 and in_chunks and on_one_cpu():
        # one sequence after the other, as a choice at run time cannot be made for several at once
        return lax.map(lambda some: one(*some, looks=True), operands)
    for _ in batch:
        one = jax.vmap(one)
    return one(*operands)
