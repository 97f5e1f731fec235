"""Experts one token at a time, in float64 and plain loops."""

import math
from collections.abc import Sequence

import numpy as np


def gated(gate_up: Sequence[float], *, alpha: float, limit: float) -> list[float]:
    """Clamped SwiGLU of interleaved gate and up."""
    out = []
    for i in range(len(gate_up) // 2):
        gate, up = gate_up[2 * i], gate_up[2 * i + 1]
        gate = limit if gate > limit else gate
        up = max(-limit, min(limit, up))
        out.append((up + 1) * gate / (1 + math.exp(-alpha * gate)))
    return out


def route(logits: Sequence[float], top_k: int) -> tuple[list[int], list[float]]:
    """The experts of the largest logits, best first, and a softmax over theirs alone."""
    chosen = sorted(range(len(logits)), key=lambda expert: (-logits[expert], expert))[:top_k]
    weights = [math.exp(logits[expert] - logits[chosen[0]]) for expert in chosen]
    return chosen, [weight / sum(weights) for weight in weights]


def apply_experts(
    matrices: dict[str, np.ndarray],
    x: np.ndarray,
    chosen: np.ndarray,
    shares: np.ndarray,
    *,
    alpha: float,
    limit: float,
) -> np.ndarray:
    """Every row's sum over its experts; experts that are not here add nothing.

    `matrices` holds gate_up_proj [experts, hidden, 2 mlp], gate_up_proj_bias, down_proj [experts, mlp, hidden] and
    down_proj_bias.
    """
    m = {name: np.asarray(value, np.float64) for name, value in matrices.items()}
    x = np.asarray(x, np.float64)
    out = np.zeros(x.shape)
    for row, pair in np.ndindex(chosen.shape):
        expert = int(chosen[row, pair])
        if not 0 <= expert < len(m["down_proj"]):
            continue
        gate_up = x[row] @ m["gate_up_proj"][expert] + m["gate_up_proj_bias"][expert]
        inner = np.array(gated(gate_up.tolist(), alpha=alpha, limit=limit))
        out[row] += float(shares[row, pair]) * (inner @ m["down_proj"][expert] + m["down_proj_bias"][expert])
    return out
