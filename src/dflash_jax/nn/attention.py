"""Grouped-query attention of a target over its KV cache.

Scores and softmax are float32. Every query sees its own row at least.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from dflash_jax.nn.product import host_kernel, on_one_cpu, product

QUERIES_PER_CHUNK = 256  # bounds the score matrix of a long prefill to batch * heads * 256 * capacity
# A prefill is cut into at most so many spans, each of which meets only the keys up to its end: a quarter of what the
# causal mask leaves empty is still computed. More spans save little and take longer to compile.
MOST_SPANS = 4
SPAN_MULTIPLE = 128
# Up to so many queries a CPU is faster with the keys first; with 16 the two forms take the same time.
FEW_QUERIES = 8
_MASKED = -1e30  # beside a key that is seen it takes no weight; finite, so that no difference is NaN


def _softmax_parts(
    scores: Float[Array, "*rows key"], mask: Bool[Array, "*rows key"], sinks: Float[Array, "*rows"] | None = None
) -> tuple[Float[Array, "*rows key"], Float[Array, "*rows 1"]]:
    """Unnormalised weights of a softmax over keys, of which each row sees one at least, and their sum.

    `sinks` are logits that take their share of the sum and give no value.
    """
    scores = jnp.where(mask, scores, _MASKED)
    top = scores.max(axis=-1)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    top = lax.stop_gradient(top)[..., None]
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks[..., None] - top)
    return weights, total


def _rows_in_reach(
    buffer: Float[Array, "batch kv_heads capacity head_dim"], first: Int32[Array, " batch"], size: int
) -> Float[Array, "batch kv_heads size head_dim"]:
    """`size` rows of every sequence from its own first row on."""
    take = jax.vmap(lambda one, row: lax.dynamic_slice_in_dim(one, row, size, axis=1))
    return take(buffer, first)


def _attend_chunk(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch kv_heads capacity head_dim"],
    v: Float[Array, "batch kv_heads capacity head_dim"],
    starts: Int32[Array, " batch"],
    *,
    window: int | None,
    sinks: Float[Array, " heads"] | None,
) -> Float[Array, "batch query heads head_dim"]:
    """`causal_attention` of a few queries."""
    batch, query, heads, head_dim = q.shape
    kv_heads, capacity = k.shape[1:3]
    group = heads // kv_heads
    key_rows = jnp.arange(capacity, dtype=jnp.int32)[None]
    if window is not None and capacity > (reach := window + query - 1):
        # no query of the chunk sees more than these rows: the scores of a long cache are never made
        first = jnp.clip(starts - (window - 1), 0, capacity - reach)
        k, v = (_rows_in_reach(part, first, reach) for part in (k, v))
        key_rows = first[:, None] + jnp.arange(reach, dtype=jnp.int32)[None]
    rows = starts[:, None] + jnp.arange(query, dtype=jnp.int32)[None]
    visible = key_rows[:, None] <= rows[:, :, None]
    if window is not None:
        visible &= key_rows[:, None] > rows[:, :, None] - window
    grouped = q.astype(k.dtype).reshape(batch, query, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    if query == 1 or (query <= FEW_QUERIES and on_one_cpu()):
        # keys first: XLA's CPU product of a few rows with many would turn all keys round (docs/design/017-few-rows.md)
        scores = product("bktd,bkgqd->bktgq", k, grouped, out=jnp.float32)
        scores = scores.transpose(0, 1, 3, 4, 2) * head_dim**-0.5
    else:
        scores = product("bkgqd,bktd->bkgqt", grouped, k, out=jnp.float32) * head_dim**-0.5
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(1, kv_heads, group, 1)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks, scores.shape[:-1])
    weights, total = _softmax_parts(scores, jnp.broadcast_to(visible[:, None, None], scores.shape), sinks)
    out = product("bkgqt,bktd->bkgqd", weights.astype(v.dtype), v, out=jnp.float32) / total
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def causal_attention(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch kv_heads capacity head_dim"],
    v: Float[Array, "batch kv_heads capacity head_dim"],
    starts: Int32[Array, " batch"],
    *,
    window: int | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch query heads head_dim"]:
    """Attention of new tokens over a KV cache that already holds them, in chunks of queries.

    Query i lies at cache row `starts + i` and sees the rows up to its own, with a window only the last `window` of
    them. For a start of 2, three queries, capacity 6 (`x` seen), without a window and with one of 2:

        query 0   x x x . . .     . x x . . .
        query 1   x x x x . .     . . x x . .
        query 2   x x x x x .     . . . x x .

    Args:
        q: queries, after RoPE.
        k: keys by cache row, after RoPE; rows that are not seen may hold anything finite.
        v: values by cache row.
        starts: cache row of each sequence's first query.
        window: rows a query sees, its own included; None: all up to its own. Scores beyond it are not computed.
        sinks: a logit per head that joins the softmax and gives no value; None: no sink.

    **Source:** sinks: huggingface/transformers `models/gpt_oss/modeling_gpt_oss.py`, `eager_attention_forward` (a
    softmax over scores and sink, the sink's share dropped).
    """
    batch, query, heads, head_dim = q.shape
    kernel = host_kernel("attention_kernel", k)
    if kernel is not None and kernel.takes(query, k):
        return kernel.kernel_attention(q, k, v, starts, window=window, sinks=sinks)

    def chunk(
        q_chunk: Float[Array, "batch chunk heads head_dim"], first: Int32[Array, ""]
    ) -> Float[Array, "batch chunk heads head_dim"]:
        return _attend_chunk(q_chunk, k, v, starts + first, window=window, sinks=sinks)

    if query <= QUERIES_PER_CHUNK:
        return chunk(q, jnp.int32(0))
    pad = -query % QUERIES_PER_CHUNK
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    num_chunks = (query + pad) // QUERIES_PER_CHUNK
    q_chunks = q.reshape(batch, num_chunks, QUERIES_PER_CHUNK, heads, head_dim).swapaxes(0, 1)
    firsts = jnp.arange(num_chunks, dtype=jnp.int32) * QUERIES_PER_CHUNK
    out = lax.map(lambda pair: chunk(*pair), (q_chunks, firsts))
    return out.swapaxes(0, 1).reshape(batch, query + pad, heads, head_dim)[:, :query]


def _by_library(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch query kv_heads head_dim"],
    v: Float[Array, "batch query kv_heads head_dim"],
    *,
    window: int | None,
    sinks: Float[Array, " heads"] | None,
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "batch query heads head_dim"]:
    """`prefill_attention` by jax's own, which has no sinks.

    With the softmax's sum known, `total = exp(logsumexp)`, a sink scales its result by `total / (total + exp(sink))`.
    """
    reach = None if window is None else (window - 1, 0)
    out, logsumexp = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=reach, implementation=implementation, return_residual=True
    )
    if sinks is None:
        return out
    share = jax.nn.sigmoid(logsumexp.astype(jnp.float32) - sinks.astype(jnp.float32)[None, None])
    return (out.astype(jnp.float32) * share[..., None]).astype(q.dtype)


def _has_flash(q: Float[Array, "batch query heads head_dim"]) -> bool:
    """Whether cuDNN's fused attention is there: an NVIDIA GPU, 16-bit activations, a head size it knows."""
    return jax.default_backend() == "gpu" and q.dtype.itemsize == 2 and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


def prefill_attention(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch query kv_heads head_dim"],
    v: Float[Array, "batch query kv_heads head_dim"],
    *,
    window: int | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch query heads head_dim"]:
    """Attention of whole sequences from their first token on: `causal_attention` from an empty cache.

    That nothing comes before is known when the program is made, so the keys after a span of queries are left out. For
    four queries in two spans (`x` seen, `.` masked, blank never computed):

        query 0   x .
        query 1   x x
        query 2   x x x .
        query 3   x x x x

    On an NVIDIA GPU with 16-bit activations, cuDNN's fused attention does it, and no score is ever stored.

    Args:
        q: queries, after RoPE.
        k: keys by token, after RoPE.
        v: values by token.
        window: see `causal_attention`.
        sinks: see `causal_attention`.
    """
    if _has_flash(q):
        return _by_library(q, k, v, window=window, sinks=sinks, implementation="cudnn")
    batch, query = q.shape[:2]
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    # a window leaves out what is far by itself
    span = query if window is not None else -(-query // (MOST_SPANS * SPAN_MULTIPLE)) * SPAN_MULTIPLE
    parts = []
    for start in range(0, query, span):
        stop = min(start + span, query)
        starts = jnp.full(batch, start, jnp.int32)
        seen = keys[:, :, :stop], values[:, :, :stop]
        parts.append(causal_attention(q[:, start:stop], *seen, starts, window=window, sinks=sinks))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def write_rows(
    buffer: Float[Array, "batch kv_heads capacity head_dim"],
    rows: Float[Array, "batch query kv_heads head_dim"],
    starts: Int32[Array, " batch"],
) -> Float[Array, "batch kv_heads capacity head_dim"]:
    """Return the buffer with each sequence's new rows written from its own start.

    The caller guarantees `starts + query <= capacity`: XLA would move a later start back, over rows in use.
    """
    new = rows.swapaxes(1, 2).astype(buffer.dtype)
    if on_one_cpu() and new.shape[0] == 1:
        # A single `dynamic_update_slice` XLA for CPUs computes twice, for the loop's next step and for the product that
        # reads it, and copies the whole cache for both. A scatter of several parts it does in place.
        head = jnp.arange(new.shape[1], dtype=jnp.int32)[:, None]
        row = starts[0] + jnp.arange(new.shape[2], dtype=jnp.int32)[None]
        return buffer.at[0, head, row].set(new[0], mode="promise_in_bounds", unique_indices=True)
    write = jax.vmap(lambda one, part, start: lax.dynamic_update_slice(one, part, (jnp.int32(0), start, jnp.int32(0))))
    return write(buffer, new, starts)


def write_first_rows(
    buffer: Float[Array, "batch kv_heads capacity head_dim"], rows: Float[Array, "batch query kv_heads head_dim"]
) -> Float[Array, "batch kv_heads capacity head_dim"]:
    """Return the buffer with its first rows written: `write_rows` from 0, one copy, and none where the rows fill it."""
    return lax.dynamic_update_slice(buffer, rows.swapaxes(1, 2).astype(buffer.dtype), (0, 0, 0, 0))
