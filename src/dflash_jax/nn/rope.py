"""Rotary position embedding, exact at any absolute position up to 2^31.

A pair of channels turns by `frequency` turns per position. The usual `float32(position) * float32(frequency)` keeps 24
bits of a product whose integer part is thrown away, so at position 131072 the remaining angle is off by up to 8e-3 rad
and at 2^24 it is noise. Here a frequency is an integer number of 2^-64 turns and the product with the integer position
wraps modulo one turn by itself, as unsigned arithmetic does:

    phase = (position * frequency_64) mod 2^64      its top 32 bits are kept: 2^-32 of a turn, 1.5e-9 rad
    angle = signed(phase) * 2 pi / 2^32              in [-pi, pi], one float32 rounding

Shifting every position by the same offset therefore shifts every phase by the same wrapped integer, and differences of
phases, all that attention sees, do not depend on the offset.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, UInt32

MAX_POSITION = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Frequencies of a model's rotary embedding; hashable, so it can be a static field.

    Attributes:
        theta: base of the geometric series of wavelengths (`rope_theta`).
        head_dim: channels per head; channel i is paired with i + head_dim / 2 (the "rotate half" or NeoX layout).
    """

    theta: float
    head_dim: int

    def frequencies_64(self) -> list[int]:
        """Turns per position of each pair as integers in units of 2^-64 turns, from float64 frequencies.

        A frequency `theta^(-2i/head_dim) / 2 pi` is below 0.16 turns, so it fits. Its own relative rounding (2^-53) is
        the same at every position: it changes the model by less than float32 weights resolve, and never breaks shift
        invariance.
        """
        exponents = [2 * i / self.head_dim for i in range(self.head_dim // 2)]
        return [round(self.theta ** (-e) / (2 * math.pi) * 2**64) for e in exponents]


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


def rope_angles(rope: Rope, positions: Int32[Array, "*rows"]) -> Float[Array, "*rows half_dim"]:
    """Return the rotation angle of each channel pair, in radians in [-pi, pi], float32.

    Args:
        rope: the frequencies.
        positions: absolute positions, 0 to 2^31 - 1.
    """
    table = rope.frequencies_64()
    high = jnp.asarray(np.array([f >> 32 for f in table], np.uint32))
    low = jnp.asarray(np.array([f & 0xFFFFFFFF for f in table], np.uint32))
    shape = (*positions.shape, len(table))
    position = jnp.broadcast_to(positions.astype(jnp.uint32)[..., None], shape)
    phase = position * jnp.broadcast_to(high, shape) + _high_product(position, jnp.broadcast_to(low, shape))
    return lax.bitcast_convert_type(phase, jnp.int32).astype(jnp.float32) * np.float32(2 * math.pi / 2**32)


def rope_cos_sin(
    rope: Rope, positions: Int32[Array, "*rows"]
) -> tuple[Float[Array, "*rows half_dim"], Float[Array, "*rows half_dim"]]:
    """Return cosines and sines of `rope_angles`, float32: made once per forward and shared by its layers."""
    angles = rope_angles(rope, positions)
    return jnp.cos(angles), jnp.sin(angles)


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
