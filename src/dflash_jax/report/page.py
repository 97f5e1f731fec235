"""The page itself: records to one self-contained HTML file that asks nothing of the network."""

import base64
import dataclasses
import gzip
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import jinja2
import markupsafe
import plotly.offline

import dflash_jax
from dflash_jax.core import atomic_file
from dflash_jax.report import (
    agree_record,
    check_figures,
    check_tables,
    parity_figures,
    parity_tables,
    run_figures,
    tables,
)
from dflash_jax.report.alarm import seen_alarm
from dflash_jax.report.artefacts import artefacts
from dflash_jax.report.check_record import Check
from dflash_jax.report.config import ReportConfig
from dflash_jax.report.decode_verdict import flips_table
from dflash_jax.report.figures import Figure
from dflash_jax.report.glossary import GLOSSARY
from dflash_jax.report.markdown import render_markdown
from dflash_jax.report.parity_record import Parity
from dflash_jax.report.records import Records, read_records
from dflash_jax.report.run_record import Run, Sample
from dflash_jax.report.samples import cut_into_blocks, spread_by_tau
from dflash_jax.report.tables import Table
from dflash_jax.report.verdict import write_verdict

MAX_SAMPLES = 24
EMPHASIS = re.compile(r"(?<![\w*])\*(\w+)\*(?![\w*])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One tab: its figures, then its tables."""

    name: str
    title: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is anything on it."""
        return bool(self.figures or self.tables)


def _visible(text: str) -> markupsafe.Markup:
    """A token's text, escaped, with a mark before each line break (a token of only line breaks is else invisible)."""
    return markupsafe.escape(text).replace("\n", markupsafe.Markup('<span class="nl"></span>\n'))


def _with_code(text: str) -> markupsafe.Markup:
    """A sentence, escaped, with what stands in backquotes as code and a word between asterisks emphasised."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        parts = [text]
    marked = (
        f"<code>{markupsafe.escape(part)}</code>"
        if place % 2
        else EMPHASIS.sub(r"<em>\1</em>", str(markupsafe.escape(part)))
        for place, part in enumerate(parts)
    )
    return markupsafe.Markup("".join(marked))


def _rounded(records: Records) -> frozenset[str]:
    """Prompts whose text differs from plain decoding's by rounding alone.

    Details do not say which record they belong to: with several records nothing is excused.
    """
    if len(records.decodes) != 1:
        return frozenset()
    [decode] = records.decodes
    return frozenset(flip.id for flip in decode.flips or () if decode.dtype == "bfloat16" and flip.explained)


def _shown_sample(sample: Sample, *, rounded: frozenset[str]) -> dict[str, Any]:
    """A sample as the template wants it."""
    blocks = cut_into_blocks(sample)
    tokens = f"{len(sample.pieces):,}"
    against = {
        None: None,
        True: ("good", "equal to plain decoding"),
        False: ("good", "flips by rounding") if sample.id in rounded else ("bad", "DIFFERS from plain decoding"),
    }[sample.tokens_equal]
    head = {"id": sample.id, "prompt": sample.prompt, "tau": sample.tau, "against": against}
    return head | {"tokens": tokens, "blocks": blocks}


def _heading(records: Records) -> str:
    """The default title: what was done and the first record's name."""
    if len(records.checks) > 1 and not records.parities:
        return f"DFlash comparison of {len(records.checks)} checks"
    for kind, named in (
        ("positional parity", records.parities),
        ("offline check", records.checks),
        ("agreement", records.agreements),
        ("training run", records.runs),
        ("decoding", records.decodes),
    ):
        if named:
            return f"DFlash {kind}: {named[0].label}"
    return "DFlash report: decoded text"


def _found(*things: Any) -> tuple[Any, ...]:
    """What there is of figures and tables that may be None."""
    return tuple(thing for thing in things if thing is not None)


def _check_panels(checks: Sequence[Check]) -> list[Panel]:
    """The breakdowns of one check, or of several side by side, those without content left out."""
    own = tuple(check_tables.page_table(check) for check in checks)
    beside = (check_tables.side_by_side(checks),) if len(checks) > 1 else ()
    panels = [
        Panel(
            name="by-offset",
            title="By position offset",
            figures=tuple(check_figures.offset_figures(checks)),
            tables=beside + own,
        )
    ]
    panels += [
        Panel(
            name=f"by-{kind}",
            title=f"By {word}",
            figures=_found(check_figures.breakdown_figure(checks, kind)),
            tables=_found(check_tables.breakdown_table(checks, kind)),
        )
        for kind, (word, _) in check_tables.BREAKDOWNS.items()
    ]
    panels.append(
        Panel(
            name="by-slot",
            title="By slot",
            figures=_found(check_figures.survival_figure(checks), check_figures.slot_figure(checks)),
            tables=_found(check_tables.slot_table(checks)),
        )
    )
    return [panel for panel in panels if panel]


def _parity_panels(parities: Sequence[Parity]) -> list[Panel]:
    """A panel per parity; figures get names of their own."""
    panels = []
    for place, parity in enumerate(parities):
        drawn = [
            dataclasses.replace(item, name=f"{item.name}-{place}") for item in parity_figures.parity_figures(parity)
        ]
        panels.append(
            Panel(
                name=f"parity-{place}",
                title=parity.label,
                figures=tuple(drawn),
                tables=tuple(parity_tables.parity_tables(parity)),
            )
        )
    return panels


def _training_figures(runs: Sequence[Run]) -> list[Figure]:
    """The loss of every run, held-out tau where it was measured, and the accuracy by slot of each."""
    if not runs:
        return []
    slots = [
        run_figures.slot_figure(
            run,
            name=f"slots-{place}",
            title="Accuracy by slot" if len(runs) == 1 else f"Accuracy by slot: {run.label}",
        )
        for place, run in enumerate(runs)
    ]
    return [run_figures.loss_figure(runs), *_found(run_figures.held_out_figure(runs), *slots)]


def _run_tables(run: Run) -> list[Table]:
    """The drafters that a run kept, and its held-out measurements."""
    return list(_found(tables.run_table(run) if run.records else None, tables.held_out_table(run)))


def _context(records: Records, title: str | None) -> dict[str, Any]:
    """Everything the template shows, except code and style."""
    checks, decodes, runs = records.checks, records.decodes, records.runs
    committed = run_figures.committed_figure(records.samples)
    samples = spread_by_tau(records.samples, count=MAX_SAMPLES)
    heading = title or _heading(records)
    context: dict[str, Any] = {
        "title": heading,
        "alarm": seen_alarm(records),
        "verdict": write_verdict(records),
        "markdown": render_markdown(records, title=heading),
        "parity_panels": _parity_panels(records.parities),
        "comparison_figures": _found(check_figures.comparison_figure(records.comparisons)),
        "comparison_tables": [check_tables.comparison_table(records.comparisons)] if records.comparisons else [],
        "group_figures": check_figures.group_figures(checks) if checks else [],
        "check_panels": _check_panels(checks) if checks else [],
        "agree_tables": [table for agree in records.agreements for table in agree_record.agree_tables(agree)],
        "training_figures": _training_figures(runs),
        "training_tables": [table for run in runs for table in _run_tables(run)],
        "decode_figures": _found(committed),
        "decode_tables": [tables.decode_table(decodes), *_found(*map(flips_table, decodes))] if decodes else [],
        "samples": [_shown_sample(sample, rounded=_rounded(records)) for sample in samples],
        "samples_note": f"{len(samples)} of {len(records.samples):,} prompts, evenly spaced by tau, highest first.",
        "artefacts": artefacts(records),
        "glossary": GLOSSARY,
    }
    sections = {
        "verdict": ("In short", context["verdict"]),
        "parity": ("Positional parity", records.parities),
        "comparison": ("Comparison", records.comparisons),
        "check": ("Offline check", checks),
        "agree": ("Offline against online", records.agreements),
        "training": ("Training", runs),
        "decode": ("Decoding", decodes or context["decode_figures"]),
        "samples": ("Text by block", samples),
        "run": ("What was run", context["artefacts"]),
        "words": ("Words and estimators", GLOSSARY),
    }
    return context | {"sections": {name: heading for name, (heading, content) in sections.items() if content}}


def _has_figures(context: dict[str, Any]) -> bool:
    """Whether anything is to be drawn."""
    named = ("comparison_figures", "group_figures", "training_figures", "decode_figures")
    panels = context["parity_panels"] + context["check_panels"]
    return any(context[name] for name in named) or any(panel.figures for panel in panels)


def _policy(scripts: Sequence[str]) -> str:
    """A content security policy: only these very scripts run and nothing is fetched, even if a record holds markup."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    rest = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {rest}"


def pack(code: str) -> str:
    """A script as base64 of gzip, which the page's own script unpacks: 2.0 MB in place of plotly's 4.8."""
    return base64.b64encode(gzip.compress(code.encode(), compresslevel=9, mtime=0)).decode()


def render_page(records: Records, *, title: str | None) -> tuple[str, list[str]]:
    """The page's HTML, and the names of its sections in order."""
    folder = resources.files("dflash_jax.report") / "assets"
    css, script, template = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html.jinja")
    )
    context = _context(records, title)
    has_figures = _has_figures(context)
    plotly_js = plotly.offline.get_plotlyjs()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"visible": _visible, "with_code": _with_code}
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = environment.from_string(template).render(
        **context,
        css=markupsafe.Markup(css),
        script=markupsafe.Markup(script),
        plotly=markupsafe.Markup(pack(plotly_js)) if has_figures else None,
        policy=_policy([plotly_js, script] if has_figures else [script]),
        meta=f"dflash-jax {dflash_jax.__version__}, page made {made}; it is one file and works offline.",
    )
    return page, list(context["sections"])


def write_report(config: ReportConfig) -> dict[str, Any]:
    """Write the page, or the Markdown, atomically.

    Returns:
        `report` (its path; None where there is no `out`), `bytes` (its size), `sections` (of a page: their names, in
        order), and `markdown` (the text) where there is no `out`.

    Raises:
        InputError: an input is missing, of no known kind, or broken; nothing is written then.
    """
    records = read_records(config.inputs)
    if config.format == "md":
        text, sections = render_markdown(records, title=config.title or _heading(records)), []
    else:
        text, sections = render_page(records, title=config.title)
    result = {"report": None, "bytes": len(text.encode()), "sections": sections}
    if config.out is None:
        return result | {"markdown": text}
    with atomic_file(config.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return result | {"report": str(config.out)}
