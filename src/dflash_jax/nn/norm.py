"""RMSNorm."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class RMSNorm(eqx.Module):
    """Root-mean-square normalisation over the last axis.

    Statistics in float32, cast back to the input's dtype, then multiplied by the weight: the order matters bit for bit
    in bfloat16.

    **Source:** huggingface/transformers `models/qwen3/modeling_qwen3.py`, `Qwen3RMSNorm` (same order).
    """

    weight: Float[Array, " hidden"]
    eps: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        """Return `x / sqrt(mean(x^2) + eps) * weight`, in `x`'s dtype."""
        wide = x.astype(jnp.float32)
        scaled = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = jnp.expand_dims(self.weight, tuple(range(x.ndim - 1)))
        return scaled.astype(x.dtype) * weight
