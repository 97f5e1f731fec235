"""How features are stored: as they are, or in 8 bits with scales per token."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Shaped

FeaturesDtype = Literal["bfloat16", "float32", "int8", "float8"]
FEATURES_DTYPES: tuple[str, ...] = get_args(FeaturesDtype)
_LARGEST = {"int8": 127.0, "float8": 448.0}  # of int8 symmetric about 0, and of float8_e4m3fn
_DTYPES = {
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float32": ("F32", np.dtype(np.float32)),
    "int8": ("I8", np.dtype(np.int8)),
    "float8": ("F8_E4M3", np.dtype(ml_dtypes.float8_e4m3fn)),
}
# A residual stream has channels tens of times larger than the rest, and an int8 step is a 127th of the largest: so few
# channels share a scale. A float8 carries its own exponent, and one scale per layer does.
_CHANNELS_PER_SCALE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureLayout:
    """Columns of a cache's features and how they are stored.

    Attributes:
        num_layers: captured layers, K.
        hidden_size: the target's, H.
        dtype: "bfloat16", "float32", "int8" or "float8".
        top_k: the target's likeliest tokens that are stored of every token, beside the features; 0: none.
    """

    num_layers: int
    hidden_size: int
    dtype: str
    top_k: int = 0

    @property
    def columns(self) -> int:
        """Features of a token, K*H."""
        return self.num_layers * self.hidden_size

    @property
    def quantised(self) -> bool:
        """Whether features are stored in 8 bits and have scales."""
        return self.dtype in _LARGEST

    @property
    def scales(self) -> int:
        """Scales of a token, 0 where features are stored as they are; each is for `columns / scales` columns in a row.

        int8: one per 64 channels where H divides by 64, else one per captured layer. float8: one per captured layer.
        """
        if not self.quantised:
            return 0
        grouped = self.dtype == "int8" and self.hidden_size % _CHANNELS_PER_SCALE == 0
        return self.columns // _CHANNELS_PER_SCALE if grouped else self.num_layers

    @property
    def safetensors_dtype(self) -> str:
        """The name that safetensors has for the stored type."""
        return _DTYPES[self.dtype][0]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The stored type as numpy's or ml_dtypes'."""
        return _DTYPES[self.dtype][1]


def feature_layout(manifest: dict[str, Any]) -> FeatureLayout:
    """Return the layout of a cache's features."""
    return FeatureLayout(
        num_layers=len(manifest["capture_layers"]),
        hidden_size=manifest["hidden_size"],
        dtype=manifest["features_dtype"],
        top_k=manifest.get("top_k", 0),
    )


def store_features(
    features: Float[Array, "*tokens features"], layout: FeatureLayout
) -> tuple[Shaped[Array, "*tokens features"], Float[Array, "*tokens scales"]]:
    """Return features as they are stored, and their scales (no columns where they have none). Runs on the device.

    `scale = bfloat16(largest magnitude of its columns / 127)`, or / 448 for float8; 1 where all are zero. int8 stores
    `round(feature / scale)` (half to even) between -127 and 127, float8 `feature / scale`, both with the rounded scale.
    Features that are NaN or infinite make a scale so.
    """
    leading = features.shape[:-1]
    if not layout.quantised:
        return features.astype(layout.numpy_dtype), jnp.zeros((*leading, 0), jnp.bfloat16)
    largest = _LARGEST[layout.dtype]
    grouped = features.astype(jnp.float32).reshape(*leading, layout.scales, -1)
    scales = (jnp.abs(grouped).max(axis=-1) / jnp.float32(largest)).astype(jnp.bfloat16)
    scales = jnp.where(scales == 0, jnp.bfloat16(1), scales)
    # the scale was rounded, so the largest may lie half a step outside
    stored = jnp.clip(grouped / scales.astype(jnp.float32)[..., None], -largest, largest)
    stored = (jnp.round(stored) if layout.dtype == "int8" else stored).astype(layout.numpy_dtype)
    return stored.reshape(features.shape), scales


@jax.jit
def load_features(
    stored: Shaped[Array, "*tokens features"], scales: Float[Array, "*tokens scales"]
) -> Float[Array, "*tokens features"]:
    """Return the features that were stored in 8 bits: `bfloat16(stored * scale)`, computed on the device."""
    grouped = stored.astype(jnp.float32).reshape(*scales.shape, -1) * scales.astype(jnp.float32)[..., None]
    return grouped.astype(jnp.bfloat16).reshape(stored.shape)


def load_features_on_host(
    stored: Shaped[np.ndarray, "*tokens features"], scales: Float[np.ndarray, "*tokens scales"]
) -> Float[np.ndarray, "*tokens features"]:
    """Return what `load_features` does, bit for bit, by numpy."""
    grouped = stored.astype(np.float32).reshape(*scales.shape, -1) * scales.astype(np.float32)[..., None]
    return grouped.astype(ml_dtypes.bfloat16).reshape(stored.shape)


def first_not_finite(features: Float[np.ndarray, "seq features"]) -> int | None:
    """Row of the first NaN or infinity; None where all is finite. By exponent bits: numpy is slow on bfloat16."""
    bits, exponent = (np.uint16, 0x7F80) if features.dtype.itemsize == 2 else (np.uint32, 0x7F800000)
    largest = (features.view(bits) & bits(exponent)).max(axis=1)
    bad = np.flatnonzero(largest == exponent)
    return int(bad[0]) if bad.size else None
