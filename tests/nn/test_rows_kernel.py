"""The kernel for a few rows against numpy in float64, and what it promises of bits, threads and memory."""

import importlib
import resource
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dflash_jax.nn.product import cpu_says, on_one_cpu, rows_product

product = importlib.import_module("dflash_jax.nn.product")
kernel = product.host_kernel("rows_kernel", np.zeros(2**17))
pytestmark = pytest.mark.skipif(kernel is None, reason="the kernel is for one CPU with AVX-512, with numba")


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def made(x: jax.Array, weight: jax.Array) -> np.ndarray:
    return np.asarray(jax.jit(kernel.kernel_product)(x, weight))


# chunks that are equal, unequal, and empty
SHAPES = [(2, 16), (6, 48), (578, 576), (1536, 576), (66, 512), (10, 16384), (256, 144)]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 23])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_numpys(rows: int, shape: tuple[int, int]):
    x, weight = random(rows, shape[1]), random(*shape, seed=1)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    # sums of 16 partial sums: the error of each grows with a sixteenth of the inputs
    bound = (shape[1] / 16 + 16) * 2**-24 * (np.abs(x) @ np.abs(weight).T)
    assert (np.abs(made(x, weight) - exact) <= bound).all()


def test_a_row_does_not_hang_on_the_rows_beside_it():
    x, weight = random(16, 576), random(1536, 576, seed=1)
    whole = made(x, weight)
    for rows in range(1, 16):
        np.testing.assert_array_equal(made(x[:rows], weight), whole[:rows])
        np.testing.assert_array_equal(made(x[16 - rows :], weight), whole[16 - rows :])


def test_infinities_and_nan_stay_in_their_row():
    x = random(5, 64).at[1, 3].set(jnp.inf).at[2, 5].set(jnp.nan)
    weight = random(40, 64, seed=1)
    found = made(x, weight)
    assert np.isinf(found[1]).all()
    assert np.isnan(found[2]).all()
    assert np.isfinite(found[[0, 3, 4]]).all()


def test_gradients_are_einsums():
    x, weight, slope = random(6, 64), random(40, 64, seed=1), random(6, 40, seed=2)

    def by(form):
        return jax.grad(lambda x, weight: (form(x, weight) * slope).sum(), argnums=(0, 1))(x, weight)

    for found, expected in zip(
        by(kernel.kernel_product),
        by(lambda x, weight: jnp.einsum("ri,oi->ro", x, weight, precision="highest")),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    _, tangent = jax.jvp(lambda x: kernel.kernel_product(x, weight), (x,), (x,))
    np.testing.assert_allclose(tangent, made(x, weight), atol=1e-5)


@pytest.mark.parametrize(("x_axis", "weight_axis"), [(0, None), (None, 0), (0, 0)])
def test_vmapped(x_axis, weight_axis):
    x, weights = random(3, 4, 64), random(3, 40, 64, seed=1)
    x = x if x_axis == 0 else x[0]
    weights = weights if weight_axis == 0 else weights[0]
    found = jax.vmap(kernel.kernel_product, in_axes=(x_axis, weight_axis))(x, weights)
    expected = np.asarray(x, np.float64) @ np.swapaxes(np.asarray(weights, np.float64), -1, -2)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_many_threads_many_programs():
    """Each job is its own: calls from several threads, with helpers that come late, do not meet each other's."""
    weights = [random(512, 320, seed=seed) for seed in range(8)]
    rows = [random(count, 320, seed=count) for count in (2, 4, 9)]
    program = jax.jit(lambda x, weights: [kernel.kernel_product(x, weight) for weight in weights])
    expected = [[made(x, weight) for weight in weights] for x in rows]

    def run(number: int) -> bool:
        found = program(rows[number % 3], weights)
        return all((np.asarray(a) == b).all() for a, b in zip(found, expected[number % 3], strict=True))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(run, range(300)))


@pytest.mark.parametrize("outputs", [2, 130])
def test_jobs_are_freed(outputs: int):
    """A call gives back what it takes from the heap: 150,000 calls would keep 17 MB otherwise."""
    weight, x = random(outputs, 256), random(2, 256)

    @jax.jit
    def many(x):
        return lax.fori_loop(0, 75_000, lambda _, x: x + 0 * kernel.kernel_product(x, weight)[:, :1], x)

    many(x).block_until_ready()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many(x).block_until_ready()
    many(x).block_until_ready()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4_000  # KiB


@pytest.mark.parametrize(
    ("rows", "weight", "taken"),
    [
        (2, jnp.ones((512, 64)), True),
        (12, jnp.ones((512, 64)), True),
        (1, jnp.ones((512, 64)), False),
        (13, jnp.ones((512, 64)), False),
        (4, jnp.ones((513, 64)), False),
        (4, jnp.ones((512, 72)), False),
        (4, jnp.ones((512, 64), jnp.bfloat16), False),
    ],
)
def test_what_the_kernel_takes(rows, weight, taken):
    assert kernel.takes(rows, weight) == taken
    assert product.host_kernel("rows_kernel", weight[:256]) is None  # too small
    x = jnp.ones((rows, weight.shape[1]), weight.dtype)
    assert (kernel.NAME in str(jax.make_jaxpr(lambda *given: rows_product(*given))(x, weight))) == taken
    np.testing.assert_array_equal(rows_product(x, weight).astype(jnp.float32), weight.shape[1])


@pytest.mark.parametrize("fault", [ImportError("no numba"), OSError("no libc")])
def test_without_the_kernel_xla_multiplies(monkeypatch, fault):
    monkeypatch.setattr(product, "_host_kernel", product._host_kernel.__wrapped__)
    x, weight = jnp.ones((4, 64)), jnp.ones((512, 64))

    def fail(_):
        raise fault

    monkeypatch.setattr(product.importlib, "import_module", fail)
    if isinstance(fault, ImportError):
        assert product.host_kernel("rows_kernel", weight) is None
        assert kernel.NAME not in str(jax.make_jaxpr(lambda *given: rows_product(*given))(x, weight))
    else:
        with pytest.warns(UserWarning, match="without dflash_jax.nn.rows_kernel.*no libc"):
            assert product.host_kernel("rows_kernel", weight) is None


@pytest.mark.parametrize(
    ("there", "system", "flags"),
    [(False, "linux", "avx2"), (False, "darwin", "avx512f"), (True, "linux", "avx2 avx512f")],
)
def test_which_machines_have_it(monkeypatch, there, system, flags):
    monkeypatch.setattr(product, "cpu_says", lambda _: flags)
    monkeypatch.setattr(sys, "platform", system)
    assert (product._host_kernel.__wrapped__("rows_kernel") is not None) == there
    assert on_one_cpu()
    assert "avx512f" in cpu_says("flags").split()
