import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dflash_jax.nn import filter_scores, sample_tokens
from dflash_jax.nn.sampling import gumbel_noise, gumbel_of
from oracles import sampling

ROWS, VOCAB = 4, 11
filter_jit = jax.jit(filter_scores)
noise_jit = jax.jit(gumbel_noise, static_argnames="vocab_size")


def shares_of(logits, *, temperature: np.typing.ArrayLike = 1.0, top_k=None, top_p=None):
    """The filtered distribution of rows of logits, settings for all rows or one each."""
    rows = len(logits)
    each = lambda value, kind: None if value is None else jnp.asarray(np.broadcast_to(kind(value), rows))
    scores = filter_jit(
        jnp.asarray(logits, jnp.float32),
        temperature=each(temperature, np.float32),
        top_k=each(top_k, np.int32),
        top_p=each(top_p, np.float32),
    )
    return np.asarray(jax.nn.softmax(scores, axis=-1))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0.5, 0.3, 0.2]),
        ({"top_p": 0.5}, [1, 0, 0]),
        ({"top_p": 0.51}, [0.625, 0.375, 0]),
        ({"top_k": 2}, [0.625, 0.375, 0]),
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0]),
        ({"top_k": 2, "top_p": 0.63}, [0.625, 0.375, 0]),
        ({"top_k": 7, "top_p": 1.0}, [0.5, 0.3, 0.2]),
        ({"temperature": 0.5}, [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]),
        ({"temperature": 1e-30}, [1, 0, 0]),
    ],
)
def test_worked_distributions(settings, kept):
    # far from zero, where exponentials of the logits themselves overflow
    found = shares_of(np.log([[0.5, 0.3, 0.2]]) + 200, **settings)
    np.testing.assert_allclose(found, [kept], atol=3e-5)  # 200 has float32 steps of 1.5e-5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_rows_of_logits_are_loops(seed):
    draw = np.random.default_rng(seed)
    # steps of a quarter: ties are common, and fall on edges
    logits = draw.integers(-12, 13, (ROWS, VOCAB)) / 4
    temperature, top_k, top_p = (
        draw.uniform(0.3, 2, ROWS),
        draw.integers(1, VOCAB + 3, ROWS),
        draw.uniform(0.05, 1, ROWS),
    )
    for k, p in ((None, None), (top_k, None), (None, top_p), (top_k, top_p)):
        found = shares_of(logits, temperature=temperature, top_k=k, top_p=p)
        for row in range(ROWS):
            one = {"top_k": None if k is None else int(k[row]), "top_p": None if p is None else float(p[row])}
            wanted = sampling.probabilities(logits[row].tolist(), temperature=float(temperature[row]), **one)
            np.testing.assert_allclose(found[row], wanted, atol=1e-5)


def test_edges_are_exact_in_a_large_vocabulary():
    logits = np.random.default_rng(1).normal(0, 3, (2, 49152)).astype(np.float32)
    for k in (1, 50, 49151):
        kept = shares_of(logits, top_k=k) > 0
        assert kept.sum(axis=1).tolist() == [k, k]
        assert (logits[kept].reshape(2, k).min(axis=1) == np.sort(logits)[:, -k]).all()
    share = shares_of(logits, top_p=0.9) > 0
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum(axis=1, keepdims=True)
    for row in range(2):
        assert 0.9 - 1e-5 < exact[row][share[row]].sum() < 0.9 + exact[row][share[row]].min() + 1e-5


def test_noise_is_gumbel_s_and_finite():
    noise = np.asarray(noise_jit(jax.random.split(jax.random.key(3), 64), 50000), np.float64)
    assert np.isfinite(noise).all()
    assert stats.kstest(noise[:4].ravel(), "gumbel_r").pvalue > 1e-3
    # the upper tail, which decides of rare tokens: P(noise > x) = 1 - exp(-exp(-x)), 3.2e6 draws
    for x, mean in ((8.0, 1073.4), (11.0, 53.4)):
        assert abs((noise > x).sum() - mean) < 4 * mean**0.5


def test_noise_reaches_the_rarest_tokens():
    # a uniform of 23 bits, as jax's own has, ends at 16
    found = gumbel_of(jnp.array([[0, 1, 2**31, 2**32 - 1]], jnp.uint32))
    np.testing.assert_allclose(found, [[22.874, 21.775, 0.3665, -2.812]], atol=2e-3)


@pytest.mark.slow
def test_a_sample_hangs_on_its_key_and_its_logits_alone():
    draw = np.random.default_rng(0)
    hidden, head = draw.normal(0, 1, (ROWS, 6)).astype(np.float32), draw.normal(0, 1, (VOCAB, 6)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 100)

    def sample(hidden, keys):
        return sample_tokens(jnp.asarray(hidden), jnp.asarray(head), keys, temperature=jnp.ones(len(hidden)))

    together = np.asarray(jax.vmap(lambda key: sample(hidden, jnp.broadcast_to(key, ROWS)))(keys))
    alone = np.asarray(jax.vmap(lambda key: sample(hidden[2:3], key[None]))(keys))
    assert (together[:, 2] == alone[:, 0]).all()
    assert len(set(alone[:, 0].tolist())) > 3
