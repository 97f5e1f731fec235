"""The baseline report's form, to the letter."""

import io

import pytest
import rich.console

from dflash_jax.core import InputError
from dflash_jax.report import markdown_table, render_table
from dflash_jax.report.check_record import check_from_json
from dflash_jax.report.check_tables import page_table

BUCKET = {"accept_len_mean": 0.17, "accept_len_ci95": [0.125, 0.21549], "token_acc_mean": 0.04, "num_anchors": 1016}
CHECK = BUCKET | {"num_prompts": 16, "block_size": 8, "drafter": "runs/a|b/[red]run-1500", "unseen": BUCKET}
CHECK |= {"by_ctx_pos_start": {"131072": BUCKET | {"accept_len_mean": 0.69, "accept_len_ci95": None}, "0": BUCKET}}
CHECK |= {"accept_len_by_offset_difference": {"131072": {"mean": -0.0004, "ci95": [-0.52, 0.0]}}}
CHECK |= {"replay": {"tau_micro": 1.2, "tau_macro": 1.25, "tau_ci95": [1.1, 1.3]}}


def test_markdown():
    assert markdown_table(CHECK) == (
        "| ctx_pos_start | n | accept_len_mean | token_acc_mean |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| 0 | 1,016 | 0.170 [0.125, 0.215] | 0.040 |\n"
        "| 131072 | 1,016 | 0.690 | 0.040 |\n"
        "| all | 1,016 | 0.170 [0.125, 0.215] | 0.040 |\n"
        "| unseen | 1,016 | 0.170 [0.125, 0.215] | 0.040 |\n"
        "\n"
        "- n counts anchors; accept_len is 0 to 7 (block_size 8, bonus excluded); [95 % intervals] are bootstraps"
        " over the 16 prompts.\n"
        # The mean rounds to zero, which has no sign of its own.
        "- Paired difference of accept_len to offset 0: 131072: +0.000 [-0.520, +0.000]\n"
    )


@pytest.mark.parametrize("markup", [True, False])
def test_terminal_table_fits_eighty_columns_and_shows_brackets(markup):
    output = io.StringIO()
    rich.console.Console(file=output, width=80, markup=markup).print(render_table(CHECK))
    text = output.getvalue()
    assert "│ 0             │ 1,016 │ 0.170 [0.125, 0.215] │          0.040 │" in text
    assert "/[red]run-1500" in text
    assert text.index("131072") < text.index("├") < text.index("│ all ")
    assert max(map(len, text.splitlines())) <= 80


def test_the_page_adds_differences_and_tau_where_the_check_has_them():
    table = page_table(check_from_json(CHECK, where="check", label="a|b"))
    assert table.columns[5:] == ("difference to offset 0 [95 %]", "replay tau micro [95 %]")
    assert [row[5:] for row in table.rows] == [
        ("–", "–"),
        ("+0.000 [-0.520, +0.000]", "–"),
        ("–", "1.200 [1.100, 1.300]"),
        ("–", "–"),
    ]
    plain = {key: value for key, value in CHECK.items() if key not in ("replay", "accept_len_by_offset_difference")}
    assert len(page_table(check_from_json(plain, where="check", label="c")).columns) == 5


def test_a_broken_check_is_an_input_error():
    with pytest.raises(InputError, match="the check: the key 'accept_len_mean' is missing"):
        markdown_table({"num_anchors": 3, "by_ctx_pos_start": {}})
