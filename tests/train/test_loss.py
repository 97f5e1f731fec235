import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.drafter import StoredSequence, drafter_shapes
from dflash_jax.train.loss import Objective, block_loss, draw_anchors, slot_weights
from oracles import loss as oracle
from support import tiny

GAMMA = 2.5
WIDTH = 16
VOCAB, HIDDEN, FEATURES = len(tiny.TOKENS), 24, 48
CONFIG = tiny.tiny_drafter_config()


def test_anchors_are_drawn_without_replacement_from_the_eligible():
    eligible = jnp.array([False, True, True, False, True, True, True, False, True])
    for seed in range(20):
        anchors, valid = draw_anchors(eligible, 4, key=jax.random.key(seed))
        assert valid.all()
        assert len(set(anchors.tolist())) == 4
        assert eligible[anchors].all()


def test_every_eligible_index_is_drawn_equally_often():
    eligible = jnp.array([False, True, True, False, True, True, True, False, True])
    keys = jax.random.split(jax.random.key(0), 3000)
    anchors, _ = jax.vmap(lambda key: draw_anchors(eligible, 2, key=key))(keys)
    share = np.bincount(np.asarray(anchors).ravel(), minlength=9) / 3000
    # 2 of 6: a third each; 0.04 is more than four standard errors
    assert share == pytest.approx(np.where(eligible, 1 / 3, 0.0), abs=0.04)


def test_fewer_eligible_than_asked_for_are_marked():
    anchors, valid = draw_anchors(jnp.array([False, True, False, False, True]), 4, key=jax.random.key(3))
    assert valid.tolist() == [True, True, False, False]
    assert set(anchors[:2].tolist()) == {1, 4}


def test_slot_weights_by_hand():
    assert slot_weights(5, 4.0) == pytest.approx([1.0, 0.7788008, 0.6065307, 0.4723666], rel=1e-6)
    assert slot_weights(2, 7.0).tolist() == [1.0]


def rows():
    """Greedy text with a departure, at two offsets, one of them cut short by the token budget."""
    draw = np.random.default_rng(4)

    def row(length, prompt_len, *, budget, offset, departures):
        next_ids = draw.integers(0, VOCAB, length).tolist()
        token_ids = [7, *next_ids[:-1]]
        for at in departures:
            token_ids[at] = (token_ids[at] + 1) % VOCAB
        features = draw.normal(0, 1, (length, FEATURES)).astype(np.float32)
        return oracle.Row(
            features=features, token_ids=token_ids, next_ids=next_ids, prompt_len=prompt_len,
            limit=prompt_len + budget, position_offset=offset,
        )  # fmt: skip

    return [
        row(11, 4, budget=7, offset=0, departures=[]),
        row(9, 3, budget=50, offset=4096, departures=[6]),
        row(5, 4, budget=50, offset=0, departures=[]),  # a response of one token: no anchor
    ]


def stack(some, *, width, fill=0.0):
    def padded(values, dtype):
        values = np.asarray(values)
        out = np.full((width, *values.shape[1:]), fill, dtype)
        out[: len(values)] = values
        return out

    def numbers(name):
        return jnp.array([getattr(row, name) for row in some], jnp.int32)

    return StoredSequence(
        features=jnp.array([padded(row.features, np.float32) for row in some]),
        token_ids=jnp.array([padded(row.token_ids, np.int32) for row in some]),
        next_ids=jnp.array([padded(row.next_ids, np.int32) for row in some]),
        length=jnp.array([len(row.token_ids) for row in some], jnp.int32),
        prompt_len=numbers("prompt_len"),
        limit=numbers("limit"),
        position_offset=numbers("position_offset"),
    )


@functools.cache
def model():
    """A drafter, an embedding and a head, all at random."""
    draw = np.random.default_rng(8)
    embed, head = (draw.normal(0, scale, (VOCAB, HIDDEN)).astype(np.float32) for scale in (1.0, 0.4))
    return tiny.random_drafter(CONFIG), embed, head


loss_alone = jax.jit(block_loss, static_argnames=("anchors_per_sequence", "objective"))
loss_and_gradient = jax.jit(
    jax.value_and_grad(block_loss, has_aux=True), static_argnames=("anchors_per_sequence", "objective")
)


def run(compiled, sequences, *, anchors=WIDTH, seed=0):
    """Loss, statistics and gradient where there is one; as it stands, with every eligible anchor drawn."""
    drafter, embed, head = model()
    key = jax.random.key(seed)
    return compiled(
        drafter,
        jnp.asarray(embed),
        jnp.asarray(head),
        sequences,
        anchors_per_sequence=anchors,
        objective=Objective(gamma=GAMMA),
        key=key,
    )


