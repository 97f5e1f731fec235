"""RMSNorm."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class RMSNorm(eqx.Module):
    """Root-mean-square normalisation over the last axis.

    Statistics are float32. The order of what follows matters bit for bit in bfloat16; a weight that is wider than the
    input (float32 master weights) is multiplied in float32.

    Attributes:
        weight: factor of each channel.
        eps: added to the mean square.
        cast_last: whether the weight is multiplied in float32 and the product cast to the input's dtype (gpt-oss), and
            not the cast value by the weight (Llama, Qwen3).

    **Source:** huggingface/transformers `models/qwen3/modeling_qwen3.py`, `Qwen3RMSNorm`, and
    `models/gpt_oss/modeling_gpt_oss.py`, `GptOssRMSNorm` (same orders).
    """

    weight: Float[Array, " hidden"]
    eps: float = eqx.field(static=True)
    cast_last: bool = eqx.field(static=True, default=False)

    def __call__(self, x: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        """Return `x / sqrt(mean(x^2) + eps) * weight`, in `x`'s dtype."""
        wide = x.astype(jnp.float32)
        scaled = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = jnp.expand_dims(self.weight, tuple(range(x.ndim - 1)))
        if self.cast_last or self.weight.dtype != x.dtype:
            return (scaled * weight.astype(jnp.float32)).astype(x.dtype)
        return scaled.astype(x.dtype) * weight
