"""Drafter folders: z-lab's layout, `config.json` and `model.safetensors`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, Int64

from dflash_jax.core import InputError, check_names_and_shapes, load_tensors, save_tensors, sha256_file, write_json
from dflash_jax.drafter.config import DrafterConfig, read_drafter_config
from dflash_jax.drafter.model import Drafter, init_drafter
from dflash_jax.drafter.vocabulary import check_draft_ids

DRAFT_TO_TARGET = "d2t"
"""The draft vocabulary's tensor, int64: target id = draft id + d2t[draft id]."""


def _named_leaves(drafter: Drafter) -> dict[str, Any]:
    """Weights by their public names, which are the module's own paths: `layers.0.self_attn.q_proj.weight`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(drafter)

    def name(path: tuple) -> str:
        return ".".join(str(getattr(part, "name", getattr(part, "idx", ""))) for part in path)

    return {name(path): leaf for path, leaf in leaves}


def save_drafter(drafter: Drafter, folder: Path) -> None:
    """Write a drafter as z-lab, SGLang and vLLM read it; weights keep their dtype. The folder must exist."""
    weights = {name: np.asarray(leaf) for name, leaf in _named_leaves(replace(drafter, draft_ids=None)).items()}
    if drafter.draft_ids is not None:
        weights[DRAFT_TO_TARGET] = to_offsets(np.asarray(drafter.draft_ids))
    save_tensors(folder / "model.safetensors", weights)
    write_json(folder / "config.json", drafter.config.to_json(dtype=str(drafter.fc.weight.dtype)))


def drafter_shapes(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a config calls for: 11 per layer (15 with biases), 3 and a vocabulary's."""
    skeleton = eqx.filter_eval_shape(lambda: init_drafter(config, key=jax.random.key(0)))
    vocabulary = {} if config.draft_vocab_size is None else {DRAFT_TO_TARGET: (config.draft_vocab_size,)}
    return {name: tuple(leaf.shape) for name, leaf in _named_leaves(skeleton).items()} | vocabulary


def to_offsets(ids: Int32[np.ndarray, " draft_vocab"]) -> Int64[np.ndarray, " draft_vocab"]:
    """Return a draft vocabulary as `d2t` has it."""
    return ids.astype(np.int64) - np.arange(len(ids))


def from_offsets(offsets: np.ndarray, vocab_size: int, *, where: Path) -> Int32[np.ndarray, " draft_vocab"]:
    """Return the draft vocabulary that a `d2t` says.

    Raises:
        InputError: no whole numbers, or ids that do not rise within the vocabulary.
    """
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu":
        raise InputError(f"{where}: {DRAFT_TO_TARGET} has dtype {offsets.dtype}: one whole number per token is needed")
    ids = offsets.astype(np.int64) + np.arange(len(offsets))
    check_draft_ids(ids, vocab_size, what=f"{where}: {DRAFT_TO_TARGET}")
    return ids.astype(np.int32)


def load_drafter(folder: Path, *, dtype: jnp.dtype | type = jnp.float32) -> Drafter:
    """Return the drafter of a folder.

    Args:
        folder: ours or any z-lab DFlash checkpoint.
        dtype: of the weights and activations.

    Raises:
        InputError: see `read_drafter_config`; weights missing, truncated, or not what the config calls for (all named
            at once); a draft vocabulary that is none.
    """
    config = read_drafter_config(folder)
    tensors = load_tensors(folder / "model.safetensors", what="the drafter's weights")
    check_names_and_shapes({n: t.shape for n, t in tensors.items()}, drafter_shapes(config), what=str(folder))
    skeleton = eqx.filter_eval_shape(lambda: init_drafter(config, key=jax.random.key(0)))
    leaves = [jnp.asarray(tensors[name], jnp.dtype(dtype)) for name in _named_leaves(skeleton)]
    drafter = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(skeleton), leaves)
    if config.draft_vocab_size is None:
        return drafter
    ids = from_offsets(tensors[DRAFT_TO_TARGET], config.vocab_size, where=folder)
    return replace(drafter, draft_ids=jnp.asarray(ids))


def drafter_fingerprint(folder: Path) -> str:
    """SHA-256 of a drafter's weights file: what it is, by content."""
    return sha256_file(folder / "model.safetensors")
