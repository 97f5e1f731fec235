"""What the page says in words follows the intervals, not the means."""

import math

import pytest

from dflash_jax.report.check_verdict import check_tiles
from dflash_jax.report.records import read_records
from dflash_jax.report.verdict import MOST_TILED, write_verdict


def _verdict(build, tmp_path, *documents):
    paths = [build.write_json(tmp_path / f"{place}.json", document) for place, document in enumerate(documents)]
    groups = write_verdict(read_records(paths))
    return {_lead(group, sentence): sentence for group in groups for sentence in group.sentences}


def _lead(group, sentence):
    return f"{group.heading}: {sentence.lead}" if group.heading else sentence.lead


def test_a_good_drafter(build, tmp_path):
    verdict = _verdict(build, tmp_path, build.check(), build.decode())
    assert {lead: sentence.mark for lead, sentence in verdict.items()} == {
        "Held-out prompts": "good",
        "Learned": "good",
        "The offsets agree": "good",
        "Decoding is lossless": "good",
        "Speed": "good",
    }
    assert verdict["Held-out prompts"].text == (
        "the target commits 1.52 tokens per pass (95 % 1.48 to 1.56) where plain decoding commits 1; over all anchors"
        " it accepts 0.55 of 7 drafted tokens per anchor (95 % 0.51 to 0.59)."
    )
    largest = "the largest paired difference is +0.001 [+0.000, +0.002] (at 65,536)"
    assert largest in verdict["The offsets agree"].text
    assert verdict["Decoding is lossless"].text.startswith("all 2,304 tokens decoded")


def _with_difference(build, mean, low, high, **more):
    return build.check(accept_len_by_offset_difference={"4096": {"mean": mean, "ci95": [low, high]} | more})


@pytest.mark.parametrize(
    ("mean", "low", "high", "lead"),
    [
        (0.0, 0.0, 0.0, "The offsets agree"),
        (0.02, 0.01, 0.03, "The offsets agree"),  # real, but too small to matter
        (0.09, 0.08, 0.1, "The offsets agree"),  # the margin itself is within
        (-0.2, -0.3, -0.1, "The offsets disagree"),
        (0.2, 0.1, 0.3, "The offsets disagree"),
        (0.2, -0.1, 0.5, "Offsets are undecided"),
        (0.05, -0.1, 0.2, "Offsets are undecided"),
        (0.09, 0.01, 0.17, "Offsets are undecided"),  # not 0, but its centre is within the margin
    ],
)
def test_offsets_are_judged_by_an_equivalence_test(build, tmp_path, mean, low, high, lead):
    verdict = _verdict(build, tmp_path, _with_difference(build, mean, low, high))
    assert {name for name in verdict if "ffsets" in name} == {lead}
    tile = check_tiles(read_records([tmp_path / "0.json"]).checks[0])[-1]
    agree = lead == "The offsets agree"
    assert (tile.value, tile.mark == "good") == ("1 of 1" if agree else "0 of 1", agree)


def test_a_broken_offset_is_named_and_the_others_are_not(build, tmp_path):
    differences = build.check()["accept_len_by_offset_difference"] | {"4096": {"mean": -0.2, "ci95": [-0.3, -0.1]}}
    broken = _verdict(build, tmp_path, build.check(accept_len_by_offset_difference=differences))["The offsets disagree"]
    assert broken.mark == "bad"
    assert "4,096: -0.200 [-0.300, -0.100]." in broken.text
    assert "65,536" not in broken.text


def test_small_differences_are_told_from_none(build, tmp_path):
    small = _verdict(build, tmp_path, _with_difference(build, 0.02, 0.01, 0.03, num_anchors=7, num_anchors_differing=1))
    assert "not chance" in small["The offsets agree"].text
    none = _verdict(build, tmp_path, _with_difference(build, 0.0, 0.0, 0.0, num_anchors=1700, num_anchors_differing=0))
    assert none["The offsets agree"].text.startswith("not one of the 1,700 anchors has another accept_len")


def test_without_paired_differences_parity_is_left_open(build, tmp_path):
    verdict = _verdict(build, tmp_path, build.check(accept_len_by_offset_difference=None))
    assert "not decided" in verdict["Offsets"].text
    undecided = build.check(accept_len_by_offset_difference={"4096": {"mean": 0.0, "ci95": None}})
    assert _verdict(build, tmp_path, undecided)["Offsets are undecided"].mark == "warn"


