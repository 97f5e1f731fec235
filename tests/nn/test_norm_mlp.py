import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.nn import Linear, RMSNorm, SwiGLU
from dflash_jax.nn.product import has_fast_16_bit_products, on_one_cpu


def test_rmsnorm_by_hand():
    # mean square of (3, 4) is 12.5, and with eps 3.5 the root is 4
    norm = RMSNorm(weight=jnp.array([2.0, 10.0]), eps=3.5)
    assert norm(jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[1.5, 10.0], [0.0, 0.0]]
    assert norm(jnp.array([3.0, 4.0])).tolist() == [1.5, 10.0]


@pytest.mark.parametrize(("dtype", "cast_last"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_rmsnorm_is_transformers_bit_for_bit_in_bfloat16(dtype, cast_last):
    torch = pytest.importorskip("torch")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    draw = np.random.default_rng(0)
    x = draw.normal(size=(3, 50, 96)).astype(np.float32) * 5
    weight = draw.uniform(0.5, 1.5, 96).astype(np.float32)
    theirs = (GptOssRMSNorm if cast_last else Qwen3RMSNorm)(96, eps=1e-5).to(getattr(torch, dtype))
    theirs.weight.data = torch.from_numpy(weight).to(getattr(torch, dtype))
    want = theirs(torch.from_numpy(x).to(getattr(torch, dtype))).detach().float().numpy()
    ours = RMSNorm(weight=jnp.asarray(weight, dtype), eps=1e-5, cast_last=cast_last)
    got = ours(jnp.asarray(x, dtype))
    assert got.dtype == dtype
    if dtype == "bfloat16":
        np.testing.assert_array_equal(np.asarray(got, np.float32), want)
    else:
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-6)  # measured 3.6e-7


def test_linear_by_hand():
    weight = jnp.array([[1.0, 2.0, 3.0], [0.0, -1.0, 5.0]])
    assert Linear(weight=weight)(jnp.array([1.0, 10.0, 100.0])).tolist() == [321.0, 490.0]
    with_bias = Linear(weight=weight, bias=jnp.array([0.5, -0.5]))
    assert with_bias(jnp.array([1.0, 10.0, 100.0])).tolist() == [321.5, 489.5]
    assert with_bias(jnp.array([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])).tolist() == [[[1.5, -0.5], [0.5, -0.5]]]


def test_weights_wider_than_the_rows_have_gradients_that_were_never_narrow():
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(2, 30, 8)), jnp.bfloat16)
    layer = Linear(weight=jnp.asarray(draw.normal(size=(5, 8)), jnp.float32), bias=jnp.ones(5))
    norm = RMSNorm(weight=jnp.asarray(draw.uniform(0.5, 1.5, 8), jnp.float32), eps=1e-5)
    # bfloat16 holds small whole numbers, so that the cotangent is exact
    cotangent = jnp.asarray(draw.integers(-3, 4, (2, 30, 5)), jnp.bfloat16)

    @jax.jit
    def slopes(layer, norm, x):
        (out, normed), back = jax.vjp(lambda layer, norm, x: (layer(x), norm(x)), layer, norm, x)
        return out, normed, back((cotangent, jnp.ones_like(normed)))

    out, normed, (of_layer, of_norm, of_x) = slopes(layer, norm, x)
    assert (out.dtype, normed.dtype, of_x.dtype) == (jnp.bfloat16,) * 3
    rows, slope = (np.asarray(part, np.float64).reshape(60, -1) for part in (x, cotangent))
    # exact products of bfloat16, summed in float32: 60 of them
    np.testing.assert_allclose(of_layer.weight, slope.T @ rows, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(of_layer.bias, slope.sum(axis=0))
    scaled = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(of_norm.weight, scaled.sum(axis=0), rtol=0, atol=2e-5)
    want = rows @ np.asarray(layer.weight.astype(jnp.bfloat16), np.float64).T + 1
    np.testing.assert_allclose(np.asarray(out, np.float64).reshape(60, 5), want, atol=0.05)


NARROW = jax.default_backend() == "cpu" and has_fast_16_bit_products()


def dots_of(compiled: str) -> list[str]:
    """Operands' types of every product of a compiled program."""
    types = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", compiled))
    return [
        f"{types[first]} {types[second]}" for first, second in re.findall(r" dot\((%[\w.-]+), (%[\w.-]+)\)", compiled)
    ]


@pytest.mark.skipif(not (NARROW and on_one_cpu()), reason="it is one CPU with 16-bit products that would widen them")
def test_the_gradient_of_16_bit_weights_is_a_16_bit_product_on_a_cpu():
    """Left to itself XLA widens both operands of it and takes twice the time."""
    layer, x = Linear(weight=jnp.ones((64, 96))), jnp.ones((4, 32, 96), jnp.bfloat16)
    slope = jax.jit(lambda layer, x, slope: jax.vjp(lambda layer: layer(x), layer)[1](slope))
    compiled = slope.lower(layer, x, jnp.ones((4, 32, 64), jnp.bfloat16)).compile().as_text()
    assert dots_of(str(compiled)) == ["bf16 bf16"]
    # tiles of 16 do not fit: as XLA does it, and right
    odd = jax.vjp(lambda layer: layer(x[:, :5]), layer)[1](jnp.ones((4, 5, 64), jnp.bfloat16))
    np.testing.assert_array_equal(odd[0].weight, np.full((64, 96), 20.0))


def test_swiglu_by_hand():
    # gate (ln 3, 0), its silu (3/4 ln 3, 0); up (4, 7); their product (3 ln 3, 0)
    ln3 = float(np.log(3.0))
    mlp = SwiGLU(
        gate_proj=Linear(weight=jnp.array([[ln3, 0.0, 0.0], [0.0, 0.0, 0.0]])),
        up_proj=Linear(weight=jnp.array([[0.0, 4.0, 0.0], [0.0, 0.0, 7.0]])),
        down_proj=Linear(weight=jnp.array([[2.0, 5.0], [-1.0, 0.0], [0.0, 9.0]])),
    )
    got = mlp(jnp.ones((2, 1, 3)))
    assert got.shape == (2, 1, 3)
    np.testing.assert_allclose(got[1, 0], [6 * ln3, -3 * ln3, 0.0], rtol=1e-6)
