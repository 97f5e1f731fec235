"""Errors, masks and paired sums on numbers worked by hand."""

import numpy as np
import pytest

from dflash_jax.parity.chain import Outcome
from dflash_jax.parity.measure import as_results, mean_accepted, paired_sums, relative_errors, whole_blocks
from dflash_jax.parity.texts import Text, make_batches


def text(prompt_len, length, *, prompt=7, features_len=None):
    return Text(
        token_ids=np.arange(length, dtype=np.int32),
        prompt_len=prompt_len,
        prompt_hash=prompt,
        prompt_set="some",
        limit=1000,
        features_len=length if features_len is None else features_len,
    )


def outcome(accepted, labelled, departures=0):
    accepted, labelled = np.array(accepted, np.int32), np.array(labelled, bool)
    return Outcome(
        accepted=accepted,
        correct=np.arange(labelled.shape[1])[None] < accepted[:, None],
        labelled=labelled,
        num_departures=departures,
    )


def test_relative_errors_are_per_row():
    found = relative_errors(np.array([[3.0, 5.0], [1.0, 2.0]]), np.array([[3.0, 1.0], [1.0, 2.0]]))
    assert found == pytest.approx([4 / np.sqrt(10), 0])


def test_anchors_end_with_the_features():
    assert text(3, 9).num_anchors == 5  # 3 to 7
    assert text(3, 9, features_len=5).num_anchors == 3  # 3 to 5: the block at 5 reads rows 0 to 4
    assert text(3, 4).num_anchors == 0


def test_whole_blocks_are_compared_where_there_are_enough():
    # 2 drafted slots: anchors 3 and 4 of six tokens; the last has one label only
    masks, whole = whole_blocks([text(3, 6)], [outcome([2, 1], [[1, 1], [1, 0]])])
    assert (masks[0].tolist(), whole) == ([True, False], True)
    # room for three whole blocks in eight tokens, and one is whole: the text leaves the greedy path
    few = outcome([2, 0, 1, 1], [[1, 1], [1, 0], [1, 0], [1, 0]])
    masks, whole = whole_blocks([text(3, 8)], [few])
    assert (masks[0].tolist(), whole) == ([True] * 4, False)
    # no room at all
    assert whole_blocks([text(3, 5)], [outcome([1], [[1, 0]])])[1] is False


def test_differences_are_summed_by_prompt():
    texts = [text(3, 6), text(3, 6), text(3, 6, prompt=8)]
    both = [[1, 1], [1, 1]]
    ours = [outcome([2, 0], both), outcome([1, 1], both), outcome([0, 2], both)]
    theirs = [outcome([2, 2], both), outcome([0, 2], both), outcome([1, 0], both)]
    masks = [np.array([True, True]), np.array([True, False]), np.array([False, True])]
    assert paired_sums(texts, ours, theirs, masks).tolist() == [[-1, 3], [2, 1]]
    assert mean_accepted(ours, masks) == (2 + 0 + 1 + 2) / 4


def test_results_are_over_the_reference_s_labels():
    """An engine with fewer labels than the reference has misses there, not fewer slots."""
    one = [text(3, 7)]
    sound = [outcome([2, 2, 1], [[1, 1], [1, 1], [1, 0]])]
    ours = [outcome([1, 0, 0], [[1, 0], [1, 1], [0, 0]], departures=3)]
    (result,) = as_results(one, ours, sound, whole=True, offset=4096)
    assert result.anchors.tolist() == [3, 4, 5]
    assert result.labelled.tolist() == sound[0].labelled.tolist()
    assert result.correct.tolist() == [[True, False], [False, False], [False, False]]
    assert result.whole.tolist() == [True, True, False]
    assert (result.position_offset, result.prompt_set) == (4096, "some")
    assert result.on_chain is not None
    assert result.on_chain.tolist() == [True, False, True]  # 3 commits 2, then 5
    two = [outcome([1, 0], [[1, 1], [1, 1]])]
    (cut,) = as_results([text(3, 7, features_len=4)], two, two, whole=False, offset=0)
    assert cut.on_chain is None
    assert cut.labelled.all()


def test_every_text_is_in_one_batch_of_few_widths():
    lengths = [5, 64, 65, 130, 40, 300, 64, 128, 7]
    texts = [text(2, length) for length in lengths]
    batches = make_batches(texts, tokens_per_batch=128)
    shapes = [batch.tokens.shape for batch in batches]
    assert {width for _, width in shapes} == {64, 128, 256, 512}
    assert all(rows == 1 or rows * width <= 128 for rows, width in shapes)
    seen = [one for batch in batches for one in batch.texts]
    assert sorted(map(id, seen)) == sorted(map(id, texts))
    for batch in batches:
        for row, length in enumerate(batch.lengths):
            if row < len(batch.texts):
                assert batch.tokens[row, :length].tolist() == batch.texts[row].token_ids.tolist()
            else:
                assert length == 1
            assert not batch.tokens[row, length:].any()
