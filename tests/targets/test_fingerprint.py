"""A fingerprint lives longer than a version: caches and drafters of an older dflash-jax must stay usable."""

import json

import numpy as np

from dflash_jax.core import save_tensors
from dflash_jax.targets import fingerprint

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def test_smollm2s_config_has_the_fingerprint_of_the_first_version(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    save_tensors(tmp_path / "model.safetensors", {"any": np.zeros(1, np.float32)})
    assert fingerprint(tmp_path)["target_config"] == "5ee79b86f2af820901d03bfc698e684200f5278f92898d960c8de7398ca168d0"
