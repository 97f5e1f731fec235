"""From per-anchor results to the numbers of the check's JSON. numpy only.

Two means of acceptance are kept apart. *All anchors*: every position of the text is an anchor once. *Replay*: only the
anchors that decoding would have visited, found by walking a -> a + committed. Decoding lands behind rejections and
full blocks, so the two differ; only the replay predicts decoding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dflash_jax.accept.evaluate import SequenceResult


def replay_blocks(result: SequenceResult) -> list[int]:
    """Return the tokens each block of the decode chain commits, 1 to B; they sum to `length - prompt_len - 1`.

    From anchor a, `min(accepted + 1, length - 1 - a)` tokens are committed (the bonus falls away where the text ends)
    and the last of them is the next anchor. Worked: prompt_len 3, length 9, accepted by anchor 3..7 = [2, 0, 0, 4, 1]:
    anchor 3 commits 3, anchor 6 commits min(4 + 1, 2) = 2: [3, 2].
    """
    blocks, anchor = [], result.prompt_len
    while anchor < result.length - 1:
        committed = min(int(result.accepted[anchor - result.prompt_len]) + 1, result.length - 1 - anchor)
        blocks.append(committed)
        anchor += committed
    return blocks


def bootstrap_interval(sums: Float[np.ndarray, "prompts pair"], *, samples: int, seed: int) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of `sum(numerators) / sum(denominators)` over resampled prompts.

    Prompts are resampled, not anchors: anchors of one prompt are not independent. The order of the prompts is of no
    account, and prompts with a denominator of 0 are left out.

    Args:
        sums: numerator and denominator of each prompt; one denominator at least is above 0.
        samples: resamples.
        seed: of the resampling.
    """
    sums = sums[np.lexsort(sums.T)]
    sums = sums[sums[:, 1] > 0]
    prompts = len(sums)
    weights = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=samples)
    totals = weights @ sums
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5])
    return float(low), float(high)


def _by_prompt(
    results: Sequence[SequenceResult], pairs: Sequence[tuple[float, float]]
) -> Float[np.ndarray, "prompts 2"]:
    """Sum each sequence's (numerator, denominator) over sequences of the same prompt."""
    sums: dict[int, np.ndarray] = {}
    for result, pair in zip(results, pairs, strict=True):
        sums[result.prompt_hash] = sums.get(result.prompt_hash, np.zeros(2)) + np.array(pair, float)
    return np.array(list(sums.values()))


def _survival(lengths: Int[np.ndarray, " blocks"], drafted: int) -> list[float]:
    """Share of blocks with at least k accepted tokens, k = 1 to B-1."""
    return [float((lengths >= k).mean()) for k in range(1, drafted + 1)]


def _replay(results: Sequence[SequenceResult], *, drafted: int, samples: int, seed: int) -> dict[str, Any]:
    chains = [replay_blocks(result) for result in results]
    blocks = np.array([block for chain in chains for block in chain])
    pairs = [(float(sum(chain)), float(len(chain))) for chain in chains]
    return {
        "tau_micro": float(blocks.mean()),
        "tau_macro": float(np.mean([np.mean(chain) for chain in chains])),
        "tau_ci95": list(bootstrap_interval(_by_prompt(results, pairs), samples=samples, seed=seed)),
        # of the tokens a block commits beyond its first, so that 1 + sum(survival) = tau_micro exactly
        "survival": _survival(blocks - 1, drafted),
        "num_blocks": len(blocks),
    }


def summarise(results: Sequence[SequenceResult], *, samples: int, seed: int) -> dict[str, Any] | None:
    """Return one group's numbers under the design's keys; None where no anchor has labels at all its slots.

    - `accept_len_*`, `survival`: over anchors whose B-1 slots all have labels, pooled (micro).
    - `token_acc_mean`: hits over labelled slots, pooled, all anchors.
    - `replay`: over the decode chain; `tau_micro` pools blocks, `tau_macro` averages per-sequence means, `tau_ci95` is
      tau_micro's.
    - `num_unlabelled`: slots without a label among all anchors.
    """
    whole = [result.accepted[result.labelled.all(axis=1)] for result in results]
    accepted = np.concatenate([np.zeros(0, np.int32), *whole])
    if not accepted.size:
        return None
    drafted = results[0].labelled.shape[1]
    correct, labelled = (sum(int(getattr(r, name).sum()) for r in results) for name in ("correct", "labelled"))
    pairs = [(float(part.sum()), float(len(part))) for part in whole]
    return {
        "accept_len_mean": float(accepted.mean()),
        **{f"accept_len_p{q}": float(np.percentile(accepted, q)) for q in (50, 90, 99)},
        "accept_len_ci95": list(bootstrap_interval(_by_prompt(results, pairs), samples=samples, seed=seed)),
        "token_acc_mean": correct / labelled,
        "survival": _survival(accepted, drafted),
        "replay": _replay(results, drafted=drafted, samples=samples, seed=seed),
        "num_anchors": int(accepted.size),
        "num_prompts": len({result.prompt_hash for result in results}),
        "num_unlabelled": sum(int((~result.labelled).sum()) for result in results),
    }


def offset_differences(results: Sequence[SequenceResult], *, samples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Return accept_len's difference to the smallest offset, for every other offset, on the same anchors.

    `mean` is pooled over anchors, `ci95` a bootstrap over prompts, `num_anchors_differing` counts anchors with another
    accept_len. A text that is not stored at both offsets is left out.
    """
    offsets = sorted({result.position_offset for result in results})
    base = {result.sequence_index: result for result in results if result.position_offset == offsets[0]}
    differences = {}
    for offset in offsets[1:]:
        paired = [r for r in results if r.position_offset == offset and r.sequence_index in base]
        deltas = []
        for result in paired:
            whole = result.labelled.all(axis=1) & base[result.sequence_index].labelled.all(axis=1)
            deltas.append((result.accepted.astype(int) - base[result.sequence_index].accepted)[whole])
        pooled = np.concatenate([np.zeros(0, int), *deltas])
        if not pooled.size:
            continue
        pairs = [(float(delta.sum()), float(len(delta))) for delta in deltas]
        differences[str(offset)] = {
            "mean": float(pooled.mean()),
            "ci95": list(bootstrap_interval(_by_prompt(paired, pairs), samples=samples, seed=seed)),
            "num_anchors": int(pooled.size),
            "num_anchors_differing": int((pooled != 0).sum()),
        }
    return differences
