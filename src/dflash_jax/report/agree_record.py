"""An `agree` record (docs/design/014): as typed values, as sentences, and as tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dflash_jax.report.check_record import check_label
from dflash_jax.report.fields import Fields
from dflash_jax.report.sentences import Sentence, Tile
from dflash_jax.report.tables import NONE, Table, plural

MAX_ROWS = 40
_READ_KEYS = {
    "num_blocks",
    "num_equal",
    "differences",
    "causes",
    "by_ctx_pos_start",
    "num_texts",
    "features_dtype",
    "served_drafter",
    "warnings",
}
CAUSES = {
    "label": "the stored label, or the stored text, is not what decoding's target says",
    "features": "the stored features are not those of decoding's target, so the drafter drafts otherwise",
    "drafter": "decoding's drafter is not the checked one",
    "numerics": "a near tie, which rounding decides",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OffsetBlocks:
    """Decoding's blocks at one offset, those that are the replay's, and tau of both (None: no block)."""

    num_blocks: int
    num_equal: int
    num_differences: int
    replay_tau: float | None
    decode_tau: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockDifference:
    """One place where decoding parts from the replay; tokens are written out, a dash where there is none."""

    prompt: str
    ctx_pos_start: int
    anchor: int
    slot: int
    offline: str
    online: str
    margin: float | None
    cause: str
    found: str
    num_blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Agree:
    """One `agree` record; offsets rise. `extra` holds every key not read here."""

    label: str
    num_blocks: int
    num_equal: int
    num_texts: int
    features_dtype: str | None
    served_drafter: str | None
    causes: dict[str, int]
    offsets: dict[int, OffsetBlocks]
    differences: tuple[BlockDifference, ...]
    warnings: tuple[str, ...]
    extra: dict[str, Any]


def is_agree(document: Any) -> bool:
    """Whether a JSON value is an agree's document."""
    return isinstance(document, dict) and {"num_blocks", "num_equal", "differences"} <= document.keys()


def _token(fields: Fields, side: str) -> str:
    """A token of one side, as its text where the record has it."""
    tokens, texts = fields.optional_object("tokens"), fields.optional_object("text")
    token = tokens.optional_integer(side) if tokens else None
    text = texts.optional_text(side) if texts else None
    return NONE if token is None else str(token) if text is None else f"{token} {text!r}"


def _difference(fields: Fields) -> BlockDifference:
    """One item of `differences`."""
    return BlockDifference(
        prompt=fields.text("prompt"),
        ctx_pos_start=fields.integer("ctx_pos_start"),
        anchor=fields.integer("anchor"),
        slot=fields.integer("slot"),
        offline=_token(fields, "offline"),
        online=_token(fields, "online"),
        margin=fields.optional_number("margin"),
        cause=fields.text("cause"),
        found=fields.text("found"),
        num_blocks=fields.integer("num_blocks"),
    )


def _offset(fields: Fields) -> OffsetBlocks:
    """One entry of `by_ctx_pos_start`."""
    return OffsetBlocks(
        num_blocks=fields.integer("num_blocks"),
        num_equal=fields.integer("num_equal"),
        num_differences=fields.integer("num_differences"),
        replay_tau=fields.optional_number("replay_tau_micro"),
        decode_tau=fields.optional_number("decode_tau_micro"),
    )


def agree_from_json(document: Mapping[str, Any], *, where: str, label: str) -> Agree:
    """An agree's JSON document as an `Agree`.

    Args:
        document: the contract of docs/design/014.
        where: what to call it in an error.
        label: its short name on the page, where the record names no drafter.

    Raises:
        InputError: a key is missing or has another kind.
    """
    fields = Fields(where, document)
    causes = fields.optional_object("causes")
    return Agree(
        label=check_label(document) or label,
        num_blocks=fields.integer("num_blocks"),
        num_equal=fields.integer("num_equal"),
        num_texts=fields.integer("num_texts"),
        features_dtype=fields.optional_text("features_dtype"),
        served_drafter=fields.optional_text("served_drafter"),
        causes={name: causes.integer(name) for name in causes.value} if causes else {},
        offsets={offset: _offset(item) for offset, item in fields.by_offset("by_ctx_pos_start").items()},
        differences=tuple(map(_difference, fields.objects("differences"))),
        warnings=fields.optional_texts("warnings"),
        extra={key: value for key, value in document.items() if key not in _READ_KEYS},
    )


