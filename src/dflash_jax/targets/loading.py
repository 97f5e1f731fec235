"""Target folders: reading, checking, fingerprinting, describing."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dflash_jax.core import InputError, check_names_and_shapes, read_header, read_json, sha256_file, sha256_json
from dflash_jax.targets.config import TargetConfig, default_capture_layers, read_target_config
from dflash_jax.targets.decoder import Target
from dflash_jax.targets.layout import assemble, tensor_shapes

_INDEX = "model.safetensors.index.json"
_DTYPES = ("BF16", "F16", "F32")  # others are quantised: numbers that mean nothing without their scales


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a target folder: one `model.safetensors`, or those of its index.

    Raises:
        InputError: neither is there; the index is no index, or names a path outside the folder or a file that is not
            there.
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
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder / _INDEX} names files that are not there: {', '.join(missing)}")
    return [folder / name for name in names]


def _checked_files(folder: Path, config: TargetConfig) -> list[Path]:
    """The weight files, after their headers were found to hold just what the config calls for."""
    files = weight_files(folder)
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, entry in read_header(file, what="the target's weights").items():
            if entry["dtype"] not in _DTYPES:
                raise InputError(f"{file}: {name} is {entry['dtype']}; only {', '.join(_DTYPES)} are handled")
            found[name] = tuple(entry["shape"])
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)  # some checkpoints store the tied head once more
    check_names_and_shapes(found, tensor_shapes(config), what=str(folder))
    return files


def _read_weights(folder: Path, config: TargetConfig, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Every tensor on the device, one at a time through host memory."""
    weights = {}
    wanted = tensor_shapes(config)
    for file in _checked_files(folder, config):
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in wanted.keys() & set(tensors.keys()):
                    weights[name] = jnp.asarray(tensors.get_tensor(name), dtype)
        except SafetensorError as error:
            raise InputError(f"the target's weights are not readable: {file}: {error}") from error
    return weights


def load_target(folder: Path, *, dtype: jnp.dtype | type = jnp.float32, rope: str = "exact") -> Target:
    """Return the model of a target folder.

    Args:
        folder: a Hugging Face folder: `config.json`, `model.safetensors` or its shards.
        dtype: of weights and activations; norms' statistics, softmax and logits are float32 in any case.
        rope: how angles are computed: `exact`, `float32`, `bfloat16` or `table:N` (see `nn.Rope`).

    Raises:
        InputError: see `read_target_config`; weights missing, truncated, of a dtype that is not a plain float, or not
            what the config calls for (all named at once).
    """
    config = read_target_config(folder, rope=rope)
    weights = _read_weights(folder, config, jnp.dtype(dtype))
    return assemble(config, weights.pop)


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


def describe_target(folder: Path) -> dict[str, Any]:
    """Return what a target is, for people and scripts, from its config and headers alone (no weights are read).

    Keys: architecture, the config's sizes, `num_parameters`, `weight_bytes`, `default_capture_layers` by count,
    `kv_bytes_per_token` (float32), `rope` in words.

    Raises:
        InputError: see `load_target`.
    """
    config = read_target_config(folder)
    shapes = tensor_shapes(config)
    counts = [count for count in (1, 3, 4, 5, 6) if count <= config.num_layers - 3]
    files = _checked_files(folder, config)
    return {
        **asdict(config),
        "num_parameters": sum(int(np.prod(shape)) for shape in shapes.values()),
        "weight_bytes": sum(file.stat().st_size for file in files),
        "kv_bytes_per_token": 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4,
        "default_capture_layers": {
            str(count): list(default_capture_layers(config.num_layers, count)) for count in counts
        },
        "rope": config.rope.describe(),
    }
