"""Grouped-query attention: of a target over its KV cache, and of drafted blocks over a shared context.

Scores and softmax are float32. A query that may see nothing gets zeros, never NaN.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

QUERIES_PER_CHUNK = 256  # bounds the score matrix of a long prefill to batch * heads * 256 * capacity
_MASKED = -1e30  # finite, so that an all-masked row gives zeros through its zero weights and not NaN


def _softmax_parts(
    scores: list[Float[Array, "..."]], masks: list[Bool[Array, "..."]]
) -> tuple[list[Float[Array, "..."]], Float[Array, "..."]]:
    """Unnormalised weights of each part and their common sum, for one softmax over keys that lie in several arrays."""
    scores = [jnp.where(mask, score, _MASKED) for score, mask in zip(scores, masks, strict=True)]
    top = lax.stop_gradient(jnp.stack([score.max(axis=-1) for score in scores]).max(axis=0))[..., None]
    weights = [jnp.where(mask, jnp.exp(score - top), 0.0) for score, mask in zip(scores, masks, strict=True)]
    total = sum((weight.sum(axis=-1, keepdims=True) for weight in weights), start=jnp.zeros_like(top))
    return weights, jnp.where(total == 0, 1.0, total)


def causal_attention(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch kv_heads capacity head_dim"],
    v: Float[Array, "batch kv_heads capacity head_dim"],
    visible: Bool[Array, "batch query capacity"],
) -> Float[Array, "batch query heads head_dim"]:
    """Attention of new tokens over a KV cache that already holds them, in chunks of queries.

    Args:
        q: queries, after RoPE.
        k: keys by cache row, after RoPE; rows that are not visible may hold anything finite.
        v: values by cache row.
        visible: which cache rows each query sees.
    """
    batch, query, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads

    def chunk(
        q_chunk: Float[Array, "batch chunk heads head_dim"], visible_chunk: Bool[Array, "batch chunk capacity"]
    ) -> Float[Array, "batch chunk heads head_dim"]:
        grouped = q_chunk.reshape(batch, -1, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
        scores = jnp.einsum("bkgqd,bktd->bkgqt", grouped, k, preferred_element_type=jnp.float32) * head_dim**-0.5
        (weights,), total = _softmax_parts([scores], [visible_chunk[:, None, None]])
        out = jnp.einsum("bkgqt,bktd->bkgqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
        return out.transpose(0, 3, 1, 2, 4).reshape(q_chunk.shape).astype(q.dtype)

    if query <= QUERIES_PER_CHUNK:
        return chunk(q, visible)
    pad = -query % QUERIES_PER_CHUNK
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    visible = jnp.pad(visible, ((0, 0), (0, pad), (0, 0)))
    num_chunks = (query + pad) // QUERIES_PER_CHUNK
    q_chunks = q.reshape(batch, num_chunks, QUERIES_PER_CHUNK, heads, head_dim).swapaxes(0, 1)
    visible_chunks = visible.reshape(batch, num_chunks, QUERIES_PER_CHUNK, -1).swapaxes(0, 1)
    out = lax.map(lambda pair: chunk(*pair), (q_chunks, visible_chunks))
    return out.swapaxes(0, 1).reshape(batch, query + pad, heads, head_dim)[:, :query]


def block_attention(
    q: Float[Array, "anchor block heads head_dim"],
    context_k: Float[Array, "kv_heads context head_dim"],
    context_v: Float[Array, "kv_heads context head_dim"],
    context_visible: Bool[Array, "anchor context"],
    block_k: Float[Array, "anchor block kv_heads head_dim"],
    block_v: Float[Array, "anchor block kv_heads head_dim"],
    block_visible: Bool[Array, "anchor block"],
) -> Float[Array, "anchor block heads head_dim"]:
    """Attention of every block over the one context of its sequence and over its own slots, one softmax for both.

    The life of a slot's attention, for context 4, anchors 2 and 4, block 2 (`x` seen; columns: context rows, then the
    slots of block 0, then those of block 1):

        block 0 (anchor 2)   x x . .   x x   . .
        block 1 (anchor 4)   x x x x   . .   x x

    The context is not copied per block and no other block's slots are ever scored.

    Args:
        q: queries of each block's slots, after q_norm and RoPE.
        context_k: keys of the context rows, shared by all blocks, after k_norm and RoPE.
        context_v: values of the context rows.
        context_visible: which context rows a block sees: those strictly before its anchor.
        block_k: keys of each block's own slots, after k_norm and RoPE.
        block_v: values of each block's own slots.
        block_visible: which slots of a block exist (a block is shortened at the token budget).

    **Source:** DFlash paper (arXiv 2602.06036) section 3 and z-lab/dflash@44947fb:dflash/model.py, one block at a time
    there.
    """
    anchors, block, heads, head_dim = q.shape
    kv_heads = context_k.shape[0]
    grouped = q.reshape(anchors, block, kv_heads, heads // kv_heads, head_dim)
    scale = head_dim**-0.5
    context_scores = jnp.einsum("abkgd,kcd->kabgc", grouped, context_k, preferred_element_type=jnp.float32) * scale
    block_scores = jnp.einsum("abkgd,askd->kabgs", grouped, block_k, preferred_element_type=jnp.float32) * scale
    (context_weights, block_weights), total = _softmax_parts(
        [context_scores, block_scores],
        [context_visible[None, :, None, None], block_visible[None, :, None, None]],
    )
    out = jnp.einsum(
        "kabgc,kcd->kabgd", context_weights.astype(context_v.dtype), context_v, preferred_element_type=jnp.float32
    )
    out += jnp.einsum(
        "kabgs,askd->kabgd", block_weights.astype(block_v.dtype), block_v, preferred_element_type=jnp.float32
    )
    return jnp.transpose(out / total, (1, 2, 0, 3, 4)).reshape(q.shape).astype(q.dtype)


def write_rows(
    buffer: Float[Array, "batch kv_heads capacity head_dim"],
    rows: Float[Array, "batch query kv_heads head_dim"],
    starts: Int32[Array, " batch"],
) -> Float[Array, "batch kv_heads capacity head_dim"]:
    """Return the buffer with each sequence's new rows written from its own start.

    The caller guarantees `starts + query <= capacity`: XLA would move a later start back, over rows in use.
    """
    write = jax.vmap(lambda one, new, start: lax.dynamic_update_slice(one, new, (jnp.int32(0), start, jnp.int32(0))))
    return write(buffer, rows.swapaxes(1, 2).astype(buffer.dtype), starts)
