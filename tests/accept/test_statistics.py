"""Means, replay and intervals on results made by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_jax.accept import (
    bootstrap_interval,
    by_context_length,
    by_offset,
    by_prompt_set,
    by_slot,
    offset_differences,
    rate_ratio_interval,
    replay_blocks,
    statistics,
    summarise,
)
from oracles import acceptance
from support.results import some_result as result

A = result([1, 0, 1, 1, 0], prompt_len=2, correct=[[1, 0, 1], [0, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]])
B = result(
    [0, 2, 2, 1], prompt_len=1, correct=[[0, 0, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0]], prompt_hash=2, sequence_index=1
)


def test_replay_s_worked_example():
    assert replay_blocks(result([2, 0, 0, 4, 1], prompt_len=3, block_size=6)) == [3, 2]


def test_replay_by_hand():
    assert replay_blocks(A) == [2, 2, 1]
    assert replay_blocks(B) == [1, 3]
    assert replay_blocks(result([0], prompt_len=5)) == [1]
    # all seven drafts of the first block are right, and the text ends before the bonus
    assert replay_blocks(result([7, 0, 0, 0, 0, 0, 0], prompt_len=5, block_size=8)) == [7]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_replay_is_the_plain_walk(data):
    block_size = data.draw(st.integers(2, 6))
    anchors = data.draw(st.integers(1, 12))
    accepted = [data.draw(st.integers(0, min(block_size - 1, anchors - i))) for i in range(anchors)]
    prompt_len = data.draw(st.integers(1, 4))
    one = result(accepted, prompt_len=prompt_len, block_size=block_size)
    blocks = replay_blocks(one)
    assert blocks == acceptance.replay(accepted, prompt_len=prompt_len, length=one.length)
    assert sum(blocks) == one.length - prompt_len - 1
    if one.labelled.all(axis=1).any():
        found = summarise([one], samples=3, seed=0)
        assert found is not None
        assert 1 + sum(found["replay"]["survival"]) == pytest.approx(found["replay"]["tau_micro"], rel=1e-12)


def test_summary_by_hand():
    assert summarise([A, B], samples=2000, seed=0) == {
        # whole blocks: [1, 0, 1] of A's five anchors, [0, 2] of B's four
        "accept_len_mean": 0.8,
        "accept_len_p50": 1.0,
        "accept_len_p90": pytest.approx(1.6),
        "accept_len_p99": pytest.approx(1.96),
        # A twice, both, B twice come up at 1/4, 1/2, 1/4
        "accept_len_ci95": pytest.approx([2 / 3, 1.0]),
        "token_acc_mean": pytest.approx(11 / 21),
        "survival": pytest.approx([0.6, 0.2, 0.0]),
        "replay": {
            "tau_micro": pytest.approx(9 / 5),
            "tau_macro": pytest.approx((5 / 3 + 2) / 2),
            "tau_ci95": pytest.approx([5 / 3, 2.0]),
            "survival": pytest.approx([0.6, 0.2, 0.0]),
            "num_blocks": 5,
            # whole anchors on the chains: A's 2 and 4 (1, 1), B's 1 and 2 (0, 2)
            "accept_len_mean": 1.0,
            "why": statistics.WHY_THE_MEANS_DIFFER,
        },
        "num_anchors": 5,
        "num_prompts": 2,
        "num_unlabelled": 6,
    }


def test_texts_of_one_prompt_are_one_prompt():
    again = result([0, 2, 2, 1], prompt_len=1, prompt_hash=1, sequence_index=1)
    found = summarise([A, again], samples=200, seed=0)
    assert found is not None
    assert found["num_prompts"] == 1
    assert found["accept_len_ci95"] == [0.8, 0.8]
    assert found["replay"]["tau_ci95"] == pytest.approx([1.8, 1.8])


def test_one_plus_the_chain_s_survival_is_tau():
    """Exactly, as fractions: the floats of the two are one rounding apart at most."""
    draw = np.random.default_rng(7)
    for block_size in (2, 4, 8):
        texts = []
        for index in range(5):
            anchors = int(draw.integers(block_size, 40))
            most = np.minimum(block_size - 1, anchors - np.arange(anchors))
            texts.append(
                result(draw.integers(0, most + 1).tolist(), prompt_len=3, block_size=block_size, prompt_hash=index)
            )
        found = summarise(texts, samples=3, seed=0)
        assert found is not None
        replay, blocks = found["replay"], [block for text in texts for block in replay_blocks(text)]
        counts = [round(share * replay["num_blocks"]) for share in replay["survival"]]
        assert counts == [sum(block - 1 >= k for block in blocks) for k in range(1, block_size)]
        assert replay["num_blocks"] + sum(counts) == sum(blocks) == sum(len(text.accepted) for text in texts)
        assert replay["tau_micro"] == sum(blocks) / len(blocks)


def test_the_chain_is_not_known_from_some_anchors():
    some = replace(A.at(np.array([1, 1, 1, 0, 0], bool)), on_chain=None)
    found = summarise([some, B], samples=10, seed=0)
    assert found is not None
    assert found["replay"] is None
    assert found["num_anchors"] == 5
    with pytest.raises(ValueError, match="the chain is not known: evaluate every eligible anchor"):
        replay_blocks(some)


def test_buckets_of_context_length():
    # anchors 60 to 69, blocks of 3: two slots to accept; the chain visits 60, 62, 65, 66, 68
    text = result([1, 0, 2, 0, 0, 0, 1, 0, 1, 0], prompt_len=60, block_size=3)
    found = by_context_length(
        [text, result([0, 0, 2, 1], prompt_len=300, block_size=3, prompt_hash=2)], samples=50, seed=0
    )
    assert list(found) == ["0-63", "64-127", "256-511"]
    near, far = found["0-63"], found["64-127"]
    assert [near["num_anchors"], far["num_anchors"], found["256-511"]["num_anchors"]] == [4, 5, 3]
    assert near["accept_len_mean"] == 3 / 4
    assert far["accept_len_mean"] == 2 / 5
    # blocks that start in the bucket commit 2 and 3, then 1, 2 and 2
    assert (near["replay"]["tau_micro"], near["replay"]["num_blocks"]) == (2.5, 2)
    assert (far["replay"]["tau_micro"], far["replay"]["num_blocks"]) == (pytest.approx(5 / 3), 3)
    assert by_context_length([], samples=5, seed=0) == {}


def test_buckets_of_sets_and_offsets():
    other = result([0, 2, 2, 1], prompt_len=1, prompt_hash=2, prompt_set="code", position_offset=4096)
    sets = by_prompt_set([A, other], samples=50, seed=0)
    assert sets == {"code": summarise([other], samples=50, seed=0), "toy": summarise([A], samples=50, seed=0)}
    assert by_offset([other, A], samples=50, seed=0) == {"0": sets["toy"], "4096": sets["code"]}
    # a group without one whole block says nothing
    assert list(by_offset([A, result([1, 0], prompt_len=1, position_offset=7)], samples=5, seed=0)) == ["0"]


def test_slots_by_hand():
    assert by_slot([A, B]) == [
        {"slot": 1, "token_acc": pytest.approx(6 / 9), "num_labelled": 9},
        {"slot": 2, "token_acc": pytest.approx(3 / 7), "num_labelled": 7},
        {"slot": 3, "token_acc": pytest.approx(2 / 5), "num_labelled": 5},
    ]
    lone = by_slot([result([1, 0], prompt_len=1, correct=[[1, 0, 0], [0, 0, 0]])])
    assert lone[2] == {"slot": 3, "token_acc": None, "num_labelled": 0}


def test_nothing_whole_is_no_summary():
    assert summarise([], samples=10, seed=0) is None
    assert summarise([result([1, 0], prompt_len=1)], samples=10, seed=0) is None


def interval(rows, *, samples=2000, seed=0):
    return bootstrap_interval(np.array(rows, float), samples=samples, seed=seed)


def test_interval_of_the_degenerate_cases():
    assert interval([[6, 4]]) == (1.5, 1.5)
    assert interval([[3, 2], [6, 4], [1.5, 1]]) == (1.5, 1.5)
    # a prompt without an anchor says nothing, however few resamples there are
    for seed in range(10):
        assert interval([[6, 4], [0, 0], [0, 0], [0, 0]], samples=1, seed=seed) == (1.5, 1.5)


def test_interval_does_not_look_at_the_order_of_prompts():
    rows = np.random.default_rng(0).integers(1, 9, (11, 2))
    assert interval(rows) == interval(rows[::-1]) == interval(rows[np.random.default_rng(1).permutation(11)])


def test_interval_counts_prompts_not_anchors():
    rows = np.array([[0, 2], [1, 2], [4, 2], [3, 2]])
    assert interval(1000 * rows) == interval(rows)
    low, high = interval(rows)
    assert high - low > 1.0


def test_interval_of_many_alike_prompts_is_the_normal_one():
    values = np.random.default_rng(2).normal(0, 1, 400)
    low, high = interval(np.stack([values, np.ones(400)], axis=1), samples=4000)
    half = 1.96 * values.std() / 20
    assert (low - values.mean(), high - values.mean()) == pytest.approx((-half, half), rel=0.08)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    draw = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        anchors = draw.integers(5, 40, 30)
        share = draw.beta(2, 2, 30)  # prompts differ: the mean of all is 0.5
        low, high = interval(np.stack([draw.binomial(anchors, share), anchors], axis=1), samples=300, seed=trial)
        covered += low <= 0.5 <= high
    # 0.95 asked for; three standard errors of 300 trials are 0.038, and percentile intervals are a little short
    assert 0.88 <= covered / 300 <= 0.99


def test_offset_differences_by_hand():
    # the third anchor of A lost one; the last is not whole and does not count; B's second gained one
    moved_a = result([1, 0, 0, 1, 1], prompt_len=2, position_offset=4096)
    moved_b = result([0, 3, 2, 1], prompt_len=1, prompt_hash=2, sequence_index=1, position_offset=4096)
    lone = result([3, 3, 3], prompt_len=1, prompt_hash=3, sequence_index=2, position_offset=4096)
    far = result([0, 0, 0, 1, 0], prompt_len=2, position_offset=70000)
    found = offset_differences([moved_b, A, B, lone, far, moved_a], samples=2000, seed=0)
    assert found == {
        "4096": {
            "mean": 0.0,
            "ci95": pytest.approx([-1 / 3, 1 / 2]),
            "num_anchors": 5,
            "num_anchors_differing": 2,
        },
        "70000": {
            "mean": pytest.approx(-2 / 3),
            "ci95": pytest.approx([-2 / 3, -2 / 3]),
            "num_anchors": 3,
            "num_anchors_differing": 2,
        },
    }
    assert offset_differences([A, B], samples=10, seed=0) == {}
    assert offset_differences([A, lone], samples=10, seed=0) == {}


def test_interval_of_how_many_times_as_fast():
    def times(ours, theirs):
        return rate_ratio_interval(np.array(ours, float), np.array(theirs, float), samples=2000, seed=0)

    # slow batches are slow both ways: resampled together, they leave the ratio alone
    assert times([[10, 2], [10, 40]], [[10, 4], [10, 80]]) == (2, 2)
    # the first batch alone is as fast, the second three times: a quarter of the resamples each
    assert times([[10, 1], [10, 1]], [[10, 1], [10, 3]]) == pytest.approx((1, 3))
