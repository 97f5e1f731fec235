"""Random checkpoints of every family, written by transformers itself."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

# torch's threads spin while they wait for one another: on shared cores two of them take four times the CPU time of one.
torch.set_num_threads(1)

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 15000.0, "factor": 8.0, "beta_fast": 8.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# (name, sizes). Sizes differ from one another, so that a swap of two axes does not fit. gpt-oss's window is crossed by
# every test's text, and its router's biases give some experts most of the tokens and one of them none.
SIZES: dict[str, dict[str, Any]] = {
    "grouped": {"hidden_size": 30, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4},
    "tied": {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "sharded": {"hidden_size": 20, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8},
    "llama3": {
        "hidden_size": 30, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
        "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True,
    },
    "qwen3": {"hidden_size": 26, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10},
    "gpt_oss": {
        "hidden_size": 34, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 14, "intermediate_size": 22,
        "num_local_experts": 7, "num_experts_per_tok": 3, "sliding_window": 5, "rope_parameters": YARN,
        "max_position_embeddings": 512, "swiglu_limit": 2.0,
    },
}  # fmt: skip
NAMES = tuple(SIZES)
FAMILIES = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A target folder and the model that wrote it."""

    folder: Path
    model: Any


def write_checkpoint(name: str, folder: Path) -> Checkpoint:
    """Norms away from one, biases away from zero, and weights large enough that every part moves the output."""
    torch.manual_seed(0)
    make_config, make_model = FAMILIES.get(name, (transformers.LlamaConfig, transformers.LlamaForCausalLM))
    common = {
        "vocab_size": 101, "intermediate_size": 37, "num_hidden_layers": 4, "max_position_embeddings": 97,
        "initializer_range": 0.3, "rms_norm_eps": 3e-4, "tie_word_embeddings": False, "use_cache": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }  # fmt: skip
    config = make_config(**common | SIZES[name])
    config._experts_implementation = "eager"  # the grouped product wants sizes in multiples of 16 bytes
    model = make_model(config).eval()
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if "norm" in parameter:
                weight.uniform_(0.5, 1.5)
            elif "router.bias" in parameter:
                weight.copy_(torch.tensor([3.0, -30.0, 1.0, 0.5, 0.0, -0.5, -1.0]))
            elif "bias" in parameter or "sinks" in parameter:
                weight.normal_(0, 0.5)
    model.save_pretrained(folder, max_shard_size="20KB" if name == "sharded" else "1GB")
    return Checkpoint(folder=folder, model=model)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Checkpoint]:
    """One per entry of SIZES; do not write into their folders."""
    return {name: write_checkpoint(name, tmp_path_factory.mktemp("target") / name) for name in SIZES}
