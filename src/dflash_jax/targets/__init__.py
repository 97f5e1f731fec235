"""The LLM being accelerated: its forward, with the features of captured layers, at any absolute position.

It promises: `extend` by blocks, chunked prefill and one long prefill give the same; padding and batch order change
nothing; rejecting tokens is a smaller length. It imports `core` and `nn`, and of libraries only jax, equinox, numpy,
jaxtyping and safetensors.
"""

from dflash_jax.targets.config import TargetConfig, default_capture_layers, read_target_config
from dflash_jax.targets.cost import num_active_parameters, prefill_flops
from dflash_jax.targets.decoder import (
    DecoderLayer,
    KVCache,
    Target,
    TargetOutput,
    extend,
    next_ids,
    next_top,
    pin_cache,
    prefill,
    with_screen,
)
from dflash_jax.targets.describe import describe_target
from dflash_jax.targets.layout import assemble, stored_shapes, tensor_axes, tensor_shapes
from dflash_jax.targets.loading import fingerprint, load_target
from dflash_jax.targets.mxfp4 import dequantise_mxfp4
from dflash_jax.targets.sharding import (
    constrain,
    open_mesh,
    padded_rows,
    put_batch,
    put_whole,
    weight_sharding,
    whole_axes,
)

__all__ = [
    "DecoderLayer",
    "KVCache",
    "Target",
    "TargetConfig",
    "TargetOutput",
    "assemble",
    "constrain",
    "default_capture_layers",
    "dequantise_mxfp4",
    "describe_target",
    "extend",
    "fingerprint",
    "load_target",
    "next_ids",
    "next_top",
    "num_active_parameters",
    "open_mesh",
    "padded_rows",
    "pin_cache",
    "prefill",
    "prefill_flops",
    "put_batch",
    "put_whole",
    "read_target_config",
    "stored_shapes",
    "tensor_axes",
    "tensor_shapes",
    "weight_sharding",
    "whole_axes",
    "with_screen",
]
