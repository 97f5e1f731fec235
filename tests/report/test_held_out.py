"""A run's held-out tau: drawn over steps with the best marked, told in words and in a table."""

import re
from pathlib import Path

import pytest

from dflash_jax.core import InputError
from dflash_jax.report import ReportConfig, write_report
from dflash_jax.report.markdown import render_markdown
from dflash_jax.report.records import read_records
from dflash_jax.report.run_figures import held_out_figure
from dflash_jax.report.run_verdict import run_sentences, run_tiles
from dflash_jax.report.tables import MOST_ROWS, held_out_table

RECORDS = Path(__file__).parent / "records"
TAUS = {20: 1.2, 40: 1.35, 60: 1.31}


def _folder(build, path, taus, **changes):
    """A run of as many steps as it takes, measured at those given."""
    folder = build.write_run(path, count=max(taus, default=20) // 10)
    rows = build.metrics(max(taus, default=20) // 10)
    for row in rows:
        if row["step"] in taus:
            row["eval"] = build.held_out(taus[row["step"]], **changes)
    build.write_jsonl(folder / "metrics.jsonl", rows)
    return folder


def _run(build, path, taus, **changes):
    return read_records([_folder(build, path, taus, **changes)]).runs[0]


def test_the_curve_has_the_records_values_intervals_and_the_best(build, tmp_path):
    figure = held_out_figure([_run(build, tmp_path / "run", TAUS)])
    assert figure is not None
    line, star = figure.plot["data"]
    assert (line["x"], line["y"]) == ([20, 40, 60], [1.2, 1.35, 1.31])
    assert line["error_y"]["array"] == pytest.approx([0.05] * 3)
    assert line["error_y"]["arrayminus"] == pytest.approx([0.05] * 3)
    assert line["customdata"][1] == [
        "95 % 1.300 to 1.400",
        "macro 1.370, accept_len 0.350, token_acc 0.250, 24 prompts",
    ]
    assert "%{y:.3f} (%{customdata[0]})" in line["hovertemplate"]
    assert (star["x"], star["y"], star["marker"]["symbol"], star["name"]) == ([40], [1.35], "star", "best: step 40")
    assert "24 held-out prompts" in figure.caption
    assert "95 % intervals" in figure.caption


def test_a_run_that_recorded_no_intervals_says_so(build, tmp_path):
    run = _run(build, tmp_path / "run", TAUS, tau_ci95=None)
    figure = held_out_figure([run])
    assert figure is not None
    assert figure.plot["data"][0]["error_y"]["array"] == [0.0] * 3
    assert figure.plot["data"][0]["customdata"][0][0] == "no interval"
    assert "No intervals were recorded." in figure.caption
    assert "(no interval was recorded)" in run_sentences(run)[1].text
    table = held_out_table(run)
    assert table is not None
    assert table.rows[0][1] == "1.200"
    assert table.notes[0].endswith("The run recorded no intervals.")


def test_without_measurements_there_is_no_curve_table_or_sentence(build, tmp_path):
    run = _run(build, tmp_path / "run", {})
    assert held_out_figure([run]) is None
    assert held_out_table(run) is None
    assert run.best is None
    [said] = run_sentences(run)
    assert said.text.endswith("`dflash-jax check` does.")
    assert "held-out replay tau, best" not in [tile.name for tile in run_tiles(run)]


def test_the_earliest_of_equals_is_the_best_as_in_the_runs_folder(build, tmp_path):
    run = _run(build, tmp_path / "run", {20: 1.3, 40: 1.4, 60: 1.4})
    assert run.best is not None
    assert run.best.step == 40


def test_runs_side_by_side_have_a_line_and_a_star_each(build, tmp_path):
    folders = [_folder(build, tmp_path / name, taus) for name, taus in (("a", TAUS), ("b", {}), ("c", {20: 1.1}))]
    figure = held_out_figure(read_records(folders).runs)
    assert figure is not None
    assert [trace["name"] for trace in figure.plot["data"]] == ["a", "best of a", "c", "best of c"]
    # the colours are those of the loss figure
    assert [trace["meta"]["color"] for trace in figure.plot["data"]] == ["c0", "c0", "c2", "c2"]


def test_what_is_said_of_the_best_and_of_the_last(build, tmp_path):
    said = run_sentences(_run(build, tmp_path / "a", TAUS))
    assert said[0].text.endswith("held-out tau does.")
    assert (said[1].mark, said[1].lead) == ("good", "Held-out tau")
    assert said[1].text == (
        "on 24 held-out prompts the best drafter, of step 40, commits 1.350 tokens per target pass (95 % 1.30 to 1.40)"
        " where plain decoding commits 1; the last one, of step 60, commits 1.310. Chosen by these prompts, it is"
        " flattered by them: report numbers on others."
    )
    rising = run_sentences(_run(build, tmp_path / "b", {20: 1.2, 40: 1.3}))[1].text
    assert "of step 40, commits 1.300" in rising
    assert "; it is the last one measured." in rising
    assert "flattered" not in run_sentences(_run(build, tmp_path / "c", {20: 1.2}))[1].text
    # a gain that the interval does not leave out is none yet
    assert run_sentences(_run(build, tmp_path / "d", {20: 1.04}))[1].mark == "warn"
    [tile] = [tile for tile in run_tiles(_run(build, tmp_path / "e", TAUS)) if "held-out" in tile.name]
    assert (tile.value, tile.under, tile.mark) == ("1.35", "at step 40, 95 % 1.30 to 1.40", "good")


def test_the_table_marks_the_best_in_markdown_too(build, tmp_path):
    records = read_records([_folder(build, tmp_path / "run", TAUS, num_seen=3)])
    text = render_markdown(records, title=None)
    part = text[text.index("### Held-out replay tau\n") :]
    assert "| step | tau micro [95 %] | tau macro | accept_len_mean | token_acc_mean | prompts |" in part
    assert "| 20 | 1.200 [1.150, 1.250] | 1.220 | 0.200 | 0.250 | 24 |" in part
    assert "| 40 (best) | 1.350 [1.300, 1.400] | 1.370 | 0.350 | 0.250 | 24 |" in part
    assert "- 3 prompts of that cache were trained on and are left out." in part


def test_a_long_table_keeps_the_first_the_last_and_the_best(build, tmp_path):
    taus = {step: 1.0 + step / 10_000 for step in range(10, 1010, 10)} | {
        530: 2.0
    }  # 530 is not among the evenly spaced
    table = held_out_table(_run(build, tmp_path / "run", taus))
    assert table is not None
    steps = [row[0] for row in table.rows]
    assert len(steps) == MOST_ROWS + 1
    assert (steps[0], steps[-1]) == ("10", "1,000")
    assert "530 (best)" in steps
    assert table.notes[-1] == f"{len(steps)} of 100 measurements, evenly spaced."


def test_a_page_draws_what_the_command_recorded(tmp_path):
    run = read_records([RECORDS / "run"]).runs[0]
    assert [one.step for one in run.held_out] == [30, 60, 90, 120]
    assert all(one.tau_ci95 and one.tau_micro in one.tau_ci95 for one in run.held_out)
    write_report(ReportConfig(inputs=(RECORDS / "run",), out=tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert '<figure id="figure-held-out">' in page
    assert "Held-out replay tau: run" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau_micro": "high"}, "metrics.jsonl row 2: eval: 'tau_micro' is 'high', a finite number is needed"),
        ({"tau_ci95": [1.0]}, "metrics.jsonl row 2: eval: 'tau_ci95' is [1.0], an interval [low, high] is needed"),
    ],
)
def test_a_broken_measurement_names_the_row(build, tmp_path, change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        _run(build, tmp_path / "run", {20: 1.2}, **change)
