"""Screens of 16 and of 8 bits: bounds that hold, and the tokens of the whole head."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.nn import greedy_tokens, head_screens, make_screen, on_one_cpu, screen_pays
from dflash_jax.nn import head as nn_head
from dflash_jax.nn.head import OPEN_ROWS_PER_BLOCK, ROWS_FOR_A_SCREEN, ROWS_PER_BLOCK_ON_CPU
from dflash_jax.nn.head_screen8 import (
    COLUMNS_MORE,
    COLUMNS_PER_PART8,
    LARGE_SHARE,
    PARTS_TRIED,
    bounds8,
    can_screen8,
    make_screen8,
    screened_tokens8,
)
from dflash_jax.nn.head_screen16 import (
    CANDIDATES,
    COLUMNS_PER_SCREEN_PART,
    bounded_rows,
    can_screen16,
    make_screen16,
    screened_tokens16,
)
from dflash_jax.nn.head_screens import few_rows_for_8_bits
from dflash_jax.nn.product import has_fast_16_bit_products
from support.jaxprs import largest_array

PARTS = CANDIDATES + 4
VOCAB = PARTS * COLUMNS_PER_SCREEN_PART
HIDDEN = 48

MAKE = {
    "16 bits": lambda head: make_screen(head, for_few_rows=False),
    "8 bits": make_screen,
}
SCREENED = {
    kind: jax.jit(lambda hidden, head, make=make: greedy_tokens(hidden, head, screen=make(head)))
    for kind, make in MAKE.items()
}
SETTLED = {
    "16 bits": jax.jit(lambda hidden, head: screened_tokens16(hidden, head, make_screen16(head))),
    "8 bits": jax.jit(lambda hidden, head: screened_tokens8(hidden, head, make_screen8(head))),
}
FEW_ROWS = few_rows_for_8_bits()
# a few rows, and more than open rows are at a time; more still meet 16 bits
CASES = [("16 bits", 3), ("16 bits", 200), ("8 bits", 1), ("8 bits", 3), ("8 bits", FEW_ROWS)]
of_every_kind = pytest.mark.parametrize(("kind", "rows"), CASES)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def argmax64(hidden, head):
    return np.argmax(hidden.astype(np.float64) @ head.T.astype(np.float64), axis=-1)


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        *[("16 bits", rows) for rows in (2, OPEN_ROWS_PER_BLOCK, ROWS_PER_BLOCK_ON_CPU + OPEN_ROWS_PER_BLOCK + 5)],
        *[("8 bits", rows) for rows in (1, 2, 5, OPEN_ROWS_PER_BLOCK, FEW_ROWS, FEW_ROWS + 1)],
    ],
)
def test_screened_tokens_are_the_argmax(kind, rows):
    hidden, head = normal(0, rows, HIDDEN), normal(1, VOCAB, HIDDEN)
    np.testing.assert_array_equal(SCREENED[kind](hidden, head), argmax64(hidden, head))


@pytest.mark.parametrize("kind", MAKE)
def test_a_vocabulary_of_which_few_rows_are_one_block(monkeypatch, kind):
    monkeypatch.setattr(nn_head, "DIRECT_LOGITS", 5 * VOCAB)
    hidden, head = normal(0, OPEN_ROWS_PER_BLOCK - 3, HIDDEN), normal(1, VOCAB, HIDDEN)
    head[1] = head[0]  # open rows too
    hidden[::4] = head[0]
    tokens = greedy_tokens(jnp.asarray(hidden), jnp.asarray(head), screen=MAKE[kind](jnp.asarray(head)))
    np.testing.assert_array_equal(tokens, argmax64(hidden, head))


def spread():
    """Rows and columns of very different sizes, and entries that rounding to bfloat16 moves most."""
    hidden, head = normal(0, 40, HIDDEN), normal(1, VOCAB, HIDDEN)
    hidden *= 10.0 ** np.linspace(-12, 12, 40, dtype=np.float32)[:, None]
    head *= 10.0 ** np.linspace(-12, 12, VOCAB, dtype=np.float32)[:, None]
    hidden[::2] = np.float32(1 + 2**-8 - 2**-20) * np.sign(hidden[::2])
    head[::3] = np.float32(1 + 2**-8 - 2**-20) * np.sign(head[::3])
    head[1::6] = np.float32(1 + 2**-8 - 2**-20)  # a row whose signs agree with it loses all that can be lost
    hidden[1] = np.float32(1 + 2**-8 - 2**-20)
    return hidden, head


def test_a_bound_is_never_below_its_logit():
    hidden, head = spread()
    rows, columns = bounded_rows(jnp.asarray(hidden)), make_screen16(jnp.asarray(head)).rows
    bounds = rows.astype(jnp.float32) @ columns.T.astype(jnp.float32)
    logits = hidden.astype(np.float64) @ head.T.astype(np.float64)
    assert (np.asarray(bounds, np.float64) >= logits).all()
    # and not far above it, or nothing would ever be settled: two roundings of 2^-8, each counted up and down
    norms = np.linalg.norm(hidden.astype(np.float64), axis=1)[:, None] * np.linalg.norm(head.astype(np.float64), axis=1)
    assert ((np.asarray(bounds) - logits) <= 4.2 * 2**-8 * norms).all()


def bounds_by_column(hidden, head):
    """The 8-bit screen's bounds in the head's order, and of each column its part's unit, float64."""
    screen = make_screen8(jnp.asarray(head))
    bounds = np.asarray(jax.jit(bounds8)(jnp.asarray(hidden), screen), np.float64)
    ids, columns = np.asarray(screen.ids), np.empty((len(hidden), len(head)))
    columns[:, ids] = bounds.reshape(len(hidden), -1)
    units = np.empty(len(head))
    units[ids] = np.tile(np.asarray(screen.units, np.float64), COLUMNS_PER_PART8)
    return columns, units


