"""What a target is and what it takes, from its config and headers alone: no weight is read, no device is touched."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dflash_jax.core import MeshShape, split_axes
from dflash_jax.targets.config import TargetConfig, default_capture_layers, read_target_config
from dflash_jax.targets.cost import num_active_parameters
from dflash_jax.targets.layout import tensor_axes, tensor_shapes
from dflash_jax.targets.loading import checked_tensors, has_weights
from dflash_jax.targets.sharding import check_mesh, weight_split, whole_axes

CAPTURE_COUNTS = range(1, 9)  # published drafters have 3 to 8
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def _weights_per_device(config: TargetConfig, shape: MeshShape) -> int:
    """Numbers of the weights that one device holds: all devices hold equally many."""
    axes, total = tensor_axes(config), 0
    for name, size in tensor_shapes(config).items():
        parts = math.prod(shape.along(over or ()) for over in weight_split(config, axes[name], shape))
        total += math.prod(size) // parts
    return total


def _memory(config: TargetConfig, shape: MeshShape) -> dict[str, dict[str, int]]:
    """Bytes by dtype of weights and activations."""
    weights = sum(math.prod(size) for size in tensor_shapes(config).values())
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    (kv_split,) = split_axes(("kv_heads",), (config.num_kv_heads,), shape)
    per_device, kv_parts = _weights_per_device(config, shape), shape.along(kv_split or ())
    return {
        dtype: {
            "weight_bytes": weights * item,
            "weight_bytes_per_device": per_device * item,
            "kv_bytes_per_token": kv * item,
            "kv_bytes_per_token_per_device": kv // kv_parts * item,
            "features_bytes_per_token_per_layer": config.hidden_size * item,
        }
        for dtype, item in _ITEM_BYTES.items()
    }


def describe_target(folder: Path, *, mesh: MeshShape | None = None, rope: str = "exact") -> dict[str, Any]:
    """Return what a target is, for people and scripts. A folder with `config.json` alone will do.

    A sequence's keys, values and features lie on the devices of one data (and expert) group; `..._per_device` is what
    one of them holds of it.

    Args:
        folder: target folder.
        mesh: devices to split it over, which need not be here; None is one device.
        rope: see `load_target`.

    Returns:
        `family`, the config's sizes, `num_parameters`, `num_active_parameters` (that a token meets), `weight_bytes` (of
        the files; None where there are none), `default_capture_layers` by count, `kv_bytes_per_token` (float32), `rope`
        in words, `mesh`, `num_devices`, `memory` by dtype, `whole_axes` (what the mesh cannot split, and why).

    Raises:
        InputError: see `load_target`.
    """
    shape = mesh or MeshShape()
    config = read_target_config(folder, rope=rope)
    check_mesh(config, shape)
    stored = checked_tensors(folder, config) if has_weights(folder) else None
    memory = _memory(config, shape)
    return {
        "family": config.architecture.removesuffix("ForCausalLM"),
        **asdict(config),
        "num_parameters": sum(math.prod(size) for size in tensor_shapes(config).values()),
        "num_active_parameters": num_active_parameters(config),
        "weight_bytes": None
        if stored is None
        else sum(file.stat().st_size for file in {t.file for t in stored.values()}),
        "kv_bytes_per_token": memory["float32"]["kv_bytes_per_token"],
        "default_capture_layers": {
            str(count): list(default_capture_layers(config.num_layers, count))
            for count in CAPTURE_COUNTS
            if count <= config.num_layers - 3
        },
        "rope": config.rope.describe(),
        "mesh": str(shape),
        "num_devices": shape.size,
        "whole_axes": whole_axes(config, shape),
        "memory": memory,
    }