def agree_sentences(agree: Agree) -> list[Sentence]:
    """What an agree says, in plain words."""
    blocks, texts = plural(agree.num_blocks, "block"), plural(agree.num_texts, "text")
    if not agree.differences:
        text = f"decoding visits every block of the offline replay and commits the same tokens: {blocks}, {texts}."
        said = [Sentence(mark="good", lead="Offline equals online", text=text)]
    else:
        share = f"{agree.num_equal / agree.num_blocks:.2%}" if agree.num_blocks else "none"
        text = f"{agree.num_equal:,} of {blocks} that decoding makes are the offline replay's ({share}), on {texts}."
        said = [Sentence(mark="bad", lead="Offline is not online", text=text)]
        told = "; ".join(f"{name} {count:,} ({CAUSES.get(name, 'unknown')})" for name, count in agree.causes.items())
        said.append(Sentence(mark="bad", lead="First causes", text=told + "."))
        if agree.causes.keys() == {"features"} and agree.features_dtype in ("bfloat16", "int8", "float8"):
            text = (
                f"the cache stores {agree.features_dtype} features; one of float32 shows whether anything else differs."
            )
            said.append(Sentence(mark="info", lead="Storage", text=text))
    return said + [Sentence(mark="warn", lead="Warning", text=f"{line}.") for line in agree.warnings]


def agree_tiles(agree: Agree) -> list[Tile]:
    """An agree's key numbers."""
    mark = "bad" if agree.differences else "good"
    value = f"{agree.num_equal:,} of {agree.num_blocks:,}"
    return [Tile(name="blocks, offline = online", value=value, under=plural(agree.num_texts, "text"), mark=mark)]


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _offsets_table(agree: Agree) -> Table:
    """One row per offset."""
    rows = tuple(
        (
            str(offset),
            f"{row.num_blocks:,}",
            f"{row.num_equal:,}",
            f"{row.num_differences:,}",
            _number(row.replay_tau),
            _number(row.decode_tau),
        )
        for offset, row in agree.offsets.items()
    )
    columns = ("ctx_pos_start", "blocks of decoding", "equal", "differences", "replay tau", "decode tau")
    note = "Equal: decoding starts a block at the same anchor as the replay and commits the same tokens. tau is micro."
    return Table(title="Offline replay and decoding, block by block", columns=columns, rows=rows, notes=(note,))


def _differences_table(agree: Agree) -> Table:
    """One row per difference, the first of them."""
    rows = tuple(
        (
            one.prompt,
            one.cause,
            one.found,
            str(one.ctx_pos_start),
            str(one.anchor),
            str(one.slot),
            one.offline,
            one.online,
            _number(one.margin),
            f"{one.num_blocks:,}",
        )
        for one in agree.differences[:MAX_ROWS]
    )
    columns = ("prompt", "cause", "found", "ctx_pos_start", "anchor", "slot", "offline", "online", "margin", "blocks")
    notes = ["Margin: logits between the two tokens. Blocks: decoding's that are not the replay's because of it."]
    if len(agree.differences) > MAX_ROWS:
        notes.append(f"{len(agree.differences) - MAX_ROWS:,} more are in the record.")
    return Table(title="Where they part", columns=columns, rows=rows, notes=tuple(notes), left=3)


def agree_tables(agree: Agree) -> list[Table]:
    """Every table of one agree."""
    return [_offsets_table(agree), *([_differences_table(agree)] if agree.differences else [])]
