"""What targets and drafters are made of: RMSNorm, RoPE, attention, MLP, experts, the vocabulary head.

It promises: positions are exact up to 2^31; softmax, norms and losses are float32; nothing of size rows x vocabulary is
made. It imports `core` and, of libraries, only jax, equinox, numpy and jaxtyping.
"""

from dflash_jax.nn.attention import causal_attention, prefill_attention, write_first_rows, write_rows
from dflash_jax.nn.blocks import anchors_per_chunk, as_another_value, block_attention
from dflash_jax.nn.head import (
    DIRECT_LOGITS,
    VOCAB_CHUNK,
    HeadPart,
    LinearCrossEntropy,
    OnlinePass,
    TopPart,
    best_tokens,
    fold_head,
    fold_top,
    greedy_tokens,
    linear_cross_entropy,
    linear_soft_cross_entropy,
    online_pass,
    screen_pays,
    top_tokens,
)
from dflash_jax.nn.head_sample import Sample, draw_sample, named_tokens
from dflash_jax.nn.head_screen16 import Screen16
from dflash_jax.nn.head_screens import Screen, can_screen, make_screen
from dflash_jax.nn.mlp import Linear, SwiGLU
from dflash_jax.nn.moe import Experts, MoE, apply_experts
from dflash_jax.nn.norm import RMSNorm
from dflash_jax.nn.product import on_one_cpu, product, rows_product
from dflash_jax.nn.rope import MAX_POSITION, Rope, apply_rope, check_rope_precision, rope_cos_sin
from dflash_jax.nn.rope_scaling import Llama3Scaling, RopeScaling, YarnScaling, read_rope, scaling_to_json
from dflash_jax.nn.sampling import filter_scores, noisy_scores, sample_tokens

__all__ = [
    "DIRECT_LOGITS",
    "MAX_POSITION",
    "VOCAB_CHUNK",
    "Experts",
    "HeadPart",
    "Linear",
    "LinearCrossEntropy",
    "Llama3Scaling",
    "MoE",
    "OnlinePass",
    "RMSNorm",
    "Rope",
    "RopeScaling",
    "Sample",
    "Screen",
    "Screen16",
    "SwiGLU",
    "TopPart",
    "YarnScaling",
    "anchors_per_chunk",
    "apply_experts",
    "apply_rope",
    "as_another_value",
    "best_tokens",
    "block_attention",
    "can_screen",
    "causal_attention",
    "check_rope_precision",
    "draw_sample",
    "filter_scores",
    "fold_head",
    "fold_top",
    "greedy_tokens",
    "linear_cross_entropy",
    "linear_soft_cross_entropy",
    "make_screen",
    "named_tokens",
    "noisy_scores",
    "on_one_cpu",
    "online_pass",
    "prefill_attention",
    "product",
    "read_rope",
    "rope_cos_sin",
    "rows_product",
    "sample_tokens",
    "scaling_to_json",
    "screen_pays",
    "top_tokens",
    "write_first_rows",
    "write_rows",
]
