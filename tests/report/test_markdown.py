"""Markdown in the form of the baseline report, and nothing in it that a record could abuse."""

import json
from pathlib import Path

import pytest

from dflash_jax.cli import main
from dflash_jax.report import render_result
from dflash_jax.report.markdown import render_markdown
from dflash_jax.report.records import read_records
from dflash_jax.report.tables import Table, code, escape

RECORDS = Path(__file__).parent / "records"


def test_one_check_has_the_baseline_reports_lines(build, tmp_path):
    path = build.write_json(tmp_path / "check.json", build.check())
    text = render_markdown(read_records([path]), title="Before")
    for line in (
        "# Before",
        "## Offline accept check: `run/run-600`",
        "- Drafter: `demo/run/run-600`",
        "- Cache: `demo/cache-heldout`",
        "- `accept_len_mean` 0.550 [0.510, 0.590] (max is 7 for `block_size=8`)",
        "- `token_acc_mean` 0.161",
        "| ctx_pos_start | n | accept_len_mean | token_acc_mean |",
        "| 4096 | 15,744 | 0.550 [0.510, 0.590] | 0.161 |",
    ):
        assert f"\n{line}\n" in f"\n{text}", line


def test_before_and_after_stand_side_by_side(build, tmp_path):
    before = build.check(drafter="r/run-1500", cache="c/offsets")
    after = build.check(drafter="r/run-1700", cache="c/offsets")
    for bucket in after["by_ctx_pos_start"].values():
        bucket |= {"accept_len_mean": 2.59, "accept_len_ci95": [2.0, 3.0], "token_acc_mean": 0.72}
    del after["by_ctx_pos_start"]["65536"]
    paths = [build.write_json(tmp_path / name, document) for name, document in (("a.json", before), ("b.json", after))]
    text = render_markdown(read_records(paths), title=None)
    assert "## A) Offline accept check: `r/run-1500`" in text
    assert "## B) Offline accept check: `r/run-1700`" in text
    table = text[text.index("## Side by side") :]
    assert "| 4096 | 0.550 [0.510, 0.590] | 0.161 | 2.590 [2.000, 3.000] | 0.720 |" in table
    assert "| 65536 | 0.550 [0.510, 0.590] | 0.161 | – | – |" in table
    assert "- A) r/run-1500\n- B) r/run-1700\n" in table


def test_only_seen_prompts_are_warned_of_before_and_under_every_number(build, tmp_path):
    seen = build.bucket(6.0, anchors=64, prompts=16)
    path = build.write_json(tmp_path / "check.json", build.check(unseen=None, seen=seen))
    lines = render_markdown(read_records([path]), title=None).splitlines()
    assert lines[0].startswith("> **WARNING: ONLY PROMPTS THE DRAFTER WAS TRAINED ON WERE MEASURED.**")
    table = lines.index("| ctx_pos_start | n | accept_len_mean | token_acc_mean |")
    after = [line for line in lines[table:] if not line.startswith("|")]
    assert after[1].startswith("- WARNING: ONLY PROMPTS THE DRAFTER WAS TRAINED ON")


EVIL = "a|b <img src=x> `code` [link](javascript:x)\n# heading"


def test_names_from_records_are_neither_tags_nor_links_nor_new_lines(build, tmp_path):
    check = build.check(drafter=EVIL, cache=EVIL, warnings=[EVIL])
    text = render_markdown(read_records([build.write_json(tmp_path / "c.json", check)]), title=EVIL)
    outside = [part for line in text.splitlines() for part in line.split("``")[::2]]
    assert not any("<img" in part or "](" in part for part in outside)
    assert "\n# heading" not in text
    table = Table(title="t", columns=("a", "b"), rows=((EVIL, "1"),))
    assert table.markdown.splitlines()[2].count("|") - table.markdown.splitlines()[2].count("\\|") == 3


def test_code_and_escape_by_hand():
    assert code("a/b") == "`a/b`"
    assert code("a`b") == "``a`b``"
    assert code("`a``b") == "``` `a``b ```"
    assert escape("a\n b") == "a b"
    assert escape("<b>[x](y)[z][w]") == "&lt;b>[x]\\(y)[z]\\[w]"


@pytest.mark.parametrize("name", ["check", "check-seen", "comparison", "parity-holds", "parity-broken", "decode"])
def test_what_a_command_prints_is_what_report_prints(capsys, name):
    """`--format md` of check, parity and decode, and of report on their record."""
    path = RECORDS / f"{name}.json"
    assert main(["report", "--inputs", str(path), "--format", "md"]) == 0
    *printed, empty, last = capsys.readouterr().out.split("\n")[:-1]
    assert empty == ""
    assert json.loads(last) == {"report": None, "bytes": len("\n".join([*printed, ""]).encode()), "sections": []}
    assert printed[0].startswith("# DFlash ")
    assert "\n".join([*printed[2:], ""]) == render_result(json.loads(path.read_text()))


def test_markdown_into_a_file_prints_none(capsys, tmp_path):
    out = tmp_path / "page.md"
    assert main(["report", "--inputs", str(RECORDS / "check.json"), "--format", "md", "--out", str(out)]) == 0
    assert out.read_text().startswith("# DFlash offline check: run/run-120\n")
    assert "ctx_pos_start" not in capsys.readouterr().out
    assert main(["report", "--inputs", str(RECORDS / "check.json")]) == 2
    assert "--out is needed" in capsys.readouterr().err
