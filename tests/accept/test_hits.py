"""Whether labels are the argmax: against the argmax itself, ties and near ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.accept import hits as hits_module
from dflash_jax.accept import label_hits
from dflash_jax.accept.hits import _surely_wrong
from dflash_jax.nn import greedy_tokens

VOCAB, HIDDEN = 61, 17


def some_case(seed, *, rows):
    """Labels that are the argmax, the second best, a twin of the argmax, and anything; rows of every kind."""
    draw = np.random.default_rng(seed)
    head = draw.normal(0, 1, (VOCAB, HIDDEN)).astype(np.float32)
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
