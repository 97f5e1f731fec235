"""Products of the precision that their operands have, on every device."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def product(terms: str, *operands: Float[Array, "..."], out: Any = None) -> Float[Array, "..."]:
    """Return `jnp.einsum(terms, *operands)`, float32 operands multiplied as float32.

    Left to themselves, accelerators round them first: a TPU to bfloat16, an NVIDIA GPU to TF32 (10 bits of mantissa),
    and neither decoding is lossless then nor do features agree over positions to 1e-5. Who wants speed gives bfloat16
    operands, on which this has no effect.

    Args:
        terms: subscripts of the operands and of the result.
        operands: all of one dtype.
        out: dtype of sums and result; None: the operands'.
    """
    return jnp.einsum(terms, *operands, precision=lax.Precision.HIGHEST, preferred_element_type=out)


def on_one_cpu() -> bool:
    """Whether programs run on one CPU device, where no mesh splits an axis and XLA is helped by other forms."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1
