"""Checks compared: both sides, the difference, its interval, and what is said of it."""

import re

import pytest

from dflash_jax.core import InputError
from dflash_jax.report.check_figures import comparison_figure, group_figures, offset_figures, survival_figure
from dflash_jax.report.check_tables import MOST_ALONG, comparison_table, side_by_side, slot_table
from dflash_jax.report.check_verdict import comparison_sentence, memory_sentence
from dflash_jax.report.records import read_records


def _comparison(**changes):
    side = {"drafter": "r/run-1500", "cache": "c/offsets"}
    metric = {"a": 0.17, "b": 2.59, "difference": 2.42, "ci95": [2.0, 2.8]}
    document = {"a": side, "b": side | {"drafter": "r/run-1700"}, "paired": True, "num_prompts": 16, "num_anchors": 64}
    return (
        document | {"accept_len": metric, "tau": None, "token_acc": metric | {"ci95": None}, "verdict": None} | changes
    )


def _read(build, tmp_path, *comparisons):
    first = build.check(drafter="r/run-1500", cache="c/offsets")
    checks = [first, build.check(drafter="r/run-1700", cache="c/offsets")]
    path = build.write_json(tmp_path / "c.json", first | {"checks": checks, "comparison": list(comparisons)})
    return read_records([path])


def test_a_document_of_several_checks_is_all_of_them(build, tmp_path):
    records = _read(build, tmp_path, _comparison())
    assert [check.label for check in records.checks] == ["r/run-1500", "r/run-1700"]
    # The untrained drafter stands in the whole document and in its first check alike.
    assert records.checks[0].untrained is not None
    assert [(item.a, item.b) for item in records.comparisons] == [("r/run-1500", "r/run-1700")]


def test_sides_are_named_by_what_differs(build, tmp_path):
    side = {"drafter": "r/run-1", "cache": "c/base"}
    caches = _comparison(a=side, b=side | {"cache": "c/offsets"})
    both = _comparison(a=side, b={"drafter": "r/run-2", "cache": "c/offsets"})
    for comparison in _read(build, tmp_path, caches, both).comparisons:
        assert comparison.a == "r/run-1 on base"
        assert comparison.b in ("r/run-1 on offsets", "r/run-2 on offsets")


@pytest.mark.parametrize(
    ("difference", "interval", "mark"),
    [(2.4, [2.0, 2.8], "good"), (-2.4, [-2.8, -2.0], "warn"), (0.1, [-0.1, 0.3], "info"), (0.1, None, "info")],
)
def test_only_an_interval_that_leaves_out_zero_is_a_difference(build, tmp_path, difference, interval, mark):
    metric = {"a": 0.0, "b": difference, "difference": difference, "ci95": interval}
    [comparison] = _read(build, tmp_path, _comparison(accept_len=metric)).comparisons
    assert comparison_sentence(comparison).mark == mark


def test_what_is_said_names_the_pairing(build, tmp_path):
    paired, apart = _read(build, tmp_path, _comparison(), _comparison(paired=False, verdict="b is better")).comparisons
    assert comparison_sentence(paired).text == (
        "accept_len 0.170 → 2.590 (paired by anchor): a difference of +2.420 [+2.000, +2.800]."
    )
    assert comparison_sentence(apart).text == "accept_len 0.170 → 2.590 (not paired: other prompts): b is better."


