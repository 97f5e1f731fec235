"""The forward of a build: the target itself."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, Shaped

from dflash_jax.cache.build import BuildPlan, BuildProgress, CacheBuildConfig, build_cache, resolve_layers
from dflash_jax.cache.features import FeatureLayout, store_features
from dflash_jax.cache.forward import Captured
from dflash_jax.cache.selftest import Findings, require, self_test
from dflash_jax.core import mesh_shape
from dflash_jax.targets import (
    KVCache,
    Target,
    TargetConfig,
    TargetOutput,
    extend,
    load_target,
    next_ids,
    next_top,
    open_mesh,
    padded_rows,
    prefill,
    put_batch,
    read_target_config,
    whole_axes,
)
from dflash_jax.text import load_tokenizer

Stored = tuple[
    Shaped[Array, "batch seq features"],
    Float[Array, "batch seq scales"],
    Int32[Array, "batch seq"],
    Int32[Array, "batch seq top"] | None,
    Float[Array, "batch seq top"] | None,
    KVCache | None,
]


@eqx.filter_jit
def _store(target: Target, output: TargetOutput, layout: FeatureLayout, keep: bool) -> Stored:
    """What is stored of a forward. A program of its own where the forward is no part of a larger one."""
    stored, scales = store_features(output.features, layout)
    kv = output.kv if keep else None
    if not layout.top_k:
        return stored, scales, next_ids(target, output.hidden), None, None, kv
    ids, logprobs = next_top(target, output.hidden, count=layout.top_k)
    return stored, scales, ids[..., 0], ids, logprobs.astype(jnp.float16), kv


def _start_by_layers(
    target: Target,
    tokens: Int32[Array, "batch seq"],
    lengths: Int32[Array, " batch"],
    position_offset: Int32[Array, " batch"],
    capture_layers: tuple[int, ...],
    layout: FeatureLayout,
    keep: bool,
) -> Stored:
    """Features as they are stored, next_ids and likeliest tokens, of a padded batch; a program per kind of layer."""
    output = prefill(target, tokens, lengths=lengths, position_offset=position_offset, capture_layers=capture_layers)
    return _store(target, output, layout, keep)


_start = eqx.filter_jit(_start_by_layers)
"""The same as one program. One compile per shape."""


@eqx.filter_jit
def _extend(
    target: Target,
    kv: KVCache,
    sources: Int32[Array, " batch"],
    starts: Int32[Array, " batch"],
    tokens: Int32[Array, "batch query"],
    capture_layers: tuple[int, ...],
    layout: FeatureLayout,
) -> Stored:
    """The same of tokens that continue the first `starts` rows of some sequences of a KV cache."""
    layers = jax.tree_util.tree_map(lambda buffer: buffer[sources], kv.layers)
    picked = KVCache(layers=layers, lengths=starts, position_offset=kv.position_offset[sources])
    return _store(target, extend(target, picked, tokens, capture_layers=capture_layers), layout, False)


class TargetCapture:
    """A `Capture` that runs the target, read at the first batch: nothing is loaded where nothing is left to do."""

    def __init__(
        self,
        folder: Path,
        *,
        capture_layers: tuple[int, ...],
        layout: FeatureLayout,
        dtype: str = "float32",
        rope: str = "exact",
        mesh: Mesh | None = None,
    ) -> None:
        """Remember what to capture. `layout` is that of the features on disk, `dtype` what the target runs in."""
        self._folder, self._capture_layers, self._layout = folder, capture_layers, layout
        self._dtype, self._rope, self._mesh = dtype, rope, mesh

    @cached_property
    def target(self) -> Target:
        """The target, loaded when it is first needed."""
        return load_target(self._folder, dtype=jnp.dtype(self._dtype), rope=self._rope, mesh=self._mesh)

    def start(
        self,
        tokens: Int32[np.ndarray, "batch seq"],
        lengths: Int32[np.ndarray, " batch"],
        position_offset: Int32[np.ndarray, " batch"],
        *,
        keep: bool,
        by_layers: bool = False,
    ) -> tuple[Captured, KVCache | None]:
        """Launch the forward of a batch; see `Capture`.

        Args:
            tokens: see `Capture`.
            lengths: the same.
            position_offset: the same.
            keep: the same.
            by_layers: run its layers as programs of their own. What it gives and how long it takes is the same, but
                layers of one kind are compiled once.
        """
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
        start = _start_by_layers if by_layers else _start
        *results, kv = start(self.target, **given, capture_layers=self._capture_layers, layout=self._layout, keep=keep)
        return _captured(results, rows), kv

    def extend(
        self,
        memory: KVCache,
        sources: Int32[np.ndarray, " batch"],
        starts: Int32[np.ndarray, " batch"],
        tokens: Int32[np.ndarray, "batch query"],
    ) -> Captured:
        """Launch the forward of an extension; see `Capture`."""
        rows = len(tokens)
        fill = padded_rows(self._mesh, rows) - rows
        given = put_batch(
            self._mesh,
            {
                "sources": np.pad(sources, (0, fill)),
                "starts": np.pad(starts, (0, fill)),
                "tokens": np.pad(tokens, ((0, fill), (0, 0))),
            },
        )
        *results, _ = _extend(self.target, memory, **given, capture_layers=self._capture_layers, layout=self._layout)
        return _captured(results, rows)


def _captured(results: list[Any], rows: int) -> Captured:
    """The first rows of a forward's results."""
    first: list[Any] = [array if array is None or len(array) == rows else array[:rows] for array in results]
    features, scales, labels, top_ids, top_logprobs = first
    return Captured(
        features=features, feature_scales=scales, next_ids=labels, top_ids=top_ids, top_logprobs=top_logprobs
    )


