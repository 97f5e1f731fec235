"""The block losses and their statistics, block by block in float64; imports nothing of the package."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from oracles import blocks


@dataclass(frozen=True, kw_only=True)
class Row:
    """A stored sequence without padding; `top` has token ids and log-probabilities after each token."""

    features: np.ndarray
    token_ids: list[int]
    next_ids: list[int]
    prompt_len: int
    limit: int
    position_offset: int
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The weighted mean, and hits and labels by slot."""

    loss: float
    hits: list[int]
    counts: list[int]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of one row."""
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def kl(log_q: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> float:
    """`KL(p || q)` of the given tokens' probabilities, which are made to sum to 1."""
    p = np.exp(logprobs.astype(np.float64))
    total = 0.0
    for token, share in zip(ids, p / p.sum(), strict=True):
        total += share * (np.log(share) - log_q[token])
    return total


def dpace_weights(probabilities: Sequence[float | None], alpha: float) -> list[float]:
    """Weights of a block's drafted slots; None: no label."""
    weights = []
    for k in range(len(probabilities)):
        weight = 0.0
        for m in range(k, len(probabilities)):
            if probabilities[m] is not None:
                weight += float(np.prod([(1 - alpha) * q + alpha for q in probabilities[: m + 1] if q is not None]))
        weights.append(0.0 if probabilities[k] is None else weight)
    return weights


def block_loss(
    weights: Mapping[str, np.ndarray],
    config: Mapping,
    embed: np.ndarray,
    head: np.ndarray,
    rows: Sequence[Row],
    *,
    gamma: float,
    kind: str = "cross-entropy",
    denominator: str = "weights",
    alpha: float = 0.5,
    slot_weights: Sequence[Sequence[float]] | None = None,
) -> Loss:
    """Loss over every eligible anchor of every sequence; `config` is a drafter's config.json.

    With `slot_weights`, one list per block, these are taken and not computed: d-pace's are constants to the gradient.
    """
    total = weight_sum = 0.0
    hits, counts = [0] * (config["block_size"] - 1), [0] * (config["block_size"] - 1)
    for number, slots in enumerate(every_block(weights, config, embed, head, rows)):
        weighed = slot_weights[number] if slot_weights else _weights(slots, kind=kind, gamma=gamma, alpha=alpha)
        for k, slot in enumerate(slots):
            if slot is None:
                continue
            row, before, label, log_q = slot
            value = -log_q[label]
            if kind == "kl":
                value = kl(log_q, row.top_ids[before], row.top_logprobs[before])
            total += weighed[k] * value
            weight_sum += weighed[k]
            counts[k] += 1
            hits[k] += int(np.argmax(log_q) == label)
    return Loss(loss=total / (weight_sum if denominator == "weights" else sum(counts) + 1e-5), hits=hits, counts=counts)


def _weights(slots: Sequence, *, kind: str, gamma: float, alpha: float) -> list[float]:
    if kind == "d-pace":
        return dpace_weights([None if slot is None else float(np.exp(slot[3][slot[2]])) for slot in slots], alpha)
    return [np.exp(-k / gamma) for k in range(len(slots))]


def all_dpace_weights(
    weights: Mapping[str, np.ndarray], config: Mapping, embed: np.ndarray, head: np.ndarray, rows: Sequence[Row]
) -> list[list[float]]:
    """D-PACE's weights of every block, alpha 0.5."""
    found = every_block(weights, config, embed, head, rows)
    return [_weights(slots, kind="d-pace", gamma=1.0, alpha=0.5) for slots in found]


def every_block(
    weights: Mapping[str, np.ndarray], config: Mapping, embed: np.ndarray, head: np.ndarray, rows: Sequence[Row]
) -> list[list]:
    """Per block, per drafted slot: (sequence, index of the token before, label, log-probabilities); None: no label."""
    block_size, mask = config["block_size"], config["dflash_config"]["mask_token_id"]
    found = []
    for row in rows:
        length = len(row.token_ids)
        for anchor in blocks.eligible(row.prompt_len, length):
            slots, labels = blocks.labels(
                row.token_ids, row.next_ids, length=length, limit=row.limit, anchor=anchor, block_size=block_size
            )
            hidden = blocks.draft_block(
                weights,
                config,
                slots=embed[[row.token_ids[anchor], *[mask] * (slots - 1)]],
                features=row.features[:anchor],
                first_position=row.position_offset,
            )
            block = [
                None if label is None else (row, anchor + k - 1, label, log_softmax(head @ hidden[k]))
                for k, label in enumerate(labels, start=1)
            ]
            found.append(block + [None] * (block_size - 1 - len(block)))
    return found
