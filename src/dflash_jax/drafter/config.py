"""A drafter's architecture, read from and written to z-lab's `config.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_jax.core import InputError, read_json
from dflash_jax.nn import Rope, RopeScaling, read_rope, scaling_to_json

# Fields that would change the maths, and the only values handled. z-lab's reader looks in `dflash_config` and above it.
_NEUTRAL = {
    "hidden_act": (None, "silu"),
    "use_swa": (None, False),
    "input_embedding_scale": (None, 1),
    "output_multiplier": (None, 1),
    "logit_scale": (None, 1),
    "final_logit_softcapping": (None, 0),
    "conv_kernel_size": (None,),
    "selector_rank": (None,),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DrafterConfig:
    """Sizes and constants of a DFlash drafter; hashable, so it can be a static field.

    Attributes:
        hidden_size: width of the drafter, equal to the target's.
        intermediate_size: width of the MLP.
        num_layers: drafter layers.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: channels per head.
        attention_bias: whether q, k, v and o have biases (gpt-oss drafters do).
        rms_norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary frequencies.
        max_positions: informative: the context the drafter was made for, tokens.
        block_size: positions per block, the anchor included.
        mask_token_id: token whose target embedding fills slots 1 to B-1.
        capture_layers: 0-based target layers whose outputs are the features, in order.
        num_target_layers: decoder layers of the target.
        vocab_size: the target's vocabulary.
        draft_vocab_size: tokens that drafts are chosen among; None: the whole vocabulary.
        sliding_window: tokens that a slot of a sliding layer looks back, itself included; None: no layer slides.
        sliding_layers: layers that slide, rising.
        is_causal: whether slots see their block up to themselves alone, in every layer; None: in sliding layers.
        rope_scaling: how the rotary frequencies are stretched; None: not at all.
        rope_precision: how angles are computed, see `nn.Rope`; a setting of ours, not of the checkpoint.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_bias: bool
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    block_size: int
    mask_token_id: int
    capture_layers: tuple[int, ...]
    num_target_layers: int
    vocab_size: int
    draft_vocab_size: int | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    is_causal: bool | None = None
    rope_scaling: RopeScaling | None = None
    rope_precision: str = "exact"

    @property
    def rope(self) -> Rope:
        """The rotary embedding."""
        return Rope(
            theta=self.rope_theta, head_dim=self.head_dim, scaling=self.rope_scaling, precision=self.rope_precision
        )

    def window_of(self, layer: int) -> int | None:
        """How far a layer's slots look back, tokens; None: to the text's beginning."""
        return self.sliding_window if layer in self.sliding_layers else None

    def is_causal_layer(self, layer: int) -> bool:
        """Whether a layer's slots see their own block up to themselves alone."""
        return layer in self.sliding_layers if self.is_causal is None else self.is_causal

    @property
    def num_features(self) -> int:
        """Width of the features, K*H."""
        return len(self.capture_layers) * self.hidden_size

    def to_json(self, *, dtype: str) -> dict[str, Any]:
        """Return z-lab's `config.json`, with rope keys at the top level where every reader looks.

        **Source:** key set of z-lab/Qwen3-8B-DFlash-b16 (revision 9b41424b7109) `config.json`; it differs in leaving
        out `auto_map` (no code travels with the checkpoint) and the target's bos and eos ids, and in
        `draft_vocab_size` where the drafter has a draft vocabulary (speculators' name).
        """
        settings = {"draft_vocab_size": self.draft_vocab_size, "is_causal": self.is_causal}
        kinds = ("full_attention", "sliding_attention")
        return {name: value for name, value in settings.items() if value is not None} | {
            "architectures": ["DFlashDraftModel"],
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "block_size": self.block_size,
            "dflash_config": {"mask_token_id": self.mask_token_id, "target_layer_ids": list(self.capture_layers)},
            "dtype": dtype,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "layer_types": [kinds[layer in self.sliding_layers] for layer in range(self.num_layers)],
            "max_position_embeddings": self.max_positions,
            "max_window_layers": self.num_layers,
            "model_type": "qwen3",
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "num_target_layers": self.num_target_layers,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": scaling_to_json(self.rope_scaling),
            "rope_theta": self.rope_theta,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": False,
            "use_cache": True,
            "use_sliding_window": bool(self.sliding_layers),
            "vocab_size": self.vocab_size,
        }


def _check_neutral(raw: dict[str, Any], where: Path) -> None:
    levels = {"": raw, "dflash_config.": raw.get("dflash_config") or {}}
    problems = [
        f"{level}{name} is {values[name]!r}"
        for level, values in levels.items()
        for name, allowed in _NEUTRAL.items()
        if values.get(name) not in allowed
    ]
    kinds = set(raw.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    problems += [f"layer_types has {kind!r}" for kind in sorted(kinds)]
    if problems:
        raise InputError(f"{where}: not handled: {'; '.join(problems)}")


def _read_sight(raw: dict[str, Any], where: Path) -> dict[str, Any]:
    """`sliding_window`, `sliding_layers` and `is_causal` of a config.

    Raises:
        InputError: settings of which engines would make different things.
    """
    types, window, used = raw.get("layer_types"), raw.get("sliding_window"), raw.get("use_sliding_window")
    sliding = tuple(layer for layer, kind in enumerate(types or ()) if kind == "sliding_attention")
    causal = {
        level.get(name)
        for level in (raw, raw.get("dflash_config") or {})
        for name in ("is_causal", "causal")
        if level.get(name) is not None
    }
    problems = []
    if sliding and (type(window) is not int or window < 1 or used is False):
        problems.append(
            f"layer_types has 'sliding_attention', sliding_window is {window!r} and use_sliding_window {used!r}: a "
            "window of at least 1 and true are needed"
        )
    if not sliding and window is not None and used is not False:
        problems.append(f"sliding_window is {window!r}, and layer_types names no layer that slides")
    if types is not None and len(types) != raw.get("num_hidden_layers"):
        problems.append(f"layer_types has {len(types)} layers of {raw.get('num_hidden_layers')!r}")
    if len(causal) > 1 or not causal <= {True, False}:
        problems.append(f"is_causal and causal are {sorted(map(str, causal))}: one of true and false is needed")
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}")
    return {
        "sliding_window": window if sliding else None,
        "sliding_layers": sliding,
        "is_causal": causal.pop() if causal else None,
    }


