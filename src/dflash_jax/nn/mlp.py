"""Linear layers and the SwiGLU MLP."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dflash_jax.nn.product import has_fast_16_bit_products, on_one_cpu, product, rows_product, turned


@jax.custom_vjp
def _product(
    x: Float[Array, "*rows in_features"], weight: Float[Array, "out_features in_features"]
) -> Float[Array, "*rows out_features"]:
    """`x @ weight.T` in `x`'s dtype, of a weight that may be kept wider; its gradient is summed in its own dtype.

    A cast before the product would have that gradient in `x`'s dtype: rounded, and over devices summed so. It must not
    be differentiated under `jax.vmap` over sequences, which would make one such gradient per sequence.
    """
    return rows_product(x, weight.astype(x.dtype))


def _forward(x: Float[Array, "..."], weight: Float[Array, "..."]):  # noqa: ANN202  (a custom_vjp's pair)
    return _product(x, weight), (x, weight)


def _backward(kept: tuple[Float[Array, "..."], Float[Array, "..."]], slope: Float[Array, "..."]):  # noqa: ANN202
    x, weight = kept
    to_x = product("...o,oi->...i", slope, weight.astype(x.dtype))
    if on_one_cpu():
        # XLA for CPUs transposes a copy of both where more than one axis is summed over; where devices are many, axes
        # after the first may be split and stay apart
        x, slope = (part.reshape(-1, part.shape[-1]) for part in (x, slope))
        if x.dtype.itemsize < 4 and has_fast_16_bit_products():
            return to_x, product("or,ri->oi", turned(slope), x, out=weight.dtype)
    rows = tuple(range(x.ndim - 1))
    wide = lax.dot_general(
        slope, x, ((rows, rows), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=weight.dtype
    )
    return to_x, wide


_product.defvjp(_forward, _backward)


class Linear(eqx.Module):
    """`x @ weight.T + bias`, the weight stored `[out, in]` as checkpoints store it (so loading copies nothing).

    Weights may be wider than `x` (float32 master weights, bfloat16 activations): the product is of `x`'s dtype, sums
    and the weights' gradients are of theirs.
    """

    weight: Float[Array, "out_features in_features"]
    bias: Float[Array, " out_features"] | None = None

    def __call__(self, x: Float[Array, "*rows in_features"]) -> Float[Array, "*rows out_features"]:
        """Return the projection in `x`'s dtype."""
        y = _product(x, self.weight)
        if self.bias is None:
            return y
        return (y.astype(self.bias.dtype) + jnp.expand_dims(self.bias, tuple(range(y.ndim - 1)))).astype(x.dtype)


class SwiGLU(eqx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    def __call__(self, x: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        """Return the MLP's output, not added to the residual stream."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
