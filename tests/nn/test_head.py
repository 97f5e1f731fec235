import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.nn import LinearCrossEntropy, greedy_tokens, linear_cross_entropy, linear_soft_cross_entropy, top_tokens
from dflash_jax.nn.head import COLUMNS_PER_PART, DIRECT_LOGITS, ROWS_PER_BLOCK_ON_CPU, VOCAB_CHUNK, best_columns
from dflash_jax.nn.product import on_one_cpu
from support.jaxprs import largest_array

# two whole chunks and a rest, whole chunks only, less than a chunk
VOCABS = [2 * VOCAB_CHUNK + 317, 2 * VOCAB_CHUNK, 61]

greedy = jax.jit(greedy_tokens)
cross_entropy = jax.jit(linear_cross_entropy)


def whole_numbers(seed, *shape):
    """Small whole numbers: products are exact in float32, so that ties are ties."""
    return np.random.default_rng(seed).integers(-3, 4, shape)


@pytest.mark.parametrize("vocab", VOCABS[:2])
@pytest.mark.parametrize("rows", [3, 1031])
def test_greedy_tokens_are_numpys_argmax(rows, vocab):
    assert (rows * vocab > DIRECT_LOGITS) == (rows == 1031)  # the direct product, and the chunks
    hidden, head = whole_numbers(0, rows, 3), whole_numbers(1, vocab, 3)
    got = greedy(jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32))
    want = np.argmax(hidden.astype(np.float32) @ head.T.astype(np.float32), axis=-1)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "best",
    [
        [VOCAB_CHUNK - 1, VOCAB_CHUNK],
        pytest.param([5, 2 * VOCAB_CHUNK], marks=pytest.mark.slow),
        pytest.param([2 * VOCAB_CHUNK, VOCABS[0] - 1], marks=pytest.mark.slow),
    ],
)
def test_the_lowest_of_tied_tokens_wins_across_chunks(best):
    head = -np.ones((VOCABS[0], 2), np.float32)
    head[best] = [7.0, 1.0]
    for rows in (2, 1031):
        assert set(greedy(jnp.ones((rows, 2)), jnp.asarray(head)).tolist()) == {best[0]}


def test_all_logits_may_be_negative_and_rows_keep_their_shape():
    head = np.full((VOCABS[0], 1), -1e30, np.float32)
    head[9000] = -1e29
    got = greedy(jnp.ones((2, 600, 1)), jnp.asarray(head))
    assert got.shape == (2, 600)
    assert set(got.ravel().tolist()) == {9000}


def test_the_best_column_of_parts_is_numpys_argmax():
    """Ties within a part, across parts, in the last column; rows all alike; rows without a finite number."""
    logits = np.random.default_rng(3).integers(0, 40, (50, 4 * COLUMNS_PER_PART)).astype(np.float32)
    logits[0] = 7
    logits[1] = -np.inf
    logits[2, [5, 6, 300]] = 99
    logits[3, [-1, 200]] = 99
    logits[4, -1] = 99
    score, index = best_columns(jnp.asarray(logits))
    np.testing.assert_array_equal(index, logits.argmax(axis=1))
    np.testing.assert_array_equal(score, logits.max(axis=1))


