"""A small llama GGUF file with random weights, written by the gguf package from a transformers model."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

TOKENS = ["<unk>", "<s>", "</s>", "<mask-me>", "[word]", *"abcdefgh0123456789", "Ġ", "ab", "Ġab", "01"]
TYPES = [3, 3, 3, 3, 4, *[1] * 22]
MERGES = ["a b", "Ġ ab", "0 1"]

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_model(*, tied: bool) -> transformers.LlamaForCausalLM:
    """Random Llama with grouped heads (4 on 2), a head_dim of its own and no two sizes alike."""
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=40, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=97,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, rms_norm_eps=3e-5,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # transformers starts every norm at one, where a swap of two would not show
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Llama.cpp's order of q and k rows, head by head and row by row."""
    head_dim = len(rows) // heads
    order = []
    for head in range(heads):
        for pair in range(head_dim // 2):
            order += [head * head_dim + pair, head * head_dim + pair + head_dim // 2]
    return rows[order]


def gguf_tensors(model: transformers.LlamaForCausalLM) -> dict[str, np.ndarray]:
    """The model's weights under GGUF names and in GGUF's row order."""
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem = name.removesuffix(".weight")
        value = weight.numpy()
        if stem.endswith("q_proj"):
            value = permuted(value, model.config.num_attention_heads)
        elif stem.endswith("k_proj"):
            value = permuted(value, model.config.num_key_value_heads or 0)
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            tensors[f"blk.{layer}.{NAMES[part]}.weight"] = value
        else:
            tensors[f"{NAMES[stem]}.weight"] = value
    return tensors


METADATA: Mapping[str, Any] = {
    "llama.block_count": 3,
    "llama.context_length": 97,
    "llama.embedding_length": 40,
    "llama.feed_forward_length": 56,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 6,
    "llama.rope.freq_base": 5000.0,
    "llama.rope.dimension_count": 6,
    "llama.attention.layer_norm_rms_epsilon": 3e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}",
}


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    changes: Mapping[str, Any] | None = None,
    drop: Collection[str] = (),
    architecture: str = "llama",
    quantise: Callable[[str], gguf.GGMLQuantizationType] = lambda _: gguf.GGMLQuantizationType.F32,
) -> Path:
    """Write a GGUF of METADATA with `changes` and without the keys of `drop`; None as a change's value drops too."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (dict(METADATA) | dict(changes or {})).items():
        if key in drop:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        kind = quantise(name)
        data = gguf.quants.quantize(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
