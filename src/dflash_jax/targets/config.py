"""A target's architecture, read from its checkpoint's own `config.json`.

Whatever changes the maths and is not handled raises.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_jax.core import InputError, read_json
from dflash_jax.nn import Rope

_ARCHITECTURES = ("LlamaForCausalLM",)
# TargetConfig's whole numbers and their names in `config.json`; head_dim may be left out there
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
}
# fields that would change the maths: the only values handled
_NEUTRAL = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "quantization_config": (None,),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetConfig:
    """Sizes and constants of a Llama-family decoder; hashable, so it can be a static field.

    Attributes:
        architecture: the checkpoint's class name, such as `LlamaForCausalLM`.
        vocab_size: rows of the embedding and of the head.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: channels per head.
        rms_norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary frequencies.
        max_positions: context length the target was made for, tokens.
        tie_embeddings: whether the head is the embedding.
        attention_bias: whether q, k, v and o have biases.
        mlp_bias: whether gate, up and down have biases.
        qk_norm: whether every head's queries and keys pass an RMSNorm before RoPE (Qwen3).
        attention_sinks: whether every head has a sink: a logit beside its scores that takes weight and gives nothing.
        sliding_window: tokens that sliding layers see, the query's own included; None without such layers.
        sliding_layers: 0-based layers with a sliding window.
        num_experts: experts of every MLP; 0 for a dense one.
        experts_per_token: experts that work on a token.
        swiglu_alpha: sigmoid gain of the experts' clamped SwiGLU.
        swiglu_limit: bound of its gate (from above) and up (from both sides).
        mxfp4: whether the checkpoint holds the experts' matrices as MXFP4 blocks and scales.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    tie_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_sinks: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    mxfp4: bool = False

    @property
    def rope(self) -> Rope:
        """Rotary frequencies."""
        return Rope(theta=self.rope_theta, head_dim=self.head_dim)


def _sizes(raw: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """The whole numbers of a config by our names, and what is wrong with them (then they are not to be used)."""
    values = {ours: raw.get(theirs) for ours, theirs in _SIZES.items()}
    if values["num_kv_heads"] is None:
        values["num_kv_heads"] = values["num_heads"]
    problems = []
    for ours, value in values.items():
        if value is None:
            problems.append(f"{_SIZES[ours]} is missing")
        elif type(value) is not int or value < 1:  # a bool is an int too
            problems.append(f"{_SIZES[ours]} is {value!r}, a positive whole number is needed")
    if problems:
        return {}, problems
    sizes = {ours: value for ours, value in values.items() if value is not None}
    sizes["head_dim"] = raw.get("head_dim") or sizes["hidden_size"] // sizes["num_heads"]
    if type(sizes["head_dim"]) is not int or sizes["head_dim"] < 2 or sizes["head_dim"] % 2:
        problems.append(f"head_dim is {sizes['head_dim']!r}, an even number is needed (rotary pairs)")
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        problems.append(f"{sizes['num_heads']} query heads cannot share {sizes['num_kv_heads']} key and value heads")
    return sizes, problems


def _constants(raw: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """rms_norm_eps and rope_theta, and what is wrong with them.

    rope_theta lies at the top level (transformers 4) or inside `rope_parameters` (transformers 5).
    """
    rope = raw.get("rope_parameters") or {}
    values = {"rms_norm_eps": raw.get("rms_norm_eps"), "rope_theta": rope.get("rope_theta", raw.get("rope_theta"))}
    constants, problems = {}, []
    for name, value in values.items():
        if value is None:
            problems.append(f"{name} is missing")
        elif type(value) not in (int, float) or value <= 0:
            problems.append(f"{name} is {value!r}, a positive number is needed")
        else:
            constants[name] = float(value)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        problems.append(f"rope_type is {kind!r}, only 'default' is handled")
    return constants, problems


def read_target_config(folder: Path) -> TargetConfig:
    """Return the config of a target folder.

    Raises:
        InputError: no such folder or no `config.json`; another architecture; a field that changes the maths and is not
            handled; a field that is missing or is no size.
    """
    if not folder.is_dir():
        raise InputError(
            f"no target folder at {folder}: make one with `dflash-jax target import --smollm2 --out {folder}`"
        )
    where = folder / "config.json"
    raw = read_json(where, what="the target's config")
    if not isinstance(raw, dict):
        raise InputError(f"the target's config is a JSON {type(raw).__name__}, an object is needed: {where}")
    architecture = (raw.get("architectures") or ["(none)"])[0]
    if architecture not in _ARCHITECTURES:
        raise InputError(f"{where}: architecture {architecture} is not handled; handled: {', '.join(_ARCHITECTURES)}")
    foreign = [f"{name} is {raw[name]!r}" for name in _NEUTRAL if name in raw and raw[name] not in _NEUTRAL[name]]
    if foreign:
        raise InputError(f"{where}: not handled: {'; '.join(foreign)}")
    sizes, wrong_sizes = _sizes(raw)
    constants, wrong_constants = _constants(raw)
    if wrong_sizes or wrong_constants:
        raise InputError(f"{where}: {'; '.join(wrong_sizes + wrong_constants)}")
    return TargetConfig(
        architecture=architecture,
        rms_norm_eps=constants["rms_norm_eps"],
        rope_theta=constants["rope_theta"],
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        **sizes,
    )


def default_capture_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Return `count` layer ids spread evenly from layer 1 to layer `num_layers - 3`; one alone is the middle layer.

    Worked: 36 layers, 5 ids: (1, 9, 17, 25, 33). 30 layers, 4 ids: (1, 10, 18, 27).

    **Source:** z-lab/dflash@44947fb:dflash/model.py `build_target_layer_ids` (Python's round, half to even). There the
    count is the number of drafter layers; here it is free, as published drafters have it.

    Raises:
        InputError: there are fewer layers than the rule needs.
    """
    if count < 1 or num_layers < 4 or count > num_layers - 3:
        raise InputError(f"{count} capture layers cannot be spread over a target of {num_layers} layers: name them")
    if count == 1:
        return (num_layers // 2,)
    return tuple(round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count))
