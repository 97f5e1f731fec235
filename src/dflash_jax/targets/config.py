"""A target's architecture, read from its checkpoint's own `config.json`.

Whatever changes the maths and is not handled raises.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_jax.core import InputError, read_json
from dflash_jax.nn import Rope, RopeScaling, check_rope_precision, read_rope

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
_POSITIVE = "a positive number is needed"
# fields that would change the maths: the only values handled
_NEUTRAL = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
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
        rope_scaling: how the rotary frequencies are stretched; None: not at all.
        rope_precision: how angles are computed, see `nn.Rope`; a setting of ours, not of the checkpoint.
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
    rope_scaling: RopeScaling | None = None
    rope_precision: str = "exact"
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
        """The rotary embedding."""
        return Rope(
            theta=self.rope_theta, head_dim=self.head_dim, scaling=self.rope_scaling, precision=self.rope_precision
        )


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


def read_target_config(folder: Path, *, rope: str = "exact") -> TargetConfig:
    """Return the config of a target folder.

    Args:
        folder: a Hugging Face folder; only its `config.json` is read.
        rope: how angles are computed: `exact`, `float32`, `bfloat16` or `table:N` (see `nn.Rope`).

    Raises:
        InputError: no such folder or no `config.json`; another architecture; a field that changes the maths and is not
            handled; a field that is missing or is no size; a rope setting that is none.
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
    rope_theta, rope_scaling, wrong_rope = read_rope(raw)
    eps = raw.get("rms_norm_eps")
    if type(eps) not in (int, float) or eps <= 0:
        wrong_sizes.append("rms_norm_eps is missing" if eps is None else f"rms_norm_eps is {eps!r}, {_POSITIVE}")
    if wrong_sizes or wrong_rope or rope_theta is None:
        raise InputError(f"{where}: {'; '.join(wrong_sizes + wrong_rope)}")
    return TargetConfig(
        architecture=architecture,
        rms_norm_eps=float(eps),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rope_precision=check_rope_precision(rope),
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
