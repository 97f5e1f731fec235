"""The records a page is made of, read, recognised by their keys and checked: check, decode, decode details, run."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_jax.core import RECORD_NAME, InputError, read_json, read_jsonl
from dflash_jax.report.fields import Fields, Interval, is_number

WANTED = "give a check JSON, a decode JSON, a decode details JSONL or a run folder"


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """Statistics of walking the decode chain over stored greedy responses; estimators as in the check's record."""

    tau_micro: float
    tau_macro: float | None
    tau_ci95: Interval | None
    survival: tuple[float, ...] | None
    num_blocks: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """A check's statistics over one group of anchors (everything, seen, unseen, one offset)."""

    accept_len_mean: float
    accept_len_ci95: Interval | None
    token_acc_mean: float
    survival: tuple[float, ...] | None
    replay: Replay | None
    num_anchors: int
    num_prompts: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """accept_len at an offset minus accept_len at offset 0, paired over prompts."""

    mean: float
    ci95: Interval | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One `check` record. `by_offset` and `differences` rise by offset; `extra` holds every key not read here."""

    label: str
    block_size: int
    total: Bucket
    seen: Bucket | None
    unseen: Bucket | None
    untrained: Bucket | None
    by_offset: dict[int, Bucket]
    differences: dict[int, Difference]
    extra: dict[str, Any]

    @property
    def main(self) -> Bucket:
        """The group that the page speaks about first: held-out prompts where there are any, else everything."""
        return self.unseen or self.total

    @property
    def group(self) -> str:
        """What to call `main`."""
        if self.unseen:
            return "Held-out prompts"
        return "Seen (training) prompts" if self.seen else "All prompts"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """One `decode` record. The plain fields are None when it was made without `--compare`."""

    label: str
    tokens_equal: bool | None
    tau_micro: float
    tau_macro: float | None
    tokens_per_s: float
    plain_tokens_per_s: float | None
    speedup: float | None
    num_prompts: int
    num_tokens: int
    block_size: int
    extra: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One decoded prompt: each output token's text, the tokens each block committed, their mean (None: no block)."""

    id: str
    prompt: str
    pieces: tuple[str, ...]
    accepted: tuple[int, ...]
    tokens_equal: bool | None
    tau: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One row of a training curve; a number that was not finite is None."""

    step: int
    loss: float | None
    accuracy: float | None
    accuracy_by_slot: tuple[float | None, ...]
    learning_rate: float | None
    anchors_per_s: float | None
    grad_norm: float | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training run: its curve, its resolved config, and the record of each drafter it kept, by folder name."""

    label: str
    steps: tuple[Step, ...]
    config: dict[str, Any]
    records: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Records:
    """All inputs of one page, each kind in the order given; `samples` pools every details file.

    `sidecars` are the records that commands leave beside a file as `FILE.record.json`, by the file's name.
    """

    checks: tuple[Check, ...]
    decodes: tuple[Decode, ...]
    samples: tuple[Sample, ...]
    runs: tuple[Run, ...]
    sidecars: dict[str, dict[str, Any]]


def read_records(paths: Sequence[Path]) -> Records:
    """Read every input.

    Raises:
        InputError: a path is missing, is of no known kind, or is broken; the message names the file and the key.
    """
    found: list[Check | Decode | Sample | Run] = []
    labels: Counter[tuple[type, str]] = Counter()
    for path in paths:
        for item in _read(path):
            if isinstance(item, Sample):
                found.append(item)
                continue
            labels[type(item), item.label] += 1
            again = labels[type(item), item.label] > 1
            # Two checks of one drafter (on two caches) are told apart by their files.
            found.append(dataclasses.replace(item, label=f"{item.label} ({path.name})") if again else item)
    return Records(
        checks=tuple(item for item in found if isinstance(item, Check)),
        decodes=tuple(item for item in found if isinstance(item, Decode)),
        samples=tuple(item for item in found if isinstance(item, Sample)),
        runs=tuple(item for item in found if isinstance(item, Run)),
        sidecars={path.name: record for path in paths if (record := _sidecar(path)) is not None},
    )


def _read(path: Path) -> Sequence[Check | Decode | Sample | Run]:
    """The records of one input."""
    if not path.exists():
        raise InputError(f"{path} does not exist: {WANTED}")
    if path.is_dir():
        return [_run(path)]
    if path.suffix == ".jsonl":
        return _jsonl(path)
    document = read_json(path, what="the record")
    if isinstance(document, dict) and {"by_ctx_pos_start", "accept_len_mean"} <= document.keys():
        return [check_from_json(document, where=str(path), label=_label(document, path))]
    if isinstance(document, dict) and {"tokens_per_s", "tau_micro"} <= document.keys():
        return [_decode(document, path)]
    keys = (
        f"its keys are {', '.join(map(str, list(document)[:8]))}" if isinstance(document, dict) else "it is no object"
    )
    raise InputError(f"{path} is no record that a report knows ({keys}): {WANTED}")


