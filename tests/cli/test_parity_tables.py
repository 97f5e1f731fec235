"""A parity's tables: the verdict per offset, the exchanges, the cause last."""

import io

from rich.console import Console

from dflash_jax.cli.commands import COMMANDS
from dflash_jax.cli.tables import show

(PARITY,) = (command for command in COMMANDS if command.name == "parity")


def row(verdict, difference, **changes):
    found = {
        "verdict": verdict,
        "accept_len_difference": difference,
        "ci95": [difference - 0.1, difference + 0.1],
        "feature_drift": 2.5e-7,
        "argmax_agreement": 1.0,
        "drafter_drift": 0.0,
        "accept_len_mean": 2.0 + difference,
        "accept_len_ci95": [1.5, 2.5],
        "num_anchors": 1200,
        "num_anchors_differing": 7,
        "more_prompts_needed": None,
        "swaps": None,
        "spoils": None,
    }
    return found | changes


def parity(**changes):
    group = {"accept_len_mean": 2.0, "accept_len_ci95": [1.5, 2.5], "token_acc_mean": 0.5, "num_anchors": 9}
    found = {
        "verdict": "broken",
        "cause": "the target's table [of angles] ends",
        "cause_id": "table_end",
        "evidence": [{"test": "features against others", "result": "exact 0.9, table:8192 0"}],
        "by_ctx_pos_start": {
            "0": row("holds", 0.0),
            "4096": row("undecided", -0.125, more_prompts_needed=1234),
            "65536": row("broken", -1.5, swaps={"none": 0.5, "drafter": 0.625, "all": 2.0}, spoils={"drafter": 1.875}),
        },
        "reference": group,
        "by_context_length": {"0-63": group | {"num_prompts": 3, "replay": None}},
        "margin": 0.1,
        "num_prompts": 12,
        "rope": "table:8192",
        "drafter_rope": "exact",
        "drafter_positions": "absolute",
        "context_shift": 0,
        "block_shift": 0,
        "cache": None,
        "drafter": "run/run-9",
        "notes": ["a shift of both is nothing"],
        "warnings": ["only seen prompts"],
    }
    return found | changes


def shown(result):
    out = io.StringIO()
    show("parity", result, console=Console(file=out, width=200, markup=False, emoji=False, highlight=False))
    return [" ".join(line.replace("│", " ").replace("┃", " ").split()) for line in out.getvalue().splitlines()]


def test_offsets_exchanges_and_the_cause():
    lines = shown(parity())
    assert lines[0] == "parity"
    assert lines[1] == (
        "drafter run/run-9 on 12 prompts; engine: rope table:8192, drafter_rope exact, drafter_positions absolute, "
        "context_shift 0, block_shift 0"
    )
    assert "0 holds 2.000 [1.500, 2.500] +0.000 [-0.100, +0.100] 7 of 1,200 2.5e-07 100.0% 0" in lines
    assert "65,536 broken 0.500 [1.500, 2.500] -1.500 [-1.600, -1.400] 7 of 1,200 2.5e-07 100.0% 0" in lines
    assert any(line.startswith("4,096 undecided: needs 1,234 more prompts") for line in lines)
    assert "none 0.500 –" in lines
    assert "drafter 0.625 1.875" in lines
    assert "0-63 9 3 2.000 [1.500, 2.500] 0.500 –" in lines
    assert "exact 0.9, table:8192 0" in lines
    assert "note: a shift of both is nothing" in lines
    assert lines.index("only seen prompts") < lines.index("parity: broken")
    assert lines[-2] == "table_end: the target's table [of angles] ends"


def test_what_holds_has_no_exchanges():
    lines = shown(parity(verdict="holds", cause=None, cause_id=None, evidence=[], warnings=[], cache="c",
                         by_ctx_pos_start={"0": row("holds", 0.0)}))  # fmt: skip
    assert not any("mended" in line for line in lines)
    assert "engine: the cache c, rope" in lines[1]
    assert lines[-2] == "parity: holds"


def test_what_counts_as_a_violation():
    def holds(verdict, cause_id):
        return PARITY.holds({"verdict": verdict, "cause_id": cause_id})

    assert holds("holds", None)
    assert holds("undecided", None)
    assert holds("holds", "memorisation")
    assert not holds("broken", "unknown")
    # every offset is as the smallest, and the drafter reads the wrong layers at all of them
    assert not holds("holds", "capture_layers_shifted")
