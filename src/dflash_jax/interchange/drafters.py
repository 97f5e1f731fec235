"""Drafters in the layouts of others: written for serving engines, and read from other trainers.

Two layouts, one set of tensors (11 per layer, 15 with biases, and 3):

    z-lab         config.json says `DFlashDraftModel`, `dflash_config`; layer ids are those of layers
    speculators   config.json says `speculators_model_type`, a Qwen3 `transformer_layer_config` and the verifier; layer
                  ids count from the embedding

A draft vocabulary (`drafter.vocabulary`) is `d2t` in both; speculators' has the same as a mask, `t2d`, and the head's
rows beside it.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.accept import check_fit
from dflash_jax.core import (
    RECORD_NAME,
    InputError,
    check_names_and_shapes,
    load_tensors,
    make_record,
    read_header,
    read_json,
    save_tensors,
    write_json,
    write_record,
)
from dflash_jax.drafter import (
    DRAFT_TO_TARGET,
    DrafterConfig,
    drafter_fingerprint,
    drafter_shapes,
    from_offsets,
    load_drafter,
    parse_drafter_config,
    read_drafter_config,
    save_drafter,
)
from dflash_jax.interchange.config import DrafterExportConfig, DrafterImportConfig
from dflash_jax.interchange.places import check_free, whole_folder
from dflash_jax.interchange.speculators import from_speculators_layer, to_speculators_layer
from dflash_jax.interchange.vocabulary import (
    HEAD,
    TARGET_IN_DRAFT,
    WEIGHTS,
    WHAT,
    check_mask,
    choose_vocabulary,
    write_head_rows,
)
from dflash_jax.targets import TargetConfig, load_target, read_target_config

SPECULATORS_VERSION = "0.9.0"
"""The version whose layout is written."""
# Fields that would change what is drafted, and the only values handled.
_SPECULATORS_NEUTRAL = {
    "speculators_model_type": ("dflash",),
    "sample_from_anchor": (None, False),
    "sliding_window_non_causal": (None, False, True),
}
# What checkpoints of speculators may carry of the target's: not the drafter's, if it is the target's still.
_EMBEDDING = "embed_tokens.weight"
_TARGETS_OWN = (_EMBEDDING, HEAD)


def export_drafter(config: DrafterExportConfig) -> dict[str, Any]:
    """Write a drafter for serving engines; the folder appears whole or not at all, after it was read back.

    Returns:
        `out`, `format`, `dtype`, `block_size`, `capture_layers`, `draft_vocab_size` (None: drafts are of all tokens),
        `num_tensors`, `num_parameters` (of the network), `bytes`, `sha256` (of the weights' file), `vllm` and `sglang`
        (what to start them with; None where they do not read the layout), `warnings` (engines known not to compute
        what this drafter needs); with `--draft-vocab` also `label_share`, the share of the counted labels in it.

    Raises:
        InputError: no drafter, or one that is damaged or of another target; a draft vocabulary that cannot be chosen;
            `--out` is taken or cannot be written.
    """
    check_free(config.out)
    sizes = read_drafter_config(config.drafter)
    if config.format == "speculators" and sizes.is_causal:
        raise InputError(
            f"{config.drafter}: is_causal is true, for every layer: speculators' layout says so of sliding layers alone"
        )
    if config.target is not None:
        check_fit(sizes, read_target_config(config.target), where=config.drafter)
    drafter, chosen = load_drafter(config.drafter, dtype=jnp.dtype(config.dtype)), {}
    if config.draft_vocab is not None:
        drafter, chosen = choose_vocabulary(drafter, config)
        sizes = drafter.config
    with whole_folder(config.out, "drafter") as folder:
        save_drafter(drafter, folder)
        again = load_drafter(folder, dtype=jnp.dtype(config.dtype))
        same = jax.tree_util.tree_map(lambda a, b: bool(jnp.array_equal(a, b)), drafter, again)
        if not all(jax.tree_util.tree_leaves(same)):
            raise InputError(f"{config.out}: what was written is not what was read: see to the disk; nothing is left")
        if config.format == "speculators":
            write_json(folder / "config.json", _speculators_json(sizes, config))
            write_head_rows(drafter, folder, config)
        result = {
            "out": str(config.out),
            "format": config.format,
            **_facts(folder, sizes, dtype=config.dtype),
            **chosen,
            **_serving(sizes, config),
            "warnings": _warnings(sizes, config),
        }
        write_record(folder, _record("export", config, config.drafter, result))
    return result


def import_drafter(config: DrafterImportConfig) -> dict[str, Any]:
    """Make a drafter folder of z-lab's layout or speculators'; it appears whole or not at all.

    Weights stay as they are, bit for bit; settings are written where every reader looks for them.

    Returns:
        `out`, `format` (what was found), `dtype`, `block_size`, `capture_layers`, `draft_vocab_size`, `num_tensors`,
        `num_parameters`, `bytes`, `sha256`, `dropped` (tensors that were the target's own, bit for bit, or said the
        draft vocabulary twice).

    Raises:
        InputError: not a DFlash drafter of either layout; a setting that changes what is drafted and is not handled;
            tensors that do not fit; a head or embedding that is not the target's; a draft vocabulary that is none or
            is said in two ways; a drafter of another target; `--out` is taken or cannot be written.
    """
    check_free(config.out)
    where = config.drafter / "config.json"
    if not config.drafter.is_dir():
        raise InputError(f"no drafter folder at {config.drafter}")
    raw = read_json(where, what="the drafter's config")
    from_speculators = isinstance(raw, dict) and "speculators_model_type" in raw
    target = None if config.target is None else read_target_config(config.target)
    if from_speculators:
        if target is None:
            raise InputError(f"{where} is speculators' and does not say how many layers the target has: give --target")
        sizes = _speculators_config(raw, target, where=where)
    else:
        sizes = parse_drafter_config(raw, where=where)
    if target is not None:
        check_fit(sizes, target, where=config.drafter)
    tensors = load_tensors(config.drafter / WEIGHTS, what=WHAT)
    ids = None
    if sizes.draft_vocab_size is not None and DRAFT_TO_TARGET in tensors:
        ids = from_offsets(tensors[DRAFT_TO_TARGET], sizes.vocab_size, where=config.drafter)
    dropped = [name for name in (*_TARGETS_OWN, TARGET_IN_DRAFT) if from_speculators and name in tensors]
    if dropped:
        assert config.target is not None
        extra = {name: tensors.pop(name) for name in dropped}
        check_mask(extra.pop(TARGET_IN_DRAFT, None), ids, sizes.vocab_size, where=config.drafter)
        _check_targets_own(extra, config.target, ids=ids, where=config.drafter)
    check_names_and_shapes({n: t.shape for n, t in tensors.items()}, drafter_shapes(sizes), what=str(config.drafter))
    dtype = str(tensors["fc.weight"].dtype)
    with whole_folder(config.out, "drafter") as folder:
        save_tensors(folder / WEIGHTS, tensors)
        write_json(folder / "config.json", sizes.to_json(dtype=dtype))
        result = {
            "out": str(config.out),
            "format": "speculators" if from_speculators else "z-lab",
            **_facts(folder, sizes, dtype=dtype),
            "dropped": dropped,
        }
        write_record(folder, _record("import", config, config.drafter, result))
    return result


def _facts(folder: Path, sizes: DrafterConfig, *, dtype: str) -> dict[str, Any]:
    """What was written, of either command."""
    weights = folder / WEIGHTS
    header = read_header(weights, what=WHAT)
    return {
        "dtype": dtype,
        "block_size": sizes.block_size,
        "capture_layers": list(sizes.capture_layers),
        "draft_vocab_size": sizes.draft_vocab_size,
        "num_tensors": len(header),
        "num_parameters": sum(
            int(np.prod(shape)) for shape in drafter_shapes(replace(sizes, draft_vocab_size=None)).values()
        ),
        "bytes": weights.stat().st_size,
        "sha256": drafter_fingerprint(folder),
    }


def _record(
    command: str, config: DrafterExportConfig | DrafterImportConfig, source: Path, result: dict[str, Any]
) -> dict[str, Any]:
    """Our record, with what the source's says of its training: a check of what is served needs the prompts."""
    path = source / RECORD_NAME
    parent = read_json(path, what="the drafter's record") if path.is_file() else {}
    kept = ("trained_prompt_hashes", "step", "cache_fingerprint")
    carried = {name: parent[name] for name in kept if isinstance(parent, dict) and name in parent}
    return make_record(command, config, result=result, **carried)


def _serving(sizes: DrafterConfig, config: DrafterExportConfig) -> dict[str, Any]:
    """What vLLM and SGLang are to be started with: vLLM counts the drafted tokens, SGLang the anchor too.

    **Source:** z-lab/dflash `README.md` (SGLang), NVIDIA-NeMo/Automodel pull request 2913 and RedHatAI's model cards
    (vLLM, `block_size - 1`; its method is "dflash" for both layouts).
    """
    out, block_size = str(config.out), sizes.block_size
    sglang = (
        f"--speculative-algorithm DFLASH --speculative-draft-model-path {out} "
        f"--speculative-num-draft-tokens {block_size}"
    )
    vllm = json.dumps({"method": "dflash", "model": out, "num_speculative_tokens": block_size - 1})
    own = config.format == "z-lab" and sizes.draft_vocab_size is not None
    return {
        "vllm": None if own else f"--speculative-config '{vllm}'",
        "sglang": sglang if config.format == "z-lab" and not own else None,
    }


def _warnings(sizes: DrafterConfig, config: DrafterExportConfig) -> list[str]:
    found = []
    if config.format == "z-lab" and sizes.draft_vocab_size is not None:
        found.append(
            "z-lab's layout has no draft vocabulary: this folder is for dflash-jax's own commands; vLLM serves one of "
            "--format speculators, and SGLang drafts from the whole vocabulary: export without --draft-vocab for it"
        )
    if sizes.sliding_layers:
        found.append(
            f"layers {', '.join(map(str, sizes.sliding_layers))} slide over {sizes.sliding_window} tokens: TPU servers "
            "run them as full attention, which accepts little beyond the window: compare online with `check`"
        )
    if sizes.rope_scaling is not None:
        found.append(
            f"its rotary frequencies are scaled ({sizes.rope_scaling.rope_type}): some TPU servers ignore that or "
            "compute it otherwise: compare accept_len online with check's"
        )
    if sizes.attention_bias:
        found.append(
            "its attention has biases, which some TPU servers leave out: compare accept_len online with `check`"
        )
    return found


def _speculators_json(sizes: DrafterConfig, config: DrafterExportConfig) -> dict[str, Any]:
    """Speculators' `config.json`.

    **Source:** what vllm-project/speculators 0.9.0 `DFlashDraftModel.save_pretrained` writes; it differs in leaving out
    `auto_map` (no code travels with the checkpoint) and in repeating the rotary settings under transformers 4's names.
    """
    assert config.target is not None
    theirs = sizes.to_json(dtype=config.dtype)
    dflash = theirs.pop("dflash_config")
    for name in ("architectures", "block_size", "num_target_layers"):
        del theirs[name]
    for name in ("draft_vocab_size", "is_causal"):
        theirs.pop(name, None)
    scaling = theirs["rope_scaling"] or {"rope_type": "default"}
    theirs["rope_parameters"] = {**scaling, "rope_theta": sizes.rope_theta}
    verifier = read_json(config.target / "config.json", what="the target's config")
    return {
        "architectures": ["DFlashDraftModel"],
        "aux_hidden_state_layer_ids": [to_speculators_layer(layer) for layer in sizes.capture_layers],
        "block_size": sizes.block_size,
        "draft_vocab_size": sizes.draft_vocab_size or sizes.vocab_size,
        "dtype": config.dtype,
        "mask_token_id": dflash["mask_token_id"],
        "sample_from_anchor": False,
        "sliding_window_non_causal": sizes.is_causal is False,
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": sizes.block_size - 1, "verifier_accept_k": 1}
            ],
            "verifier": {
                "architectures": verifier["architectures"],
                "name_or_path": config.verifier or str(config.target),
            },
        },
        "speculators_model_type": "dflash",
        "speculators_version": SPECULATORS_VERSION,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": theirs,
    }


