"""An agreement as sentences, tables and a section: whether offline equals online, and what is to blame."""

import pytest

from dflash_jax.core import InputError
from dflash_jax.report import ReportConfig, render_result, write_report
from dflash_jax.report.agree_record import agree_from_json, agree_sentences, agree_tables, agree_tiles
from dflash_jax.report.records import read_records


def _agree(build, **changes):
    return agree_from_json(build.agree(**changes), where="agree.json", label="agree")


def test_what_differs_is_said_with_its_causes(build):
    agree = _agree(build)
    said = {sentence.lead: sentence for sentence in agree_sentences(agree)}
    assert list(said) == ["Offline is not online", "First causes", "Warning"]
    assert said["Offline is not online"].mark == "bad"
    assert "794 of 800 blocks that decoding makes are the offline replay's (99.25%), on 24 texts" in (
        said["Offline is not online"].text
    )
    assert "label 1 (the stored label" in said["First causes"].text
    assert "features 2 (the stored features" in said["First causes"].text
    assert [(tile.value, tile.mark) for tile in agree_tiles(agree)] == [("794 of 800", "bad")]


def test_equal_blocks_are_good_news(build):
    agree = _agree(build, differences=[], causes={}, num_equal=800, warnings=[])
    (said,) = agree_sentences(agree)
    assert (said.mark, said.lead) == ("good", "Offline equals online")
    assert [table.title for table in agree_tables(agree)] == ["Offline replay and decoding, block by block"]


def test_stored_precision_is_told_where_it_alone_is_to_blame(build):
    only = build.agree()["differences"][:1]
    leads = [one.lead for one in agree_sentences(_agree(build, differences=only, causes={"features": 1}))]
    assert "Storage" in leads
    exact = _agree(build, differences=only, causes={"features": 1}, features_dtype="float32")
    assert "Storage" not in [one.lead for one in agree_sentences(exact)]


def test_tables_by_hand(build):
    offsets, differences = agree_tables(_agree(build))
    assert offsets.rows == (("0", "400", "400", "0", "1.500", "1.502"), ("4096", "400", "394", "3", "1.500", "1.502"))
    assert differences.rows[0] == (
        "00c0ffee00c0ffee",
        "features",
        "what was found of features",
        "4096",
        "131",
        "2",
        "260 ' a'",
        "284 '\\n'",
        "0.012",
        "2",
    )
    assert differences.rows[1][8] == differences.rows[2][7] == "–"


def test_page_and_markdown_have_the_section(build, tmp_path):
    path = build.write_json(tmp_path / "agree.json", build.agree())
    assert [agree.label for agree in read_records([path]).agreements] == ["run/run-600"]
    result = write_report(ReportConfig(inputs=(path,), out=tmp_path / "page.html"))
    assert "agree" in result["sections"]
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Offline against online</h2>" in page
    assert "DFlash agreement: run/run-600" in page
    text = render_result(build.agree())
    assert "## Offline against online: `run/run-600`" in text
    assert "| 4096 | 400 | 394 | 3 | 1.500 | 1.502 |" in text


def test_a_broken_record_is_one_line(build):
    with pytest.raises(InputError, match="^agree.json: 'num_equal' is -1, an integer of at least 0 is needed"):
        _agree(build, num_equal=-1)