def reference(hidden, head, labels):
    """Loss, argmax and gradient of every row in float64."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    top = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    loss = (top + np.log(total))[:, 0] - logits[np.arange(len(labels)), labels]
    gradient = weights / total @ np.asarray(head, np.float64) - np.asarray(head, np.float64)[labels]
    return loss, logits.argmax(axis=-1), gradient


def cross_entropy_inputs(vocab, *, scale=1.0, rows=11, hidden=6):
    draw = np.random.default_rng(2)
    x = draw.normal(size=(rows, hidden)).astype(np.float32) * scale
    head = draw.normal(size=(vocab, hidden)).astype(np.float32)
    labels = draw.integers(0, vocab, rows).astype(np.int32)
    labels[0], labels[1] = vocab - 1, 0
    labels[2:5] = (x @ head.T).argmax(-1)[2:5]  # some hits
    return x, head, labels


@jax.jit
@partial(jax.value_and_grad, has_aux=True)
def weighted_loss(x, head, labels, weights):
    result = linear_cross_entropy(x, head, labels)
    return jnp.sum(result.loss * weights), result


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("scale", [1.0, 100.0])  # at 100, logits beyond 500 overflow a softmax that is not shifted
def test_cross_entropy_and_its_gradient(vocab, scale):
    x, head, labels = cross_entropy_inputs(vocab, scale=scale)
    loss, best, gradient = reference(x, head, labels)
    weights = np.linspace(-1.0, 2.0, len(labels), dtype=np.float32)  # each row's own cotangent
    (_, result), got = weighted_loss(x, head, labels, weights)
    # of the largest: measured 7.4e-8 for the loss, 1.5e-6 for the gradient
    np.testing.assert_allclose(result.loss, loss, rtol=0, atol=4e-7 * np.abs(loss).max())
    want = gradient * weights[:, None]
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 * np.abs(want).max())
    assert result.tokens.tolist() == best.tolist()
    assert 3 <= (result.tokens == labels).sum() < len(labels)


def test_the_gradient_is_jaxs_of_the_plain_loss():
    x, head, labels = map(jnp.asarray, cross_entropy_inputs(VOCAB_CHUNK + 77))

    def plain(x):
        return -jnp.mean(jax.nn.log_softmax(x @ head.T)[jnp.arange(len(labels)), labels])

    want = jax.jit(jax.grad(plain))(x)
    got = jax.jit(jax.grad(lambda x: linear_cross_entropy(x, head, labels).loss.mean()))(x)
    # measured 1.6e-6 of the largest; either is as far from float64
    np.testing.assert_allclose(got, want, rtol=0, atol=6e-6 * np.abs(want).max())


def test_by_hand():
    # logits (0, ln 3): probabilities 1/4 and 3/4; d loss / d hidden is p . head - head[label].
    head, hidden = jnp.array([[0.0, 1.0], [math.log(3.0), 0.0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    labels = jnp.array([0, 1], jnp.int32)
    result = cross_entropy(hidden, head, labels)
    np.testing.assert_allclose(result.loss, [math.log(4), math.log(4 / 3)], rtol=1e-6)
    assert result.tokens.tolist() == [1, 1]
    gradient = jax.jit(jax.grad(lambda h: linear_cross_entropy(h, head, labels).loss.sum()))(hidden)
    ln3 = math.log(3.0)
    np.testing.assert_allclose(gradient, [[0.75 * ln3, -0.75], [-0.25 * ln3, 0.25]], rtol=1e-6)


def test_the_lowest_of_tied_tokens_is_the_argmax():
    head = jnp.asarray(np.repeat([[1.0]], VOCAB_CHUNK + 3, axis=0), jnp.float32)
    labels = jnp.array([0, 1, VOCAB_CHUNK], jnp.int32)
    assert cross_entropy(jnp.ones((3, 1)), head, labels).tokens.tolist() == [0, 0, 0]


@pytest.mark.parametrize("vocab", VOCABS)
def test_soft_labels_are_a_weighted_sum_of_hard_ones(vocab):
    x, head, _ = cross_entropy_inputs(vocab)
    draw = np.random.default_rng(3)
    ids = np.array([draw.choice(vocab, 4, replace=False) for _ in x], np.int32)
    shares = draw.dirichlet(np.ones(4), len(x)).astype(np.float32)
    parts = [reference(x, head, ids[:, i]) for i in range(4)]
    loss, gradient = (
        sum(shares[:, i].reshape(-1, *[1] * (parts[i][p].ndim - 1)) * parts[i][p] for i in range(4)) for p in (0, 2)
    )
    weights = np.linspace(-1.0, 2.0, len(x), dtype=np.float32)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(x):
        result: LinearCrossEntropy = linear_soft_cross_entropy(
            x, jnp.asarray(head), jnp.asarray(ids), jnp.asarray(shares)
        )
        return jnp.sum(result.loss * weights), result

    (_, result), got = run(jnp.asarray(x))
    np.testing.assert_allclose(result.loss, loss, rtol=0, atol=1e-6 * np.abs(loss).max())
    want = gradient * weights[:, None]
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 * np.abs(want).max())


@pytest.mark.parametrize(("vocab", "count"), [(VOCABS[0], 5), (61, 61)])
def test_top_tokens_are_a_sorted_softmaxs_first(vocab, count):
    x, head, _ = cross_entropy_inputs(vocab)
    logits = x.astype(np.float64) @ head.astype(np.float64).T
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    ids, got = jax.jit(top_tokens, static_argnames="count")(jnp.asarray(x)[:, None], jnp.asarray(head), count=count)
    want = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    np.testing.assert_array_equal(ids[:, 0], want)
    np.testing.assert_allclose(got[:, 0], np.take_along_axis(logprobs, want, axis=-1), atol=1e-5)


def test_of_tied_top_tokens_the_lower_comes_first():
    ids, logprobs = top_tokens(jnp.ones((1, 2)), jnp.asarray(np.ones((2 * VOCAB_CHUNK, 2), np.float32)), count=3)
    assert ids.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(logprobs, -math.log(2 * VOCAB_CHUNK), rtol=1e-6)


def test_the_head_is_frozen():
    x, head, labels = map(jnp.asarray, cross_entropy_inputs(61))
    gradient = jax.jit(jax.grad(lambda head: linear_cross_entropy(x, head, labels).loss.sum()))(head)
    assert gradient.shape == head.shape
    assert not gradient.any()


def test_bfloat16_rows_give_a_float32_loss_and_a_bfloat16_gradient():
    x, head, labels = map(jnp.asarray, cross_entropy_inputs(VOCAB_CHUNK + 77))
    x, head = x.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    loss, _, gradient = reference(x, head, labels)
    result = cross_entropy(x, head, labels)
    assert result.loss.dtype == jnp.float32
    np.testing.assert_allclose(result.loss, loss, rtol=0, atol=5e-6)  # products are exact, sums float32: measured 6e-7
    got = jax.jit(jax.grad(lambda x: linear_cross_entropy(x, head, labels).loss.sum()))(x)
    assert got.dtype == jnp.bfloat16
    # bfloat16 probabilities and a bfloat16 result, 2^-9 each: measured 2.2e-3 of the largest
    np.testing.assert_allclose(np.asarray(got, np.float64), gradient, atol=6e-3 * np.abs(gradient).max())


def test_nothing_of_rows_times_vocabulary_is_made():
    rows, hidden, vocab = 1000, 8, 5 * VOCAB_CHUNK + 9
    x = jax.ShapeDtypeStruct((rows, hidden), jnp.float32)
    head = jax.ShapeDtypeStruct((vocab, hidden), jnp.float32)
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    loss = jax.grad(lambda x, head, labels: linear_cross_entropy(x, head, labels).loss.sum())
    assert largest_array(jax.make_jaxpr(loss)(x, head, labels).jaxpr) == rows * VOCAB_CHUNK
    # one CPU takes all columns of some rows, others some columns of all rows
    some = ROWS_PER_BLOCK_ON_CPU * vocab if on_one_cpu() else rows * VOCAB_CHUNK
    assert largest_array(jax.make_jaxpr(greedy_tokens)(x, head).jaxpr) == some < rows * vocab / 3
