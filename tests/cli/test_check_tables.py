"""A check as people see it in the terminal."""

import io

from rich.console import Console

from dflash_jax.cli.tables import show

GROUP = {
    "accept_len_mean": 1.25,
    "accept_len_p50": 1.0,
    "accept_len_p90": 2.0,
    "accept_len_p99": 2.0,
    "accept_len_ci95": [1.0, 1.5],
    "token_acc_mean": 0.5,
    "survival": [0.75, 0.5],
    "replay": {
        "tau_micro": 2.0,
        "tau_macro": 2.125,
        "tau_ci95": [1.75, 2.25],
        "survival": [0.625, 0.375],
        "num_blocks": 16,
        "accept_len_mean": 1.0625,
        "why": "because [so it is]",
    },
    "num_anchors": 1040,
    "num_prompts": 4,
    "num_unlabelled": 7,
}
ONLY_SEEN = "ONLY PROMPTS THE DRAFTER WAS TRAINED ON were checked"


def some_check(**changes):
    return {
        **GROUP,
        "seen": None,
        "unseen": GROUP,
        "by_ctx_pos_start": {"0": GROUP, "4096": GROUP},
        "by_context_length": {"0-63": GROUP, "64-127": GROUP | {"replay": None}},
        "by_prompt_set": {"code [x]": GROUP},
        "by_slot": [
            {"slot": 1, "token_acc": 0.75, "num_labelled": 1047},
            {"slot": 2, "token_acc": None, "num_labelled": 0},
        ],
        "accept_len_by_offset_difference": {},
        "anchors": "all",
        "num_departures": 0,
        "block_size": 3,
        "cache": "caches/base",
        "drafter": "run/run-280",
        "comparison": [],
        "checks": [],
        "warnings": [],
        **changes,
    }


def shown(result, *, width=120):
    out = io.StringIO()
    show("check", result, console=Console(file=out, width=width, markup=False, emoji=False, highlight=False))
    return [" ".join(line.replace("│", " ").replace("┃", " ").split()) for line in out.getvalue().splitlines()]


def test_every_part_of_a_check():
    lines = shown(some_check())
    assert lines[0] == "check"
    assert "anchors all" in lines
    assert "num_unlabelled 7" in lines
    for line in (
        "4096 1,040 1.250 [1.000, 1.500] 0.500",
        "unseen 1,040 1.250 [1.000, 1.500] 0.500",
        "0-63 1,040 4 1.250 [1.000, 1.500] 0.500 2.000 [1.750, 2.250]",
        "64-127 1,040 4 1.250 [1.000, 1.500] 0.500 –",
        "code [x] 1,040 4 1.250 [1.000, 1.500] 0.500 2.000 [1.750, 2.250]",
        "1 1,047 0.750 0.750 0.625",
        "2 0 – 0.500 0.375",
        "all anchors 1,040 1.250 [1.000, 1.500] – –",
        "chain (replay) 16 1.062 2.000 [1.750, 2.250] 2.125",
        "because [so it is]",
    ):
        assert line in lines, line
    assert not any("WARNING" in line for line in lines)


def test_some_anchors_have_no_chain():
    lines = shown(some_check(replay=None, anchors="random:64"))
    assert "replay (tau) walks the chain of blocks, which needs every anchor:" in " ".join(lines)
    assert not any(line.startswith("chain") for line in lines)


def test_a_warning_is_framed_and_stands_last():
    lines = shown(some_check(seen=GROUP, unseen=None, warnings=[ONLY_SEEN, "12 of 40 response tokens"]))
    (top,) = [place for place, line in enumerate(lines) if "WARNING" in line and line.startswith("┏━")]
    assert lines[top].endswith("━┓")
    assert lines[top + 1 : top + 4] == [ONLY_SEEN, "", "12 of 40 response tokens"]
    assert lines[-1].startswith("┗━")
    assert top + 4 == len(lines) - 1


def test_a_warning_is_red_and_bold_on_a_terminal():
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system="standard", markup=False)
    show("check", some_check(warnings=[ONLY_SEEN]), console=console)
    assert f"\x1b[1;31m{ONLY_SEEN}" in out.getvalue()


def test_several_checks_and_their_comparison():
    second = some_check(drafter="run/run-300", warnings=[ONLY_SEEN])
    difference = {"a": 1.25, "b": 1.5, "difference": 0.25, "ci95": [-0.125, 0.625]}
    pair = {
        "a": {"drafter": "run/run-280", "cache": "caches/base"},
        "b": {"drafter": "run/run-300", "cache": "caches/base"},
        "paired": True,
        "num_prompts": 4,
        "num_anchors": 1040,
        "accept_len": difference,
        "token_acc": difference | {"difference": -0.25},
        "tau": None,
        "verdict": "no difference can be told",
    }
    lines = shown(some_check(checks=[some_check(), second], comparison=[pair]))
    assert sum(line == "4096 1,040 1.250 [1.000, 1.500] 0.500" for line in lines) == 2
    assert "a: run/run-280 accept_len 1.250 1.500 +0.250 [-0.125, +0.625]" in lines
    assert "b: run/run-300 token_acc 1.250 1.500 -0.250 [-0.125, +0.625]" in lines
    assert "tau – – –" in lines
    told = " ".join(lines)
    assert "a = run/run-280, b = run/run-300 (the same anchors, 4 prompts): no difference can be told." in told
    # which of the two the warning is about
    assert "(run/run-300 on caches/base)" in lines
