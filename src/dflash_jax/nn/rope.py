"""Rotary position embedding, exact at any absolute position up to 2^31.

A pair of channels turns by `frequency` turns per position. The usual `float32(position) * float32(frequency)` keeps 24
bits of a product whose integer part is thrown away, so at position 131072 the remaining angle is off by up to 8e-3 rad
and at 2^24 it is noise. Here a frequency is an integer number of 2^-64 turns and the product with the integer position
wraps modulo one turn by itself, as unsigned arithmetic does:

    phase = (position * frequency_64) mod 2^64      its top 32 bits are kept: 2^-32 of a turn, 1.5e-9 rad
    angle = signed(phase) * 2 pi / 2^32              in [-pi, pi], one float32 rounding

Shifting every position by the same offset therefore shifts every phase by the same wrapped integer, and differences of
phases, all that attention sees, do not depend on the offset.

Other engines compute their angles otherwise; `Rope.precision` reproduces what they serve, to find out what it costs.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, UInt32

from dflash_jax.core import InputError
from dflash_jax.nn.product import on_one_cpu
from dflash_jax.nn.rope_scaling import RopeScaling, scaling_to_json

MAX_POSITION = 2**31 - 1
_PRECISION = re.compile(r"exact|float32|bfloat16|table:[1-9][0-9]{0,9}")


def check_rope_precision(text: str) -> str:
    """Return the setting, one of `exact`, `float32`, `bfloat16` and `table:N`; see `Rope.precision`.

    Raises:
        InputError: it is none of them.
    """
    if not _PRECISION.fullmatch(text):
        raise InputError(
            f"the rope setting is {text!r}: choose exact, float32, bfloat16 or table:N (a table of N rows, such as "
            "table:4096)"
        )
    return text


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """A model's rotary embedding; hashable, so it can be a static field.

    Attributes:
        theta: base of the geometric series of wavelengths (`rope_theta`).
        head_dim: channels per head; channel i is paired with i + head_dim / 2 (the "rotate half" or NeoX layout).
        scaling: how the frequencies are stretched; None: not at all.
        precision: how an angle is computed.
            `exact`: integer phases; a shift of all positions changes no difference of angles.
            `float32`: float32 position times float32 frequency, as transformers does.
            `bfloat16`: position, frequency, their product, cosine and sine each rounded to bfloat16, as an engine does
            that computes its angles in the activations' dtype.
            `table:N`: a float32 cosine and sine table of N rows, read with a clamped index: positions past its end get
            row N - 1.
    """

    theta: float
    head_dim: int
    scaling: RopeScaling | None = None
    precision: str = "exact"

    def __post_init__(self) -> None:
        """Check the precision."""
        check_rope_precision(self.precision)

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by (YaRN); scores grow by its square."""
        return 1.0 if self.scaling is None else self.scaling.attention_factor_used

    def frequencies(self, dtype: type[np.floating] = np.float64) -> Float[np.ndarray, " half_dim"]:
        """Return the angle per position of each pair, in radians, computed in the given precision.

        float32 follows transformers' order of roundings (exponent, power, reciprocal, scaling): measured equal to its
        frequencies but for one unit in the last place of about one in a hundred.
        """
        exponents = np.arange(0, self.head_dim, 2).astype(dtype) / dtype(self.head_dim)
        powers = np.array([self.theta ** float(exponent) for exponent in exponents]).astype(dtype)
        inverse = dtype(1) / powers
        return inverse if self.scaling is None else self.scaling.scale(inverse, theta=self.theta)

    def frequencies_64(self) -> list[int]:
        """Turns per position of each pair as integers in units of 2^-64 turns, from float64 frequencies.

        A frequency is at most 1 radian, 0.16 turns, so it fits. Its own relative rounding (about 2^-52) is the same at
        every position: it changes the model by less than float32 weights resolve, and never breaks shift invariance.
        """
        return [round(frequency / (2 * math.pi) * 2**64) for frequency in self.frequencies().tolist()]

    def to_json(self) -> dict[str, Any]:
        """Return theta and head_dim, and scaling and precision where they are not the default: for fingerprints."""
        told: dict[str, Any] = {"theta": self.theta, "head_dim": self.head_dim}
        if self.scaling is not None:
            told["scaling"] = scaling_to_json(self.scaling)
        return told if self.precision == "exact" else told | {"precision": self.precision}

    def describe(self) -> str:
        """Return the embedding in words."""
        words = f"theta {self.theta:g} over {self.head_dim} channels, "
        if self.scaling is None:
            words += "unscaled; "
        else:
            factor = f", cosines and sines times {self.attention_factor:.4g}" if self.attention_factor != 1 else ""
            words += (
                f"{self.scaling.rope_type} scaling by {self.scaling.factor:g} from a context of "
                f"{self.scaling.original_max_position_embeddings} tokens{factor}; "
            )
        if self.precision == "exact":
            return words + "exact at any position below 2^31"
        return words + f"angles as {self.precision} has them: they change with the absolute position"


