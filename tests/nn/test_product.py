import jax.numpy as jnp
import numpy as np

from dflash_jax.nn import product


def test_product_is_einsum():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 5)).astype(np.float32)
    np.testing.assert_allclose(product("ij,kj->ik", jnp.asarray(a), jnp.asarray(b)), a @ b.T, atol=1e-6)
    narrow = jnp.ones((3, 3), jnp.bfloat16)
    assert product("ij,jk->ik", narrow, narrow).dtype == jnp.bfloat16
    assert product("ij,jk->ik", narrow, narrow, out=jnp.float32).dtype == jnp.float32
