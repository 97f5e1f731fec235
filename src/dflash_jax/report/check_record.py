"""A `check` record and a comparison of two, as typed values."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_jax.core import InputError
from dflash_jax.report.fields import Fields, Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """Statistics of walking the decode chain over stored greedy responses; estimators as in the check's record."""

    tau_micro: float
    tau_macro: float | None
    tau_ci95: Interval | None
    survival: tuple[float, ...] | None
    num_blocks: int | None
    accept_len_mean: float | None
    why: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """A check's statistics over one group of anchors (everything, seen, unseen, one offset, one prompt set, ...)."""

    accept_len_mean: float
    accept_len_ci95: Interval | None
    token_acc_mean: float
    survival: tuple[float, ...] | None
    replay: Replay | None
    num_anchors: int
    num_prompts: int | None
    num_unlabelled: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """token_acc of one slot of the block, 1 to B-1, whatever the slots before it held."""

    slot: int
    token_acc: float
    ci95: Interval | None
    num_labelled: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """accept_len at an offset minus accept_len at the smallest offset, paired over prompts."""

    mean: float
    ci95: Interval | None
    num_anchors: int | None
    num_anchors_differing: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One `check` record. `by_offset` and `differences` rise by offset; `extra` holds every key not read here."""

    label: str
    drafter: str | None
    cache: str | None
    block_size: int
    anchors: str | None
    total: Bucket
    seen: Bucket | None
    unseen: Bucket | None
    untrained: Bucket | None
    by_offset: dict[int, Bucket]
    differences: dict[int, Difference]
    by_context_length: dict[str, Bucket]
    by_prompt_set: dict[str, Bucket]
    by_slot: tuple[Slot, ...]
    warnings: tuple[str, ...]
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

    @property
    def only_seen(self) -> bool:
        """Whether every prompt measured is one that the drafter was trained on."""
        return self.seen is not None and self.unseen is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One metric on both sides of a comparison; `difference` is b minus a."""

    a: float
    b: float
    difference: float
    ci95: Interval | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two pairs of drafter and cache, compared. `paired`: both saw the same anchors of the same texts."""

    a: str
    b: str
    paired: bool
    num_prompts: int | None
    num_anchors: int | None
    metrics: dict[str, Compared]
    verdict: str | None


METRICS = ("accept_len", "token_acc", "tau")

_CHECK_KEYS = {
    "accept_len_mean",
    "accept_len_p50",
    "accept_len_p90",
    "accept_len_p99",
    "accept_len_ci95",
    "token_acc_mean",
    "survival",
    "replay",
    "anchors",
    "num_anchors",
    "num_prompts",
    "num_unlabelled",
    "seen",
    "unseen",
    "untrained",
    "by_ctx_pos_start",
    "by_context_length",
    "by_prompt_set",
    "by_slot",
    "accept_len_by_offset_difference",
    "block_size",
    "comparison",
    "checks",
    "warnings",
}


def is_check(document: Any) -> bool:
    """Whether a JSON value is a check's document."""
    return isinstance(document, dict) and {"by_ctx_pos_start", "accept_len_mean"} <= document.keys()


def short_path(path: str, *, parts: int = 2) -> str:
    """The last folders of a path, which tell one drafter or cache from another."""
    return "/".join(Path(path).parts[-parts:])


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
        accept_len_mean=fields.optional_number("accept_len_mean"),
        why=fields.optional_text("why"),
    )


def bucket_from(fields: Fields | None) -> Bucket | None:
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
        num_unlabelled=fields.optional_integer("num_unlabelled"),
    )


def buckets_from(fields: Mapping[Any, Fields]) -> dict[Any, Bucket]:
    """Groups by their key, those without an anchor left out."""
    found = {key: bucket_from(item) for key, item in fields.items()}
    return {key: bucket for key, bucket in found.items() if bucket is not None}


def _length_start(name: str) -> int:
    """The first length of a bucket such as `128-255` or `1024+`; a bucket of another form goes last."""
    digits = name.split("-")[0].rstrip("+")
    return int(digits) if digits.isdecimal() else 1 << 62


def by_context_length(fields: Fields) -> dict[str, Bucket]:
    """Groups by tokens of context, rising."""
    named = fields.named_objects("by_context_length")
    return buckets_from({name: named[name] for name in sorted(named, key=_length_start)})


def _slot(fields: Fields) -> Slot:
    """One slot's token_acc."""
    return Slot(
        slot=fields.integer("slot"),
        token_acc=fields.number("token_acc"),
        ci95=fields.optional_interval("ci95"),
        num_labelled=fields.optional_integer("num_labelled"),
    )


def _slots(fields: Fields) -> tuple[Slot, ...]:
    """Slots that have any label, in order."""
    labelled = [item for item in fields.objects("by_slot") if item.value.get("token_acc") is not None]
    return tuple(sorted(map(_slot, labelled), key=lambda slot: slot.slot))


