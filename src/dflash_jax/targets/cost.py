"""What a forward costs, from the config alone."""

import math

from dflash_jax.targets.config import TargetConfig
from dflash_jax.targets.layout import tensor_shapes


def num_active_parameters(config: TargetConfig) -> int:
    """Return how many parameters a token meets: all but those of the experts that do not work on it."""
    total = 0
    for name, size in tensor_shapes(config).items():
        share = (config.experts_per_token, config.num_experts) if ".experts." in name else (1, 1)
        total += math.prod(size) * share[0] // share[1]
    return total


def visible_pairs(length: int, window: int | None) -> int:
    """Return how many (query, key) pairs causal attention has over a sequence from its first token.

    Worked: length 4 without a window 1 + 2 + 3 + 4 = 10, with a window of 2: 1 + 2 + 2 + 2 = 7.
    """
    reach = min(window or length, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def prefill_flops(config: TargetConfig, *, batch: int, length: int) -> float:
    """Return the FLOPs that features and next_ids of whole sequences need: matrix products, 2 per multiply and add.

    The embedding is a lookup and costs nothing; every token meets the head once; attention counts the pairs that causal
    masks and windows leave, though an implementation may compute more. Norms, softmax, RoPE and gates are left out: a
    few parts in a thousand.

    Args:
        config: the target.
        batch: sequences.
        length: tokens of each.
    """
    vocab = config.vocab_size * config.hidden_size
    products = num_active_parameters(config) - (0 if config.tie_embeddings else vocab)
    windows = [config.sliding_window if i in config.sliding_layers else None for i in range(config.num_layers)]
    pairs = sum(visible_pairs(length, window) for window in windows)
    # scores and weighted values: a product of head_dim each, for every head
    attention = 2 * 2 * config.num_heads * config.head_dim * pairs
    return float(batch * (2 * products * length + attention))
