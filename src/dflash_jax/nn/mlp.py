"""Linear layers and the SwiGLU MLP."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Linear(eqx.Module):
    """`x @ weight.T + bias`, the weight stored `[out, in]` as checkpoints store it (so loading copies nothing)."""

    weight: Float[Array, "out_features in_features"]
    bias: Float[Array, " out_features"] | None = None

    def __call__(self, x: Float[Array, "*rows in_features"]) -> Float[Array, "*rows out_features"]:
        """Return the projection in `x`'s dtype."""
        y = jnp.einsum("...i,oi->...o", x, self.weight)
        return y if self.bias is None else y + jnp.expand_dims(self.bias, tuple(range(y.ndim - 1)))


class SwiGLU(eqx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    def __call__(self, x: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        """Return the MLP's output, not added to the residual stream."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
