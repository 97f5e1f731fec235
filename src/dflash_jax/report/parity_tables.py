"""A parity as tables: by offset, what each exchange of a link did, and what else was tried."""

from dflash_jax.report.check_tables import accept_len_text
from dflash_jax.report.parity_record import Measured, OffsetParity, Parity
from dflash_jax.report.tables import NONE, Table, count, scientific, with_interval

LINKS = {
    "features": "features",
    "labels": "labels",
    "target": "target (features and labels)",
    "context_positions": "context positions",
    "block_positions": "block positions",
    "positions": "positions (context and block)",
    "near_positions": "positions, as at the smallest offset",
    "drafter": "drafter",
}
"""The links of the chain between a text and its accept_len, as a page writes them."""

REFERENCE = (
    "The reference is the same texts with exact angles, features and labels computed here, and absolute positions, at"
    " the smallest offset."
)


def link_name(name: str) -> str:
    """A link, or a probe, as a page writes it."""
    return LINKS.get(name, name)


def measured_text(value: Measured | None, *, sign: str = "") -> str:
    """A mean with its interval; a dash where there is none."""
    return NONE if value is None else with_interval(value.mean, value.ci95, sign=sign)


def offsets_table(parity: Parity) -> Table:
    """One row per offset: verdict, acceptance, its paired difference, and how far the numerics moved."""

    def row(offset: int, item: OffsetParity) -> tuple[str, ...]:
        agreement = item.argmax_agreement
        return (
            str(offset),
            item.verdict,
            measured_text(item.accept_len),
            measured_text(item.difference, sign="+"),
            NONE if item.tau is None else f"{item.tau:.3f}",
            f"{count(item.num_anchors_differing)} of {count(item.num_anchors)}",
            scientific(item.feature_drift),
            scientific(item.drafter_drift),
            NONE if agreement is None else f"{agreement:.2%}",
        )

    rows = [row(offset, item) for offset, item in parity.offsets.items()]
    if parity.reference:
        tau = parity.reference.replay
        cells = ("reference", NONE, accept_len_text(parity.reference), NONE, f"{tau.tau_micro:.3f}" if tau else NONE)
        rows.append((*cells, *(NONE,) * 4))
    columns = ("ctx_pos_start", "verdict", "accept_len_mean [95 %]", "difference to reference [95 %]", "tau")
    columns += ("anchors that differ", "feature drift", "drafter drift", "argmax agreement")
    notes = [REFERENCE + " Differences are paired by anchor; drifts are relative, root mean square."]
    if parity.margin is not None:
        notes.append(
            f"holds: the whole interval lies within ±{parity.margin:g} accepted tokens; broken: it leaves out 0 and its"
            " centre lies beyond the margin; undecided: neither."
        )
    rule = len(parity.offsets) if parity.reference else None
    return Table(title=f"Parity: {parity.label}", columns=columns, rows=tuple(rows), notes=tuple(notes), rule=rule)


def exchanges_table(parity: Parity) -> Table | None:
    """accept_len with one link mended in the engine's chain, and with it alone the engine's. None where none was."""
    rows = []
    for offset, item in parity.offsets.items():
        names = [*item.swaps, *(name for name in item.spoils if name not in item.swaps)]
        rows += [
            (str(offset), link_name(name), measured_text(item.swaps.get(name)), measured_text(item.spoils.get(name)))
            for name in names
        ]
    if not rows:
        return None
    columns = ("ctx_pos_start", "link", "mended in the engine's chain", "the engine's in a sound chain")
    notes = [
        "accept_len_mean on the same anchors. The link to blame brings acceptance back when it alone is mended, and"
        " takes it away when it alone is the engine's."
    ]
    if parity.reference:
        notes.append(f"The reference has {accept_len_text(parity.reference)} on all prompts.")
    return Table(title="One link exchanged at a time", columns=columns, rows=tuple(rows), notes=tuple(notes))


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
    return Table(title="Evidence for the cause", columns=("test", "result"), rows=parity.evidence)


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
    makers = (offsets_table, exchanges_table, evidence_table, probes_table, memory_table, lengths_table)
    return [table for make in makers if (table := make(parity)) is not None]
