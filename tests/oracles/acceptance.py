"""What is accepted at an anchor, decoding's walk, and resampling, as plain loops; imports nothing of the package."""

from collections.abc import Mapping, Sequence

import numpy as np

from oracles import blocks


def replay(accepted: Sequence[int], *, prompt_len: int, length: int) -> list[int]:
    """Tokens that each block commits; `accepted[i]` belongs to the anchor `prompt_len + i`."""
    known = prompt_len + 1  # the prompt and the token that its own pass gives
    committed = []
    while known < length:
        anchor = known - 1
        new = 0
        for _ in range(accepted[anchor - prompt_len]):
            if known < length:
                known, new = known + 1, new + 1
        if known < length:  # the bonus
            known, new = known + 1, new + 1
        committed.append(new)
    return committed


def at_anchor(
    weights: Mapping[str, np.ndarray],
    config: Mapping,
    *,
    embed: np.ndarray,
    head: np.ndarray,
    token_ids: Sequence[int],
    next_ids: Sequence[int],
    features: np.ndarray,
    anchor: int,
    limit: int,
    block_size: int,
    position_offset: int,
    draft_ids: Sequence[int] | None = None,
) -> tuple[int, list[bool], list[bool], float]:
    """One block from nothing but the features before its anchor, in float64.

    Args:
        weights: the drafter folder's tensors, float64.
        config: its config.json.
        embed: `[vocab, hidden]`.
        head: `[vocab, hidden]`.
        token_ids: the text.
        next_ids: the target's token after each.
        features: `[seq, K*H]`.
        anchor: index of the block's first token.
        limit: most tokens decoding would have allowed.
        block_size: slots of a whole block.
        position_offset: absolute position of token 0.
        draft_ids: the tokens that may be drafted; None: all.

    Returns:
        accept_len; hits and labelled slots 1 to B-1; how far the closest decision was from a tie, as a share of the
        logits' spread.
    """
    slots, labels = blocks.labels(
        token_ids, next_ids, length=len(token_ids), limit=limit, anchor=anchor, block_size=block_size
    )
    hidden = blocks.draft_block(
        weights,
        config,
        slots=embed[[token_ids[anchor], *[config["dflash_config"]["mask_token_id"]] * (slots - 1)]],
        features=features[:anchor],
        first_position=position_offset,
    )
    hits, margin = [False] * (block_size - 1), np.inf
    for slot in range(1, slots):
        tokens = range(len(head)) if draft_ids is None else draft_ids
        logits = np.array([head[token] @ hidden[slot] for token in tokens])
        second, first = np.sort(logits)[-2:]
        margin = min(margin, (first - second) / (logits.max() - logits.min()))
        hits[slot - 1] = labels[slot - 1] is not None and tokens[int(np.argmax(logits))] == labels[slot - 1]
    accepted = 0
    while accepted < block_size - 1 and hits[accepted]:
        accepted += 1
    return accepted, hits, [label is not None for label in labels], float(margin)


def resampled_difference(
    a: Mapping[int, tuple[float, float]], b: Mapping[int, tuple[float, float]], *, samples: int, seed: int
) -> np.ndarray:
    """Ratio of b minus that of a, over prompts drawn one by one; those that both have are drawn for both at once."""
    draw = np.random.default_rng(seed)
    strata = [sorted(a.keys() & b.keys()), sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())]
    differences = []
    for _ in range(samples):
        drawn = [key for stratum in strata for key in (draw.choice(stratum, len(stratum)) if stratum else ())]
        ratios = []
        for side in (a, b):
            pairs = [side[int(key)] for key in drawn if int(key) in side]
            ratios.append(sum(top for top, _ in pairs) / sum(bottom for _, bottom in pairs))
        differences.append(ratios[1] - ratios[0])
    return np.array(differences)
