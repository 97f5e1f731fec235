import functools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.core import InputError
from dflash_jax.drafter import Compute, StoredSequence, draft_blocks, drafter_shapes
from dflash_jax.train.loss import (
    Objective,
    block_loss,
    dpace_weights,
    draw_anchors,
    loss_gradient,
    slot_weights,
)
from oracles import loss as oracle
from support import tiny
from support.jaxprs import float32_precisions

GAMMA = 2.5
WIDTH = 16
VOCAB, HIDDEN, FEATURES = len(tiny.TOKENS), 24, 48
TOP = 6
OBJECTIVE = Objective(gamma=GAMMA)
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
        # the greedy token and five others, with half of the mass on tokens that are not stored
        top_ids = (np.array(next_ids)[:, None] + np.arange(TOP) * 7) % VOCAB
        logprobs = np.sort(np.log(draw.dirichlet(np.ones(TOP), length) / 2), axis=1)[:, ::-1]
        return oracle.Row(
            features=features, token_ids=token_ids, next_ids=next_ids, prompt_len=prompt_len,
            limit=prompt_len + budget, position_offset=offset, top_ids=top_ids,
            top_logprobs=logprobs.astype(np.float16),
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
        top_ids=jnp.array([padded(row.top_ids, np.int32) for row in some]),
        top_logprobs=jnp.array([padded(row.top_logprobs, np.float16) for row in some]),
    )


@functools.cache
def model():
    """A drafter, an embedding and a head, all at random."""
    draw = np.random.default_rng(8)
    embed, head = (draw.normal(0, scale, (VOCAB, HIDDEN)).astype(np.float32) for scale in (1.0, 0.4))
    return tiny.random_drafter(CONFIG), embed, head


STATIC = ("anchors_per_sequence", "objective", "compute")
loss_alone = jax.jit(block_loss, static_argnames=STATIC)
gradient_in_parts = jax.jit(loss_gradient, static_argnames=(*STATIC, "parts"))
loss_and_gradient = jax.jit(jax.value_and_grad(block_loss, has_aux=True), static_argnames=STATIC)


def run(compiled, sequences, *, anchors=WIDTH, seed=0, objective=OBJECTIVE, **settings):
    """Loss, statistics and gradient where there is one; as it stands, with every eligible anchor drawn."""
    drafter, embed, head = model()
    key = jax.random.key(seed)
    dtype = settings["compute"].dtype if settings else jnp.float32
    return compiled(
        drafter, jnp.asarray(embed, dtype), jnp.asarray(head, dtype), sequences, anchors_per_sequence=anchors,
        objective=objective, key=key, **settings,
    )  # fmt: skip


def all_anchors(sequences, seed=0, **settings):
    (loss, statistics), gradient = run(loss_and_gradient, sequences, seed=seed, **settings)
    return float(loss), statistics, gradient


def as_float64(drafter):
    leaves = jax.tree_util.tree_leaves(drafter)
    return {name: np.asarray(leaf, np.float64) for name, leaf in zip(drafter_shapes(CONFIG), leaves, strict=True)}


def in_float64(weights, some, **settings):
    embed, head = (part.astype(np.float64) for part in model()[1:])
    return oracle.block_loss(weights, CONFIG.to_json(dtype="float32"), embed, head, some, gamma=GAMMA, **settings)


OBJECTIVES = [
    pytest.param(kind, denominator, marks=[pytest.mark.slow] * ((kind, denominator) != ("cross-entropy", "weights")))
    for kind in ("cross-entropy", "d-pace", "kl")
    for denominator in ("weights", "labels")
]


def test_loss_and_statistics_are_those_of_a_plain_loop():
    loss, statistics, _ = all_anchors(stack(rows(), width=WIDTH))
    wanted = in_float64(as_float64(model()[0]), rows())
    assert wanted.counts == [11, 8, 5, 3]  # 6, 5, 4, 3 of the first text; 5, 3, 1, 0 of the second, which departs
    assert loss == pytest.approx(wanted.loss, rel=2e-6)
    assert statistics.loss == loss
    assert statistics.num_labels == sum(wanted.counts)
    assert statistics.accuracy_by_slot == pytest.approx(np.divide(wanted.hits, wanted.counts))
    assert statistics.accuracy == pytest.approx(sum(wanted.hits) / sum(wanted.counts))


