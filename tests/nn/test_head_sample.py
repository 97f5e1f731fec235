"""A softmax over a sample of the vocabulary against the same formulas in float64, and its mean against the whole."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.nn import (
    VOCAB_CHUNK,
    LinearCrossEntropy,
    draw_sample,
    linear_soft_cross_entropy,
    named_tokens,
    online_pass,
)

ROWS, HIDDEN, LABELS = 6, 16, 3


def inputs(vocab, *, seed=0):
    draw = np.random.default_rng(seed)
    hidden = draw.normal(0, 1, (ROWS, HIDDEN)).astype(np.float32)
    head = draw.normal(0, 0.5, (vocab, HIDDEN)).astype(np.float32)
    ids = np.stack([draw.choice(vocab // 2, LABELS, replace=False) for _ in range(ROWS)]).astype(np.int32)
    return hidden, head, ids, draw.dirichlet(np.ones(LABELS), ROWS).astype(np.float32)


def exact(hidden, head, ids, shares, counts):
    """Loss and slope in float64, every column weighed."""
    hidden, head, shares = (array.astype(np.float64) for array in (hidden, head, shares))
    logits = hidden @ head.T
    weighed = np.exp(logits) * counts
    total = weighed.sum(axis=1)
    loss = np.log(total) - (shares * np.take_along_axis(logits, ids, axis=1)).sum(axis=1)
    return loss, weighed / total[:, None] @ head - np.einsum("rl,rlh->rh", shares, head[ids])


def draws(named, count, keys):
    return jax.jit(jax.vmap(lambda key: draw_sample(jnp.asarray(named), count, key=key)))(keys)


def as_counts(sample, vocab):
    """How many tokens every token stands for in each of several samples."""
    counts = np.zeros((len(sample.tokens), vocab))
    np.add.at(counts, (np.arange(len(counts))[:, None], np.asarray(sample.tokens)), np.asarray(sample.weights))
    return counts


def test_named_tokens_are_labels_with_a_probability():
    ids, shares = jnp.array([[1, 4], [4, 0]], jnp.int32), jnp.array([[1.0, 0.0], [0.5, 0.5]])
    assert named_tokens(ids, shares, 6).tolist() == [True, True, False, False, True, False]
    assert named_tokens(ids[:1], shares[:1], 6).tolist() == [False, True, False, False, False, False]


def test_named_tokens_stand_for_themselves_and_others_for_the_rest():
    named = np.zeros(40, bool)
    named[[3, 5, 7, 39]] = True
    counts = as_counts(draws(named, 16, jax.random.split(jax.random.key(0), 50)), 40)
    assert (counts[:, named] == 1).all()
    rest = counts[:, ~named]
    assert ((rest > 0).sum(axis=1) == 12).all()  # without replacement
    np.testing.assert_allclose(rest[rest > 0], 3.0)  # 36 others, 12 drawn
    assert len({tuple(row.nonzero()[0]) for row in rest}) == 50


@pytest.mark.parametrize(("num_named", "count"), [(4, 16), (0, 16), (30, 16), (40, 16), (38, 40), (3, 40)])
def test_every_token_is_there_once_on_average(num_named, count):
    named = np.arange(40) < num_named
    counts = as_counts(draws(named, count, jax.random.split(jax.random.key(1), 4000)), 40)
    # a token drawn with probability p weighs 1 / p: a deviation of sqrt(1 / p - 1), here at most sqrt(19)
    np.testing.assert_allclose(counts.mean(axis=0), 1.0, atol=5 * np.sqrt(19 / 4000))
    np.testing.assert_allclose(counts.sum(axis=1), 40, rtol=1e-6)
    assert ((counts > 0).sum(axis=1) == count).all()


@pytest.mark.parametrize("count", [64, pytest.param(2 * VOCAB_CHUNK + 5, marks=pytest.mark.slow)])
def test_loss_and_slope_are_those_of_the_weighed_columns(count):
    vocab = 3 * VOCAB_CHUNK
    hidden, head, ids, shares = inputs(vocab)
    key = jax.random.key(3)
    weights = np.linspace(-1.0, 2.0, ROWS, dtype=np.float32)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(x):
        result: LinearCrossEntropy = linear_soft_cross_entropy(
            x,
            jnp.asarray(head),
            jnp.asarray(ids),
            jnp.asarray(shares),
            one_pass=partial(online_pass, sampled=count),
            key=key,
        )
        return jnp.sum(result.loss * weights), result

    (_, result), slope = run(jnp.asarray(hidden))
    sample = draw_sample(named_tokens(jnp.asarray(ids), jnp.asarray(shares), vocab), count, key=key)
    counts = as_counts(jax.tree.map(lambda x: x[None], sample), vocab)[0]
    loss, wanted = exact(hidden, head, ids, shares, counts)
    np.testing.assert_allclose(result.loss, loss, rtol=0, atol=2e-6 * np.abs(loss).max())
    wanted *= weights[:, None]
    np.testing.assert_allclose(slope, wanted, rtol=0, atol=5e-6 * np.abs(wanted).max())
    logits = np.where(counts > 0, hidden.astype(np.float64) @ head.T.astype(np.float64), -np.inf)
    assert result.tokens.tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.slow
def test_a_sample_of_everything_is_the_softmax():
    hidden, head, ids, shares = map(jnp.asarray, inputs(120))
    whole, slope = online_pass(hidden, head, ids, shares)
    for sampled in (120, 1000):
        got, sampled_slope = online_pass(hidden, head, ids, shares, jax.random.key(0), sampled=sampled)
        np.testing.assert_allclose(got.loss, whole.loss, rtol=1e-6)
        np.testing.assert_allclose(sampled_slope, slope, atol=1e-6)
        assert got.tokens.tolist() == whole.tokens.tolist()


def test_a_wider_head_is_narrowed_as_its_rows_are_taken():
    hidden, head, ids, shares = inputs(64)
    narrow, rows = jnp.asarray(head, jnp.bfloat16), jnp.asarray(hidden, jnp.bfloat16)
    found, expected = (
        online_pass(rows, table, jnp.asarray(ids), jnp.asarray(shares), jax.random.key(3), sampled=24)
        for table in (jnp.asarray(head), narrow)
    )
    for ours, theirs in zip(*map(jax.tree_util.tree_leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
