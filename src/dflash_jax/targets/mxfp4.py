"""MXFP4, the four-bit format in which OpenAI ships gpt-oss's experts."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

MXFP4_GROUP = 32  # values that share one scale; two values a byte
# E2M1: sign, two bits of exponent, one of mantissa
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantise_mxfp4(
    blocks: UInt8[Array, "*rows groups 16"], scales: UInt8[Array, "*rows groups"], *, dtype: jnp.dtype | type
) -> Float[Array, "*rows 32*groups"]:
    """Return the numbers of MXFP4 blocks: `value * 2^(scale - 127)`.

    Worked: the byte 0x2F under scale 128 holds first -6 * 2 = -12 (low nibble 0xF), then 1 * 2 = 2 (high nibble 0x2).

    Args:
        blocks: two values a byte, the earlier one in the low nibble; 32 values share a scale.
        scales: exponents with a bias of 127 (E8M0); 255 is NaN.
        dtype: of the result; bfloat16 and float32 hold every value exactly, but those below their smallest normal.

    **Source:** OCP Microscaling Formats specification 1.0; nibble order as huggingface/transformers
    `integrations/mxfp4.py`, `_convert_moe_packed_tensors`, which also swaps the last two axes: the caller does that.
    """
    table = jnp.asarray(np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32))
    nibbles = jnp.stack([blocks & 0xF, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], MXFP4_GROUP)
    # as exponents of float32: scale 0 is 2^-127, which a float32 exponent field of 0 does not say
    factors = lax.bitcast_convert_type(scales.astype(jnp.uint32) << 23, jnp.float32)
    factors = jnp.where(scales == 0, jnp.float32(2.0**-127), jnp.where(scales == 255, jnp.nan, factors))
    values = table[nibbles.astype(jnp.int32)] * factors[..., None]
    return values.astype(dtype).reshape(*blocks.shape[:-2], -1)
