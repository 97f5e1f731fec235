"""A parity as sentences, tables and figures: what is broken, the cause, and what was measured."""

import re

import pytest

from dflash_jax.core import InputError
from dflash_jax.report.parity_figures import parity_figures
from dflash_jax.report.parity_record import parity_from_json
from dflash_jax.report.parity_tables import mended_table, numerics_table, offsets_table, spoiled_table
from dflash_jax.report.parity_verdict import parity_sentences, parity_tiles


def _parity(build, **changes):
    return parity_from_json(build.parity(**changes), where="parity.json", label="parity")


def _said(parity):
    return {sentence.lead: sentence for sentence in parity_sentences(parity)}


def test_a_broken_parity_names_the_offsets_and_the_cause(build):
    said = _said(_parity(build))
    assert [(lead, sentence.mark) for lead, sentence in said.items()] == [
        ("Positional parity is broken", "bad"),
        ("Cause", "bad"),
        ("Undecided", "warn"),
        ("Holds elsewhere", "good"),
    ]
    broken = said["Positional parity is broken"].text
    assert "131,072: -0.400 [-0.440, -0.360]" in broken
    assert "65,536" not in broken
    assert "164 prompts, 15,744 anchors" in broken
    assert said["Cause"].text == "the target's rotary angles are rounded to bfloat16."
    assert "About 40 more prompts would decide it" in said["Undecided"].text
    assert "at 0." in said["Holds elsewhere"].text


def test_a_fault_at_the_smallest_offset_is_not_blamed_on_distance(build):
    rows = build.parity()["by_ctx_pos_start"]
    text = _said(_parity(build, by_ctx_pos_start={"0": rows["131072"]}))["Positional parity is broken"].text
    assert "distance alone is not the fault" in text


def test_where_all_holds_it_is_said_how_well(build):
    rows = build.parity()["by_ctx_pos_start"]
    held = {offset: rows["0"] | {"feature_drift": 3e-7} for offset in ("0", "4096")}
    parity = _parity(build, by_ctx_pos_start=held, verdict="holds", cause=None, cause_id=None)
    said = _said(parity)
    assert list(said) == ["Positional parity holds"]
    assert "Not one anchor has another accept_len" in said["Positional parity holds"].text
    assert "move by 3.0e-07 at most" in said["Positional parity holds"].text
    assert [tile.value for tile in parity_tiles(parity)] == ["holds", "2 of 2", "+0.00", "3.0e-07"]


def test_memorisation_is_a_warning_and_a_misfit_a_fault(build):
    seen = build.bucket(5.0, anchors=64, prompts=16)
    parity = _parity(build, verdict="holds", cause="it knows its prompts", cause_id="memorisation", seen=seen)
    assert _said(parity)["Cause"].mark == "warn"
    assert "is memory" in _said(parity)["Seen and unseen"].text
    misfit = _parity(build, verdict="holds", cause="layers are shifted", cause_id="capture_layers_shifted")
    assert _said(misfit)["Cause"].mark == "bad"


def test_only_seen_prompts_are_warned_of_under_the_numbers(build):
    seen = build.bucket(5.0, anchors=64, prompts=16)
    warnings = ["ONLY PROMPTS THE DRAFTER WAS TRAINED ON were compared", "another one"]
    parity = _parity(build, seen=seen, unseen=None, warnings=warnings)
    assert offsets_table(parity).notes[0].startswith("WARNING: ONLY PROMPTS THE DRAFTER WAS TRAINED ON were measured.")
    # The record's own line of it is not said again; its other warnings are.
    assert [item.text for item in parity_sentences(parity) if item.lead == "Warning"] == ["another one."]
    for other in (_parity(build), _parity(build, seen=seen)):
        assert not any("WARNING" in note for note in offsets_table(other).notes)


def test_tables_hold_the_records_numbers(build):
    parity = _parity(build)
    table = offsets_table(parity)
    assert table.rows[2][:5] == ("131072", "broken", "0.150 [0.110, 0.190]", "-0.400 [-0.440, -0.360]", "1.120")
    assert table.rows[3][:3] == ("reference", "–", "0.550 [0.510, 0.590]")
    assert table.rule == 3
    assert numerics_table(parity).rows[1] == ("65536", "3.0e-07", "0", "100.00%", "-0.080 [-0.130, -0.030]")
    mended, spoiled = mended_table(parity), spoiled_table(parity)
    assert mended is not None
    assert spoiled is not None
    assert [row[0] for row in mended.rows] == [
        "none: the engine as it is",
        "features",
        "labels",
        "drafter",
        "all: a sound engine",
    ]
    assert [row[1] for row in mended.rows] == ["0.150", "0.530", "0.160", "0.150", "0.550"]
    assert [row[1] for row in spoiled.rows] == ["0.170", "0.550"]


def test_figures_show_verdicts_the_margin_and_only_what_moved(build):
    figures = {figure.name: figure.plot for figure in parity_figures(_parity(build))}
    assert list(figures) == [
        "parity-differences",
        "parity-drift",
        "parity-swaps",
        "parity-spoils",
        "parity-memory",
        "parity-lengths",
    ]
    [points] = figures["parity-differences"]["data"]
    assert points["meta"]["colors"] == ["good", "warn", "bad"]
    assert points["marker"]["symbol"] == ["circle", "diamond", "x"]
    assert points["error_y"]["array"] == pytest.approx([0.04] * 3)
    [band] = figures["parity-differences"]["layout"]["shapes"]
    assert (band["y0"], band["y1"], band["name"]) == (-0.1, 0.1, "good")
    # 0 has no place on a logarithmic axis: offset 0 did not move, and neither did the drafter anywhere.
    [drift] = figures["parity-drift"]["data"]
    assert (drift["x"], drift["y"]) == (["65,536", "131,072"], [3e-7, 0.8])
    assert figures["parity-lengths"]["data"][0]["x"] == ["64-127", "128-255"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "fine"}, "'verdict' is 'fine', holds, broken or undecided is needed"),
        ({"by_ctx_pos_start": {"far": {}}}, "by_ctx_pos_start: 'far' is no position offset"),
        ({"by_ctx_pos_start": {"0": {}}}, "by_ctx_pos_start: 0: the key 'verdict' is missing"),
        ({"probes": {"layers-1": "x"}}, "probes: 'layers-1' is 'x', an object is needed"),
        ({"evidence": [3]}, "'evidence' is [3], a list of objects is needed"),
        ({"notes": "x"}, "'notes' is 'x', a list of strings is needed"),
    ],
)
def test_a_broken_parity_record_is_one_line_with_file_and_key(build, change, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        _parity(build, **change)
    assert str(error.value).startswith("parity.json: ")
