"""A parity as tables: by offset, what each exchange of a link did, and what else was tried."""

from collections.abc import Iterable

from dflash_jax.report.check_tables import accept_len_text
from dflash_jax.report.parity_record import Measured, OffsetParity, Parity
from dflash_jax.report.tables import NONE, Table, count, scientific, with_interval

LINKS = {
    "none": "none: the engine as it is",
    "features": "features",
    "labels": "labels",
    "target": "target (features and labels)",
    "context_positions": "context positions",
    "block_positions": "block positions",
    "positions": "positions (context and block)",
    "near_positions": "positions, as at the smallest offset",
    "drafter": "drafter",
    "all": "all: a sound engine",
}
"""The links of the chain between a text and its accept_len, as a page writes them."""

REFERENCE = (
    "The reference is the same texts with exact angles, features and labels computed here, and absolute positions, at"
    " the smallest offset."
)

SEEN_WARNING = (
    "WARNING: ONLY PROMPTS THE DRAFTER WAS TRAINED ON were measured. Parity may be read off them, how much is accepted"
    " may not."
)


def link_name(name: str) -> str:
    """A link, or a probe, as a page writes it."""
    return LINKS.get(name, name)


def measured_text(value: Measured | None, *, sign: str = "") -> str:
    """A mean with its interval; a dash where there is none."""
    return NONE if value is None else with_interval(value.mean, value.ci95, sign=sign)


def offsets_table(parity: Parity) -> Table:
    """One row per offset: verdict, acceptance, and its paired difference to the reference."""

    def row(offset: int, item: OffsetParity) -> tuple[str, ...]:
        return (
            str(offset),
            item.verdict,
            measured_text(item.accept_len),
            measured_text(item.difference, sign="+"),
            NONE if item.tau is None else f"{item.tau:.3f}",
            f"{count(item.num_anchors_differing)} of {count(item.num_anchors)}",
        )

    rows = [row(offset, item) for offset, item in parity.offsets.items()]
    if parity.reference:
        tau = parity.reference.replay
        tau_text = f"{tau.tau_micro:.3f}" if tau else NONE
        rows.append(("reference", NONE, accept_len_text(parity.reference), NONE, tau_text, NONE))
    columns = ("ctx_pos_start", "verdict", "accept_len_mean [95 %]", "difference to reference [95 %]", "tau")
    notes = [SEEN_WARNING] if parity.only_seen else []
    notes.append(REFERENCE + " Differences are paired by anchor.")
    if parity.margin is not None:
        notes.append(
            f"holds: the whole interval lies within ±{parity.margin:g} accepted tokens; broken: it leaves out 0 and its"
            " centre lies beyond the margin; undecided: neither."
        )
    return Table(
        title=f"Parity: {parity.label}",
        columns=(*columns, "anchors that differ"),
        rows=tuple(rows),
        notes=tuple(notes),
        rule=len(parity.offsets) if parity.reference else None,
        left=2,
    )


def numerics_table(parity: Parity) -> Table:
    """One row per offset: how far features and drafter moved, and the difference to the engine's smallest offset."""

    def row(offset: int, item: OffsetParity) -> tuple[str, ...]:
        agreement = NONE if item.argmax_agreement is None else f"{item.argmax_agreement:.2%}"
        difference = measured_text(item.offset_difference, sign="+")
        return str(offset), scientific(item.feature_drift), scientific(item.drafter_drift), agreement, difference

    columns = ("ctx_pos_start", "feature drift", "drafter drift", "argmax agreement")
    return Table(
        title="Numerics",
        columns=(*columns, f"difference to the engine at {min(parity.offsets, default=0)} [95 %]"),
        rows=tuple(row(offset, item) for offset, item in parity.offsets.items()),
        notes=("Drifts are relative to the reference, root mean square; argmax agreement is with its next tokens.",),
    )


def _exchanged(parity: Parity, kind: str, *, title: str, notes: tuple[str, ...]) -> Table | None:
    """accept_len by the link exchanged, a column per offset that was taken apart. None where none was."""
    by_offset: dict[int, dict[str, Measured]] = {
        offset: links for offset, item in parity.offsets.items() if (links := getattr(item, kind))
    }
    names = sorted_links({name for links in by_offset.values() for name in links})
    if not names:
        return None
    rows = tuple((link_name(name), *(measured_text(links.get(name)) for links in by_offset.values())) for name in names)
    columns = ("link", *(f"accept_len at {offset}" for offset in by_offset))
    return Table(title=title, columns=columns, rows=rows, notes=notes)


def sorted_links(names: Iterable[str]) -> list[str]:
    """Links in the order of the chain, those that a page knows no words for last."""
    known = list(LINKS)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def mended_table(parity: Parity) -> Table | None:
    """The engine's accept_len with one link mended at a time. None where nothing was broken."""
    notes = (
        "The engine's chain with that one link made sound, on the same anchors of 32 prompts at most. The link that"
        " brings acceptance back is to blame.",
    )
    return _exchanged(parity, "swaps", title="One link mended at a time", notes=notes)


def spoiled_table(parity: Parity) -> Table | None:
    """The reference's accept_len with one link the engine's at a time. None where nothing was broken."""
    notes = ("A sound chain with that one link the engine's. The link that takes acceptance away is to blame.",)
    return _exchanged(parity, "spoils", title="One link spoiled at a time", notes=notes)


def probes_table(parity: Parity) -> Table | None:
    """accept_len of the reference with layers or block moved by one. None where the record has no probes."""
    rows = tuple((name, measured_text(value)) for name, value in parity.probes.items())
    if not rows:
        return None
    if parity.reference:
        rows = (("as it is", accept_len_text(parity.reference)), *rows)
    notes = ("Where a moved reference accepts more, the drafter was trained that way.",)
    return Table(title="The reference, moved by one", columns=("moved", "accept_len_mean"), rows=rows, notes=notes)


def evidence_table(parity: Parity) -> Table | None:
    """What was tried to name the cause. None where nothing was."""
    if not parity.evidence:
        return None
    return Table(title="Evidence for the cause", columns=("test", "result"), rows=parity.evidence, left=2)


def memory_table(parity: Parity) -> Table | None:
    """The reference on prompts the drafter was trained on, and on others. None where they are not told apart."""
    groups = {"seen (trained on)": parity.seen, "unseen": parity.unseen}
    rows = tuple(
        (
            name,
            count(group.num_prompts),
            f"{group.num_anchors:,}",
            accept_len_text(group),
            f"{group.token_acc_mean:.3f}",
        )
        for name, group in groups.items()
        if group
    )
    columns = ("prompts", "number", "n", "accept_len_mean [95 %]", "token_acc_mean")
    return Table(title="Seen and unseen prompts", columns=columns, rows=rows) if rows else None


def lengths_table(parity: Parity) -> Table | None:
    """Acceptance by real context length. None where the record has none."""
    rows = tuple(
        (name, f"{bucket.num_anchors:,}", accept_len_text(bucket), f"{bucket.token_acc_mean:.3f}")
        for name, bucket in parity.by_context_length.items()
    )
    columns = ("context length", "n", "accept_len_mean [95 %]", "token_acc_mean")
    return Table(title="accept_len by real context length", columns=columns, rows=rows) if rows else None


def parity_tables(parity: Parity) -> list[Table]:
    """Every table of one parity."""
    makers = (offsets_table, numerics_table, evidence_table, mended_table, spoiled_table, probes_table, memory_table)
    makers += (lengths_table,)
    return [table for make in makers if (table := make(parity)) is not None]
