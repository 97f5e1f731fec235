"""Random Llama checkpoints, written by transformers itself."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

# torch's threads spin while they wait for one another: on shared cores two of them take four times the CPU time of one.
torch.set_num_threads(1)

# (name, sizes, bytes per file). Sizes differ from one another, so that a swap of two axes does not fit.
SIZES = {
    "grouped": {"hidden_size": 30, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4},
    "tied": {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "sharded": {"hidden_size": 20, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A target folder and the model that wrote it."""

    folder: Path
    model: Any


def write_checkpoint(name: str, folder: Path) -> Checkpoint:
    """Norms away from one and weights large enough that every part moves the output."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=101, intermediate_size=37, num_hidden_layers=4, max_position_embeddings=97, initializer_range=0.3,
        rms_norm_eps=3e-4, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        **{"tie_word_embeddings": False} | SIZES[name],
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if "norm" in parameter:
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size="20KB" if name == "sharded" else "1GB")
    return Checkpoint(folder=folder, model=model)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Checkpoint]:
    """One per entry of SIZES; do not write into their folders."""
    return {name: write_checkpoint(name, tmp_path_factory.mktemp("target") / name) for name in SIZES}
