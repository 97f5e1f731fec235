"""The forward of a build: the target itself."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from dflash_jax.cache.build import BuildProgress, CacheBuildConfig, build_cache, resolve_layers
from dflash_jax.core import mesh_shape
from dflash_jax.targets import (
    Target,
    load_target,
    next_ids,
    open_mesh,
    padded_rows,
    prefill,
    put_batch,
    read_target_config,
    whole_axes,
)


@eqx.filter_jit
def _forward(
    target: Target,
    tokens: Int32[Array, "batch seq"],
    lengths: Int32[Array, " batch"],
    position_offset: Int32[Array, " batch"],
    capture_layers: tuple[int, ...],
    features_dtype: str,
) -> tuple[Float[Array, "batch seq features"], Int32[Array, "batch seq"]]:
    """Features as they are stored, and next_ids, of a padded batch. One compile per shape."""
    output = prefill(target, tokens, lengths=lengths, position_offset=position_offset, capture_layers=capture_layers)
    return output.features.astype(jnp.dtype(features_dtype)), next_ids(target, output.hidden)


class TargetCapture:
    """A `Capture` that runs the target, read at the first batch: nothing is loaded where nothing is left to do."""

    def __init__(
        self,
        folder: Path,
        *,
        capture_layers: tuple[int, ...],
        features_dtype: str,
        rope: str = "exact",
        mesh: Mesh | None = None,
    ) -> None:
        """Remember what to capture. `features_dtype` is that of the features on disk; the forward is float32."""
        self._folder, self._capture_layers, self._features_dtype = folder, capture_layers, features_dtype
        self._rope, self._mesh = rope, mesh

    @cached_property
    def _target(self) -> Target:
        return load_target(self._folder, rope=self._rope, mesh=self._mesh)

    def __call__(
        self,
        tokens: Int32[np.ndarray, "batch seq"],
        lengths: Int32[np.ndarray, " batch"],
        position_offset: Int32[np.ndarray, " batch"],
    ) -> tuple[Float[Array, "batch seq features"], Int32[Array, "batch seq"]]:
        """Launch the forward of a batch; see `Capture`."""
        rows = len(tokens)
        fill = padded_rows(self._mesh, rows) - rows  # rows of one token that nobody looks at
        given = put_batch(
            self._mesh,
            {
                "tokens": np.pad(tokens, ((0, fill), (0, 0))),
                "lengths": np.pad(lengths, (0, fill), constant_values=1),
                "position_offset": np.pad(position_offset, (0, fill)),
            },
        )
        features, ids = _forward(
            self._target, **given, capture_layers=self._capture_layers, features_dtype=self._features_dtype
        )
        return (features[:rows], ids[:rows]) if fill else (features, ids)


def build(
    config: CacheBuildConfig, *, fingerprint: dict[str, Any], progress: Callable[[BuildProgress], None] | None = None
) -> dict[str, Any]:
    """Build a cache of a target folder's features; see `build_cache`, whose result and errors these are.

    The result has `mesh` and `whole_axes` (what the mesh cannot split, and why) besides.

    Args:
        config: settings.
        fingerprint: `targets.fingerprint` and the tokenizer's, merged; the rope's parameters are added here.
        progress: called after every batch.
    """
    target = read_target_config(config.target, rope=config.rope)
    # each of several processes builds shards of its own, with its own devices
    mesh = open_mesh(target, config.mesh, local=True)
    capture = TargetCapture(
        config.target,
        capture_layers=resolve_layers(config, target.num_layers),
        features_dtype=config.features,
        rope=config.rope,
        mesh=mesh,
    )
    built = build_cache(
        config, fingerprint=fingerprint | {"rope": target.rope.to_json()}, capture=capture, progress=progress
    )
    return built | {"mesh": str(mesh_shape(mesh)), "whole_axes": whole_axes(target, mesh_shape(mesh))}
