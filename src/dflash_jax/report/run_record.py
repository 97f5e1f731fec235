"""Decode records, decoded text and training runs as typed values."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_jax.core import RECORD_NAME, InputError, read_json, read_jsonl
from dflash_jax.report.check_record import check_label
from dflash_jax.report.fields import Fields, Interval, is_number


@dataclass(frozen=True, kw_only=True, slots=True)
class Flip:
    """The first token at which a prompt's speculative and plain decoding differ (docs/decoding.md).

    `margin` is the larger of what the two ways preferred their own token by, None where a filter left one of them out;
    `rounding` is how far rounding alone moves such a margin: twice the largest difference of any score between the two
    ways at the other tokens of the text. `explained` is the record's own judgement.
    """

    id: str
    index: int
    plain: str
    speculative: str
    margin: float | None
    rounding: float
    reproduced: bool
    explained: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """One `decode` record. The plain fields are None when it was made without `--compare`.

    `flips` has one entry for each prompt whose tokens differ; None where the record does not list them.
    """

    label: str
    tokens_equal: bool | None
    tau_micro: float
    tau_macro: float | None
    tokens_per_s: float
    plain_tokens_per_s: float | None
    speedup: float | None
    speedup_ci95: Interval | None
    num_prompts: int
    num_tokens: int
    block_size: int
    dtype: str | None
    flips: tuple[Flip, ...] | None
    extra: dict[str, Any]

    @property
    def only_rounding(self) -> bool:
        """Whether tokens differ from plain decoding's, and bfloat16's rounding explains every prompt's difference.

        In float32 nothing is excused, and neither is a difference that the record says nothing of.
        """
        flips = self.flips or ()
        return (
            self.tokens_equal is False and self.dtype == "bfloat16" and any(flips) and all(f.explained for f in flips)
        )


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
class HeldOut:
    """What decoding of held-out prompts would have been, at a step of a run with `--eval-cache`.

    `num_seen` prompts of that cache were trained on and are left out.
    """

    step: int
    tau_micro: float
    tau_macro: float | None
    tau_ci95: Interval | None
    accept_len_mean: float | None
    token_acc_mean: float | None
    num_prompts: int | None
    num_seen: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One row of a training curve; a number that was not finite is None, and so is what was not measured."""

    step: int
    loss: float | None
    accuracy: float | None
    accuracy_by_slot: tuple[float | None, ...]
    learning_rate: float | None
    anchors_per_s: float | None
    grad_norm: float | None
    seconds: float | None
    held_out: HeldOut | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training run: its curve, its resolved config, and the record of each drafter it kept, by folder name."""

    label: str
    steps: tuple[Step, ...]
    config: dict[str, Any]
    records: dict[str, dict[str, Any]]

    @property
    def held_out(self) -> tuple[HeldOut, ...]:
        """The held-out measurements in order; none without `--eval-cache`."""
        return tuple(row.held_out for row in self.steps if row.held_out)

    @property
    def best(self) -> HeldOut | None:
        """The measurement of the highest tau, the earliest of equals, as `RUN/best` is chosen; None where none was."""
        return min(self.held_out, key=lambda one: (-one.tau_micro, one.step), default=None)

    def step_of(self, name: str) -> Step | None:
        """The last row of the curve up to a kept drafter's step; None where none was logged by then."""
        rows = [row for row in self.steps if row.step <= _step_of(name)]
        return rows[-1] if rows else None


def read_object(path: Path, *, what: str) -> dict[str, Any]:
    """A JSON document that is an object."""
    value = read_json(path, what=what)
    if not isinstance(value, dict):
        raise InputError(f"{path} is {json.dumps(value)[:40]}, a JSON object is needed: write the record again")
    return value


def _flip(fields: Fields) -> Flip:
    """One entry of a decode record's `differences`."""
    margins = [fields.optional_number(f"{way}_margin") for way in ("plain", "speculative")]
    known = [abs(margin) for margin in margins if margin is not None]
    return Flip(
        id=fields.text("id"),
        index=fields.integer("index"),
        plain=f"{fields.integer('plain_token')} {fields.text('plain_text')!r}",
        speculative=f"{fields.integer('speculative_token')} {fields.text('speculative_text')!r}",
        margin=max(known) if len(known) == 2 else None,
        rounding=2 * fields.number("difference_max"),
        reproduced=fields.boolean("reproduced"),
        explained=fields.boolean("explained"),
    )


