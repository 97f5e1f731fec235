"""Block rules and the drafter's maths as plain loops over numbers; imports nothing of the package."""

from collections.abc import Mapping, Sequence

import numpy as np


def eligible(prompt_len: int, length: int) -> list[int]:
    """Anchors: response tokens that have a token after them."""
    return [a for a in range(length) if a >= prompt_len and a + 1 < length]


def labels(
    token_ids: Sequence[int], next_ids: Sequence[int], *, length: int, limit: int, anchor: int, block_size: int
) -> tuple[int, list[int | None]]:
    """Slots that exist, and the label of slots 1 to B-1 (None: unlabelled)."""
    slots = max(1, min(block_size, limit - anchor))
    found: list[int | None] = []
    greedy = True
    for k in range(1, block_size):
        if not greedy or k >= slots or anchor + k >= length:
            found.append(None)
            continue
        found.append(next_ids[anchor + k - 1])
        greedy = token_ids[anchor + k] == next_ids[anchor + k - 1]
    return slots, found


def accept_len(drafted: Sequence[int], greedy: Sequence[int], num_drafted: int) -> int:
    """Leading equal tokens among the first `num_drafted`."""
    count = 0
    for ours, theirs in list(zip(drafted, greedy, strict=True))[:num_drafted]:
        if ours != theirs:
            break
        count += 1
    return count


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean() + eps) * weight


def _rotate(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """One head's channels, pair (i, i + d/2) turned by position * theta^(-2i/d)."""
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out


def draft_block(
    weights: Mapping[str, np.ndarray],
    config: Mapping,
    *,
    slots: np.ndarray,
    features: np.ndarray,
    first_position: int,
    block_shift: int = 0,
) -> np.ndarray:
    """The drafter's output for one block, slot by slot and head by head, in float64.

    Args:
        weights: a drafter folder's tensors, float64.
        config: its config.json.
        slots: `[slots, hidden]` input embeddings.
        features: `[anchor, K*H]` features of the tokens before the anchor.
        first_position: absolute position of the first feature row.
        block_shift: added to the position of every slot, and to no feature row's.

    Layers slide and are causal as `layer_types`, `sliding_window` and `is_causal` say.
    """
    eps, theta, d = config["rms_norm_eps"], config["rope_theta"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    anchor_position = first_position + len(features) + block_shift
    context = [_norm(weights["fc.weight"] @ row, weights["hidden_norm.weight"], eps) for row in features]
    x = slots.astype(np.float64)
    for layer in range(config["num_hidden_layers"]):
        w = {n.removeprefix(f"layers.{layer}."): t for n, t in weights.items() if n.startswith(f"layers.{layer}.")}

        def project(name: str, row: np.ndarray, w: Mapping[str, np.ndarray] = w) -> np.ndarray:
            return (w[f"self_attn.{name}.weight"] @ row + w.get(f"self_attn.{name}.bias", 0.0)).reshape(-1, d)

        normed = [_norm(row, w["input_layernorm.weight"], eps) for row in x]
        rows = [(row, first_position + i) for i, row in enumerate(context)]
        rows += [(row, anchor_position + i) for i, row in enumerate(normed)]
        keys = [
            [_rotate(_norm(h, w["self_attn.k_norm.weight"], eps), at, theta) for h in project("k_proj", row)]
            for row, at in rows
        ]
        values = [project("v_proj", row) for row, _ in rows]
        slides = config["layer_types"][layer] == "sliding_attention"
        causal = slides if config.get("is_causal") is None else config["is_causal"]
        attended = []
        for k, row in enumerate(normed):
            parts = []
            for head, q in enumerate(project("q_proj", row)):
                q = _rotate(_norm(q, w["self_attn.q_norm.weight"], eps), anchor_position + k, theta)
                kv = head // (heads // kv_heads)
                here, seen = len(features) + k, []
                for there in range(len(keys)):
                    near = not slides or abs(here - there) < config["sliding_window"]
                    if near and (not causal or there <= here):
                        seen.append(there)
                scores = np.array([q @ keys[there][kv] / np.sqrt(d) for there in seen])
                shares = np.exp(scores - scores.max())
                parts.append(sum(s * values[there][kv] for s, there in zip(shares / shares.sum(), seen, strict=True)))
            out = w["self_attn.o_proj.weight"] @ np.concatenate(parts)
            attended.append(out + w.get("self_attn.o_proj.bias", 0.0))
        x = x + np.array(attended)
        for k, row in enumerate(x):
            y = _norm(row, w["post_attention_layernorm.weight"], eps)
            gate, up = w["mlp.gate_proj.weight"] @ y, w["mlp.up_proj.weight"] @ y
            x[k] = row + w["mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
    return np.array([_norm(row, weights["norm.weight"], eps) for row in x])
