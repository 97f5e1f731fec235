from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.nn import greedy_tokens, make_screen, on_one_cpu, screen_pays
from dflash_jax.nn import head as nn_head
from dflash_jax.nn.head import OPEN_ROWS_PER_BLOCK, ROWS_FOR_A_SCREEN, ROWS_PER_BLOCK_ON_CPU
from dflash_jax.nn.head_screen import CANDIDATES, COLUMNS_PER_SCREEN_PART, bounded_rows, can_screen, screened_tokens
from dflash_jax.nn.product import has_fast_16_bit_products
from support.jaxprs import largest_array

PARTS = CANDIDATES + 4
VOCAB = PARTS * COLUMNS_PER_SCREEN_PART
HIDDEN = 48

screened = jax.jit(lambda hidden, head: greedy_tokens(hidden, head, screen=make_screen(head)))
settled_by_screen = jax.jit(lambda hidden, head: screened_tokens(hidden, head, make_screen(head)))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def argmax64(hidden, head):
    return np.argmax(hidden.astype(np.float64) @ head.T.astype(np.float64), axis=-1)


@pytest.mark.parametrize("rows", [2, OPEN_ROWS_PER_BLOCK, ROWS_PER_BLOCK_ON_CPU + OPEN_ROWS_PER_BLOCK + 5])
def test_screened_tokens_are_the_argmax(rows):
    hidden, head = normal(0, rows, HIDDEN), normal(1, VOCAB, HIDDEN)
    np.testing.assert_array_equal(screened(hidden, head), argmax64(hidden, head))


def test_a_vocabulary_of_which_few_rows_are_one_block(monkeypatch):
    monkeypatch.setattr(nn_head, "DIRECT_LOGITS", 5 * VOCAB)
    hidden, head = normal(0, OPEN_ROWS_PER_BLOCK - 3, HIDDEN), normal(1, VOCAB, HIDDEN)
    head[1] = head[0]  # open rows too
    hidden[::4] = head[0]
    tokens = greedy_tokens(jnp.asarray(hidden), jnp.asarray(head), screen=make_screen(jnp.asarray(head)))
    np.testing.assert_array_equal(tokens, argmax64(hidden, head))


def test_a_bound_is_never_below_its_logit():
    """Rows and columns of very different sizes, and entries that rounding moves most."""
    hidden, head = normal(0, 40, HIDDEN), normal(1, VOCAB, HIDDEN)
    hidden *= 10.0 ** np.linspace(-12, 12, 40, dtype=np.float32)[:, None]
    head *= 10.0 ** np.linspace(-12, 12, VOCAB, dtype=np.float32)[:, None]
    hidden[::2] = np.float32(1 + 2**-8 - 2**-20) * np.sign(hidden[::2])
    head[::3] = np.float32(1 + 2**-8 - 2**-20) * np.sign(head[::3])
    head[1::6] = np.float32(1 + 2**-8 - 2**-20)  # a row whose signs agree with it loses all that can be lost
    hidden[1] = np.float32(1 + 2**-8 - 2**-20)
    rows, columns = bounded_rows(jnp.asarray(hidden)), make_screen(jnp.asarray(head)).rows
    bounds = rows.astype(jnp.float32) @ columns.T.astype(jnp.float32)
    logits = hidden.astype(np.float64) @ head.T.astype(np.float64)
    assert (np.asarray(bounds, np.float64) >= logits).all()
    # and not far above it, or nothing would ever be settled: two roundings of 2^-8, each counted up and down
    norms = np.linalg.norm(hidden.astype(np.float64), axis=1)[:, None] * np.linalg.norm(head.astype(np.float64), axis=1)
    assert ((np.asarray(bounds) - logits) <= 4.2 * 2**-8 * norms).all()


def test_norms_are_rounded_up():
    head = normal(1, VOCAB, HIDDEN)
    low = head.astype(jnp.bfloat16).astype(np.float64)
    norms = [np.linalg.norm(rows, axis=1) for rows in (head - low, low, head.astype(np.float64))]
    in_screen = np.asarray(make_screen(jnp.asarray(head)).rows[:, HIDDEN:], np.float64)
    in_rows = np.asarray(bounded_rows(jnp.asarray(head))[:, HIDDEN:], np.float64)
    assert (in_screen >= np.stack(norms[:2], axis=1)).all()
    assert (in_rows >= np.stack([norms[2], norms[0]], axis=1)).all()


