"""A target's architecture, read from its checkpoint's own `config.json`.

Whatever changes the maths and is not handled raises.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_jax.core import InputError, read_json
from dflash_jax.nn import Rope, RopeScaling, check_rope_precision, read_rope
from dflash_jax.targets.mxfp4 import MXFP4_GROUP

# Fields that would change the maths in an engine that reads them, and the only values handled. None, or a field that is
# not there, is always handled; a family's own settings are read elsewhere.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "attn_temperature_tuning": (False,),
    "clip_qkv": (),
    "dim_model_base": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "no_rope_layer_interval": (),
    "no_rope_layers": (),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "scale_depth": (1,),
    "scale_emb": (1,),
    "use_bidirectional_attention": (False,),
    "use_qk_norm": (False,),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """What an architecture has beyond a Llama, and what its `config.json` means where it is silent (in transformers).

    Attributes:
        head_dim: channels per head where the config does not say; None: hidden_size over heads.
        attention_bias: whether q, k, v and o have biases where the config does not say.
        mlp_bias: whether the config may ask for biases in the MLP.
        qk_norm: whether every head's queries and keys are normalised.
        norm_cast_last: whether norms multiply by their weight before they cast.
        sinks: whether heads have sinks.
        experts: whether MLPs are mixtures of experts.
        windows: whether layers may have sliding windows.
        first_slides: whether, without `layer_types`, every second layer slides, the first one too.
        rope_theta: base of the rotary frequencies where the config does not say (Llama 2's do not).
    """

    head_dim: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_cast_last: bool = False
    sinks: bool = False
    experts: bool = False
    windows: bool = False
    first_slides: bool = False
    rope_theta: float = 10_000.0


_FAMILIES = {
    "LlamaForCausalLM": _Family(mlp_bias=True),
    "Qwen3ForCausalLM": _Family(head_dim=128, qk_norm=True, windows=True),
    "GptOssForCausalLM": _Family(
        head_dim=64,
        attention_bias=True,
        norm_cast_last=True,
        sinks=True,
        experts=True,
        windows=True,
        first_slides=True,
        rope_theta=150_000.0,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetConfig:
    """Sizes and constants of a decoder; hashable, so it can be a static field.

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
        norm_cast_last: whether norms multiply by their weight before they cast, see `nn.RMSNorm` (gpt-oss).
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
    norm_cast_last: bool = False
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


class _Reader:
    """The fields of one `config.json`, and what is wrong with them, gathered to be told at once."""

    def __init__(self, raw: dict[str, Any], family: _Family) -> None:
        self.raw, self.family = raw, family
        self.not_handled: list[str] = []
        self.wrong: list[str] = []

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number; 1 where it is wrong."""
        value = self.raw.get(name)
        value = default if value is None else value
        if type(value) is int and value > 0:  # a bool is an int too
            return value
        wanted = "is missing" if value is None else f"is {value!r}, a positive whole number is needed"
        self.wrong.append(f"{name} {wanted}")
        return 1

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; 1 where it is wrong."""
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return float(value)
        wanted = "is missing" if value is None else f"is {value!r}, a positive number is needed"
        self.wrong.append(f"{name} {wanted}")
        return 1.0

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false."""
        value = self.raw.get(name)
        value = default if value is None else value
        if type(value) is not bool:
            self.wrong.append(f"{name} is {value!r}, true or false is needed")
        return bool(value)

    def check_neutral(self) -> None:
        """Name the fields that change the maths and are not handled."""
        for name, allowed in _NEUTRAL.items():
            value = self.raw.get(name)
            if value is not None and value not in allowed:
                self.not_handled.append(f"{name} is {value!r}")
        if self.raw.get("mlp_bias") and not self.family.mlp_bias:
            self.not_handled.append(f"mlp_bias is {self.raw['mlp_bias']!r}")

    def heads(self) -> dict[str, int]:
        """The sizes of attention."""
        num_heads, hidden = self.size("num_attention_heads"), self.size("hidden_size")
        num_kv_heads = self.size("num_key_value_heads", default=num_heads)
        head_dim = self.raw.get("head_dim") or self.family.head_dim or hidden // num_heads
        if not self.wrong:
            if type(head_dim) is not int or head_dim < 2 or head_dim % 2:
                self.wrong.append(f"head_dim is {head_dim!r}, an even number is needed (rotary pairs)")
            if num_heads % num_kv_heads:
                self.wrong.append(f"{num_heads} query heads cannot share {num_kv_heads} key and value heads")
        return {"num_heads": num_heads, "hidden_size": hidden, "num_kv_heads": num_kv_heads, "head_dim": head_dim}

    def windows(self, num_layers: int) -> dict[str, Any]:
        """The sliding window and the layers that have it."""
        kinds, window = self.raw.get("layer_types"), self.raw.get("sliding_window")
        if not self.family.windows and window is not None:
            self.not_handled.append(f"sliding_window is {window!r}")
        if kinds is None:
            kinds = self._kinds_left_out(num_layers)
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            self.wrong.append(f"layer_types is {kinds!r}, a list of {num_layers} is needed")
            return {}
        known = ("full_attention", "sliding_attention") if self.family.windows else ("full_attention",)
        self.not_handled += [f"layer_types has {kind!r}" for kind in sorted({str(k) for k in kinds} - set(known))]
        sliding = tuple(index for index, kind in enumerate(kinds) if kind == "sliding_attention")
        if not sliding or not self.family.windows:
            return {}
        if not self.family.first_slides and not self.flag("use_sliding_window", default=False):
            self.wrong.append("layer_types has 'sliding_attention' and use_sliding_window is not true")
        return {"sliding_window": self.size("sliding_window"), "sliding_layers": sliding}

    def _kinds_left_out(self, num_layers: int) -> list[str]:
        """What transformers makes of a config without `layer_types`."""
        if self.family.first_slides:
            return ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]
        if self.family.windows and self.flag("use_sliding_window", default=False):
            first = self.size("max_window_layers", default=28)
            return ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
        return ["full_attention"] * num_layers

    def experts(self) -> dict[str, Any]:
        """The experts' numbers."""
        if not self.family.experts:
            return {}
        sizes = {"num_experts": self.size("num_local_experts"), "experts_per_token": self.size("num_experts_per_tok")}
        if sizes["experts_per_token"] > sizes["num_experts"] and not self.wrong:
            self.wrong.append(
                f"num_experts_per_tok is {sizes['experts_per_token']}, there are {sizes['num_experts']} experts"
            )
        other = self.raw.get("experts_per_token")
        if other is not None and other != sizes["experts_per_token"]:
            self.wrong.append(f"experts_per_token {other!r} is not num_experts_per_tok {sizes['experts_per_token']}")
        alpha, limit = self.number("swiglu_alpha", default=1.702), self.number("swiglu_limit", default=7.0)
        return {**sizes, "swiglu_alpha": alpha, "swiglu_limit": limit}

    def quantisation(self, sizes: dict[str, int]) -> bool:
        """Whether the experts are stored as MXFP4; any other quantisation is not handled."""
        told = self.raw.get("quantization_config")
        if told is None:
            return False
        if not self.family.experts or not isinstance(told, dict) or told.get("quant_method") != "mxfp4":
            self.not_handled.append(f"quantization_config is {told!r}")
            return False
        odd = [name for name in ("hidden_size", "intermediate_size") if sizes.get(name, 0) % MXFP4_GROUP]
        self.wrong += [f"{name} {sizes[name]} is no multiple of {MXFP4_GROUP}: no MXFP4 groups" for name in odd]
        return True

    def rope(self) -> dict[str, Any]:
        """The rotary settings."""
        theta, scaling, problems = read_rope(self.raw, default_theta=self.family.rope_theta)
        self.wrong += problems
        return {"rope_theta": theta, "rope_scaling": scaling}


def _read_fields(reader: _Reader) -> dict[str, Any]:
    """TargetConfig's fields, of use only where the reader found nothing wrong."""
    reader.check_neutral()
    sizes = {"vocab_size": reader.size("vocab_size"), "intermediate_size": reader.size("intermediate_size")}
    sizes |= reader.heads()
    sizes |= {
        "num_layers": reader.size("num_hidden_layers"),
        "max_positions": reader.size("max_position_embeddings"),
    }
    eps = reader.number("rms_norm_eps")
    bias = reader.flag("attention_bias", default=reader.family.attention_bias)
    return {
        **sizes,
        "rms_norm_eps": eps,
        "tie_embeddings": reader.flag("tie_word_embeddings", default=False),
        "attention_bias": bias,
        "mlp_bias": reader.family.mlp_bias and reader.flag("mlp_bias", default=False),
        "qk_norm": reader.family.qk_norm,
        "norm_cast_last": reader.family.norm_cast_last,
        "attention_sinks": reader.family.sinks,
        "mxfp4": reader.quantisation(sizes),
        **reader.rope(),
        **reader.windows(sizes["num_layers"]),
        **reader.experts(),
    }


def read_target_config(folder: Path, *, rope: str = "exact") -> TargetConfig:
    """Return the config of a target folder.

    Args:
        folder: a Hugging Face folder; only its `config.json` is read.
        rope: how angles are computed: `exact`, `float32`, `bfloat16` or `table:N` (see `nn.Rope`).

    Raises:
        InputError: no such folder or no `config.json`; another architecture; a field that changes the maths and is not
            handled; a field that is missing or is no size; a rope setting that is none. All fields are named at once.
    """
    if not folder.is_dir():
        raise InputError(
            f"no target folder at {folder}: make one with `dflash-jax target import --smollm2 --out {folder}`"
        )
    where = folder / "config.json"
    raw = read_json(where, what="the target's config")
    if not isinstance(raw, dict):
        raise InputError(f"the target's config is a JSON {type(raw).__name__}, an object is needed: {where}")
    found = raw.get("architectures")
    architecture = str(found[0]) if isinstance(found, list) and found else "(none)"
    if architecture not in _FAMILIES:
        raise InputError(f"{where}: architecture {architecture} is not handled; handled: {', '.join(_FAMILIES)}")
    reader = _Reader(raw, _FAMILIES[architecture])
    values = _read_fields(reader)
    if reader.not_handled:
        raise InputError(f"{where}: not handled: {'; '.join(reader.not_handled)}")
    if reader.wrong:
        raise InputError(f"{where}: {'; '.join(reader.wrong)}")
    return TargetConfig(architecture=architecture, rope_precision=check_rope_precision(rope), **values)


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