def _speculators_config(raw: dict[str, Any], target: TargetConfig, *, where: Path) -> DrafterConfig:
    problems = [
        f"{name} is {raw.get(name)!r}" for name, fine in _SPECULATORS_NEUTRAL.items() if raw.get(name) not in fine
    ]
    inner, layers = raw.get("transformer_layer_config"), raw.get("aux_hidden_state_layer_ids")
    if not isinstance(inner, dict):
        problems.append(f"transformer_layer_config is {inner!r}, an object is needed")
        inner = {}
    if not isinstance(layers, list) or not layers or not all(type(layer) is int for layer in layers):
        problems.append(f"aux_hidden_state_layer_ids is {layers!r}, layer ids are needed")
        layers = []
    if type(raw.get("draft_vocab_size")) is not int:
        problems.append(f"draft_vocab_size is {raw.get('draft_vocab_size')!r}, a number of tokens is needed")
    if raw.get("target_hidden_size") not in (None, inner.get("hidden_size")):
        problems.append(f"target_hidden_size is {raw['target_hidden_size']!r}, not the drafter's")
    if 0 in layers:
        problems.append("aux_hidden_state_layer_ids names 0, the embedding, which is no layer's output")
    if problems:
        raise InputError(f"{where}: not handled: {'; '.join(problems)}")
    return parse_drafter_config(
        inner
        | {
            "architectures": ["DFlashDraftModel"],
            "block_size": raw.get("block_size"),
            "draft_vocab_size": raw.get("draft_vocab_size"),
            # there it is said of sliding layers alone; full ones are never causal
            "is_causal": False if raw.get("sliding_window_non_causal") else None,
            "dflash_config": {
                "mask_token_id": raw.get("mask_token_id"),
                "target_layer_ids": [from_speculators_layer(layer) for layer in layers],
            },
            "num_target_layers": target.num_layers,
        },
        where=where,
    )


def _check_targets_own(tensors: dict[str, np.ndarray], folder: Path, *, ids: np.ndarray | None, where: Path) -> None:
    """Refuse a head or an embedding that is not the target's: the drafter was trained with it.

    Args:
        tensors: by their names in speculators' layout.
        folder: the target's.
        ids: the draft vocabulary, whose rows the head is; None: all.
        where: the drafter, to be named in errors.
    """
    target = load_target(folder, layers=())
    own = {_EMBEDDING: target.embed_tokens, HEAD: target.head if ids is None else target.head[ids]}
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or not np.array_equal(tensor, np.asarray(own[name]).astype(tensor.dtype)):
            raise InputError(
                f"{where}: {name} is not the target's: name the --target it was trained for (a drafter with a head or "
                "an embedding of its own is not handled)"
            )
