"""What an import asks of the target: greedy labels, embeddings, and whether the features are really its own."""

from functools import cached_property
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt16

from dflash_jax.core import InputError
from dflash_jax.targets import Target, fingerprint, load_target, next_ids, prefill, read_target_config
from dflash_jax.text import load_tokenizer

ROWS = 256
"""Rows are given to the head in pieces of this size, and sequences padded to multiples of it: few compiles."""
MAX_RELATIVE_ERROR = 0.25
"""Features of bfloat16 engines differ from ours by a few hundredths; a neighbouring layer's by a multiple of this."""


@eqx.filter_jit
def _greedy(target: Target, last: Float[Array, "row hidden"]) -> Int32[Array, " row"]:
    return next_ids(target, target.norm(last.astype(target.embed_tokens.dtype)))


@eqx.filter_jit
def _features(
    target: Target, tokens: Int32[Array, "1 seq"], offset: Int32[Array, " 1"], layers: tuple[int, ...]
) -> Float[Array, "seq features"]:
    lengths = jnp.full(1, tokens.shape[1], jnp.int32)
    return prefill(target, tokens, lengths=lengths, position_offset=offset, capture_layers=layers).features[0]


def relative_error(found: Float[np.ndarray, "seq hidden"], wanted: Float[np.ndarray, "seq hidden"]) -> float:
    """Return the median over tokens of `|found - wanted| / |wanted|`, Euclidean norms.

    The median, since a text's first token has features a hundred times longer than the rest, equal from layer to layer.
    Worked: rows [3, 5], [0, 9], [1, 0] against [3, 4], [0, 9], [2, 0] have 1/5, 0 and 1/2: the median is 1/5.
    """
    difference = np.linalg.norm(found.astype(np.float64) - wanted.astype(np.float64), axis=1)
    return float(np.median(difference / np.maximum(np.linalg.norm(wanted.astype(np.float64), axis=1), 1e-30)))


def not_finite(features: Float[np.ndarray, "seq features"]) -> Bool[np.ndarray, "seq features"]:
    """Where features are NaN or infinite, by their exponent bits: a cast of such bits is a warning."""
    exponent = {2: 0x7F80, 4: 0x7F800000}[features.dtype.itemsize]
    return (as_bits(features) & exponent) == exponent


class TargetSide:
    """A target folder, read when it is first needed."""

    def __init__(self, folder: Path) -> None:
        """Read the config alone."""
        self.folder = folder
        self.config = read_target_config(folder)

    @cached_property
    def _target(self) -> Target:
        return load_target(self.folder)

    def fingerprint(self) -> dict[str, Any]:
        """What a cache built with this target says of it."""
        target = fingerprint(self.folder) | load_tokenizer(self.folder).fingerprint()
        return target | {"rope": self.config.rope.to_json()}

    def greedy_tokens(self, last: Float[np.ndarray, "seq hidden"]) -> Int32[np.ndarray, " seq"]:
        """The target's token after each row of its last layer's output, which is not normed yet."""
        padded = np.zeros((-(-len(last) // ROWS) * ROWS, last.shape[1]), last.dtype)
        padded[: len(last)] = last
        pieces = [_greedy(self._target, jax.device_put(piece)) for piece in np.split(padded, len(padded) // ROWS)]
        return np.concatenate([np.asarray(piece) for piece in pieces])[: len(last)]

    def embeddings(self, token_ids: Int32[np.ndarray, " row"]) -> UInt16[np.ndarray, "row hidden"]:
        """Embeddings of tokens as the bits of bfloat16."""
        rows = self._target.embed_tokens[jnp.asarray(token_ids)]
        return np.asarray(rows.astype(jnp.bfloat16)).view(np.uint16)

    def last_layer(self, token_ids: Int32[np.ndarray, " seq"], position_offset: int) -> np.ndarray:
        """The last layer's output, not normed, in bfloat16."""
        padded = np.zeros((1, -(-len(token_ids) // ROWS) * ROWS), np.int32)
        padded[0, : len(token_ids)] = token_ids
        offset = np.array([position_offset], np.int32)
        layers = (self.config.num_layers - 1,)
        features = _features(self._target, jax.device_put(padded), jax.device_put(offset), layers)
        return np.asarray(features[: len(token_ids)].astype(jnp.bfloat16))

    def check_features(
        self,
        token_ids: Int32[np.ndarray, " seq"],
        features: Float[np.ndarray, "seq features"],
        position_offset: int,
        capture_layers: tuple[int, ...],
    ) -> float:
        """Return the relative error of features against the target's own, the largest of the layers.

        Raises:
            InputError: a column block is nearer to another layer than to the one it is said to be, or to none of
                them; a feature is NaN or infinite.
        """
        layers = tuple(range(self.config.num_layers))
        offset = jax.device_put(np.array([position_offset], np.int32))
        own = np.asarray(_features(self._target, jax.device_put(token_ids[None]), offset, layers), np.float32)
        own = own.reshape(len(token_ids), len(layers), -1)
        bad = np.flatnonzero(not_finite(features).any(axis=1))
        if bad.size:
            raise InputError(f"the features of token {bad[0]} of the first text are not finite")
        found = features.astype(np.float32).reshape(len(token_ids), len(capture_layers), -1)
        errors = []
        for place, layer in enumerate(capture_layers):
            by_layer = [relative_error(found[:, place], own[:, other]) for other in layers]
            nearest = int(np.argmin(by_layer))
            if by_layer[nearest] > MAX_RELATIVE_ERROR:
                raise InputError(
                    f"the hidden states are not of the target {self.folder}: those said to be of layer {layer} differ "
                    f"from every layer of it (by {by_layer[nearest]:.0%} at least): name the target they were made with"
                )
            if nearest != layer:
                raise InputError(
                    f"the layer ids are wrong: the hidden states said to be the output of layer {layer} are that of "
                    f"layer {nearest} (0-based) of the target {self.folder}: correct the ids"
                )
            errors.append(by_layer[layer])
        return max(errors)


def as_bits(features: np.ndarray) -> np.ndarray:
    """Features as unsigned integers of their size: equal bits, not equal numbers, is what a copy must have."""
    return features.view(np.uint16 if features.dtype == ml_dtypes.bfloat16 else f"u{features.dtype.itemsize}")
