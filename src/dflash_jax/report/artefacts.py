"""What was run: records, configs and provenance, as facts and folded text."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dflash_jax.report.records import Records

MAX_ITEMS = 12
MAX_TEXT = 200


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


def artefacts(records: Records) -> list[Artefact]:
    """What was run: every run's config and drafter records, then what checks and decodes say besides their numbers."""
    shown: list[Artefact] = []
    for run in records.runs:
        shown.append(describe(f"{run.label}: resolved config", run.config))
        shown += [describe(f"{run.label}/{name}: record", record) for name, record in run.records.items()]
    shown += [describe(f"parity: {parity.label}", parity.extra) for parity in records.parities if parity.extra]
    shown += [describe(f"agree: {agree.label}", agree.extra) for agree in records.agreements if agree.extra]
    shown += [describe(f"check: {check.label}", check.extra) for check in records.checks if check.extra]
    shown += [describe(f"{name}: record", record) for name, record in records.sidecars.items()]
    shown += [describe(f"decode: {decode.label}", decode.extra) for decode in records.decodes if decode.extra]
    return shown
