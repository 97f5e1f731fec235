"""From per-anchor results to means, curves and intervals. numpy only.

Two means of acceptance are kept apart. *All anchors*: every position of the text is an anchor once. *Chain* (replay):
only the anchors that decoding would have visited, found by walking a -> a + committed. Decoding lands behind
rejections and full blocks, so the two differ; only the replay predicts decoding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dflash_jax.accept.evaluate import SequenceResult

WHY_THE_MEANS_DIFFER = (
    "accept_len_mean is over all anchors, replay.accept_len_mean over those where decoding starts a block: it skips "
    "what it accepted and lands behind rejections, where the text is harder to guess; only the replay predicts it"
)
FIRST_CONTEXT_BUCKET = 64


def replay_blocks(result: SequenceResult) -> list[int]:
    """Return the tokens each block of the decode chain commits, 1 to B; they sum to `length - prompt_len - 1`.

    Worked: prompt_len 3, length 9, accepted by anchor 3..7 = [2, 0, 0, 4, 1]: anchor 3 commits 3, anchor 6 commits
    min(4 + 1, 2) = 2: [3, 2].

    Raises:
        ValueError: not every eligible anchor was evaluated, so the chain is not known.
    """
    if result.on_chain is None:
        raise ValueError("the chain is not known: evaluate every eligible anchor")
    return result.committed[result.on_chain].tolist()


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
    totals = resample_prompts(len(sums), samples=samples, draw=np.random.default_rng(seed)) @ sums
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5])
    return float(low), float(high)


def rate_ratio_interval(
    a: Float[np.ndarray, "batches pair"], b: Float[np.ndarray, "batches pair"], *, samples: int, seed: int
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a's rate over b's, both of the same batches, resampled together.

    Args:
        a: tokens and seconds of each batch, done one way.
        b: the same done the other way.
        samples: resamples.
        seed: of the resampling.
    """
    draw = np.random.default_rng(seed)
    totals = resample_prompts(len(a), samples=samples, draw=draw) @ np.concatenate([a, b], axis=1)
    low, high = np.percentile(totals[:, 0] / totals[:, 1] / (totals[:, 2] / totals[:, 3]), [2.5, 97.5])
    return float(low), float(high)


def resample_prompts(
    prompts: int, *, samples: int, draw: np.random.Generator
) -> Int[np.ndarray, "{samples} {prompts}"]:
    """How often each prompt comes up in each resample of as many."""
    return draw.multinomial(prompts, np.full(prompts, 1 / prompts), size=samples)


def _pair(numerators: np.ndarray, denominators: np.ndarray | int) -> Float[np.ndarray, " 2"]:
    return np.array([numerators.sum(), np.sum(denominators)], float)


def accept_len_sums(result: SequenceResult) -> Float[np.ndarray, " 2"]:
    """Return accepted tokens and anchors, over anchors whose B-1 slots all have labels."""
    return _pair(result.accepted[result.whole], int(result.whole.sum()))


def token_acc_sums(result: SequenceResult) -> Float[np.ndarray, " 2"]:
    """Return hits and labelled slots, over all anchors."""
    return _pair(result.correct, result.labelled)


def tau_sums(result: SequenceResult) -> Float[np.ndarray, " 2"]:
    """Return committed tokens and blocks of the chain; zeros where it is not known."""
    if result.on_chain is None:
        return np.zeros(2)
    return _pair(result.committed[result.on_chain], result.on_chain)


Sums = Callable[[SequenceResult], Float[np.ndarray, " 2"]]


def sums_by_prompt(results: Sequence[SequenceResult], sums: Sums) -> dict[int, Float[np.ndarray, " 2"]]:
    """Return numerator and denominator of each prompt, by prompt_hash, over all its texts and offsets."""
    found: dict[int, np.ndarray] = {}
    for result in results:
        found[result.prompt_hash] = found.get(result.prompt_hash, np.zeros(2)) + sums(result)
    return found


def _interval(results: Sequence[SequenceResult], sums: Sums, *, samples: int, seed: int) -> list[float]:
    rows = np.array(list(sums_by_prompt(results, sums).values()))
    return list(bootstrap_interval(rows, samples=samples, seed=seed))


def _survival(lengths: Int[np.ndarray, " blocks"], drafted: int) -> list[float]:
    """Share of blocks with at least k accepted tokens, k = 1 to B-1."""
    return [float((lengths >= k).mean()) for k in range(1, drafted + 1)]


def _replay(results: Sequence[SequenceResult], *, samples: int, seed: int) -> dict[str, Any] | None:
    """The chain's numbers; None where it is not known or has no block among these anchors."""
    if any(result.on_chain is None for result in results):
        return None
    chains = [result.committed[result.on_chain] for result in results]
    blocks = np.concatenate([np.zeros(0, int), *chains])
    if not blocks.size:
        return None
    on_chain = np.concatenate([result.accepted[result.on_chain & result.whole] for result in results])
    return {
        "tau_micro": float(blocks.mean()),
        "tau_macro": float(np.mean([chain.mean() for chain in chains if chain.size])),
        "tau_ci95": _interval(results, tau_sums, samples=samples, seed=seed),
        # of the tokens a block commits beyond its first, so that 1 + sum(survival) = tau_micro exactly
        "survival": _survival(blocks - 1, results[0].labelled.shape[1]),
        "num_blocks": len(blocks),
        "accept_len_mean": float(on_chain.mean()) if on_chain.size else None,
        "why": WHY_THE_MEANS_DIFFER,
    }


