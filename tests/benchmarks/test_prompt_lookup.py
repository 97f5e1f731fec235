"""Prompt lookup by hand, and its benchmark on a tiny chain."""

import json

import numpy as np
import pytest

import prompt_lookup
from dflash_jax.accept import SequenceResult
from dflash_jax.core import InputError
from dflash_jax.drafter import save_drafter
from support import tiny, tiny_chain


def look_up(tokens, **settings):
    return prompt_lookup.look_up(
        np.array(tokens, np.int32), **{"count": 4, "longest": 3, "shortest": 2} | settings
    ).tolist()


def test_look_up_by_hand():
    assert look_up([5, 6, 7, 5, 6]) == [7, 5, 6]
    assert look_up([5, 6, 7, 5, 6], count=2) == [7, 5]
    assert look_up([5, 6, 7, 6]) == []  # one token stood before, and two are needed
    assert look_up([5, 6, 7, 6], shortest=1) == [7, 6]
    assert look_up([1, 2, 3, 8, 2, 3, 9, 1, 2, 3]) == [8, 2, 3, 9]  # three tokens before two
    assert look_up([1, 2, 3, 8, 2, 3, 9, 1, 2, 3], longest=2) == [9, 1, 2, 3]  # the last place
    assert look_up([4, 4, 4]) == [4]  # where it ends counts, not where it begins
    assert look_up([4]) == []


def test_a_lookup_is_held_against_the_labels_of_its_anchors():
    tokens = np.array([1, 2, 3, 1, 2, 3, 1, 9], np.int32)
    next_ids = np.array([2, 3, 1, 2, 3, 1, 2, 0], np.int32)  # the text leaves the greedy path at its last token
    result = SequenceResult(
        prompt_hash=1, prompt_set="s", text_hash=2, sequence_index=0, position_offset=0, prompt_len=4, length=8,
        num_departures=1, anchors=np.arange(4, 7, dtype=np.int32), accepted=np.zeros(3, np.int32),
        correct=np.zeros((3, 3), bool), labelled=np.array([[1, 1, 1], [1, 0, 0], [1, 0, 0]], bool),
        on_chain=np.array([True, True, True]),
    )  # fmt: skip
    found = prompt_lookup.looked_up(result, tokens, next_ids, longest=3, shortest=2)
    # from [1, 2] the guess is [3, 1, 2]: right at the label 2, where the text has 9
    assert found.correct.tolist() == [[True] * 3, [True, False, False], [True, False, False]]
    # a slot without a label counts for nothing, whatever is guessed there
    assert found.accepted.tolist() == [3, 1, 1]
    assert found.on_chain is not None
    assert found.on_chain.tolist() == [True, False, False]


@pytest.mark.slow
def test_the_benchmark_on_a_tiny_chain(tmp_path, capsys):
    target = tiny.tiny_target()
    cache = tiny_chain.make_cache(tmp_path / "chain", target, tiny.TEXTS[:4], max_new_tokens=24)
    (tmp_path / "drafter").mkdir()
    save_drafter(tiny.half_memorised(), tmp_path / "drafter")
    arguments = ["--target", str(target), "--cache", str(cache), "--drafter", str(tmp_path / "drafter")]
    assert prompt_lookup.main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["num_prompts"] == 4
    lookup, drafter, rows = result["lookup"], result["drafter"], result["drafter_by_lookup"]
    assert result["the_better_of_both"]["accept_len_mean"] >= max(lookup["accept_len_mean"], drafter["accept_len_mean"])
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=1e-4)
    mean = sum(row["share"] * (row["accept_len_mean"] or 0) for row in rows)
    assert mean == pytest.approx(drafter["accept_len_mean"], rel=1e-3)
    difference = drafter["accept_len_mean"] - lookup["accept_len_mean"]
    assert result["lookup_minus_drafter"]["accept_len"]["difference"] == pytest.approx(-difference, abs=1e-3)
    with pytest.raises(InputError, match="--shortest is 4, --longest 3"):
        prompt_lookup.main([*arguments, "--shortest", "4"])
