"""The page itself: records to one self-contained HTML file that asks nothing of the network."""

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import jinja2
import markupsafe
import plotly.offline

import dflash_jax
from dflash_jax.core import atomic_file
from dflash_jax.report import figures, tables, verdict
from dflash_jax.report.config import ReportConfig
from dflash_jax.report.records import Check, Records, Run, Sample, read_records
from dflash_jax.report.samples import cut_into_blocks, spread_by_tau

MAX_SAMPLES = 24
MAX_ITEMS = 12
MAX_TEXT = 200

GLOSSARY = {
    "accept_len": "Leading drafted tokens of a block that equal the target's greedy tokens, 0 to B-1; the bonus token"
    " is not counted. The mean pools all anchors (micro).",
    "tau": "Tokens committed per target pass, 1 to B, bonus included: accept_len + 1 on blocks that decoding visits."
    " Micro: committed tokens divided by passes, pooled over prompts. Macro: the mean of per-prompt means.",
    "survival": "At slot k, the share of blocks with accept_len of at least k: everything up to slot k was right.",
    "token_acc": "Share of the B-1 drafted tokens equal to the label at the same slot, whatever came before them. It is"
    " higher than survival and does not predict speed.",
    "all anchors, chain": "All anchors: every labelled position of a response starts a block. Chain (replay): only the"
    " anchors that decoding would visit, a to a + accept_len + 1, from the first response token. Only it gives tau.",
    "bonus": "The target's own next token, which every pass yields for free after the accepted ones.",
    "95 % interval": "Percentile bootstrap over prompts, not over anchors: anchors of one prompt are not independent.",
    "offset": "position_offset, in reports ctx_pos_start: the absolute position of a sequence's first token. A shift of"
    " all positions changes nothing in exact arithmetic, so accept_len must not depend on it.",
    "paired difference": "accept_len at an offset minus accept_len at offset 0, on the same tokens and prompts.",
    "seen, unseen": "Prompts that the drafter was trained on, and held-out ones, told apart by a hash of the prompt.",
    "block_size B": "Positions per block, the anchor (its known first token) included: B-1 tokens are drafted.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Artefact:
    """A record as shown: short values as facts, long ones as folded JSON text."""

    title: str
    facts: dict[str, str]
    documents: dict[str, str]


def elide(value: Any) -> Any:
    """A JSON value with every list cut to its first items, and a last item that says how many there were."""
    if isinstance(value, Mapping):
        return {key: elide(item) for key, item in value.items()}
    if isinstance(value, list):
        kept = [elide(item) for item in value[:MAX_ITEMS]]
        return kept if len(value) <= MAX_ITEMS else [*kept, f"… {len(value):,} items in all"]
    return value


def _is_short(value: Any) -> bool:
    """Whether a value is neither a list nor an object."""
    return not isinstance(value, Mapping | list)


def _fact(value: Any) -> str:
    """A short value, or a flat list or object of them, on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_fact(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_fact, value))
    return "–" if value is None else str(value)


def describe(title: str, record: Mapping[str, Any]) -> Artefact:
    """A record's keys: the command line joined, short and flat values as facts, everything else as folded JSON."""
    facts: dict[str, str] = {}
    documents: dict[str, str] = {}
    for key, value in record.items():
        items = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
        if key == "argv" and isinstance(value, list):
            facts["command line"] = shlex.join(map(str, value))
        elif isinstance(value, str) and len(value) > MAX_TEXT:
            documents[key] = value
        elif key != "config" and len(items) <= MAX_ITEMS and all(map(_is_short, items)):
            facts[key] = _fact(value)
        else:
            documents[key] = json.dumps(elide(value), indent=2, ensure_ascii=False)
    return Artefact(title=title, facts=facts, documents=documents)


def _artefacts(records: Records) -> list[Artefact]:
    """What was run: every run's config and drafter records, then what checks and decodes say besides their numbers."""
    shown: list[Artefact] = []
    for run in records.runs:
        shown.append(describe(f"{run.label}: resolved config", run.config))
        shown += [describe(f"{run.label}/{name}: record", record) for name, record in run.records.items()]
    shown += [describe(f"check: {check.label}", check.extra) for check in records.checks if check.extra]
    shown += [describe(f"{name}: record", record) for name, record in records.sidecars.items()]
    shown += [describe(f"decode: {decode.label}", decode.extra) for decode in records.decodes if decode.extra]
    return shown


def _visible(text: str) -> markupsafe.Markup:
    """A token's text, escaped, with a mark before each line break (a token of only line breaks is else invisible)."""
    return markupsafe.escape(text).replace("\n", markupsafe.Markup('<span class="nl"></span>\n'))


def _shown_sample(sample: Sample) -> dict[str, Any]:
    """A sample as the template wants it."""
    blocks = cut_into_blocks(sample)
    tokens = f"{len(sample.pieces):,}"
    head = {"id": sample.id, "prompt": sample.prompt, "tau": sample.tau, "equal": sample.tokens_equal}
    return head | {"tokens": tokens, "blocks": blocks}


def _tile_groups(records: Records) -> list[tuple[str, list[verdict.Tile]]]:
    """Key numbers; one group without a heading where no kind of record occurs twice."""
    groups = [(check.label, verdict.check_tiles(check)) for check in records.checks]
    groups += [(decode.label, verdict.decode_tiles(decode)) for decode in records.decodes]
    groups += [(run.label, verdict.run_tiles(run)) for run in records.runs]
    if max(len(records.checks), len(records.decodes), len(records.runs)) > 1:
        return groups
    return [("", [tile for _, tiles in groups for tile in tiles])] if groups else []


def _heading(records: Records) -> str:
    """The default title: the first record's name."""
    named = (*records.checks, *records.runs, *records.decodes)
    return f"DFlash report: {named[0].label}" if named else "DFlash report: decoded text"


def _titled(title: str, one: Check | Run, all_of_it: Sequence[Check | Run]) -> str:
    """A figure's title, with the record's name where there are several."""
    return title if len(all_of_it) == 1 else f"{title}: {one.label}"


def _context(records: Records, title: str | None) -> dict[str, Any]:
    """Everything the template shows, except code and style."""
    checks, decodes, runs = records.checks, records.decodes, records.runs
    survival = [
        figures.survival_figure(check, name=f"survival-{place}", title=_titled("Survival by slot", check, checks))
        for place, check in enumerate(checks)
    ]
    slots = [
        figures.slot_figure(run, name=f"slots-{place}", title=_titled("Accuracy by slot", run, runs))
        for place, run in enumerate(runs)
    ]
    decode_figures = [figures.speed_figure(decodes)] if decodes else []
    committed = figures.committed_figure(records.samples)
    samples = spread_by_tau(records.samples, count=MAX_SAMPLES)
    context = {
        "title": title or _heading(records),
        "verdict": verdict.write_verdict(records),
        "tile_groups": _tile_groups(records),
        "offset_figures": figures.offset_figures(checks),
        "survival_figures": [figure for figure in survival if figure],
        "check_tables": [tables.page_table(check) for check in checks],
        "training_figures": [figures.loss_figure(runs), *(figure for figure in slots if figure)] if runs else [],
        "decode_figures": decode_figures + ([committed] if committed else []),
        "decode_table": tables.decode_table(decodes) if decodes else None,
        "samples": [_shown_sample(sample) for sample in samples],
        "samples_note": f"{len(samples)} of {len(records.samples):,} prompts, evenly spaced by tau, highest first.",
        "artefacts": _artefacts(records),
        "glossary": GLOSSARY,
    }
    sections = {
        "verdict": ("In short", context["verdict"] or context["tile_groups"]),
        "check": ("Offline check", checks),
        "training": ("Training", runs),
        "decode": ("Decoding", context["decode_figures"]),
        "samples": ("Text by block", samples),
        "run": ("What was run", context["artefacts"]),
        "words": ("Words and estimators", GLOSSARY),
    }
    return context | {"sections": {name: heading for name, (heading, content) in sections.items() if content}}


def _policy(scripts: Sequence[str]) -> str:
    """A content security policy: only these very scripts run and nothing is fetched, even if a record holds markup."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    rest = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {rest}"


def render_page(records: Records, *, title: str | None) -> tuple[str, list[str]]:
    """The page's HTML, and the names of its sections in order."""
    folder = resources.files("dflash_jax.report") / "assets"
    css, script, template = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html.jinja")
    )
    context = _context(records, title)
    has_figures = any(
        context[name] for name in ("offset_figures", "survival_figures", "training_figures", "decode_figures")
    )
    plotly_js = plotly.offline.get_plotlyjs()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = _visible
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = environment.from_string(template).render(
        **context,
        css=markupsafe.Markup(css),
        script=markupsafe.Markup(script),
        plotly=markupsafe.Markup(plotly_js),
        has_figures=has_figures,
        policy=_policy([plotly_js, script] if has_figures else [script]),
        meta=f"dflash-jax {dflash_jax.__version__}, page made {made}; it is one file and works offline.",
    )
    return page, list(context["sections"])


def write_report(config: ReportConfig) -> dict[str, Any]:
    """Write the page atomically.

    Returns:
        `report` (its path), `bytes` (its size) and `sections` (their names, in order).

    Raises:
        InputError: an input is missing, of no known kind, or broken; nothing is written then.
    """
    page, sections = render_page(read_records(config.inputs), title=config.title)
    with atomic_file(config.out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return {"report": str(config.out), "bytes": len(page.encode()), "sections": sections}