def check_not_last_layer(capture_layers: tuple[int, ...], num_target_layers: int, *, what: str) -> None:
    """Refuse features of the target's last layer: no two engines would agree about them.

    Hugging Face's `hidden_states` hold, for that layer alone, what the final norm made of its output, so z-lab's loop
    would feed a drafter something else than it was trained on here.

    Raises:
        InputError: the last layer is captured.
    """
    if num_target_layers - 1 in capture_layers:
        raise InputError(
            f"{what} captures the target's last layer, {num_target_layers - 1}: other engines take that one after the "
            f"target's final norm and would not agree; capture layers 0 to {num_target_layers - 2}"
        )


def _check_ranges(config: DrafterConfig, where: Path) -> None:
    """An id out of range would index nothing and raise nothing: JAX clamps it."""
    wrong = {
        f"block_size is {config.block_size}, at least 2 are needed": config.block_size < 2,
        f"num_attention_heads {config.num_heads} is no multiple of num_key_value_heads {config.num_kv_heads}": (
            config.num_kv_heads < 1 or config.num_heads % config.num_kv_heads
        ),
        f"mask_token_id {config.mask_token_id} is outside the vocabulary of {config.vocab_size}": (
            not 0 <= config.mask_token_id < config.vocab_size
        ),
        f"target_layer_ids {list(config.capture_layers)} are not layers of a target of {config.num_target_layers}": (
            not config.capture_layers or not all(0 <= i < config.num_target_layers for i in config.capture_layers)
        ),
        f"draft_vocab_size is {config.draft_vocab_size} of {config.vocab_size} tokens": (
            config.draft_vocab_size is not None and not 0 < config.draft_vocab_size < config.vocab_size
        ),
    }
    if problems := [problem for problem, is_wrong in wrong.items() if is_wrong]:
        raise InputError(f"{where}: {'; '.join(problems)}")


def read_drafter_config(folder: Path) -> DrafterConfig:
    """Return the config of a drafter folder (ours or any z-lab DFlash checkpoint).

    `block_size` is read at the top level or inside `dflash_config`, rope_theta at the top level or inside
    `rope_parameters`.

    Raises:
        InputError: no such folder or no `config.json`; not a DFlash drafter; a field that changes the maths and is not
            handled; a field that is missing, no number, or out of range; the target's last layer is captured.
    """
    if not folder.is_dir():
        raise InputError(f"no drafter folder at {folder}")
    where = folder / "config.json"
    return parse_drafter_config(read_json(where, what="the drafter's config"), where=where)


def parse_drafter_config(raw: Any, *, where: Path) -> DrafterConfig:
    """Return the config that z-lab's `config.json` says; see `read_drafter_config`, whose errors these are.

    Args:
        raw: the file's content.
        where: the file, to be named in errors.
    """
    found = raw.get("architectures") if isinstance(raw, dict) else None
    if not found or found[0] != "DFlashDraftModel":
        raise InputError(f"{where}: architectures is {found!r}, a DFlash drafter has ['DFlashDraftModel']")
    _check_neutral(raw, where)
    sight = _read_sight(raw, where)
    dflash = raw.get("dflash_config") or {}
    rope_theta, rope_scaling, wrong_rope = read_rope(raw)
    if wrong_rope or rope_theta is None:
        raise InputError(f"{where}: {'; '.join(wrong_rope)}")
    merged = {**raw, **dflash}
    reduced = raw.get("draft_vocab_size")
    if reduced == raw.get("vocab_size"):
        reduced = None
    try:
        config = DrafterConfig(
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=int(raw["num_attention_heads"]),
            num_kv_heads=int(raw["num_key_value_heads"]),
            head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // int(raw["num_attention_heads"])),
            attention_bias=bool(raw.get("attention_bias", False)),
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_positions=int(raw["max_position_embeddings"]),
            block_size=int(merged["block_size"]),
            mask_token_id=int(merged["mask_token_id"]),
            capture_layers=tuple(int(i) for i in merged["target_layer_ids"]),
            num_target_layers=int(raw["num_target_layers"]),
            vocab_size=int(raw["vocab_size"]),
            draft_vocab_size=None if reduced is None else int(reduced),
            **sight,
        )
    except KeyError as error:
        raise InputError(f"{where}: {error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: a size or an id is no number: {error}") from error
    _check_ranges(config, where)
    check_not_last_layer(config.capture_layers, config.num_target_layers, what=str(where))
    return config
