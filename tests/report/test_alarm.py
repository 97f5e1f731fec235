"""One box, impossible to overlook, however many records measured only prompts that their drafter was trained on."""

import pytest

from dflash_jax.report import ReportConfig, write_report
from dflash_jax.report.alarm import FLAG, LEAD, Alarm, seen_alarm
from dflash_jax.report.markdown import render_markdown
from dflash_jax.report.records import read_records

DRAFTERS = "ABCDE"


def _seen(build, **changes):
    return build.check(unseen=None, seen=build.bucket(5.0, anchors=64, prompts=16), num_prompts=16, **changes)


def _seen_parity(build, **changes):
    return build.parity(unseen=None, seen=build.bucket(5.0, anchors=64, prompts=16), **changes)


def _read(build, folder, *documents):
    return read_records(
        [build.write_json(folder / f"{place}.json", document) for place, document in enumerate(documents)]
    )


def _five_of_seven(build, folder):
    """Four checks and a parity of seen prompts, a check and a parity of others."""
    seen = [_seen(build, drafter=f"x/{name}") for name in DRAFTERS[:4]]
    return _read(
        build,
        folder,
        *seen,
        build.check(drafter="x/E"),
        _seen_parity(build, drafter="y/1"),
        build.parity(drafter="y/2"),
    )


def test_one_record_is_told_in_a_sentence(build, tmp_path):
    assert seen_alarm(_read(build, tmp_path, _seen(build))) == Alarm(
        lead=LEAD,
        text="Every prompt measured in the check of run/run-600 (16 prompts) is among those that the drafter was"
        " trained on. The numbers show what it remembers; they say nothing about new prompts. Check it on a cache of"
        " other prompts before believing any of them.",
    )


def test_of_a_parity_alone_the_verdict_may_be_believed(build, tmp_path):
    alarm = seen_alarm(_read(build, tmp_path, _seen_parity(build)))
    assert alarm is not None
    assert alarm.lead == LEAD
    assert alarm.text == (
        "Every prompt measured in the parity of run/run-600 (164 prompts) is among those that the drafter was trained"
        " on. Parity itself may be read off them; how much is accepted may not: the numbers show what the drafter"
        " remembers."
    )


def test_a_few_are_named_in_a_sentence_and_those_of_other_prompts_are_not(build, tmp_path):
    records = _read(build, tmp_path, _seen(build, drafter="x/A"), build.check(drafter="x/B"), _seen_parity(build))
    alarm = seen_alarm(records)
    assert alarm is not None
    assert alarm.lead == f"{LEAD}, in 2 of 3 checks and parities"
    assert alarm.text.startswith(
        "Every prompt measured in the parity of run/run-600 (164 prompts) and the check of A) x/A (16 prompts) is among"
    )
    assert alarm.text.endswith(" Parity itself may be read off them; how much is accepted may not.")
    assert not alarm.items
    three = [_seen(build, drafter=f"x/{name}") for name in "ABC"]
    alarm = seen_alarm(_read(build, tmp_path, *three))
    assert alarm is not None
    assert alarm.lead == f"{LEAD}, in all 3 checks"
    assert "the check of A) x/A (16 prompts), the check of B) x/B (16 prompts) and the check of C)" in alarm.text


def test_many_are_listed_under_the_names_of_the_page(build, tmp_path):
    alarm = seen_alarm(_five_of_seven(build, tmp_path))
    assert alarm is not None
    assert alarm.lead == f"{LEAD}, in 5 of 7 checks and parities"
    assert alarm.items == (
        "parity of y/1 (164 prompts)",
        "check of A) x/A (16 prompts)",
        "check of B) x/B (16 prompts)",
        "check of C) x/C (16 prompts)",
        "check of D) x/D (16 prompts)",
    )


def test_there_is_none_where_other_prompts_were_measured_or_it_is_not_known(build, tmp_path):
    seen = build.bucket(5.0, anchors=64, prompts=16)
    for document in (build.check(), build.check(seen=seen), build.check(unseen=None), build.parity(), build.decode()):
        assert seen_alarm(_read(build, tmp_path, document)) is None


def test_markdown_holds_one_quote_and_a_mark_at_each_record(build, tmp_path):
    lines = render_markdown(_five_of_seven(build, tmp_path), title=None).splitlines()
    quoted = [line for line in lines if line.startswith(">")]
    assert lines[: len(quoted)] == quoted
    assert quoted[0].startswith(f"> **WARNING: {LEAD.upper()}, IN 5 OF 7 CHECKS AND PARITIES.** In these, every prompt")
    assert quoted[1:3] == [">", "> - parity of y/1 (164 prompts)"]
    assert quoted[3:] == [f"> - check of {name}) x/{name} (16 prompts)" for name in DRAFTERS[:4]]
    marked = [line for line in lines if line.startswith("**") and FLAG.upper() in line]
    assert marked == [
        f"**{name}** ({FLAG.upper()})" for name in ("Parity: y/1", "A) x/A", "B) x/B", "C) x/C", "D) x/D")
    ]


@pytest.mark.parametrize("count", [1, 2, *(pytest.param(count, marks=pytest.mark.slow) for count in (5, 12))])
def test_a_page_holds_one_box_that_names_them_all(build, tmp_path, count):
    names = [f"run-{place:02}" for place in range(count)]
    paths = [build.write_json(tmp_path / f"{name}.json", _seen(build, drafter=f"x/{name}")) for name in names]
    write_report(ReportConfig(inputs=tuple(paths), out=tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert page.count('role="alert"') == 1
    box = page[page.index('<div class="alarm"') : page.index("<nav")]
    assert all(f"x/{name} (16 prompts)" in box for name in names)
    assert box.count("<li>") == (count if count > 3 else 0)
    assert page.count('<span class="flag">') == (count if count > 1 else 0)