def _object(path: Path, *, what: str) -> dict[str, Any]:
    """A JSON document that is an object."""
    value = read_json(path, what=what)
    if not isinstance(value, dict):
        raise InputError(f"{path} is {json.dumps(value)[:40]}, a JSON object is needed: write the record again")
    return value


def _sidecar(path: Path) -> dict[str, Any] | None:
    """The record beside a file, where there is one."""
    beside = path.with_name(f"{path.name}.{RECORD_NAME}")
    return _object(beside, what="the record") if beside.is_file() else None


def _jsonl(path: Path) -> list[Sample]:
    """Decode details, or an error that says what the rows are instead."""
    rows = read_jsonl(path, what="the decode details")
    if {"pieces", "accepted"} <= rows[0].keys():
        return [_sample(Fields(f"{path} row {number}", row)) for number, row in enumerate(rows, start=1)]
    if {"step", "loss"} <= rows[0].keys():
        raise InputError(f"{path} is a run's curve: give the run folder {path.parent} instead")
    raise InputError(f"{path} is no record that a report knows (its rows' keys are {', '.join(rows[0])}): {WANTED}")


def _label(document: Mapping[str, Any], path: Path) -> str:
    """A short name: the last two folders of the drafter that the record names, else the file's name."""
    drafter = document.get("drafter")
    return "/".join(Path(drafter).parts[-2:]) if isinstance(drafter, str) and drafter else path.stem


def _replay(fields: Fields | None) -> Replay | None:
    """A replay sub-record."""
    if fields is None or fields.value.get("tau_micro") is None:
        return None
    return Replay(
        tau_micro=fields.number("tau_micro"),
        tau_macro=fields.optional_number("tau_macro"),
        tau_ci95=fields.optional_interval("tau_ci95"),
        survival=fields.optional_numbers("survival"),
        num_blocks=fields.optional_integer("num_blocks"),
    )


def _bucket(fields: Fields | None) -> Bucket | None:
    """A group's statistics; None where the group holds no anchor."""
    if fields is None or fields.integer("num_anchors") == 0:
        return None
    return Bucket(
        accept_len_mean=fields.number("accept_len_mean"),
        accept_len_ci95=fields.optional_interval("accept_len_ci95"),
        token_acc_mean=fields.number("token_acc_mean"),
        survival=fields.optional_numbers("survival"),
        replay=_replay(fields.optional_object("replay")),
        num_anchors=fields.integer("num_anchors"),
        num_prompts=fields.optional_integer("num_prompts"),
    )


_CHECK_KEYS = {
    "accept_len_mean",
    "accept_len_p50",
    "accept_len_p90",
    "accept_len_p99",
    "accept_len_ci95",
    "token_acc_mean",
    "survival",
    "replay",
    "num_anchors",
    "num_prompts",
    "num_unlabelled",
    "seen",
    "unseen",
    "untrained",
    "by_ctx_pos_start",
    "accept_len_by_offset_difference",
    "block_size",
}


def _by_offset(fields: Fields | None) -> dict[int, Fields]:
    """The sub-objects of an object keyed by offsets, in order of the offset."""
    if fields is None:
        return {}
    bad = [key for key in fields.value if not key.isdecimal()]
    if bad:
        raise InputError(f"{fields.where}: {bad[0]!r} is no position offset: write the record again")
    nested = {int(key): fields.optional_object(key) for key in sorted(fields.value, key=int)}
    return {offset: item for offset, item in nested.items() if item is not None}


def check_from_json(document: Mapping[str, Any], *, where: str, label: str) -> Check:
    """A check's JSON document as a `Check`.

    Args:
        document: the contract of docs: `accept_len_mean`, ..., `by_ctx_pos_start`, `block_size`.
        where: what to call it in an error.
        label: its short name on the page.

    Raises:
        InputError: a key is missing or has another kind, or the check holds no anchor.
    """
    fields = Fields(where, document)
    total = _bucket(fields)
    if total is None:
        raise InputError(f"{where}: num_anchors is 0: the check measured nothing, run it on a cache with responses")
    untrained = fields.optional_object("untrained")
    buckets = {offset: _bucket(item) for offset, item in _by_offset(fields.optional_object("by_ctx_pos_start")).items()}
    seen, unseen = (_bucket(fields.optional_object(key)) for key in ("seen", "unseen"))
    # Like is compared with like: a held-out trained drafter meets the untrained one on the same prompts.
    same_group = untrained.optional_object("unseen") if untrained and unseen else None
    differences = _by_offset(fields.optional_object("accept_len_by_offset_difference"))
    return Check(
        label=label,
        block_size=fields.integer("block_size"),
        total=total,
        seen=seen,
        unseen=unseen,
        untrained=_bucket(same_group or untrained),
        by_offset={offset: bucket for offset, bucket in buckets.items() if bucket is not None},
        differences={
            offset: Difference(mean=item.number("mean"), ci95=item.optional_interval("ci95"))
            for offset, item in differences.items()
            if offset != 0
        },
        extra={key: value for key, value in document.items() if key not in _CHECK_KEYS},
    )


