"""Target folders: checking, reading, fingerprinting."""

from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dflash_jax.core import InputError, check_names_and_shapes, mesh_shape, read_json, sha256_file, sha256_json
from dflash_jax.targets.config import TargetConfig, read_target_config
from dflash_jax.targets.decoder import Target
from dflash_jax.targets.layout import assemble, stored_names, stored_shapes, tensor_axes, tensor_shapes
from dflash_jax.targets.sharding import check_mesh, weight_sharding
from dflash_jax.targets.streaming import (
    StoredTensor,
    make_array,
    read_mxfp4,
    read_slice,
    same_bits,
    stored_tensors,
)

_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds weights, and not a config alone."""
    return (folder / _INDEX).is_file() or any(folder.glob("*.safetensors"))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a target folder: one `model.safetensors`, or those of its index.

    Raises:
        InputError: neither is there; the index is no index, or names a path outside the folder or a file that is not
            there; there is a `model.safetensors` that the index does not name.
    """
    if not (folder / _INDEX).is_file():
        if not (folder / "model.safetensors").is_file():
            raise InputError(f"{folder} is not a target folder: it has no model.safetensors and no {_INDEX}")
        return [folder / "model.safetensors"]
    index = read_json(folder / _INDEX, what="the target's weight index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / _INDEX} is not a weight index: it has no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    foreign = [name for name in names if Path(name).name != name]
    if foreign:
        raise InputError(f"{folder / _INDEX} names a file outside the folder: {foreign[0]}")
    if (folder / "model.safetensors").is_file() and "model.safetensors" not in names:
        raise InputError(f"{folder} has a model.safetensors that its {_INDEX} does not name: remove one of the two")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder / _INDEX} names files that are not there: {', '.join(missing)}")
    return [folder / name for name in names]


def checked_tensors(folder: Path, config: TargetConfig) -> dict[str, StoredTensor]:
    """Return where every tensor lies, after the headers were found to hold just what the config calls for.

    Raises:
        InputError: see `load_target`.
    """
    found = stored_tensors(weight_files(folder))
    if config.tie_embeddings:
        found.pop(_HEAD, None)  # some checkpoints store the tied head once more
    # Llama 2's files hold the rotary frequencies too, which the config tells
    found = {name: tensor for name, tensor in found.items() if not name.endswith(".rotary_emb.inv_freq")}
    wanted = stored_shapes(config)
    check_names_and_shapes({name: tensor.shape for name, tensor in found.items()}, wanted, what=str(folder))
    packed = {part for name in tensor_shapes(config) if len(parts := stored_names(config, name)) > 1 for part in parts}
    wrong = [
        f"{name} is {tensor.dtype}, {'uint8' if name in packed else 'a float'} is needed"
        for name, tensor in sorted(found.items())
        if (name in packed) != (tensor.dtype.kind == "u")
    ]
    if wrong:
        raise InputError(f"{folder}: {len(wrong)} tensor(s) are of another dtype: {'; '.join(wrong)}")
    return found


def _check_tied_head(folder: Path, config: TargetConfig) -> None:
    """Refuse a head that is stored and is not the embedding it is said to be: engines differ in which they use."""
    if not config.tie_embeddings:
        return
    stored = stored_tensors(weight_files(folder))
    head, embedding = stored.get(_HEAD), stored["model.embed_tokens.weight"]
    if head is not None and not same_bits(head, embedding):
        raise InputError(
            f"{folder}: config.json says tie_word_embeddings, and {_HEAD} is stored and is not the embedding: say "
            f"false there if the head is meant, or take {_HEAD} out of the weights"
        )


def load_target(
    folder: Path,
    *,
    dtype: jnp.dtype | type = jnp.float32,
    rope: str = "exact",
    mesh: Mesh | None = None,
    layers: tuple[int, ...] | None = None,
) -> Target:
    """Return the model of a target folder. Every process reads the bytes of its own shards, one tensor at a time.

    Args:
        folder: a Hugging Face folder: `config.json`, `model.safetensors` or its shards; MXFP4 is dequantised.
        dtype: of weights and activations; norms' statistics, softmax and logits are float32 in any case.
        rope: how angles are computed: `exact`, `float32`, `bfloat16` or `table:N` (see `nn.Rope`).
        mesh: devices to split it over (`core.make_mesh`); None is one device.
        layers: those that are read and the model gets, in this order; None is all. A model without some of them is good
            for its parts, not for a forward.

    Raises:
        InputError: see `read_target_config`; weights missing, truncated, of a dtype that is not a plain float, or not
            what the config calls for (all named at once); a stored head that should be the embedding and is not; a
            mesh with an expert axis for a target without experts.
    """
    config = read_target_config(folder, rope=rope)
    check_mesh(config, mesh_shape(mesh))
    stored, shapes, axes = checked_tensors(folder, config), tensor_shapes(config), tensor_axes(config)
    _check_tied_head(folder, config)

    def take(name: str) -> jax.Array:
        parts = [stored[part] for part in stored_names(config, name)]
        fill = partial(read_slice, parts[0]) if len(parts) == 1 else partial(read_mxfp4, *parts)
        return make_array(shapes[name], jnp.dtype(dtype), weight_sharding(config, axes[name], mesh), fill)

    return assemble(config, take, mesh=mesh, layers=layers)


def fingerprint(folder: Path) -> dict[str, str]:
    """Return what a target is, by content: SHA-256 of its weights and of the config fields that reach the maths.

    Raises:
        InputError: see `load_target`.
    """
    config = read_target_config(folder)
    hashes = [sha256_file(file) for file in weight_files(folder)]
    # A field added to TargetConfig later has a default that means what was so before it, and is left out at that
    # default: a cache stays good when this package learns a new family (tests/targets/test_fingerprint.py holds it).
    values = asdict(config)
    told = {field.name: values[field.name] for field in fields(config) if values[field.name] != field.default}
    return {"target_weights": sha256_json(hashes), "target_config": sha256_json(told)}
