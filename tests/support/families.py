"""Tiny targets of other families than `tiny`'s Llama, with random weights, and guesses for any target's text."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dflash_jax.core import save_tensors
from dflash_jax.targets import read_target_config, stored_shapes

COMMON: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "tie_word_embeddings": False,
    "max_position_embeddings": 160,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    # sinks, biases, experts, YaRN, and a window of 5 in every other layer, which a block of 4 and any text cross
    "architectures": ["GptOssForCausalLM"], "num_local_experts": 7, "num_experts_per_tok": 3, "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "swiglu_limit": 2.0,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 8.0, "beta_fast": 8.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 20,
    },
}  # fmt: skip
QWEN3: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"]}


def write_random_target(folder: Path, changes: dict[str, Any], *, seed: int = 7) -> Path:
    """A target folder without a tokenizer; weights are large enough that greedy text varies."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(COMMON | changes))
    draw = np.random.default_rng(seed)
    weights = {
        name: draw.uniform(0.5, 1.5, shape) if "norm" in name else draw.normal(0, 0.3, shape)
        for name, shape in sorted(stored_shapes(read_target_config(folder)).items())
    }
    save_tensors(folder / "model.safetensors", {name: value.astype(np.float32) for name, value in weights.items()})
    return folder
