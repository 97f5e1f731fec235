"""Attention one query head at a time, in float64 and plain loops."""

from collections.abc import Sequence

import numpy as np


def attend(
    query: np.ndarray, keys: Sequence[np.ndarray], values: Sequence[np.ndarray], sink: float | None = None
) -> np.ndarray:
    """One query over the keys it sees, and a sink that takes its share of the weight; zeros when it sees none."""
    if not keys:
        return np.zeros(len(query))
    scores = [np.dot(query, key) / np.sqrt(len(query)) for key in keys] + ([] if sink is None else [sink])
    weights = np.exp(np.array(scores) - max(scores))
    shares = weights[: len(keys)] / weights.sum()
    return sum((w * value for w, value in zip(shares, values, strict=True)), np.zeros(len(query)))


def causal_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    starts: Sequence[int],
    window: int | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Attention over a cache: query i of a sequence lies at row starts + i and sees what is not after and not too old.

    Shapes: q [batch, query, heads, d], k and v [batch, kv_heads, capacity, d], starts [batch], sinks [heads].
    """
    q, k, v = (np.asarray(part, np.float64) for part in (q, k, v))
    heads_per_kv = q.shape[2] // k.shape[1]
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        last = starts[b] + i
        rows = [row for row in range(last + 1) if window is None or last - row < window]
        shared = h // heads_per_kv
        sink = None if sinks is None else float(sinks[h])
        out[b, i, h] = attend(q[b, i, h], [k[b, shared, r] for r in rows], [v[b, shared, r] for r in rows], sink)
    return out


def block_attention(
    q: np.ndarray,
    context: tuple[np.ndarray, np.ndarray],
    context_visible: np.ndarray,
    block: tuple[np.ndarray, np.ndarray],
    block_visible: np.ndarray,
) -> np.ndarray:
    """Attention of blocks over their context and themselves.

    Shapes: q [anchor, slot, heads, d]; keys and values of the context [kv_heads, context, d], of the blocks
    [anchor, slot, kv_heads, d]; what is visible [anchor, key], or [anchor, slot, key] where slots see different keys.
    """
    q = np.asarray(q, np.float64)
    context_k, context_v = (np.asarray(part, np.float64) for part in context)
    block_k, block_v = (np.asarray(part, np.float64) for part in block)
    heads_per_kv = q.shape[2] // context_k.shape[0]
    context_visible, block_visible = (
        seen if seen.ndim == 3 else np.repeat(seen[:, None], q.shape[1], axis=1)
        for seen in (np.asarray(context_visible), np.asarray(block_visible))
    )
    out = np.zeros(q.shape)
    for a, i, h in np.ndindex(q.shape[:3]):
        shared = h // heads_per_kv
        rows = [row for row in range(context_k.shape[1]) if context_visible[a, i, row]]
        slots = [slot for slot in range(block_k.shape[1]) if block_visible[a, i, slot]]
        keys = [context_k[shared, r] for r in rows] + [block_k[a, s, shared] for s in slots]
        values = [context_v[shared, r] for r in rows] + [block_v[a, s, shared] for s in slots]
        out[a, i, h] = attend(q[a, i, h], keys, values)
    return out