def target_capture(config: CacheBuildConfig, target: TargetConfig, *, mesh: Mesh | None) -> TargetCapture:
    """Return the forward of a build.

    Raises:
        InputError: a capture layer is not in the target.
    """
    layers = resolve_layers(config, target.num_layers)
    return TargetCapture(
        config.target,
        capture_layers=layers,
        layout=replace(config, capture_layers=layers).feature_layout(target.hidden_size),
        dtype=config.dtype,
        rope=config.rope,
        mesh=mesh,
    )


def build(
    config: CacheBuildConfig,
    *,
    fingerprint: dict[str, Any],
    progress: Callable[[BuildProgress], None] | None = None,
    report: Callable[[Findings], None] | None = None,
) -> dict[str, Any]:
    """Build a cache of a target folder's features; see `build_cache`, whose result and errors these are.

    The result has besides `mesh`, `whole_axes` (what the mesh cannot split, and why) and `self_test`: what the capture
    self-test found before anything was written, by check; empty where nothing was left to build.

    Args:
        config: settings.
        fingerprint: `targets.fingerprint` and the tokenizer's, merged; the rope's parameters are added here.
        progress: called after every batch.
        report: called with what the self-test found, before the build goes on or is refused.

    Raises:
        InputError: see `build_cache`; or the self-test failed.
    """
    target = read_target_config(config.target, rope=config.rope)
    if config.process_count is None:
        config = replace(config, process_index=jax.process_index(), process_count=jax.process_count())
    # each of several processes builds shards of its own, with its own devices
    mesh = open_mesh(target, config.mesh, local=True)
    capture = target_capture(config, target, mesh=mesh)
    findings: Findings = {}

    def test(plan: BuildPlan) -> None:
        tokenizer = load_tokenizer(config.target) if (config.target / "tokenizer.json").is_file() else None
        findings.update(self_test(plan, capture.target, tokenizer=tokenizer))
        if report:
            report(findings)
        require(findings)

    built = build_cache(
        config,
        fingerprint=fingerprint | {"rope": target.rope.to_json()},
        capture=capture,
        progress=progress,
        before=test,
    )
    split = {"mesh": str(mesh_shape(mesh)), "whole_axes": whole_axes(target, mesh_shape(mesh))}
    return {"self_test": findings, **built, **split}