def _difference(fields: Fields) -> Difference:
    """A paired difference to the smallest offset."""
    return Difference(
        mean=fields.number("mean"),
        ci95=fields.optional_interval("ci95"),
        num_anchors=fields.optional_integer("num_anchors"),
        num_anchors_differing=fields.optional_integer("num_anchors_differing"),
    )


def check_from_json(document: Mapping[str, Any], *, where: str, label: str) -> Check:
    """A check's JSON document as a `Check`.

    Args:
        document: the contract of docs/design/005: `accept_len_mean`, ..., `by_ctx_pos_start`, `block_size`.
        where: what to call it in an error.
        label: its short name on the page.

    Raises:
        InputError: a key is missing or has another kind, or the check holds no anchor.
    """
    fields = Fields(where, document)
    total = bucket_from(fields)
    if total is None:
        raise InputError(f"{where}: num_anchors is 0: the check measured nothing, run it on a cache with responses")
    untrained = fields.optional_object("untrained")
    seen, unseen = (bucket_from(fields.optional_object(key)) for key in ("seen", "unseen"))
    # Like is compared with like: a held-out trained drafter meets the untrained one on the same prompts.
    same_group = untrained.optional_object("unseen") if untrained and unseen else None
    differences = {key: _difference(item) for key, item in fields.by_offset("accept_len_by_offset_difference").items()}
    drafter, cache = (document.get(key) for key in ("drafter", "cache"))
    return Check(
        label=label,
        drafter=drafter if isinstance(drafter, str) else None,
        cache=cache if isinstance(cache, str) else None,
        block_size=fields.integer("block_size"),
        anchors=fields.optional_text("anchors"),
        total=total,
        seen=seen,
        unseen=unseen,
        untrained=bucket_from(same_group or untrained),
        by_offset=buckets_from(fields.by_offset("by_ctx_pos_start")),
        differences={offset: item for offset, item in differences.items() if offset != 0},
        by_context_length=by_context_length(fields),
        by_prompt_set=buckets_from(fields.named_objects("by_prompt_set")),
        by_slot=_slots(fields),
        warnings=fields.optional_texts("warnings"),
        extra={key: value for key, value in document.items() if key not in _CHECK_KEYS},
    )


def _sides(fields: Fields) -> tuple[str, str]:
    """What stood on either side of a comparison; the cache is left out where it is the same for both."""
    a, b = (fields.optional_object(key) for key in ("a", "b"))
    if a is None or b is None:
        raise fields.bad("a" if a is None else "b", "an object of a drafter and a cache")
    sides = [(side.optional_text("drafter"), side.optional_text("cache")) for side in (a, b)]
    if sides[0][1] == sides[1][1] and sides[0][0] != sides[1][0]:
        first, second = (short_path(drafter or "drafter") for drafter, _ in sides)
    else:
        first, second = (side_label(*side) for side in sides)
    return first, second


def side_label(drafter: str | None, cache: str | None) -> str:
    """A pair of drafter and cache in words."""
    return f"{short_path(drafter or 'drafter')} on {short_path(cache or 'cache', parts=1)}"


def _compared(fields: Fields) -> Compared:
    """One metric's two values and their difference."""
    return Compared(
        a=fields.number("a"),
        b=fields.number("b"),
        difference=fields.number("difference"),
        ci95=fields.optional_interval("ci95"),
    )


def comparison_from(fields: Fields) -> Comparison:
    """One entry of a check's `comparison`.

    Raises:
        InputError: a key is missing or has another kind.
    """
    metrics = {name: fields.optional_object(name) for name in METRICS}
    a, b = _sides(fields)
    return Comparison(
        a=a,
        b=b,
        paired=fields.boolean("paired"),
        num_prompts=fields.optional_integer("num_prompts"),
        num_anchors=fields.optional_integer("num_anchors"),
        metrics={name: _compared(item) for name, item in metrics.items() if item is not None},
        verdict=fields.optional_text("verdict"),
    )


def checks_from_json(document: Mapping[str, Any], *, where: str, label: str) -> list[Check | Comparison]:
    """Every check that a document holds, then its comparisons: one of each pair of drafter and cache under `checks`."""
    fields = Fields(where, document)
    nested = fields.objects("checks")
    checks = [check_from_json(item.value, where=item.where, label=check_label(item.value) or label) for item in nested]
    # Keys that only the whole document has (the untrained drafter) belong to the first, which it repeats.
    whole = check_from_json(document, where=where, label=check_label(document) or label)
    return [whole, *checks[1:], *map(comparison_from, fields.objects("comparison"))]


def check_label(document: Mapping[str, Any]) -> str | None:
    """A short name: the last two folders of the drafter that the record names; None where it names none."""
    drafter = document.get("drafter")
    return short_path(drafter) if isinstance(drafter, str) and drafter else None