def half_steps(seed, *shape):
    """Numbers with the largest error that rounding to 8 bits can make, all downwards; each row has a largest entry."""
    values = np.random.default_rng(seed).integers(-20, 20, size=shape) + 0.49
    values[..., 0] = 127
    return values.astype(np.float32)


@pytest.mark.parametrize("which", ["sizes", "half steps", "one large entry", "zeros"])
def test_a_bound_of_8_bits_is_never_below_its_logit(which):
    if which == "sizes":
        hidden, head = spread()
    elif which == "half steps":
        hidden, head = half_steps(0, 40, HIDDEN), half_steps(1, VOCAB, HIDDEN)
    else:
        hidden, head = normal(0, 40, HIDDEN), normal(1, VOCAB, HIDDEN)
        hidden[:, 7] = 300.0 if which == "one large entry" else 0.0
        if which == "zeros":
            hidden[3], head[5], head[:, 9] = 0, 0, 0
    bounds, units = bounds_by_column(hidden, head)
    logits = hidden.astype(np.float64) @ head.T.astype(np.float64)
    assert (bounds >= logits).all()
    if which == "sizes":
        return
    # and not far above it: half a unit up and down for what is large, and for the rest by its norm; the bit that the
    # hidden states' rounding and the sums' own add is small
    large = np.abs(hidden) > LARGE_SHARE * np.linalg.norm(hidden, axis=1, keepdims=True)
    rest = np.linalg.norm(np.where(large, 0, hidden), axis=1) * np.sqrt(HIDDEN)
    most = (np.where(large, np.abs(hidden), 0).sum(axis=1) + rest)[:, None] * units
    balance = np.asarray(make_screen8(jnp.asarray(head)).balance)
    assert ((bounds - logits) <= 1.2 * balance.max() / balance.min() * most + 1e-6).all()


