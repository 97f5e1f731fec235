"""Decoding against plain decoding: equal, equal but for rounding, or different."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from dflash_jax.core import InputError
from dflash_jax.decode import Flip
from dflash_jax.report import ReportConfig, render_result, write_report
from dflash_jax.report.decode_verdict import decode_sentences, decode_tiles, flips_table
from dflash_jax.report.run_record import decode_from_json
from dflash_jax.report.tables import MOST_ROWS, decode_table

REAL = Path(__file__).parent / "smollm2" / "decode-bfloat16.json"
"""What `decode --compare --dtype bfloat16` wrote of SmolLM2-135M-Instruct and a drafter of 2 steps: 12 prompts of the
standard library, 96 tokens, batch size 4, on a CPU."""


def _flipped(build, *flips, **changes):
    document = build.decode(tokens_equal=False, dtype="bfloat16", differences=list(flips)) | changes
    return decode_from_json(document, where="decode.json", label="decode")


def _said(decode):
    return decode_sentences(decode)[0]


def test_the_keys_are_those_of_the_command(build):
    fields = {field.name for field in dataclasses.fields(Flip)}
    assert set(build.flip("a")) == set(json.loads(REAL.read_text())["differences"][0])
    assert set(build.flip("a")) == fields | {"id", "plain_text", "speculative_text"}


def test_flips_that_rounding_explains_are_lossless_up_to_it(build):
    widest = build.flip("b", plain_margin=0.03, speculative_margin=-0.2)
    decode = _flipped(build, build.flip("a"), widest)
    said = _said(decode)
    assert (said.mark, said.lead) == ("good", "Decoding is lossless up to bfloat16 rounding")
    assert said.text == (
        "2 of 24 prompts flip to another token than plain decoding's, and every flip is explained by rounding: the two"
        " tokens are nearly tied, the margin between them below the difference measured between verification and plain"
        " decoding (the widest: a margin of 0.2, where rounding moves margins by up to 0.25). The other 22 are equal,"
        " token for token."
    )
    [tile] = [tile for tile in decode_tiles(decode) if tile.name == "tokens against plain"]
    assert (tile.value, tile.under, tile.mark) == ("2 of 24 flip", "rounding explains every one", "good")
    assert decode_table([decode]).rows[0][3] == "but for rounding (2 of 24)"


def test_one_and_all(build):
    assert _said(_flipped(build, build.flip("a"))).text.startswith("1 of 24 prompts flips to")
    every = _said(_flipped(build, build.flip("a"), num_prompts=1)).text
    assert every.startswith("1 of 1 prompt flips to")
    assert "The other" not in every


def test_a_flip_that_rounding_does_not_explain_is_a_fault(build):
    wrong = build.flip("b", plain_margin=0.8, speculative_margin=-0.8, explained=False, index=3)
    decode = _flipped(build, build.flip("a"), wrong)
    said = _said(decode)
    assert (said.mark, said.lead) == ("bad", "Decoding is not lossless")
    assert said.text == (
        "2 of 24 prompts differ from plain decoding, and rounding does not explain 1 of them: b at new token 3 (a"
        " margin of 0.8, where rounding moves margins by up to 0.25)."
    )
    [tile] = [tile for tile in decode_tiles(decode) if tile.name == "tokens against plain"]
    assert (tile.value, tile.under, tile.mark) == ("differ", "2 of 24 prompts", "bad")
    assert decode_table([decode]).rows[0][3] == "NO"
    many = _said(_flipped(build, *(dict(wrong, id=str(place)) for place in range(5)))).text
    assert many.endswith("; and 2 more.")


def test_a_token_that_a_filter_leaves_out_has_no_margin(build):
    said = _said(_flipped(build, build.flip("a", plain_margin=None, explained=False)))
    assert said.mark == "bad"
    assert "(a filter leaves one of the two tokens out)" in said.text


@pytest.mark.parametrize("dtype", ["float32", None])
def test_in_float32_nothing_is_excused(build, dtype):
    said = _said(_flipped(build, build.flip("a"), dtype=dtype))
    assert (said.mark, said.lead) == ("bad", "Decoding is not lossless")
    assert "rounding is no excuse: a at new token 17" in said.text


@pytest.mark.parametrize("differences", [[], None])
def test_a_difference_that_the_record_does_not_list_is_not_excused(build, differences):
    said = _said(_flipped(build, differences=differences))
    assert (said.mark, said.lead) == ("bad", "Decoding is not lossless")
    assert said.text == "tokens decoded with the drafter differ from plain decoding's, on 24 prompts."


def test_equal_tokens_need_no_excuse(build):
    decode = _flipped(build, tokens_equal=True)
    assert _said(decode).lead == "Decoding is lossless"
    assert flips_table(decode) is None


def test_the_table_puts_faults_first_and_says_what_it_leaves_out(build):
    wrong = build.flip("b", explained=False, reproduced=False)
    table = flips_table(_flipped(build, build.flip("a"), wrong))
    assert table is not None
    assert table.rows == (
        ("b", "NO", "no", "260 ' a'", "284 '\\n'", "17", "0.0625", "0.25"),
        ("a", "yes", "yes", "260 ' a'", "284 '\\n'", "17", "0.0625", "0.25"),
    )
    many = flips_table(_flipped(build, *(build.flip(str(place)) for place in range(MOST_ROWS + 2))))
    assert many is not None
    assert len(many.rows) == MOST_ROWS
    assert many.notes[-1] == "2 more prompts are not shown."


def test_a_real_record_is_told_in_markdown_as_on_the_page(tmp_path):
    text = render_result(json.loads(REAL.read_text()))
    assert "- ✓ **Decoding is lossless up to bfloat16 rounding**: 4 of 12 prompts flip" in text
    assert "### Where tokens differ from plain decoding: decode" in text
    assert "| stdlib/re.split/document | yes | yes | 5254 ' argument' | 7048 ' flag' | 83 | 0.0626 | 1.32 |" in text
    write_report(ReportConfig(inputs=(REAL,), out=tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert '<li class="good"><span class="mark" role="img" aria-label="good"></span><span><strong>Decoding is' in page
    assert "<dt>dtype</dt><dd>bfloat16</dd>" in page  # still among what was run


def test_a_text_is_marked_by_its_own_prompts_flip_only(build, tmp_path):
    names = [f"HumanEval/{number}" for number in range(3)]
    flips = [build.flip(names[0]), build.flip(names[1], explained=False)]
    documents = [build.decode(tokens_equal=False, dtype="bfloat16", differences=flips), build.decode()]
    decode, other = (build.write_json(tmp_path / f"{n}.json", document) for n, document in enumerate(documents))
    rows = [build.detail(number, tokens_equal=number == 2) for number in range(3)]
    details = build.write_jsonl(tmp_path / "details.jsonl", rows)

    def chips(*inputs):
        write_report(ReportConfig(inputs=inputs, out=tmp_path / "page.html"))
        found = re.findall(r'<code>([^<]*)</code>.*<span class="chip (\w+)">', (tmp_path / "page.html").read_text())
        return dict(found)

    assert chips(decode, details) == dict(zip(names, ("good", "bad", "good"), strict=True))
    # whose texts these are is not known beside another record
    assert chips(decode, other, details) == dict(zip(names, ("bad", "bad", "good"), strict=True))


@pytest.mark.parametrize(("interval", "mark"), [([1.05, 1.4], "good"), ([0.9, 1.5], "warn"), (None, "good")])
def test_a_speed_up_is_a_gain_where_its_interval_is(build, interval, mark):
    decode = _flipped(build, tokens_equal=True, speedup_ci95=interval)
    speed = decode_sentences(decode)[1]
    [tile] = [tile for tile in decode_tiles(decode) if tile.name == "speed-up over plain"]
    assert (speed.mark, tile.mark) == (mark, mark)
    words = "" if interval is None else f" (95 % {interval[0]:.2f} to {interval[1]:.2f})"
    assert f"a speed-up of 1.21×{words}." in speed.text
    shown = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    assert decode_table([decode]).rows[0][-1] == f"1.21×{shown}"
    assert ("no interval is known" in decode_table([decode]).notes[0]) is (interval is None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"explained": "yes"}, "decode.json: differences 1: 'explained' is 'yes', true or false is needed"),
        ({"difference_max": None}, "decode.json: differences 1: 'difference_max' is None, a finite number is needed"),
        ({"index": -1}, "decode.json: differences 1: 'index' is -1, an integer of at least 0 is needed"),
    ],
)
def test_a_broken_difference_is_one_line_with_file_and_key(build, change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        _flipped(build, build.flip("a", **change))
