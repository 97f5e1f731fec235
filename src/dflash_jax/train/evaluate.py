"""Held-out measurement while training: decoding's replay on prompts that the drafter was not trained on."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from dflash_jax.accept import bootstrap_interval, evaluate_cache, replay_blocks
from dflash_jax.cache import Cache, check_fingerprint, open_cache
from dflash_jax.core import InputError, no_progress
from dflash_jax.drafter import Drafter

Tree = TypeVar("Tree")
ANCHORS_PER_CHUNK = 64
BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """What drafters are measured on.

    Attributes:
        cache: sequences with every label.
        rows: `sequence_index` of those whose prompts were not trained on.
        num_seen: prompts that were, and are left out.
        max_positions: the target's context.
    """

    cache: Cache
    rows: frozenset[int]
    num_seen: int
    max_positions: int

    def measure(
        self, drafter: Drafter, embed_tokens: Float[Array, "vocab hidden"], head: Float[Array, "vocab hidden"]
    ) -> dict[str, Any]:
        """Return what decoding of the held-out responses would have been.

        Where the run has several processes, all of them call this, and each measures the whole: the arrays are
        gathered, and nothing has to be told to the others. It takes the whole head and the whole drafter on one device.

        Returns:
            `tau_micro` (tokens per block, blocks pooled), `tau_ci95` (its 95 % bootstrap interval over prompts, as
            `check` has it), `tau_macro` (mean of the prompts' means), `accept_len_mean` and `token_acc_mean` (over all
            anchors, as `check` has them), `num_prompts`, `num_seen` (left out), `seconds`.
        """
        started = time.perf_counter()
        drafter, embed_tokens, head = _gathered((drafter, embed_tokens, head))
        results = evaluate_cache(
            drafter,
            embed_tokens.astype(drafter.fc.weight.dtype),
            head.astype(drafter.fc.weight.dtype),
            self.cache,
            max_positions=self.max_positions,
            block_size=drafter.config.block_size,
            anchors_per_chunk=ANCHORS_PER_CHUNK,
            position_offsets=None,
            progress=no_progress,
            rows=self.rows,
        )
        by_prompt: dict[int, list[int]] = {}
        for result in results:
            by_prompt.setdefault(result.prompt_hash, []).extend(replay_blocks(result))
        blocks = [np.asarray(own) for own in by_prompt.values()]
        sums = np.array([[own.sum(), own.size] for own in blocks], float)
        accepted = np.concatenate([result.accepted[result.whole] for result in results])
        labelled = np.concatenate([result.labelled for result in results])
        correct = np.concatenate([result.correct for result in results])
        return {
            "tau_micro": float(np.concatenate(blocks).mean()),
            "tau_ci95": list(bootstrap_interval(sums, samples=BOOTSTRAP_SAMPLES, seed=0)),
            "tau_macro": float(np.mean([own.mean() for own in blocks])),
            "accept_len_mean": float(accepted.mean()) if accepted.size else 0.0,
            "token_acc_mean": float(correct.sum() / max(int(labelled.sum()), 1)),
            "num_prompts": len(blocks),
            "num_seen": self.num_seen,
            "seconds": time.perf_counter() - started,
        }


def _gathered(arrays: Tree) -> Tree:
    """Arrays spread over several processes as whole ones on this process's own device; in one process, as they are."""
    if jax.process_count() == 1:
        return arrays
    return jax.tree_util.tree_map(jnp.asarray, multihost_utils.process_allgather(arrays, tiled=True))


def open_held_out(
    path: Path, *, fingerprint: dict[str, Any], seen: frozenset[int], max_positions: int, where: str
) -> HeldOut:
    """Return the held-out prompts of a cache.

    Args:
        path: `--eval-cache`.
        fingerprint: what it must agree with: target, tokenizer, layers.
        seen: hashes of the prompts trained on.
        max_positions: the target's context.
        where: what the fingerprint is of, for the message.

    Raises:
        InputError: a bad cache, one of another target or other layers, or one that has no unseen prompt.
    """
    cache = open_cache(path)
    check_fingerprint(cache.manifest, fingerprint, what=where)
    stored = [cache.sequence(index) for index in range(cache.num_sequences)]
    unseen = [one for one in stored if one.prompt_hash not in seen and one.last_anchor >= one.prompt_len]
    if not unseen:
        raise InputError(f"--eval-cache {path} has no prompt that the drafter was not trained on: choose another cache")
    return HeldOut(
        cache=cache,
        rows=frozenset(one.sequence_index for one in unseen),
        num_seen=len({one.prompt_hash for one in stored} & seen),
        max_positions=max_positions,
    )
