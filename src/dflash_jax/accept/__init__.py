"""What a drafter would have accepted, anchor by anchor, on stored sequences; and the statistics of it.

It promises: blocks are drafted exactly as decoding drafts them and judged by decoding's accept rule; many anchors of a
sequence share one pass over its context; intervals and differences are bootstraps over prompts. `check` and `parity`
stand on it. It imports `cache`, `decode`, `drafter`, `targets` and `core`.
"""

from dflash_jax.accept.anchors import AnchorChoice, hash_text, parse_anchors
from dflash_jax.accept.compare import compare, difference_interval, pair_results
from dflash_jax.accept.evaluate import SequenceResult, evaluate_cache, label_counts, walk_chain
from dflash_jax.accept.fit import check_block_size, check_fit
from dflash_jax.accept.statistics import (
    bootstrap_interval,
    by_context_length,
    by_offset,
    by_prompt_set,
    by_slot,
    offset_differences,
    rate_ratio_interval,
    replay_blocks,
    summarise,
)

__all__ = [
    "AnchorChoice",
    "SequenceResult",
    "bootstrap_interval",
    "by_context_length",
    "by_offset",
    "by_prompt_set",
    "by_slot",
    "check_block_size",
    "check_fit",
    "compare",
    "difference_interval",
    "evaluate_cache",
    "hash_text",
    "label_counts",
    "offset_differences",
    "pair_results",
    "parse_anchors",
    "rate_ratio_interval",
    "replay_blocks",
    "summarise",
    "walk_chain",
]