def summarise(results: Sequence[SequenceResult], *, samples: int, seed: int) -> dict[str, Any] | None:
    """Return one group's numbers under the design's keys; None where no anchor has labels at all its slots.

    - `accept_len_*`, `survival`: over anchors whose B-1 slots all have labels, pooled (micro).
    - `token_acc_mean`: hits over labelled slots, pooled, all anchors.
    - `replay`: over the decode chain; `tau_micro` pools blocks, `tau_macro` averages per-sequence means, `tau_ci95` is
      tau_micro's; `survival` of `committed - 1`, so that 1 + its sum is tau_micro; `accept_len_mean` as above but over
      the chain's anchors alone. None where not every anchor was evaluated.
    - `num_unlabelled`: slots without a label among all anchors.
    """
    accepted = np.concatenate([np.zeros(0, np.int32), *(result.accepted[result.whole] for result in results)])
    if not accepted.size:
        return None
    correct, labelled = sum((token_acc_sums(result) for result in results), np.zeros(2))
    return {
        "accept_len_mean": float(accepted.mean()),
        **{f"accept_len_p{q}": float(np.percentile(accepted, q)) for q in (50, 90, 99)},
        "accept_len_ci95": _interval(results, accept_len_sums, samples=samples, seed=seed),
        "token_acc_mean": float(correct / labelled),
        "survival": _survival(accepted, results[0].labelled.shape[1]),
        "replay": _replay(results, samples=samples, seed=seed),
        "num_anchors": int(accepted.size),
        "num_prompts": len({result.prompt_hash for result in results}),
        "num_unlabelled": sum(int((~result.labelled).sum()) for result in results),
    }


def _groups(parts: Mapping[str, Sequence[SequenceResult]], *, samples: int, seed: int) -> dict[str, dict[str, Any]]:
    """`summarise` of each part; a part without a whole block is left out."""
    found = {name: summarise(part, samples=samples, seed=seed) for name, part in parts.items()}
    return {name: group for name, group in found.items() if group is not None}


def by_offset(results: Sequence[SequenceResult], *, samples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Return `summarise` of the sequences at each position_offset, rising."""
    offsets = sorted({result.position_offset for result in results})
    parts = {str(offset): [r for r in results if r.position_offset == offset] for offset in offsets}
    return _groups(parts, samples=samples, seed=seed)


def by_prompt_set(results: Sequence[SequenceResult], *, samples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Return `summarise` of the sequences of each prompt set, by name."""
    names = sorted({result.prompt_set for result in results})
    parts = {name: [r for r in results if r.prompt_set == name] for name in names}
    return _groups(parts, samples=samples, seed=seed)


def context_bucket(context: int) -> tuple[int, int]:
    """Return the bucket of a number of context tokens, both ends included: (0, 63), (64, 127), (128, 255), doubling."""
    if context < FIRST_CONTEXT_BUCKET:
        return 0, FIRST_CONTEXT_BUCKET - 1
    low = 1 << (context.bit_length() - 1)
    return low, 2 * low - 1


def by_context_length(results: Sequence[SequenceResult], *, samples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Return `summarise` of the anchors in each bucket of context length, rising: `"0-63"`, `"64-127"`, `"128-255"`.

    An anchor's context is the tokens before it, whatever its absolute position. The replay of a bucket is over the
    chain's blocks that start in it.
    """
    longest = max((int(result.anchors[-1]) for result in results if len(result.anchors)), default=-1)
    parts, low = {}, 0
    while low <= longest:
        _, high = context_bucket(low)
        inside = [(result, (result.anchors >= low) & (result.anchors <= high)) for result in results]
        parts[f"{low}-{high}"] = [result.at(chosen) for result, chosen in inside if chosen.any()]
        low = high + 1
    return _groups(parts, samples=samples, seed=seed)


def by_slot(results: Sequence[SequenceResult]) -> list[dict[str, Any]]:
    """Return token_acc of each slot 1 to B-1 by itself, pooled over the anchors that have a label there.

    Whether the slots before it were right plays no part here; `survival` is the share where all up to it were.
    """
    correct, labelled = (
        sum(getattr(result, name).sum(axis=0) for result in results) for name in ("correct", "labelled")
    )
    return [
        {"slot": slot, "token_acc": float(hits / count) if count else None, "num_labelled": int(count)}
        for slot, (hits, count) in enumerate(zip(np.atleast_1d(correct), np.atleast_1d(labelled), strict=True), start=1)
    ]


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
            near = base[result.sequence_index]
            deltas.append((result.accepted.astype(int) - near.accepted)[result.whole & near.whole])
        pooled = np.concatenate([np.zeros(0, int), *deltas])
        if not pooled.size:
            continue
        sums: dict[int, np.ndarray] = {}
        for result, delta in zip(paired, deltas, strict=True):
            sums[result.prompt_hash] = sums.get(result.prompt_hash, np.zeros(2)) + _pair(delta, len(delta))
        differences[str(offset)] = {
            "mean": float(pooled.mean()),
            "ci95": list(bootstrap_interval(np.array(list(sums.values())), samples=samples, seed=seed)),
            "num_anchors": int(pooled.size),
            "num_anchors_differing": int((pooled != 0).sum()),
        }
    return differences