def all_anchors(sequences, seed=0):
    (loss, statistics), gradient = run(loss_and_gradient, sequences, seed=seed)
    return float(loss), statistics, gradient


def as_float64(drafter):
    leaves = jax.tree_util.tree_leaves(drafter)
    return {name: np.asarray(leaf, np.float64) for name, leaf in zip(drafter_shapes(CONFIG), leaves, strict=True)}


def in_float64(weights, some):
    embed, head = (part.astype(np.float64) for part in model()[1:])
    return oracle.block_loss(weights, CONFIG.to_json(dtype="float32"), embed, head, some, gamma=GAMMA)


def test_loss_and_statistics_are_those_of_a_plain_loop():
    loss, statistics, _ = all_anchors(stack(rows(), width=WIDTH))
    wanted = in_float64(as_float64(model()[0]), rows())
    assert wanted.counts == [11, 8, 5, 3]  # 6, 5, 4, 3 of the first text; 5, 3, 1, 0 of the second, which departs
    assert loss == pytest.approx(wanted.loss, rel=2e-6)
    assert statistics.loss == loss
    assert statistics.num_labels == sum(wanted.counts)
    assert statistics.accuracy_by_slot == pytest.approx(np.divide(wanted.hits, wanted.counts))
    assert statistics.accuracy == pytest.approx(sum(wanted.hits) / sum(wanted.counts))


@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_the_slope_of_the_plain_loop(seed):
    _, _, gradient = all_anchors(stack(rows(), width=WIDTH))
    weights, gradient = as_float64(model()[0]), as_float64(gradient)
    draw = np.random.default_rng(seed)
    direction = {name: draw.normal(0, 1, value.shape) for name, value in weights.items()}
    step = 1e-5

    def moved(sign):
        return in_float64({n: w + sign * step * direction[n] for n, w in weights.items()}, rows()).loss

    slope = (moved(1) - moved(-1)) / (2 * step)
    along = sum((gradient[name] * direction[name]).sum() for name in weights)
    assert along == pytest.approx(slope, rel=1e-4)


def test_padding_changes_nothing():
    loss, statistics, _ = all_anchors(stack(rows(), width=WIDTH))
    wide, more = run(loss_alone, stack(rows(), width=64, fill=3.0))
    assert wide == pytest.approx(loss, rel=1e-6)
    assert more.num_labels == statistics.num_labels
    assert more.accuracy_by_slot.tolist() == statistics.accuracy_by_slot.tolist()


def test_order_of_the_batch_and_of_the_draw_change_nothing():
    loss, statistics, _ = all_anchors(stack(rows(), width=WIDTH))
    turned, more, _ = all_anchors(stack(rows()[::-1], width=WIDTH), seed=9)
    assert turned == pytest.approx(loss, rel=1e-6)
    assert more.accuracy_by_slot.tolist() == statistics.accuracy_by_slot.tolist()


def test_only_what_a_block_may_see_counts():
    # one anchor, index 7: it sees features 0..6 and its own token; 8 is its only label's place
    base = stack(rows()[:1] * 3, width=WIDTH)
    base = eqx.tree_at(
        lambda s: (s.prompt_len, s.length, s.limit), base, tuple(jnp.full(3, n, jnp.int32) for n in (7, 9, 99))
    )
    loss, statistics, _ = all_anchors(base)
    assert statistics.num_labels == 3

    def changed(name, index):
        leaf = getattr(base, name)
        new = leaf.at[:, index].add(1)
        return all_anchors(eqx.tree_at(lambda s: getattr(s, name), base, new))[0]

    for name, index in [("features", 7), ("features", 8), ("features", 12), ("token_ids", 6), ("token_ids", 8),
                        ("next_ids", 6), ("next_ids", 8)]:  # fmt: skip
        assert changed(name, index) == loss, (name, index)
    for name, index in [("features", 6), ("features", 0), ("token_ids", 7), ("next_ids", 7)]:
        assert changed(name, index) != loss, (name, index)


def test_fewer_anchors_are_drawn_anew_with_every_key():
    sequences = stack(rows(), width=WIDTH)
    few = [run(loss_alone, sequences, anchors=2, seed=seed) for seed in range(4)]
    assert len({float(loss) for loss, _ in few}) > 2
    for _, statistics in few:
        assert statistics.accuracy_by_slot.shape == (4,)
        assert statistics.num_labels <= 4 * 4


def test_a_batch_without_an_anchor_has_no_loss_and_no_gradient():
    loss, statistics, gradient = all_anchors(stack(rows()[2:] * 3, width=WIDTH))
    assert (loss, int(statistics.num_labels), float(statistics.accuracy)) == (0.0, 0, 0.0)
    assert all((leaf == 0).all() for leaf in jax.tree_util.tree_leaves(gradient))