def test_most_rows_are_settled_and_those_are_right():
    hidden, head = normal(0, 500, HIDDEN), normal(1, VOCAB, HIDDEN)
    tokens, settled = settled_by_screen(hidden, head)
    assert settled.mean() > 0.9
    np.testing.assert_array_equal(tokens[settled], argmax64(hidden, head)[settled])


@pytest.mark.parametrize("apart", [1, PARTS], ids=["of two parts", "of one part"])
@pytest.mark.parametrize("rows", [3, 200])
def test_the_lowest_of_tied_tokens_wins(rows, apart):
    head = -np.ones((VOCAB, HIDDEN), np.float32)
    head[[7 + PARTS, 7 + PARTS + apart]] = 1.0
    hidden = np.ones((rows, HIDDEN), np.float32)
    assert set(screened(hidden, head).tolist()) == {7 + PARTS}
    _, settled = settled_by_screen(hidden, head)
    assert set(settled.tolist()) == {apart == 1}


@pytest.mark.parametrize("rows", [3, 200])
def test_differences_that_16_bits_do_not_show_are_seen(rows):
    """Among rows of the head that round to the same, the largest is neither the first nor the last."""
    head = normal(1, VOCAB, HIDDEN) * 0.1
    close = np.arange(3) * (PARTS + 1) + 5
    head[close] = 1.0
    head[close[1]] *= 1 + 2**-18
    assert set(screened(np.ones((rows, HIDDEN), np.float32), head).tolist()) == {close[1]}


@pytest.mark.parametrize("rows", [3, 200])
def test_more_candidates_than_are_tried(rows):
    head = normal(1, VOCAB, HIDDEN) * 0.1
    close = np.arange(CANDIDATES + 2)
    head[close] = 1.0
    head[close[-1]] *= 1 + 2**-18
    hidden = np.ones((rows, HIDDEN), np.float32)
    assert not settled_by_screen(hidden, head)[1].any()
    assert set(screened(hidden, head).tolist()) == {close[-1]}


@pytest.mark.parametrize("rows", [3, 200])
def test_rows_without_a_number_have_the_token_of_the_whole_head(rows):
    hidden, head = normal(0, rows, HIDDEN), normal(1, VOCAB, HIDDEN)
    hidden[1, 5] = np.nan
    hidden[2, 5] = np.inf
    tokens = np.asarray(screened(hidden, head))
    np.testing.assert_array_equal(tokens, jax.jit(greedy_tokens)(hidden, head))
    np.testing.assert_array_equal(tokens[[0, *range(3, rows)]], argmax64(hidden, head)[[0, *range(3, rows)]])


def test_many_rows_meet_the_screen_in_blocks():
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    rows = 16 * ROWS_PER_BLOCK_ON_CPU
    most = largest_array(jax.make_jaxpr(screened)(shape((rows, HIDDEN)), shape((VOCAB, HIDDEN))))
    assert most == ROWS_PER_BLOCK_ON_CPU * VOCAB


def test_many_rows_make_a_screen_of_their_own_where_one_pays():
    hidden, head = normal(0, ROWS_FOR_A_SCREEN, HIDDEN), normal(1, VOCAB, HIDDEN)
    np.testing.assert_array_equal(jax.jit(greedy_tokens)(hidden, head), argmax64(hidden, head))
    pays = on_one_cpu() and has_fast_16_bit_products()  # as tests/nn/test_one_cpu.py runs this, on a CPU with AMX
    assert screen_pays(jnp.dtype("float32"), jnp.asarray(head)) == pays
    assert not screen_pays(jnp.dtype("bfloat16"), jnp.asarray(head))
    for rows, made in ((ROWS_FOR_A_SCREEN, pays), (ROWS_FOR_A_SCREEN - 1, False)):
        assert ("bf16" in str(jax.make_jaxpr(greedy_tokens)(*map(jnp.asarray, (hidden[:rows], head))))) == made


def test_heads_that_no_screen_is_made_of():
    assert can_screen(jnp.zeros((VOCAB, 2)))
    assert not can_screen(jnp.zeros((VOCAB + 1, 2)))
    assert not can_screen(jnp.zeros((CANDIDATES * COLUMNS_PER_SCREEN_PART, 2)))
