"""The records as Markdown in the form of the baseline report, ready to paste."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dflash_jax.report import agree_record, check_tables, parity_tables, tables
from dflash_jax.report.agree_record import Agree
from dflash_jax.report.alarm import Alarm, seen_alarm
from dflash_jax.report.check_record import Check
from dflash_jax.report.decode_verdict import flips_table
from dflash_jax.report.parity_record import Parity
from dflash_jax.report.records import Records, records_from_json
from dflash_jax.report.run_record import Decode, Run
from dflash_jax.report.sentences import Sentence
from dflash_jax.report.tables import code, escape, lettered, with_interval
from dflash_jax.report.verdict import Group, write_verdict

MARKS = {"good": "✓", "warn": "!", "bad": "✕", "info": "·"}


def _lines(sentences: Sequence[Sentence]) -> Iterator[str]:
    """The verdict as a list."""
    for sentence in sentences:
        yield f"- {MARKS[sentence.mark]} **{escape(sentence.lead)}**: {escape(sentence.text)}"


def _alarm(alarm: Alarm) -> Iterator[str]:
    """What stands above everything else, as one quote."""
    yield f"> **WARNING: {escape(alarm.lead).upper()}.** {escape(alarm.text)}"
    yield from (">", *(f"> - {escape(item)}" for item in alarm.items)) if alarm.items else ()
    yield ""


def _group(group: Group) -> Iterator[str]:
    """What is said of one record, its heading first."""
    if group.heading:
        flag = f" ({group.flag.upper()})" if group.flag else ""
        yield f"**{escape(group.heading)}**{flag}"
        yield ""
    yield from _lines(group.sentences)
    yield ""


def _check(letter: str, check: Check) -> Iterator[str]:
    """One check: what it was of, the means, the table by offset."""
    main = check.total
    yield f"## {letter}Offline accept check: {code(check.label)}"
    yield ""
    yield from (
        f"- {name}: {code(value)}" for name, value in (("Drafter", check.drafter), ("Cache", check.cache)) if value
    )
    mean = check_tables.accept_len_text(main)
    yield f"- `accept_len_mean` {mean} (max is {check.block_size - 1} for `block_size={check.block_size}`)"
    yield f"- `token_acc_mean` {main.token_acc_mean:.3f}"
    if main.replay:
        yield f"- `replay.tau_micro` {with_interval(main.replay.tau_micro, main.replay.tau_ci95)}"
    yield ""
    yield from check_tables.baseline_table(check).markdown.splitlines()
    yield ""


def _parity(parity: Parity) -> Iterator[str]:
    """One parity: verdict, cause, tables."""
    yield f"## Positional parity: {code(parity.label)}"
    yield ""
    yield f"Verdict: **{parity.verdict}**." + (f" Cause: {escape(parity.cause)}" if parity.cause else "")
    yield ""
    for place, table in enumerate(parity_tables.parity_tables(parity)):
        if place:
            yield f"### {table.title}"
            yield ""
        yield from table.markdown.splitlines()
        yield ""


def _agreement(agree: Agree) -> Iterator[str]:
    """One agreement of replay and decoding: its tables."""
    yield f"## Offline against online: {code(agree.label)}"
    yield ""
    for place, table in enumerate(agree_record.agree_tables(agree)):
        if place:
            yield f"### {table.title}"
            yield ""
        yield from table.markdown.splitlines()
        yield ""


def _decodes(decodes: Sequence[Decode]) -> Iterator[str]:
    """All decode records."""
    yield "## Decoding"
    yield ""
    yield from tables.decode_table(decodes).markdown.splitlines()
    yield ""
    for table in filter(None, map(flips_table, decodes)):
        yield f"### {escape(table.title)}"
        yield ""
        yield from table.markdown.splitlines()
        yield ""


def _run(run: Run) -> Iterator[str]:
    """One training run: the drafters it kept, and what held-out prompts say of them."""
    yield f"## Training: {code(run.label)}"
    yield ""
    yield from tables.run_table(run).markdown.splitlines()
    yield ""
    if (table := tables.held_out_table(run)) is not None:
        yield "### Held-out replay tau"
        yield ""
        yield from table.markdown.splitlines()
        yield ""


def _checks(records: Records) -> Iterator[str]:
    """Every check, and all of them side by side where there are several."""
    several = len(records.checks) > 1
    for letter, check in zip(lettered([check.label for check in records.checks]), records.checks, strict=True):
        yield from _check(f"{letter}) " if several else "", check)
    if several:
        yield "## Side by side"
        yield ""
        yield from check_tables.side_by_side(records.checks).markdown.splitlines()
        yield ""
    if records.comparisons:
        yield "## Comparisons"
        yield ""
        yield from check_tables.comparison_table(records.comparisons).markdown.splitlines()
        yield ""


def render_markdown(records: Records, *, title: str | None) -> str:
    """All records as one Markdown document: warnings, verdict, then a section for each record."""
    lines = [f"# {escape(title)}", ""] if title else []
    if alarm := seen_alarm(records):
        lines += _alarm(alarm)
    for group in write_verdict(records):
        lines += _group(group)
    for parity in records.parities:
        lines += _parity(parity)
    lines += _checks(records)
    for agree in records.agreements:
        lines += _agreement(agree)
    if records.decodes:
        lines += _decodes(records.decodes)
    for run in records.runs:
        lines += _run(run)
    return "\n".join(lines).rstrip("\n") + "\n"


def render_result(result: Mapping[str, Any]) -> str:
    """A check's, an agree's, a parity's or a decode's result as Markdown, as `--format md` prints it.

    Raises:
        InputError: it is none of them, or is broken.
    """
    return render_markdown(records_from_json(dict(result), where="the result", label="decode"), title=None)
