"""A `parity` record as typed values (docs/design/005)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dflash_jax.report.check_record import Bucket, bucket_from, by_context_length, check_label
from dflash_jax.report.fields import Fields, Interval, is_number

Verdict = Literal["holds", "broken", "undecided"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A mean and its interval, where it has one."""

    mean: float
    ci95: Interval | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OffsetParity:
    """The engine at one offset against the reference, on the same anchors.

    `difference` is to the reference, `offset_difference` to the engine's own smallest offset. Drifts are relative root
    mean squares. `swaps` holds the engine's accept_len with that one link mended, `spoils` the reference's with that
    one link the engine's; both are empty where nothing is broken.
    """

    verdict: Verdict
    difference: Measured | None
    offset_difference: Measured | None
    accept_len: Measured | None
    tau: float | None
    feature_drift: float | None
    drafter_drift: float | None
    argmax_agreement: float | None
    num_anchors: int | None
    num_anchors_differing: int | None
    more_prompts_needed: int | None
    swaps: dict[str, Measured]
    spoils: dict[str, Measured]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """One `parity` record; offsets rise.

    `reference` is a sound engine on the same anchors, `probes` its accept_len with layers or block moved by one,
    `evidence` what was tried to name the cause and what came out. `extra` holds every key not read here.
    """

    label: str
    verdict: Verdict
    cause: str | None
    cause_id: str | None
    evidence: tuple[tuple[str, str], ...]
    offsets: dict[int, OffsetParity]
    reference: Bucket | None
    probes: dict[str, Measured]
    seen: Bucket | None
    unseen: Bucket | None
    by_context_length: dict[str, Bucket]
    margin: float | None
    num_prompts: int | None
    num_anchors: int | None
    block_size: int | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    extra: dict[str, Any]

    @property
    def only_seen(self) -> bool:
        """Whether every prompt measured is one that the drafter was trained on."""
        return self.seen is not None and self.unseen is None


_READ_KEYS = {
    "verdict",
    "cause",
    "cause_id",
    "evidence",
    "by_ctx_pos_start",
    "reference",
    "probes",
    "seen",
    "unseen",
    "by_context_length",
    "margin",
    "num_prompts",
    "num_anchors",
    "block_size",
    "notes",
    "warnings",
}


def is_parity(document: Any) -> bool:
    """Whether a JSON value is a parity's document."""
    return isinstance(document, dict) and {"by_ctx_pos_start", "cause", "verdict"} <= document.keys()


def _verdict(fields: Fields) -> Verdict:
    """One of the three words."""
    verdict = fields.text("verdict")
    for known in get_args(Verdict):
        if verdict == known:
            return known
    raise fields.bad("verdict", "holds, broken or undecided")


def _measured(fields: Fields, key: str, ci95: str) -> Measured | None:
    """A number beside its interval, both under keys of their own."""
    mean = fields.optional_number(key)
    return None if mean is None else Measured(mean=mean, ci95=fields.optional_interval(ci95))


def _exchanged(fields: Fields, key: str) -> dict[str, Measured]:
    """accept_len by the link exchanged: numbers, or objects of a mean and its interval."""
    nested = fields.optional_object(key)
    found = {name: _one_exchange(nested, name) for name in nested.value} if nested else {}
    return {name: value for name, value in found.items() if value is not None}


def _one_exchange(fields: Fields, name: str) -> Measured | None:
    """accept_len under one exchange; None where it was not made."""
    if fields.value[name] is None or is_number(fields.value[name]):
        mean = fields.optional_number(name)
        return None if mean is None else Measured(mean=mean)
    nested = fields.optional_object(name)
    return None if nested is None else _measured(nested, "accept_len_mean", "accept_len_ci95")


def _offset(fields: Fields) -> OffsetParity:
    """One entry of `by_ctx_pos_start`."""
    return OffsetParity(
        verdict=_verdict(fields),
        difference=_measured(fields, "accept_len_difference", "ci95"),
        offset_difference=_measured(fields, "offset_difference", "offset_ci95"),
        accept_len=_measured(fields, "accept_len_mean", "accept_len_ci95"),
        tau=fields.optional_number("tau"),
        feature_drift=fields.optional_number("feature_drift"),
        drafter_drift=fields.optional_number("drafter_drift"),
        argmax_agreement=fields.optional_number("argmax_agreement"),
        num_anchors=fields.optional_integer("num_anchors"),
        num_anchors_differing=fields.optional_integer("num_anchors_differing"),
        more_prompts_needed=fields.optional_integer("more_prompts_needed"),
        swaps=_exchanged(fields, "swaps"),
        spoils=_exchanged(fields, "spoils"),
    )


def parity_from_json(document: Mapping[str, Any], *, where: str, label: str) -> Parity:
    """A parity's JSON document as a `Parity`.

    Args:
        document: the contract of docs/design/005.
        where: what to call it in an error.
        label: its short name on the page, where the record names no drafter.

    Raises:
        InputError: a key is missing or has another kind.
    """
    fields = Fields(where, document)
    groups = {name: bucket_from(fields.optional_object(name)) for name in ("reference", "seen", "unseen")}
    return Parity(
        label=check_label(document) or label,
        verdict=_verdict(fields),
        cause=fields.optional_text("cause"),
        cause_id=fields.optional_text("cause_id"),
        evidence=tuple((item.text("test"), item.text("result")) for item in fields.objects("evidence")),
        offsets={offset: _offset(item) for offset, item in fields.by_offset("by_ctx_pos_start").items()},
        reference=groups["reference"],
        probes=_exchanged(fields, "probes"),
        seen=groups["seen"],
        unseen=groups["unseen"],
        by_context_length=by_context_length(fields),
        margin=fields.optional_number("margin"),
        num_prompts=fields.optional_integer("num_prompts"),
        num_anchors=fields.optional_integer("num_anchors"),
        block_size=fields.optional_integer("block_size"),
        notes=fields.optional_texts("notes"),
        warnings=fields.optional_texts("warnings"),
        extra={key: value for key, value in document.items() if key not in _READ_KEYS},
    )
