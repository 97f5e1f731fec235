"""Sampling as plain loops in float64: the filtered distribution of logits, and of whole texts by enumeration."""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np


def probabilities(
    logits: Sequence[float], *, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> list[float]:
    """Probability of every token. Tokens of equal logits stay or go together."""
    best = max(logits)
    shares = [float(np.exp((float(x) - best) / temperature)) for x in logits]
    kept = set(range(len(shares)))
    if top_k is not None:
        edge = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
        kept = {i for i in kept if logits[i] >= edge}
    if top_p is not None:
        total, mass, edge = sum(shares[i] for i in kept), 0.0, -np.inf
        for i in sorted(kept, key=lambda i: -logits[i]):
            mass += shares[i] / total
            if mass >= top_p:
                edge = logits[i]
                break
        kept = {i for i in kept if logits[i] >= edge}
    total = sum(shares[i] for i in kept)
    return [shares[i] / total if i in kept else 0.0 for i in range(len(shares))]


def text_probabilities(
    next_probabilities: Callable[[tuple[int, ...]], Sequence[float]], *, vocab_size: int, length: int
) -> dict[tuple[int, ...], float]:
    """Probability of every text of `length` tokens; `next_probabilities` is given what stands before a token."""
    found = {}
    for text in product(range(vocab_size), repeat=length):
        found[text] = float(np.prod([next_probabilities(text[:i])[text[i]] for i in range(length)]))
    return found


def chi_square(counts: dict, expected: dict) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; outcomes expected less than 8 times are taken together."""
    assert set(counts) <= set(expected)
    groups, rest = [], [0, 0.0]
    for outcome, mean in expected.items():
        if mean >= 8:
            groups.append((counts.get(outcome, 0), mean))
        else:
            rest = [rest[0] + counts.get(outcome, 0), rest[1] + mean]
    if rest[1] == 0:
        assert rest[0] == 0, "something came out that is impossible"
    else:
        groups.append(tuple(rest))
    return sum((seen - mean) ** 2 / mean for seen, mean in groups), len(groups) - 1