def decode_from_json(document: Mapping[str, Any], *, where: str, label: str) -> Decode:
    """A decode record.

    Raises:
        InputError: a key is missing or has another kind.
    """
    fields = Fields(where, document)
    read = Decode.__dataclass_fields__.keys() - {"dtype"} | {"differences"}
    listed = fields.value.get("differences") is not None
    return Decode(
        label=check_label(document) or label,
        tokens_equal=fields.optional_boolean("tokens_equal"),
        tau_micro=fields.number("tau_micro"),
        tau_macro=fields.optional_number("tau_macro"),
        tokens_per_s=fields.number("tokens_per_s"),
        plain_tokens_per_s=fields.optional_number("plain_tokens_per_s"),
        speedup=fields.optional_number("speedup"),
        speedup_ci95=fields.optional_interval("speedup_ci95"),
        num_prompts=fields.integer("num_prompts"),
        num_tokens=fields.integer("num_tokens"),
        block_size=fields.integer("block_size"),
        dtype=fields.optional_text("dtype"),
        flips=tuple(map(_flip, fields.objects("differences"))) if listed else None,
        extra={key: value for key, value in document.items() if key not in read},
    )


def sample_from(fields: Fields) -> Sample:
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
        tokens_equal=fields.optional_boolean("tokens_equal"),
        tau=fields.optional_number("tau"),
    )


def _finite(value: Any) -> float | None:
    """A number, or None for anything that is not a finite one (a diverged run writes NaN)."""
    return float(value) if is_number(value) else None


def _held_out(fields: Fields | None, step: int) -> HeldOut | None:
    """A row's `eval`."""
    if fields is None:
        return None
    return HeldOut(
        step=step,
        tau_micro=fields.number("tau_micro"),
        tau_macro=fields.optional_number("tau_macro"),
        tau_ci95=fields.optional_interval("tau_ci95"),
        accept_len_mean=fields.optional_number("accept_len_mean"),
        token_acc_mean=fields.optional_number("token_acc_mean"),
        num_prompts=fields.optional_integer("num_prompts"),
        num_seen=fields.optional_integer("num_seen"),
    )


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
    step = fields.integer("step")
    optional = ("loss", "accuracy", "learning_rate", "anchors_per_s", "grad_norm", "seconds")
    return Step(
        step=step,
        held_out=_held_out(fields.optional_object("eval"), step),
        accuracy_by_slot=tuple(_finite(value) for value in slots or ()),
        **{key: _finite(fields.value.get(key)) for key in optional},
    )


def _is_nonfinite(value: Any) -> bool:
    """Whether a value is NaN or an infinity."""
    return isinstance(value, float) and not math.isfinite(value)


def _step_of(name: str) -> int:
    """The step in a `run-<step>` folder's name; -1 for another name."""
    suffix = name.removeprefix("run-")
    return int(suffix) if suffix.isdecimal() else -1


def read_run(folder: Path) -> Run:
    """A run folder: config, curve, and the record of every drafter kept."""
    if not (folder / "metrics.jsonl").is_file() or not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is not a run folder (it needs config.json and metrics.jsonl): give the folder that `train --out`"
            " named"
        )
    rows = read_jsonl(folder / "metrics.jsonl", what="the run's curve")
    steps = [_step(Fields(f"{folder / 'metrics.jsonl'} row {number}", row)) for number, row in enumerate(rows, start=1)]
    # A run that was killed and resumed may have logged a step twice: the later row is the one that led to the drafter.
    steps = sorted({step.step: step for step in steps}.values(), key=lambda step: step.step)
    kept = sorted((path.parent for path in folder.glob(f"run-*/{RECORD_NAME}")), key=lambda path: _step_of(path.name))
    return Run(
        label=folder.resolve().name,
        steps=tuple(steps),
        config=read_object(folder / "config.json", what="the run's config"),
        records={path.name: read_object(path / RECORD_NAME, what="the drafter's record") for path in kept},
    )