def test_of_columns_with_one_bound_the_one_with_the_largest_error_counts():
    """Every other column has none; all entries are of one size in hidden states, and none is large."""
    hidden = 128
    values = np.random.default_rng(1).integers(-20, 20, size=hidden).astype(np.float32)
    values[0] = 127
    rows = np.stack([values, np.where(np.arange(hidden) == 0, 127, values + 0.49)])
    # turned on, so that all of the head's columns are of one size and nothing is balanced
    head = np.stack([np.roll(rows[row % 2], row // 2) for row in range(VOCAB)]).astype(np.float32)
    ones = np.ones((4, hidden), np.float32)
    bounds, _ = bounds_by_column(ones, head)
    assert (bounds >= ones.astype(np.float64) @ head.T.astype(np.float64)).all()


def test_one_large_entry_does_not_open_rows():
    """As if the whole error of a column lay where a row is large, nearly none would be settled."""
    hidden, head = normal(0, 500, HIDDEN), normal(1, VOCAB, HIDDEN)
    hidden[:, 7] = 40.0
    assert SETTLED["8 bits"](hidden, head)[1].mean() > 0.9


def test_norms_are_rounded_up():
    head = normal(1, VOCAB, HIDDEN)
    low = head.astype(jnp.bfloat16).astype(np.float64)
    norms = [np.linalg.norm(rows, axis=1) for rows in (head - low, low, head.astype(np.float64))]
    in_screen = np.asarray(make_screen16(jnp.asarray(head)).rows[:, HIDDEN:], np.float64)
    in_rows = np.asarray(bounded_rows(jnp.asarray(head))[:, HIDDEN:], np.float64)
    assert (in_screen >= np.stack(norms[:2], axis=1)).all()
    assert (in_rows >= np.stack([norms[2], norms[0]], axis=1)).all()


@pytest.mark.parametrize("kind", MAKE)
def test_most_rows_are_settled_and_those_are_right(kind):
    hidden, head = normal(0, 500, HIDDEN), normal(1, VOCAB, HIDDEN)
    tokens, settled = SETTLED[kind](hidden, head)
    assert settled.mean() > 0.9
    np.testing.assert_array_equal(tokens[settled], argmax64(hidden, head)[settled])


@pytest.mark.parametrize("apart", [1, PARTS], ids=["of two parts", "of one part"])
@of_every_kind
def test_the_lowest_of_tied_tokens_wins(kind, rows, apart):
    head = -np.ones((VOCAB, HIDDEN), np.float32)
    head[[7 + PARTS, 7 + PARTS + apart]] = 1.0
    hidden = np.ones((rows, HIDDEN), np.float32)
    assert set(SCREENED[kind](hidden, head).tolist()) == {7 + PARTS}
    _, settled = SETTLED[kind](hidden, head)
    # of 16 bits a part's second column is no candidate
    assert set(settled.tolist()) == {apart == 1 or kind == "8 bits"}


@of_every_kind
def test_differences_that_a_screen_does_not_show_are_seen(kind, rows):
    """Among rows of the head that round to the same, the largest is neither the first nor the last."""
    head = normal(1, VOCAB, HIDDEN) * 0.1
    close = np.arange(3) * (PARTS + 1) + 5
    head[close] = 1.0
    head[close[1]] *= 1 + 2**-18
    assert set(SCREENED[kind](np.ones((rows, HIDDEN), np.float32), head).tolist()) == {close[1]}


@of_every_kind
def test_more_candidates_than_are_tried(kind, rows):
    head = normal(1, VOCAB, HIDDEN) * 0.1
    close = np.arange(CANDIDATES + PARTS_TRIED + COLUMNS_MORE)
    head[close] = 1.0
    head[close[-1]] *= 1 + 2**-18
    hidden = np.ones((rows, HIDDEN), np.float32)
    assert not SETTLED[kind](hidden, head)[1].any()
    assert set(SCREENED[kind](hidden, head).tolist()) == {close[-1]}


@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS])
def test_candidates_in_more_parts_than_are_tried(rows):
    """Columns of the same logit and of different sizes, with others between them: each is of another part."""
    head = np.zeros((VOCAB, HIDDEN), np.float32)
    head[np.arange(VOCAB), np.arange(VOCAB) % HIDDEN] = -np.linspace(1, 3, VOCAB)
    close = np.linspace(100, VOCAB - 200, PARTS_TRIED + 4).astype(int)
    spread = np.linspace(0.1, 1.9, len(close))
    head[close] = 1
    head[close, 1] += spread
    head[close, 2] -= spread
    for best in (close[0], close[-1]):
        own = head.copy()
        own[best] *= 1 + 2**-18
        hidden = np.ones((rows, HIDDEN), np.float32)
        assert not SETTLED["8 bits"](hidden, own)[1].any()
        assert set(SCREENED["8 bits"](hidden, own).tolist()) == {best}


@of_every_kind
def test_rows_without_a_number_have_the_token_of_the_whole_head(kind, rows):
    hidden, head = normal(0, rows, HIDDEN), normal(1, VOCAB, HIDDEN)
    for row, value in zip(range(min(2, rows)), (np.nan, np.inf), strict=False):
        hidden[row, 5] = value
    tokens = np.asarray(SCREENED[kind](hidden, head))
    np.testing.assert_array_equal(tokens, jax.jit(greedy_tokens)(hidden, head))
    np.testing.assert_array_equal(tokens[2:], argmax64(hidden, head)[2:])


def test_many_rows_meet_the_screen_in_blocks():
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    rows = 16 * ROWS_PER_BLOCK_ON_CPU
    most = largest_array(jax.make_jaxpr(SCREENED["8 bits"])(shape((rows, HIDDEN)), shape((VOCAB, HIDDEN))))
    assert most == ROWS_PER_BLOCK_ON_CPU * VOCAB


def test_few_rows_meet_8_bits_and_many_16():
    head = jnp.asarray(normal(1, VOCAB, HIDDEN))
    screen = make_screen(head)
    asked = lambda rows: str(jax.make_jaxpr(partial(greedy_tokens, head=head, screen=screen))(jnp.ones((rows, HIDDEN))))
    for rows, bits in ((1, "i8"), (FEW_ROWS, "i8"), (FEW_ROWS + 1, "bf16")):
        assert [
            dtype for dtype in ("i8", "bf16") if f"{dtype}[{2 * rows if dtype == 'i8' else rows}," in asked(rows)
        ] == [bits]
    assert "i8[8," in asked(3)  # of which six rows would be dearer


@pytest.mark.parametrize(
    ("flags", "fast", "few_rows"),
    [("fpu avx2", False, 8), ("avx512_bf16 avx512_vnni", True, 8), ("avx512_bf16 amx_int8", True, 32)],
)
def test_what_a_cpu_has_says_which_screen_it_meets(monkeypatch, flags, fast, few_rows):
    # the package has a function of the module's name
    monkeypatch.setattr(sys.modules["dflash_jax.nn.product"], "cpu_says", {"flags": flags}.get)
    assert has_fast_16_bit_products() == fast
    assert few_rows_for_8_bits() == few_rows


def test_many_rows_make_a_screen_of_their_own_where_one_pays():
    hidden, head = normal(0, ROWS_FOR_A_SCREEN, HIDDEN), normal(1, VOCAB, HIDDEN)
    np.testing.assert_array_equal(jax.jit(greedy_tokens)(hidden, head), argmax64(hidden, head))
    pays = on_one_cpu() and has_fast_16_bit_products()  # as tests/nn/test_one_cpu.py runs this
    assert screen_pays(jnp.dtype("float32"), jnp.asarray(head)) == pays
    assert not screen_pays(jnp.dtype("bfloat16"), jnp.asarray(head))
    for rows, made in ((ROWS_FOR_A_SCREEN, pays), (ROWS_FOR_A_SCREEN - 1, False)):
        assert ("bf16" in str(jax.make_jaxpr(greedy_tokens)(*map(jnp.asarray, (hidden[:rows], head))))) == made


def test_heads_that_no_screen_is_made_of():
    assert head_screens.can_screen(jnp.zeros((VOCAB, 2)))
    assert can_screen16(jnp.zeros((VOCAB, 2)))
    assert not can_screen16(jnp.zeros((VOCAB + 1, 2)))
    assert not can_screen16(jnp.zeros((CANDIDATES * COLUMNS_PER_SCREEN_PART, 2)))
    assert not can_screen8(jnp.zeros((VOCAB + 1, 2)))
    assert not can_screen8(jnp.zeros((PARTS_TRIED * COLUMNS_PER_PART8, 2)))
