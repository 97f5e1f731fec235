"""The draft vocabulary: the part of the target's vocabulary that drafts are chosen among.

The network is the same with and without one, and so is the target's head: only the set changes that the argmax is over.

**Source:** FR-Spec (arXiv 2502.14856), which takes the most frequent tokens of a corpus for EAGLE-2's head;
vllm-project/speculators 0.9.0 `train/vocab_mapping.py` for the rule and for `d2t`. It differs in counting labels, the
target's own tokens, and not the text's.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from dflash_jax.core import InputError
from dflash_jax.drafter.model import Drafter
from dflash_jax.nn import greedy_tokens


def most_frequent(counts: Int[np.ndarray, " vocab"], size: int) -> Int32[np.ndarray, " draft_vocab"]:
    """Return the `size` ids that were counted most often, rising; where some tie, the lower ones.

    Args:
        counts: how often each token was a label.
        size: how many, at most the vocabulary.
    """
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def with_draft_vocabulary(drafter: Drafter, ids: Int[np.ndarray, " draft_vocab"] | None) -> Drafter:
    """Return the drafter with another draft vocabulary; None: all tokens.

    Raises:
        InputError: ids that do not rise or are outside the vocabulary.
    """
    if ids is None:
        return replace(drafter, draft_ids=None, config=replace(drafter.config, draft_vocab_size=None))
    check_draft_ids(ids, drafter.config.vocab_size, what="the draft vocabulary")
    config = replace(drafter.config, draft_vocab_size=len(ids))
    return replace(drafter, draft_ids=jnp.asarray(ids, jnp.int32), config=config)


def check_draft_ids(ids: Int[np.ndarray, " draft_vocab"], vocab_size: int, *, what: str) -> None:
    """Refuse ids that do not rise or are no tokens: JAX would clamp them.

    Raises:
        InputError: `what` is named.
    """
    if ids.size == 0 or ids.min() < 0 or ids.max() >= vocab_size or (np.diff(ids) <= 0).any():
        raise InputError(f"{what}: its ids must rise from 0 up, below the vocabulary of {vocab_size}")


def draft_head(drafter: Drafter, head: Float[Array, "vocab hidden"]) -> Float[Array, "draft_vocab hidden"]:
    """Return the head's rows that drafts are chosen among: a copy of `draft_vocab * hidden`, or the head itself."""
    return head if drafter.draft_ids is None else head[drafter.draft_ids]


def drafted_tokens(
    drafter: Drafter, hidden: Float[Array, "*slots hidden"], rows: Float[Array, "draft_vocab hidden"]
) -> Int32[Array, "*slots"]:
    """Return the drafted token of every slot: the argmax over the draft vocabulary; the lowest id wins a tie.

    Args:
        drafter: whose vocabulary it is.
        hidden: slots after the drafter's final norm.
        rows: `draft_head`.
    """
    best = greedy_tokens(hidden, rows)
    return best if drafter.draft_ids is None else drafter.draft_ids[best]


def draft_rows_of(drafter: Drafter, ids: Int32[Array, "*ids"]) -> Int32[Array, "*ids"]:
    """Return the row of `draft_head` that each token has; -1 for one outside the draft vocabulary."""
    if drafter.draft_ids is None:
        return ids
    last = drafter.draft_ids.shape[0] - 1
    row = jnp.minimum(jnp.searchsorted(drafter.draft_ids, ids).astype(jnp.int32), last)
    return jnp.where(drafter.draft_ids[row] == ids, row, -1)