def _decode(document: dict[str, Any], path: Path) -> Decode:
    """A decode record."""
    fields = Fields(str(path), document)
    read = {field: None for field in Decode.__dataclass_fields__} | {"label": None}
    return Decode(
        label=_label(document, path),
        tokens_equal=None if document.get("tokens_equal") is None else fields.boolean("tokens_equal"),
        tau_micro=fields.number("tau_micro"),
        tau_macro=fields.optional_number("tau_macro"),
        tokens_per_s=fields.number("tokens_per_s"),
        plain_tokens_per_s=fields.optional_number("plain_tokens_per_s"),
        speedup=fields.optional_number("speedup"),
        num_prompts=fields.integer("num_prompts"),
        num_tokens=fields.integer("num_tokens"),
        block_size=fields.integer("block_size"),
        extra={key: value for key, value in document.items() if key not in read},
    )


def _sample(fields: Fields) -> Sample:
    """One row of decode details; its blocks must account for every token."""
    pieces = fields.value.get("pieces")
    if not isinstance(pieces, list) or not pieces or not all(isinstance(piece, str) for piece in pieces):
        raise fields.bad("pieces", "a list of strings, one per output token,")
    counts = fields.value.get("accepted")
    if not isinstance(counts, list) or not all(type(count) is int and count >= 1 for count in counts):
        raise fields.bad("accepted", "a list of the tokens each block committed, each at least 1,")
    if len(pieces) != 1 + sum(counts):
        raise InputError(
            f"{fields.where}: {len(pieces)} pieces do not fit 1 token of prefill and accepted lengths that sum to"
            f" {sum(counts)}: write the details again"
        )
    return Sample(
        id=fields.text("id"),
        prompt=fields.text("prompt"),
        pieces=tuple(pieces),
        accepted=tuple(counts),
        tokens_equal=None if fields.value.get("tokens_equal") is None else fields.boolean("tokens_equal"),
        tau=fields.optional_number("tau"),
    )


def _finite(value: Any) -> float | None:
    """A number, or None for anything that is not a finite one (a diverged run writes NaN)."""
    return float(value) if is_number(value) else None


def _step(fields: Fields) -> Step:
    """One row of metrics.jsonl."""
    for key in ("loss", "accuracy"):
        value = fields.value.get(key)
        # NaN is a fact about the run and is shown; a missing number or a string is a broken file.
        if not is_number(value) and not (value is None and key in fields.value) and not _is_nonfinite(value):
            raise fields.bad(key, "a number")
    slots = fields.value.get("accuracy_by_slot")
    if slots is not None and not isinstance(slots, list):
        raise fields.bad("accuracy_by_slot", "a list of numbers")
    optional = ("loss", "accuracy", "learning_rate", "anchors_per_s", "grad_norm", "seconds")
    return Step(
        step=fields.integer("step"),
        accuracy_by_slot=tuple(_finite(value) for value in slots or ()),
        **{key: _finite(fields.value.get(key)) for key in optional},
    )


def _is_nonfinite(value: Any) -> bool:
    """Whether a value is NaN or an infinity."""
    return isinstance(value, float) and not math.isfinite(value)


def _step_of(folder: Path) -> int:
    """The step in a `run-<step>` folder's name; -1 for another name."""
    suffix = folder.name.removeprefix("run-")
    return int(suffix) if suffix.isdecimal() else -1


def _run(folder: Path) -> Run:
    """A run folder: config, curve, and the record of every drafter kept."""
    if not (folder / "metrics.jsonl").is_file() or not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not a run folder (it needs config.json and metrics.jsonl): {WANTED}")
    rows = read_jsonl(folder / "metrics.jsonl", what="the run's curve")
    steps = [_step(Fields(f"{folder / 'metrics.jsonl'} row {number}", row)) for number, row in enumerate(rows, start=1)]
    # A run that was killed and resumed may have logged a step twice: the later row is the one that led to the drafter.
    steps = sorted({step.step: step for step in steps}.values(), key=lambda step: step.step)
    kept = sorted((path.parent for path in folder.glob(f"run-*/{RECORD_NAME}")), key=_step_of)
    return Run(
        label=folder.resolve().name,
        steps=tuple(steps),
        config=_object(folder / "config.json", what="the run's config"),
        records={path.name: _object(path / RECORD_NAME, what="the drafter's record") for path in kept},
    )