def test_seen_prompts_only_are_called_memory(build, tmp_path):
    document = build.check(unseen=None, seen=build.bucket(5.0, anchors=64, prompts=16))
    sentence = _verdict(build, tmp_path, document)["Seen (training) prompts"]
    assert sentence.mark == "warn"
    assert "memory" in sentence.text


def test_no_gain_over_plain_or_untrained_is_said(build, tmp_path):
    nothing = build.bucket(0.012, anchors=64, prompts=16)
    verdict = _verdict(build, tmp_path, build.check(unseen=nothing))
    assert verdict["Held-out prompts"].mark == "warn"
    assert verdict["Learned"].mark == "bad"
    # A higher mean is not enough where the intervals overlap.
    barely = build.bucket(0.05, anchors=64, prompts=16) | {"accept_len_ci95": [0.01, 0.09]}
    assert _verdict(build, tmp_path, build.check(unseen=barely))["Learned"].mark == "bad"


def test_unequal_tokens_and_a_slow_down(build, tmp_path):
    verdict = _verdict(build, tmp_path, build.decode(tokens_equal=False, speedup=0.8))
    assert verdict["Decoding is not lossless"].mark == "bad"
    assert verdict["Speed"].mark == "warn"
    assert "do not pay yet" in verdict["Speed"].text
    alone = build.decode(tokens_equal=None, speedup=None, plain_tokens_per_s=None)
    assert {lead: item.mark for lead, item in _verdict(build, tmp_path, alone).items()} == {"Speed": "info"}


def test_several_checks_are_named(build, tmp_path):
    verdict = _verdict(build, tmp_path, build.check(drafter="x/run-1"), build.check(drafter="x/run-2"))
    assert "A) x/run-1: The offsets agree" in verdict
    assert "B) x/run-2: The offsets agree" in verdict
    # Two files say nothing about their difference, and how to get it is said.
    assert "--compare-drafters" in verdict["Comparison: Side by side"].text


def test_a_run_says_how_its_loss_went_and_where_it_diverged(build, tmp_path):
    run = build.write_run(tmp_path / "run", count=4)
    rows = build.metrics(4)
    build.write_jsonl(run / "metrics.jsonl", rows)
    [group] = write_verdict(read_records([run]))
    assert group.sentences[0].text.startswith(
        f"the loss of run went from {rows[0]['loss']:.2f} to {rows[-1]['loss']:.2f} in 40 steps"
    )
    rows[2]["loss"] = math.nan
    build.write_jsonl(run / "metrics.jsonl", rows)
    [group] = write_verdict(read_records([run]))
    assert [(item.mark, item.text) for item in group.sentences] == [
        ("bad", "the loss of run is not finite at step 30.")
    ]


def test_memory_is_named_where_the_intervals_part(build, tmp_path):
    both = build.check(seen=build.bucket(5.0, anchors=64, prompts=16))
    sentence = _verdict(build, tmp_path, both)["Seen and unseen"]
    assert sentence.mark == "warn"
    assert "is memory" in sentence.text
    close = build.check(seen=build.bucket(0.56, anchors=64, prompts=16))
    assert _verdict(build, tmp_path, close)["Seen and unseen"].mark == "info"


def test_the_records_own_line_of_seen_prompts_is_not_said_again(build, tmp_path):
    seen = build.bucket(5.0, anchors=64, prompts=16)
    warnings = ["ONLY PROMPTS THE DRAFTER WAS TRAINED ON were checked", "w"]
    path = build.write_json(tmp_path / "a.json", build.check(unseen=None, seen=seen, warnings=warnings))
    said = [
        item.text for group in write_verdict(read_records([path])) for item in group.sentences if item.lead == "Warning"
    ]
    assert said == ["w."]


def test_many_records_are_told_in_sentences_alone(build, tmp_path):
    def tiled(count):
        documents = [build.check(drafter=f"x/run-{place}") for place in range(count)]
        paths = [build.write_json(tmp_path / f"{place}.json", document) for place, document in enumerate(documents)]
        return [bool(group.tiles) for group in write_verdict(read_records(paths))]

    # the first group is what the checks say together
    assert tiled(MOST_TILED - 1) == [False] + [True] * (MOST_TILED - 1)
    assert tiled(MOST_TILED) == [False] * (MOST_TILED + 1)
