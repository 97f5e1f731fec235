"""Whether labels are the argmax: against the argmax itself, ties and near ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.accept import hits as hits_module
from dflash_jax.accept.hits import _surely_wrong, add_open_rows, no_open_rows, settle_open_rows
from dflash_jax.nn import greedy_tokens, make_screen

VOCAB, HIDDEN = 61, 17


def label_hits(hidden, labels, asked, *, head, rivals, screen=None):
    """Which labels are the argmax, of rows that wait for no others."""
    rows = len(hidden)
    waiting = no_open_rows(rows, head=head, dtype=hidden.dtype, screen=screen)
    places = jnp.arange(rows, dtype=jnp.int32)
    waiting = add_open_rows(waiting, hidden, labels, asked, places, head=head, rivals=rivals)
    return settle_open_rows(waiting, jnp.zeros(rows, bool), head=head, all_=True, screen=screen)[1]


def some_case(seed, *, rows, vocab=VOCAB):
    """Labels that are the argmax, the second best, a twin of the argmax, and anything; rows of every kind."""
    draw = np.random.default_rng(seed)
    head = draw.normal(0, 1, (vocab, HIDDEN)).astype(np.float32)
    head[40] = head[11]  # twins: the lower id is the argmax
    head[12] = head[11] * np.float32(1 + 2**-22)  # one rounding away
    hidden = draw.normal(0, 1, (rows, HIDDEN)).astype(np.float32)
    hidden[::3] = 3 * head[11] + 0.01 * hidden[::3]
    logits = hidden @ head.T
    best = np.argsort(-logits, axis=1)
    labels = np.where(draw.random(rows) < 0.5, best[:, 0], best[np.arange(rows), draw.integers(0, 4, rows)])
    labels[::3] = np.resize([11, 40, 12, 5], len(labels[::3]))
    return map(jnp.asarray, (hidden, labels.astype(np.int32), draw.random(rows) < 0.8, head))


@pytest.mark.parametrize(("rows", "rivals"), [(1, 1), (37, 3), (300, VOCAB)])
def test_a_hit_is_the_argmax(rows, rivals):
    # one program per shape; ten cases through it
    found, wanted = [], []
    run = jax.jit(
        lambda hidden, labels, asked, head: label_hits(hidden, labels, asked, head=head, rivals=head[9 : 9 + rivals])
    )
    for seed in range(10):
        hidden, labels, asked, head = some_case(seed, rows=rows)
        found.append(np.asarray(run(hidden, labels, asked, head)))
        wanted.append(np.asarray(asked & (greedy_tokens(hidden, head) == labels)))
    assert np.concatenate(found).tolist() == np.concatenate(wanted).tolist()
    assert rows == 1 or 0.1 < np.concatenate(wanted).mean() < 0.9


@pytest.mark.parametrize(
    "rows", [pytest.param(1, marks=pytest.mark.slow), 37, pytest.param(300, marks=pytest.mark.slow)]
)
def test_a_hit_by_a_screen_is_the_argmax(rows):
    """Twins and near twins among the labels: open rows, between those that the screen settles."""
    found, wanted = [], []
    run = jax.jit(
        lambda hidden, labels, asked, head: label_hits(
            hidden, labels, asked, head=head, rivals=head[9:12], screen=make_screen(head)
        )
    )
    for seed in range(4):
        hidden, labels, asked, head = some_case(seed, rows=rows, vocab=1280)
        # the argmax of a row of NaN is 0
        hidden, labels = hidden.at[5:7, 2].set(jnp.nan), labels.at[5:7].set(0)
        hit = np.asarray(asked & (greedy_tokens(hidden, head) == labels)) & ~np.isnan(hidden).any(axis=1)
        found.append(np.asarray(run(hidden, labels, asked, head)))
        wanted.append(hit)
    assert np.concatenate(found).tolist() == np.concatenate(wanted).tolist()
    assert rows == 1 or 0.1 < np.concatenate(wanted).mean() < 0.9


@pytest.mark.parametrize("most", [5, 2**24])
def test_rows_that_wait_for_others_get_their_answers(monkeypatch, most):
    """Six parts of 37 rows, whose answers are wanted in another order."""
    monkeypatch.setattr(hits_module, "MOST_LOGITS", most * VOCAB)
    hidden, labels, asked, head = some_case(6, rows=222)
    places = jnp.asarray(np.random.default_rng(0).permutation(222).astype(np.int32))

    @jax.jit
    def run(hidden, labels, asked, places, head):
        waiting, hits = no_open_rows(37, head=head, dtype=hidden.dtype), jnp.zeros(222, bool)
        counts = []
        for start in range(0, 222, 37):
            part = slice(start, start + 37)
            rows = hidden[part], labels[part], asked[part], places[part]
            waiting = add_open_rows(waiting, *rows, head=head, rivals=head[9:12])
            counts.append(waiting.count)
            waiting, hits = settle_open_rows(waiting, hits, head=head, all_=False)
            counts.append(waiting.count)
        waiting, hits = settle_open_rows(waiting, hits, head=head, all_=True)
        return hits, jnp.stack([*counts, waiting.count])

    hits, counts = run(hidden, labels, asked, places, head)
    wanted = asked & (greedy_tokens(hidden, head) == labels)
    assert np.asarray(hits)[np.asarray(places)].tolist() == np.asarray(wanted).tolist()
    counts = counts.tolist()
    assert counts[-1] == 0
    block = min(most, 64)
    assert max(counts[1::2]) < block
    assert max(counts) >= block  # a block was full before the end
    assert most < 64 or any(0 < count < block for count in counts[1::2])  # and some waited


@pytest.mark.slow
def test_blocks_of_rows_change_nothing(monkeypatch):
    hidden, labels, asked, head = some_case(3, rows=50)
    whole = label_hits(hidden, labels, asked, head=head, rivals=head[:2])
    monkeypatch.setattr(hits_module, "MOST_LOGITS", 7 * VOCAB)
    assert label_hits(hidden, labels, asked, head=head, rivals=head[:2]).tolist() == whole.tolist()
    monkeypatch.setattr(hits_module, "MOST_LOGITS", 1)
    assert label_hits(hidden, labels, asked, head=head, rivals=head[:2]).tolist() == whole.tolist()


def test_a_row_of_nan_is_no_hit():
    hidden, labels, _, head = some_case(5, rows=20)
    hidden = hidden.at[3:7, 2].set(jnp.nan)
    found = np.asarray(label_hits(hidden, labels.at[3].set(0), jnp.ones(20, bool), head=head, rivals=head[:4]))
    assert not found[3:7].any()
    assert found.any()


def test_rivals_settle_what_they_can_and_nothing_that_rounding_could_turn():
    hidden, labels, _, head = some_case(4, rows=300)
    exact = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    own = exact[np.arange(300), labels]
    lead = (exact.max(axis=1) - own) / np.linalg.norm(hidden, axis=1)
    settled = np.asarray(_surely_wrong(hidden, labels, head, head))
    assert settled[lead > 1e-3].all()
    assert (lead > 1e-3).mean() > 0.2
    assert not settled[lead <= 1e-6].any()
    # NaN says nothing: it is left to the whole head
    assert not np.asarray(_surely_wrong(hidden * jnp.nan, labels, head, head)).any()
