"""What a drafter would have accepted, anchor by anchor, on stored sequences; and the statistics of it.

It promises: blocks are drafted exactly as decoding drafts them and judged by decoding's accept rule; many anchors of a
sequence share one pass over its context; intervals and differences are bootstraps over prompts. `check` and `parity`
stand on it. It imports `cache`, `decode`, `drafter`, `targets`, `nn` and `core`.
"""

from dflash_jax.accept.evaluate import SequenceResult, evaluate_anchors, evaluate_cache
from dflash_jax.accept.fit import check_block_size, check_fit
from dflash_jax.accept.statistics import bootstrap_interval, offset_differences, replay_blocks, summarise

__all__ = [
    "SequenceResult",
    "bootstrap_interval",
    "check_block_size",
    "check_fit",
    "evaluate_anchors",
    "evaluate_cache",
    "offset_differences",
    "replay_blocks",
    "summarise",
]
