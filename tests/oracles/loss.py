"""The block loss and its statistics, block by block in float64; imports nothing of the package."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from oracles import blocks


@dataclass(frozen=True, kw_only=True)
class Row:
    """A stored sequence without padding."""

    features: np.ndarray
    token_ids: list[int]
    next_ids: list[int]
    prompt_len: int
    limit: int
    position_offset: int


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The weighted mean, and hits and labels by slot."""

    loss: float
    hits: list[int]
    counts: list[int]


def block_loss(
    weights: Mapping[str, np.ndarray],
    config: Mapping,
    embed: np.ndarray,
    head: np.ndarray,
    rows: Sequence[Row],
    *,
    gamma: float,
) -> Loss:
    """Loss over every eligible anchor of every sequence; `config` is a drafter's config.json."""
    block_size, mask = config["block_size"], config["dflash_config"]["mask_token_id"]
    total = weight_sum = 0.0
    hits, counts = [0] * (block_size - 1), [0] * (block_size - 1)
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
            for k, label in enumerate(labels, start=1):
                if label is None:
                    continue
                logits = head @ hidden[k]
                weight = np.exp(-(k - 1) / gamma)
                total += weight * (np.log(np.exp(logits).sum()) - logits[label])
                weight_sum += weight
                counts[k - 1] += 1
                hits[k - 1] += int(np.argmax(logits) == label)
    return Loss(loss=total / weight_sum, hits=hits, counts=counts)
