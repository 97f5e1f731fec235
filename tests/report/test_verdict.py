"""What the page says in words follows the intervals, not the means."""

import math

from dflash_jax.report.records import read_records
from dflash_jax.report.verdict import check_tiles, write_verdict


def _verdict(build, tmp_path, *documents):
    paths = [build.write_json(tmp_path / f"{place}.json", document) for place, document in enumerate(documents)]
    return {sentence.lead: sentence for sentence in write_verdict(read_records(paths))}


def test_a_good_drafter(build, tmp_path):
    verdict = _verdict(build, tmp_path, build.check(), build.decode())
    assert {lead: sentence.mark for lead, sentence in verdict.items()} == {
        "Held-out prompts": "good",
        "Learned": "good",
        "Positional parity holds": "good",
        "Decoding is lossless": "good",
        "Speed": "good",
    }
    assert verdict["Held-out prompts"].text == (
        "the target commits 1.52 tokens per pass (95 % 1.48 to 1.56) where plain decoding commits 1; over all anchors"
        " it accepts 0.55 of 7 drafted tokens per anchor (95 % 0.51 to 0.59)."
    )
    assert (
        "the largest paired difference is +0.001 (at 65,536), and one beyond ±0.002"
        in verdict["Positional parity holds"].text
    )
    assert verdict["Decoding is lossless"].text.startswith("all 2,304 tokens decoded")


def test_one_interval_without_zero_breaks_parity(build, tmp_path):
    differences = build.check()["accept_len_by_offset_difference"] | {"4096": {"mean": 0.02, "ci95": [0.01, 0.03]}}
    document = build.check(accept_len_by_offset_difference=differences)
    broken = _verdict(build, tmp_path, document)["Positional parity is broken"]
    assert broken.mark == "bad"
    assert "4,096: +0.020 [+0.010, +0.030]." in broken.text
    assert "65,536" not in broken.text
    differences["4096"] = {"mean": -0.02, "ci95": [-0.03, -0.01]}
    broken = _verdict(build, tmp_path, document | {"accept_len_by_offset_difference": differences})
    assert "4,096: -0.020 [-0.030, -0.010]." in broken["Positional parity is broken"].text
    tile = check_tiles(read_records([tmp_path / "0.json"]).checks[0])[-1]
    assert (tile.value, tile.mark) == ("2 of 3", "bad")


def test_an_interval_that_ends_at_zero_still_holds(build, tmp_path):
    document = build.check(accept_len_by_offset_difference={"0": {"mean": 0.0, "ci95": [0.0, 0.0]}})
    document["accept_len_by_offset_difference"]["4096"] = {"mean": 0.01, "ci95": [0.0, 0.02]}
    assert _verdict(build, tmp_path, document)["Positional parity holds"].mark == "good"
    assert check_tiles(read_records([tmp_path / "0.json"]).checks[0])[-1].value == "1 of 1"


def test_without_paired_differences_parity_is_left_open(build, tmp_path):
    verdict = _verdict(build, tmp_path, build.check(accept_len_by_offset_difference=None))
    assert "not decided" in verdict["Offsets"].text
    undecided = build.check(accept_len_by_offset_difference={"4096": {"mean": 0.0, "ci95": None}})
    assert "not decided" in _verdict(build, tmp_path, undecided)["Offsets"].text


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
    assert "x/run-1: Positional parity holds" in verdict
    assert "x/run-2: Positional parity holds" in verdict


def test_a_diverged_run_says_where(build, tmp_path):
    run = build.write_run(tmp_path / "run", count=4)
    rows = build.metrics(4)
    rows[2]["loss"] = math.nan
    build.write_jsonl(run / "metrics.jsonl", rows)
    [sentence] = write_verdict(read_records([run]))
    assert (sentence.mark, sentence.text) == ("bad", "the loss of run is not finite at step 30.")
