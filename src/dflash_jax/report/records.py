"""The inputs of a page, told apart by their keys: check, agree, parity, decode, decode details, run."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_jax.core import RECORD_NAME, InputError, read_json, read_jsonl
from dflash_jax.report.agree_record import Agree, agree_from_json, is_agree
from dflash_jax.report.check_record import Check, Comparison, checks_from_json, is_check, side_label
from dflash_jax.report.fields import Fields
from dflash_jax.report.parity_record import Parity, is_parity, parity_from_json
from dflash_jax.report.run_record import Decode, Run, Sample, decode_from_json, read_object, read_run, sample_from

WANTED = "give a check JSON, an agree JSON, a parity JSON, a decode JSON, a decode details JSONL or a run folder"

Item = Check | Comparison | Agree | Parity | Decode | Sample | Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Records:
    """All inputs of one page, each kind in the order given; `samples` pools every details file.

    `sidecars` are the records that commands leave beside a file as `FILE.record.json`, by the file's name.
    """

    checks: tuple[Check, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    agreements: tuple[Agree, ...] = ()
    parities: tuple[Parity, ...] = ()
    decodes: tuple[Decode, ...] = ()
    samples: tuple[Sample, ...] = ()
    runs: tuple[Run, ...] = ()
    sidecars: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def read_records(paths: Sequence[Path]) -> Records:
    """Read every input.

    Raises:
        InputError: a path is missing, is of no known kind, or is broken; the message names the file and the key.
    """
    read = [(item, path) for path in paths for item in _read(path)]
    found = _named([(item, path) for item, path in read if not isinstance(item, Comparison | Sample)])
    return Records(
        checks=tuple(item for item in found if isinstance(item, Check)),
        comparisons=tuple(item for item, _ in read if isinstance(item, Comparison)),
        agreements=tuple(item for item in found if isinstance(item, Agree)),
        parities=tuple(item for item in found if isinstance(item, Parity)),
        decodes=tuple(item for item in found if isinstance(item, Decode)),
        samples=tuple(item for item, _ in read if isinstance(item, Sample)),
        runs=tuple(item for item in found if isinstance(item, Run)),
        sidecars={path.name: record for path in paths if (record := _sidecar(path)) is not None},
    )


def records_from_json(document: dict[str, Any], *, where: str, label: str) -> Records:
    """One command's result, not yet a file.

    Raises:
        InputError: it is no record that a report knows, or is broken.
    """
    items = _from_json(document, where=where, label=label)
    found = _named([(item, Path(where)) for item in items if not isinstance(item, Comparison | Sample)])
    return Records(
        checks=tuple(item for item in found if isinstance(item, Check)),
        comparisons=tuple(item for item in items if isinstance(item, Comparison)),
        agreements=tuple(item for item in found if isinstance(item, Agree)),
        parities=tuple(item for item in found if isinstance(item, Parity)),
        decodes=tuple(item for item in found if isinstance(item, Decode)),
    )


Named = Check | Agree | Parity | Decode | Run


def _named(read: Sequence[tuple[Named, Path]]) -> list[Named]:
    """The records under names of their own: a drafter checked twice is told apart by the cache, else by the file."""
    drafters = Counter((type(item), item.label) for item, _ in read)
    found: list[Named] = []
    labels: Counter[tuple[type, str]] = Counter()
    for item, path in read:
        label = item.label
        if isinstance(item, Check) and item.cache and drafters[Check, label] > 1:
            label = side_label(item.drafter, item.cache)
        labels[type(item), label] += 1
        if labels[type(item), label] > 1:
            label = f"{label} ({path.name})"
        found.append(dataclasses.replace(item, label=label))
    return found


def _read(path: Path) -> Sequence[Item]:
    """The records of one input."""
    if not path.exists():
        raise InputError(f"{path} does not exist: {WANTED}")
    if path.is_dir():
        return [read_run(path)]
    if path.suffix == ".jsonl":
        return _jsonl(path)
    return _from_json(read_json(path, what="the record"), where=str(path), label=path.stem)


def _from_json(document: Any, *, where: str, label: str) -> Sequence[Item]:
    """The records of one JSON document."""
    if is_parity(document):
        return [parity_from_json(document, where=where, label=label)]
    if is_agree(document):
        return [agree_from_json(document, where=where, label=label)]
    if is_check(document):
        return checks_from_json(document, where=where, label=label)
    if isinstance(document, dict) and {"tokens_per_s", "tau_micro"} <= document.keys():
        return [decode_from_json(document, where=where, label=label)]
    keys = (
        f"its keys are {', '.join(map(str, list(document)[:8]))}" if isinstance(document, dict) else "it is no object"
    )
    raise InputError(f"{where} is no record that a report knows ({keys}): {WANTED}")


def _sidecar(path: Path) -> dict[str, Any] | None:
    """The record beside a file, where there is one."""
    beside = path.with_name(f"{path.name}.{RECORD_NAME}")
    return read_object(beside, what="the record") if beside.is_file() else None


def _jsonl(path: Path) -> list[Sample]:
    """Decode details, or an error that says what the rows are instead."""
    rows = read_jsonl(path, what="the decode details")
    if {"pieces", "accepted"} <= rows[0].keys():
        return [sample_from(Fields(f"{path} row {number}", row)) for number, row in enumerate(rows, start=1)]
    if {"step", "loss"} <= rows[0].keys():
        raise InputError(f"{path} is a run's curve: give the run folder {path.parent} instead")
    raise InputError(f"{path} is no record that a report knows (its rows' keys are {', '.join(rows[0])}): {WANTED}")