@pytest.mark.parametrize(("kind", "denominator"), OBJECTIVES)
def test_every_loss_and_its_gradient_are_those_of_the_plain_loop(kind, denominator):
    objective = Objective(loss=kind, denominator=denominator, gamma=GAMMA)
    loss, statistics, gradient = all_anchors(stack(rows(), width=WIDTH), objective=objective)
    weights, gradient = as_float64(model()[0]), as_float64(gradient)
    settings = {"kind": kind, "denominator": denominator}
    wanted = in_float64(weights, rows(), **settings)
    assert loss == pytest.approx(wanted.loss, rel=2e-6)
    assert statistics.accuracy_by_slot == pytest.approx(np.divide(wanted.hits, wanted.counts))
    if kind == "d-pace":  # its weights are constants: the slope is that of the sum with the weights as they are here
        embed, head = (part.astype(np.float64) for part in model()[1:])
        config = CONFIG.to_json(dtype="float32")
        settings["slot_weights"] = oracle.all_dpace_weights(weights, config, embed, head, rows())
    draw = np.random.default_rng(len(kind))
    direction = {name: draw.normal(0, 1, value.shape) for name, value in weights.items()}
    step = 1e-5

    def moved(sign):
        return in_float64({n: w + sign * step * direction[n] for n, w in weights.items()}, rows(), **settings).loss

    slope = (moved(1) - moved(-1)) / (2 * step)
    along = sum((gradient[name] * direction[name]).sum() for name in weights)
    assert along == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize(("kind", "denominator"), OBJECTIVES)
def test_parts_give_the_gradient_of_all_at_once(kind, denominator):
    """Texts with 18, 9 and no labels, so that a mean of the parts' means would be another number."""
    objective = Objective(loss=kind, denominator=denominator, gamma=GAMMA)
    batch = stack(rows(), width=WIDTH)
    _, statistics, wanted = all_anchors(batch, objective=objective)
    for parts in (1, 3):
        gradient, found = run(functools.partial(gradient_in_parts, parts=parts), batch, objective=objective)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), gradient, wanted)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, statistics)


