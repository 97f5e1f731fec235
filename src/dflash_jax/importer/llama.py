"""GGUF's llama architecture in Hugging Face's terms: config.json, tensor names and shapes, row order of q and k."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from dflash_jax.core import InputError, check_names_and_shapes
from dflash_jax.importer.gguf_file import GgufFile

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaShape:
    """Sizes of a llama-architecture model, counted in elements."""

    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    """The head is the embedding: the file has no output.weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPlan:
    """Where one tensor of the GGUF goes."""

    gguf_name: str
    name: str
    """Hugging Face's name."""
    shape: tuple[int, ...]
    rotary_heads: int | None
    """Heads whose rows GGUF permutes (q and k); None for every other tensor."""


def read_shape(file: GgufFile) -> LlamaShape:
    """Read the sizes of a llama-architecture GGUF.

    Raises:
        InputError: another architecture, or a variant whose forward is not plain Llama's.
    """
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        raise InputError(f"{file.path} is of architecture {architecture!r}: only 'llama' can be imported")
    _refuse_variants(file)
    hidden, heads = file.get("llama.embedding_length", int), file.get("llama.attention.head_count", int)
    head_dim = file.get("llama.attention.key_length", int, hidden // max(heads, 1))
    rotary = file.get("llama.rope.dimension_count", int, head_dim)
    if rotary != head_dim:
        raise InputError(
            f"{file.path} rotates {rotary} of {head_dim} dimensions per head: partial rotary is not supported"
        )
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path} has no tensor token_embd.weight: it is not a whole language model")
    return LlamaShape(
        num_layers=file.get("llama.block_count", int),
        hidden=hidden,
        intermediate=file.get("llama.feed_forward_length", int),
        heads=heads,
        kv_heads=file.get("llama.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        vocab=file.shape("token_embd.weight")[0],
        tied="output.weight" not in file.tensors,
    )


def _refuse_variants(file: GgufFile) -> None:
    """Raise for what shares the name llama and computes something else."""
    if (experts := file.get("llama.expert_count", int, 0)) > 0:
        raise InputError(f"{file.path} is a mixture of {experts} experts: only dense llama models can be imported")
    if (scaling := file.get("llama.rope.scaling.type", str, "none")) != "none":
        raise InputError(f"{file.path} uses RoPE scaling {scaling!r}: only unscaled RoPE can be imported")
    if factors := sorted(name for name in file.tensors if name.startswith(("rope_freqs", "rope_factors"))):
        raise InputError(f"{file.path} has RoPE scaling factors ({factors[0]}): only unscaled RoPE can be imported")


def hf_config(file: GgufFile, shape: LlamaShape, token_ids: dict[str, int]) -> dict[str, Any]:
    """Return config.json of a `LlamaForCausalLM`.

    Args:
        file: the GGUF.
        shape: its sizes.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`, those that the tokenizer has.
    """
    epsilon = file.get("llama.attention.layer_norm_rms_epsilon", float)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": file.get("llama.context_length", int),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # GGUF keeps float32: its shortest decimal is the 1e-05 that the original config said.
        "rms_norm_eps": float(str(np.float32(epsilon))),
        "rope_theta": file.get("llama.rope.freq_base", float, 10000.0),
        "rope_scaling": None,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "float32",
        **token_ids,
    }


def plan_tensors(file: GgufFile, shape: LlamaShape) -> list[TensorPlan]:
    """Return every tensor with its Hugging Face name and shape, in model order.

    Raises:
        InputError: the file's tensors are not exactly these; all differences are named.
    """
    q_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer_shapes = {
        "attn_norm": (shape.hidden,),
        "attn_q": (q_rows, shape.hidden),
        "attn_k": (kv_rows, shape.hidden),
        "attn_v": (kv_rows, shape.hidden),
        "attn_output": (shape.hidden, q_rows),
        "ffn_norm": (shape.hidden,),
        "ffn_gate": (shape.intermediate, shape.hidden),
        "ffn_up": (shape.intermediate, shape.hidden),
        "ffn_down": (shape.hidden, shape.intermediate),
    }
    rotary_heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}
    outer = [
        ("token_embd", "model.embed_tokens", (shape.vocab, shape.hidden)),
        ("output_norm", "model.norm", (shape.hidden,)),
    ]
    if not shape.tied:
        outer.append(("output", "lm_head", (shape.vocab, shape.hidden)))
    plans = [
        TensorPlan(gguf_name=f"{old}.weight", name=f"{new}.weight", shape=size, rotary_heads=None)
        for old, new, size in outer
    ]
    plans += [
        TensorPlan(
            gguf_name=f"blk.{layer}.{old}.weight",
            name=f"model.layers.{layer}.{new}.weight",
            shape=layer_shapes[old],
            rotary_heads=rotary_heads.get(old),
        )
        for layer in range(shape.num_layers)
        for old, new in _LAYER_NAMES.items()
    ]
    found = {name: file.shape(name) for name in file.tensors}
    check_names_and_shapes(found, {plan.gguf_name: plan.shape for plan in plans}, what=str(file.path))
    return plans


def unpermute(weight: Float[np.ndarray, "rows hidden"], *, heads: int) -> Float[np.ndarray, "rows hidden"]:
    """Return q or k rows in Hugging Face's order.

    Hugging Face rotates row i of a head together with row i + head_dim/2; GGUF stores such pairs side by side:

        GGUF rows of a head of 6    0  3  1  4  2  5      (numbers are Hugging Face's rows)
        result                      0  1  2  3  4  5

    Source: ggml-org/llama.cpp convert_hf_to_gguf.py, `LlamaModel.permute`, whose inverse this is.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, hidden)
