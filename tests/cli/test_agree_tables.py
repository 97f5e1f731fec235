"""An agreement's tables: blocks by offset, differences with their causes, the verdict last."""

import io

import pytest
from rich.console import Console

from dflash_jax.cli.commands import COMMANDS
from dflash_jax.cli.tables import show

(AGREE,) = (command for command in COMMANDS if command.name == "agree")
DIFFERENCE = {
    "prompt": "00c0ffee",
    "ctx_pos_start": 4096,
    "anchor": 131,
    "slot": 2,
    "tokens": {"offline": 260, "online": None},
    "text": {"offline": "[a]", "online": None},
    "margin": 0.0123,
    "cause": "features",
    "found": "they were rounded",
    "num_blocks": 2,
}


def result(**changes):
    row = {"num_texts": 2, "num_blocks": 40, "num_equal": 38, "num_differences": 1}
    return {
        "num_blocks": 40,
        "num_equal": 38,
        "differences": [DIFFERENCE],
        "causes": {"features": 1},
        "by_ctx_pos_start": {"4096": row | {"replay_tau_micro": 1.5, "decode_tau_micro": None}},
        "cache": "c",
        "features_dtype": "bfloat16",
        "drafter": "d",
        "served_drafter": None,
        "rope": "exact",
        "warnings": ["another target"],
    } | changes


def shown(document):
    out = io.StringIO()
    show("agree", document, console=Console(file=out, width=160, markup=False, emoji=False, highlight=False))
    return [" ".join(line.replace("│", " ").replace("┃", " ").split()) for line in out.getvalue().splitlines()]


def test_differences_are_listed_and_the_verdict_stands_last():
    lines = shown(result())
    assert lines[:2] == ["agree", "drafter d on c (bfloat16 features); rope exact"]
    assert "4,096 2 40 38 1 1.500 –" in lines
    assert "00c0ffee 4,096 131 2 260 '[a]' – 0.012 features 2" in lines
    assert "features: they were rounded" in lines
    assert lines.index("another target") < lines.index("agree: 38 of 40 blocks are equal (95.00%); causes: features 1")


def test_many_differences_are_cut():
    lines = shown(result(differences=[DIFFERENCE] * 23))
    assert sum(line.startswith("00c0ffee") for line in lines) == 20
    assert any("3 more in --json" in line for line in lines)


def test_equal_blocks():
    lines = shown(result(differences=[], causes={}, num_equal=40, warnings=[], served_drafter="e", rope="float32"))
    assert "drafter d on c (bfloat16 features), decoded with e; rope float32" in lines
    assert lines[-2] == "agree: every block is equal (40 of 40)"


@pytest.mark.parametrize(("differences", "holds"), [([], True), ([DIFFERENCE], False)])
def test_any_difference_is_a_violation(differences, holds):
    assert AGREE.holds(result(differences=differences)) is holds