def test_parts_draw_the_anchors_of_all_at_once():
    batch = stack(rows(), width=WIDTH)
    whole, apart = (
        run(functools.partial(gradient_in_parts, parts=parts), batch, anchors=2, seed=5) for parts in (1, 3)
    )
    assert whole[1].num_labels == apart[1].num_labels
    np.testing.assert_allclose(apart[1].loss, whole[1].loss, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cross-entropy", "d-pace", "kl"])
def test_a_sample_of_the_whole_vocabulary_gives_the_loss_and_the_gradient(kind):
    whole = all_anchors(stack(rows(), width=WIDTH), objective=Objective(loss=kind, gamma=GAMMA))
    sampled = all_anchors(stack(rows(), width=WIDTH), objective=Objective(loss=kind, gamma=GAMMA, sampled_vocab=VOCAB))
    assert sampled[0] == pytest.approx(whole[0], rel=1e-6)
    assert sampled[1].accuracy == whole[1].accuracy
    for ours, theirs in zip(jax.tree_util.tree_leaves(sampled[2]), jax.tree_util.tree_leaves(whole[2]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    part = all_anchors(stack(rows(), width=WIDTH), objective=Objective(loss=kind, gamma=GAMMA, sampled_vocab=VOCAB - 3))
    assert part[0] != whole[0]


def test_dpace_weights_by_hand():
    got = dpace_weights(jnp.array([[1.0, 0.5, 0.0]] * 2), jnp.array([[True, True, True], [True, False, True]]), 0.5)
    # s = 1, 0.75, 0.5, products 1, 0.75, 0.375; where slot 2 has no label its s is 1 and its weight 0
    np.testing.assert_allclose(got, [[2.125, 1.125, 0.375], [1.5, 0.0, 0.5]], rtol=1e-6)
    # alpha 1: every slot is reached, and weighs as many slots as come with it
    assert dpace_weights(jnp.zeros((1, 3)), jnp.ones((1, 3), bool), 1.0).tolist() == [[3.0, 2.0, 1.0]]


@pytest.mark.slow
def test_kl_is_zero_where_the_drafter_has_the_targets_distribution():
    """With every token stored, of a target whose logits are the drafter's own."""
    drafter, embed, head = model()
    sequences = stack(rows(), width=WIDTH)
    objective = Objective(loss="kl", gamma=GAMMA)
    # one anchor per sequence sees one label: the drafter's own distribution there is put into the cache
    one = eqx.tree_at(
        lambda s: (s.prompt_len, s.length), sequences, (jnp.full(3, 3, jnp.int32), jnp.full(3, 5, jnp.int32))
    )
    hidden = draft_blocks(
        drafter, jnp.asarray(embed), one.features, one.token_ids, jnp.full((3, 1), 3, jnp.int32),
        block_lengths=jnp.full((3, 1), 2, jnp.int32), block_size=CONFIG.block_size, position_offset=one.position_offset,
    )  # fmt: skip
    logprobs = jax.nn.log_softmax(hidden[:, 0, 0] @ jnp.asarray(head).T)
    every = jnp.broadcast_to(jnp.arange(VOCAB, dtype=jnp.int32), (3, WIDTH, VOCAB))
    own = replace(
        one, limit=jnp.full(3, 5, jnp.int32), top_ids=every, top_logprobs=jnp.repeat(logprobs[:, None], WIDTH, axis=1)
    )
    loss, statistics, gradient = all_anchors(own, objective=objective)
    assert statistics.num_labels == 3
    assert loss == pytest.approx(0.0, abs=1e-5)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree_util.tree_leaves(gradient)) < 1e-4


@pytest.mark.slow
def test_remat_gives_the_same_gradient():
    plain = all_anchors(stack(rows(), width=WIDTH), compute=Compute(dtype=jnp.dtype("float32")))
    again = all_anchors(stack(rows(), width=WIDTH), compute=Compute(dtype=jnp.dtype("float32"), remat=True))
    assert again[0] == pytest.approx(plain[0], rel=1e-6)
    for ours, theirs in zip(jax.tree_util.tree_leaves(again[2]), jax.tree_util.tree_leaves(plain[2]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_has_float32_loss_and_gradients_near_the_exact_ones():
    exact, _, wanted = all_anchors(stack(rows(), width=WIDTH))
    loss, statistics, gradient = all_anchors(stack(rows(), width=WIDTH), compute=Compute(dtype=jnp.dtype("bfloat16")))
    assert statistics.loss.dtype == jnp.float32
    assert 0 < abs(loss - exact) < 0.03 * exact
    ours, theirs = (
        np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree_util.tree_leaves(tree)])
        for tree in (gradient, wanted)
    )
    assert ours.dtype == np.float32
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.995
    # a gradient that was rounded to bfloat16 anywhere on its last way has 16 zero bits
    assert (gradient.fc.weight.view(jnp.uint32) & 0xFFFF).any()


def test_an_alpha_that_is_no_share_is_named():
    with pytest.raises(InputError, match=r"^--dpace-alpha is 1.5: a number from 0 to 1 is needed$"):
        Objective(alpha=1.5)


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_no_product_is_left_to_an_accelerators_default():
    """Which rounds float32 operands first: a TPU to bfloat16, an NVIDIA GPU to TF32."""
    traced = jax.make_jaxpr(lambda: run(loss_and_gradient, stack(rows(), width=WIDTH)))()
    told = float32_precisions(traced.jaxpr)
    assert len(told) > 20
    assert set(told) == {(jax.lax.Precision.HIGHEST,) * 2}
