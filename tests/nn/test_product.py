import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.nn import product
from dflash_jax.nn.product import on_one_cpu, rows_product, turned

module = importlib.import_module("dflash_jax.nn.product")


def test_product_is_einsum():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 5)).astype(np.float32)
    np.testing.assert_allclose(product("ij,kj->ik", jnp.asarray(a), jnp.asarray(b)), a @ b.T, atol=1e-6)
    narrow = jnp.ones((3, 3), jnp.bfloat16)
    assert product("ij,jk->ik", narrow, narrow).dtype == jnp.bfloat16
    assert product("ij,jk->ik", narrow, narrow, out=jnp.float32).dtype == jnp.float32


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it is on a CPU that sums in 16 bits are slow")
def test_16_bit_products_are_summed_in_float32_on_a_cpu():
    narrow = jnp.ones((3, 3), jnp.bfloat16)
    (made,) = [
        line
        for line in str(jax.make_jaxpr(lambda x: product("ij,jk->ik", x, x))(narrow)).splitlines()
        if "dot_general" in line
    ]
    assert "f32[3,3] = dot_general" in made


@pytest.mark.parametrize("rows", [(), (1,), (2,), (5,), (3, 4), (28,), (8, 1), (4, 16), (65,)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["with the kernel", "without it"])
def test_rows_product(rows: tuple[int, ...], dtype: jnp.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "KERNEL_BYTES", 0 if kernel == "with the kernel" else 2**40)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*rows, 48)), dtype)
    weight = jnp.asarray(rng.normal(size=(40, 48)), dtype)
    found = rows_product(x, weight, out=jnp.float32)
    assert found.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert rows_product(x, weight).dtype == dtype
    one_by_one = jax.vmap(lambda row: rows_product(row, weight))(x.reshape(-1, 48))
    np.testing.assert_allclose(one_by_one.astype(np.float32), expected.reshape(-1, 40), rtol=2e-2, atol=1e-1)


@pytest.mark.skipif(not on_one_cpu(), reason="it is one CPU that repacks the second operand")
def test_rows_product_keeps_weights_first():
    """XLA's simplifier would put the rows first again; compiled, the product still begins with the weights."""
    compiled = (
        jax.jit(lambda *given: rows_product(*given)).lower(jnp.ones((8, 1, 48)), jnp.ones((40, 48))).compile().as_text()
    )
    (product_line,) = [line for line in str(compiled).splitlines() if " dot(" in line]
    assert "f32[40,8]" in product_line, product_line


@pytest.mark.skipif(not on_one_cpu(), reason="it is kernels for CPUs that take so many rows at once")
@pytest.mark.parametrize(
    ("rows", "multiplied"), [(2, 2), (3, 3), (4, 4), (5, 8), (9, 16), (16, 16), (17, 17), (24, 24), (25, 32), (33, 33)]
)
def test_rows_are_filled_up_to_what_a_kernel_takes_at_once(rows: int, multiplied: int):
    jaxpr = jax.make_jaxpr(lambda *given: rows_product(*given))(jnp.ones((rows, 48)), jnp.ones((40, 48)))
    assert f"f32[40,{multiplied}] = dot_general" in str(jaxpr)


@pytest.mark.parametrize("shape", [(32, 48), (3, 16, 80), (2, 3, 32, 16), (17, 32), (32, 5), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_turned_is_the_transpose(shape: tuple[int, ...], dtype: jnp.dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    np.testing.assert_array_equal(jax.jit(turned)(x), np.asarray(x).swapaxes(-1, -2))
