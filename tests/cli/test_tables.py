"""Results as tables for people."""

import io

from rich.console import Console

from dflash_jax.cli.tables import show


def _shown(result: dict, *, width: int = 80) -> list[str]:
    out = io.StringIO()
    show("cache info", result, console=Console(file=out, width=width, markup=False, emoji=False, highlight=False))
    return [" ".join(line.replace("│", " ").replace("┃", " ").split()) for line in out.getvalue().splitlines()]


def test_scalars_are_one_table_and_nothing_is_markup():
    lines = _shown(
        {"bytes": 1234567, "rate": 0.000612345, "speed": 45678.9, "ok": True, "title": None, "path": "[bold]a[/]:x:"}
    )
    assert lines[0] == "cache info"
    expected = ["bytes 1,234,567", "rate 0.0006123", "speed 45,679", "ok yes", "title -", "path [bold]a[/]:x:"]
    assert lines[2:-1] == expected


def test_lists_are_shown_up_to_a_dozen_items():
    lines = _shown({"layers": [1, 10, 18], "none": [], "problems": ["a is bad", "b too"], "long": list(range(15))})
    assert lines[2:6] == ["layers 1 10 18", "none none", "problems a is bad", "b too"]
    assert lines[6] == "long 0 1 2 3 4 5 6 7 8 9 10 11 and 3 more"


def test_mappings_become_tables_of_their_own_and_scalars_come_last():
    lines = _shown({"n": 1, "seconds": {"train": 2.5}, "buckets": {"0": {"n": 3, "tau": 1.25}, "4096": {"n": 4}}})
    assert lines.index("seconds") < lines.index("buckets") < lines.index("cache info")
    assert lines[lines.index("seconds") + 2] == "train 2.5"
    assert lines[lines.index("buckets") + 2] == "n tau"
    assert "0 3 1.25" in lines
    assert "4096 4 -" in lines
    assert lines[-2] == "n 1"


def test_a_check_is_the_last_part_in_the_form_of_the_baseline_report():
    bucket = {
        "accept_len_mean": 1.25,
        "accept_len_ci95": [1.0, 1.5],
        "token_acc_mean": 0.5,
        "survival": [0.5] * 7,
        "num_anchors": 40,
        "num_prompts": 4,
    }
    offsets = {"0": bucket, "4096": bucket}
    check = bucket | {"by_ctx_pos_start": offsets, "seen": None, "unseen": bucket, "block_size": 8, "drafter": "d"}
    lines = _shown({"check": check, "seconds": {"train": 2.5}, "report": "page.html"})
    assert lines.index("seconds") < lines.index("check")
    head = lines.index("ctx_pos_start n accept_len_mean token_acc_mean")
    assert lines[head + 2 : head + 4] == ["0 40 1.250 [1.000, 1.500] 0.500", "4096 40 1.250 [1.000, 1.500] 0.500"]
    assert lines[-2] == "report page.html"


def test_long_words_are_folded_and_not_cut():
    digest = "0123456789abcdef" * 6
    lines = _shown({"sha256": digest}, width=60)
    assert "".join(lines[2:-1]).replace("sha256", "").replace(" ", "") == digest