def _high_product(a: UInt32[Array, "*shape"], b: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """High 32 bits of the 64-bit product of two uint32, by 16-bit halves (no 64-bit integers on TPU).

    Worked: a = 0x80000000, b = 6 gives 0x3_00000000, so 3.
    """
    mask = jnp.uint32(0xFFFF)
    a_low, a_high, b_low, b_high = a & mask, a >> 16, b & mask, b >> 16
    low = a_low * b_low
    # each term is at most 0xFFFF * 0xFFFF + 2 * 0xFFFF = 0xFFFFFFFF: no sum overflows
    middle = a_high * b_low + (low >> 16)
    other = a_low * b_high + (middle & mask)
    return a_high * b_high + (middle >> 16) + (other >> 16)


def _exact_angles(rope: Rope, positions: Int32[Array, "*rows"]) -> Float[Array, "*rows half_dim"]:
    table = rope.frequencies_64()
    high = jnp.asarray(np.array([f >> 32 for f in table], np.uint32))
    low = jnp.asarray(np.array([f & 0xFFFFFFFF for f in table], np.uint32))
    shape = (*positions.shape, len(table))
    position = jnp.broadcast_to(positions.astype(jnp.uint32)[..., None], shape)
    phase = position * jnp.broadcast_to(high, shape) + _high_product(position, jnp.broadcast_to(low, shape))
    return lax.bitcast_convert_type(phase, jnp.int32).astype(jnp.float32) * np.float32(2 * math.pi / 2**32)


def _round_bfloat16(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """float32 values that bfloat16 holds. A cast there and back is a rounding that XLA is free to leave out."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def rope_angles(rope: Rope, positions: Int32[Array, "*rows"]) -> Float[Array, "*rows half_dim"]:
    """Return the rotation angle of each channel pair, in radians, float32; within [-pi, pi] where they are exact.

    Args:
        rope: frequencies and precision.
        positions: absolute positions, 0 to 2^31 - 1.
    """
    if rope.precision == "exact":
        return _exact_angles(rope, positions)
    if rope.precision.startswith("table:"):
        rows = int(rope.precision.removeprefix("table:"))
        positions = jnp.minimum(positions, jnp.int32(min(rows - 1, MAX_POSITION)))
    frequencies = jnp.asarray(rope.frequencies(np.float32))
    shape = (*positions.shape, frequencies.shape[0])
    position = jnp.broadcast_to(positions.astype(jnp.float32)[..., None], shape)
    frequency = jnp.broadcast_to(frequencies, shape)
    if rope.precision == "bfloat16":
        return _round_bfloat16(_round_bfloat16(position) * _round_bfloat16(frequency))
    return position * frequency


def rope_cos_sin(
    rope: Rope, positions: Int32[Array, "*rows"]
) -> tuple[Float[Array, "*rows half_dim"], Float[Array, "*rows half_dim"]]:
    """Return cosines and sines of `rope_angles` times `rope.attention_factor`, float32.

    They are made once per forward and shared by its layers.
    """
    angles = rope_angles(rope, positions)

    def finish(values: Float[Array, "*rows half_dim"]) -> Float[Array, "*rows half_dim"]:
        values = _round_bfloat16(values) if rope.precision == "bfloat16" else values
        if rope.attention_factor == 1:
            return values
        values = values * np.float32(rope.attention_factor)
        return _round_bfloat16(values) if rope.precision == "bfloat16" else values

    if not on_one_cpu():
        return finish(jnp.cos(angles)), finish(jnp.sin(angles))
    # what comes out of a loop is there: else XLA makes both anew, angles and all, for every head of every layer
    cos, sin = lax.map(lambda is_sin: finish(lax.cond(is_sin, jnp.sin, jnp.cos, angles)), jnp.array([False, True]))
    return cos, sin


def apply_rope(
    x: Float[Array, "*rows heads head_dim"],
    cos_sin: tuple[Float[Array, "*rows half_dim"], Float[Array, "*rows half_dim"]],
) -> Float[Array, "*rows heads head_dim"]:
    """Rotate channel pairs (i, i + head_dim/2) of every head by its row's angle, in float32; `x`'s dtype comes back.

    Worked, head_dim 2, angle pi/2: [1, 0] becomes [0, 1].

    **Source:** the rotate-half layout of huggingface/transformers `models/llama/modeling_llama.py`; it differs in that
    the product is float32 whatever the activations are.
    """
    cos, sin = (part[..., None, :] for part in cos_sin)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