def test_tables_and_figures_hold_the_numbers(build, tmp_path):
    records = _read(build, tmp_path, _comparison())
    assert comparison_table(records.comparisons).rows == (
        ("r/run-1500 → r/run-1700", "accept_len", "0.170", "2.590", "+2.420 [+2.000, +2.800]", "yes", "16", "64"),
        ("r/run-1500 → r/run-1700", "token_acc", "0.170", "2.590", "+2.420", "yes", "16", "64"),
    )
    figure = comparison_figure(records.comparisons)
    assert figure is not None
    [points] = figure.plot["data"]  # token_acc has another unit, and tau was not measured
    assert (points["x"], points["error_x"]["array"]) == ([2.42], pytest.approx([0.38]))
    assert side_by_side(records.checks).columns[1::2] == ("A accept_len_mean [95 %]", "B accept_len_mean [95 %]")
    bars = group_figures(records.checks)[0].plot["data"]
    assert [trace["name"] for trace in bars] == ["A) r/run-1500", "B) r/run-1700"]
    assert all(trace["error_y"]["array"] for trace in bars)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paired": "yes"}, "comparison 1: 'paired' is 'yes', true or false is needed"),
        ({"a": None}, "comparison 1: 'a' is None, an object of a drafter and a cache is needed"),
        ({"accept_len": {"a": 1.0}}, "comparison 1: accept_len: the key 'b' is missing"),
    ],
)
def test_a_broken_comparison_is_one_line_with_file_and_key(build, tmp_path, change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        _read(build, tmp_path, _comparison(**change))


def test_a_fall_from_seen_to_unseen_prompts_is_called_memory(build, tmp_path):
    seen = build.bucket(6.0, anchors=64, prompts=16)
    trained_on = seen | build.check(unseen=None, seen=seen, cache="c/base", **seen)
    others = build.check(cache="c/other")

    def said(*documents):
        paths = [build.write_json(tmp_path / f"{place}.json", document) for place, document in enumerate(documents)]
        sentence = memory_sentence(read_records(paths).checks)
        return sentence.text if sentence else None

    assert said(others, trained_on) == (
        "accept_len is 3.96 on prompts it was trained on (run/run-600 on base) and 0.55 on others (run/run-600 on"
        " other): memory. The offsets of the second check agree with each other, so positions are not the cause."
    )
    assert said(trained_on, others | {"drafter": "another/run-600"}) is None
    apart = {"4096": {"mean": -0.4, "ci95": [-0.5, -0.3]}}
    assert (said(trained_on, others | {"accept_len_by_offset_difference": apart}) or "").endswith("memory.")
    same = build.bucket(6.0, anchors=64, prompts=16)
    assert said(trained_on, others | {"unseen": same}) is None


def _checks(build, tmp_path, count, **changes):
    paths = [
        build.write_json(tmp_path / f"{place:02}.json", build.check(drafter=f"x/run-{place:02}", **changes))
        for place in range(count)
    ]
    return read_records(paths).checks


def test_tables_of_many_checks_are_read_down(build, tmp_path):
    along = side_by_side(_checks(build, tmp_path, MOST_ALONG))
    assert along.columns[0] == "ctx_pos_start"
    assert len(along.columns) == 1 + 2 * MOST_ALONG
    table = side_by_side(_checks(build, tmp_path, MOST_ALONG + 1))
    offsets = ("0", "4096", "65536", "131072")
    assert table.columns == ("ctx_pos_start", *offsets, "all", "unseen", "untrained")
    assert [row[0] for row in table.rows[:3]] == ["A accept_len [95 %]", "A token_acc", "B accept_len [95 %]"]
    assert table.rows[2][1:3] == ("0.550\n[0.510, 0.590]",) * 2
    assert "| B accept_len [95 %] | 0.550 [0.510, 0.590] | 0.550 [0.510, 0.590] |" in table.markdown
    assert table.notes == side_by_side(_checks(build, tmp_path, MOST_ALONG + 1)).notes
    assert "C) x/run-02" in table.notes
    slots = slot_table(_checks(build, tmp_path, MOST_ALONG + 1))
    assert slots is not None
    assert slots.columns == ("slot", *map(str, range(1, 8)))


def test_figures_of_many_checks_keep_room_and_tell_them_apart(build, tmp_path):
    checks = _checks(build, tmp_path, 14)
    looks = []
    for figure in (*group_figures(checks), *offset_figures(checks)):
        traces = figure.plot["data"]
        assert [trace["name"] for trace in traces] == list("ABCDEFGHIJKLMN")
        marks = [trace.get("marker", {}) for trace in traces]
        looks.append(
            {(t["meta"]["color"], str(m.get("pattern")), m.get("symbol")) for t, m in zip(traces, marks, strict=True)}
        )
        assert "named under “In short”" in figure.caption
    assert [len(found) for found in looks] == [14] * 4
    survival, of_two = survival_figure(checks), survival_figure(checks[:2])
    assert survival is not None
    assert of_two is not None
    assert [trace["name"] for trace in survival.plot["data"]][:2] == ["A, all anchors", "B, all anchors"]
    assert [trace["name"] for trace in of_two.plot["data"]][:2] == [
        "A) x/run-00, all anchors",
        "A) x/run-00, chain",
    ]


def test_seen_prompts_are_marked_in_legends_beside_others(build, tmp_path):
    seen = build.bucket(6.0, anchors=64, prompts=16)
    documents = [build.check(drafter="x/A"), build.check(drafter="x/B", unseen=None, seen=seen)]
    paths = [build.write_json(tmp_path / f"{place}.json", document) for place, document in enumerate(documents)]
    checks = read_records(paths).checks
    for figure in (*group_figures(checks), *offset_figures(checks)):
        assert [trace["name"] for trace in figure.plot["data"]] == ["A) x/A", "B) x/B (seen)"]
        assert figure.caption.endswith("(seen): ONLY PROMPTS THE DRAFTER WAS TRAINED ON.")
    [alone] = offset_figures(checks[1:])[0].plot["data"]
    assert alone["name"] == "x/B"


def test_the_margins_band_is_seen_to_end(build, tmp_path):
    [check] = _checks(build, tmp_path, 1)
    layout = offset_figures([check])[1].plot["layout"]
    low, high = layout["yaxis"]["autorangeoptions"]["include"]
    assert low < layout["shapes"][0]["y0"] < layout["shapes"][0]["y1"] < high
