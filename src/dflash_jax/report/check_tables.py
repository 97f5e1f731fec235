"""A check in the form of the baseline report, several checks side by side, and comparisons."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.table
from rich.text import Text

from dflash_jax.report.check_record import Bucket, Check, Comparison, Difference, check_from_json, check_label
from dflash_jax.report.tables import NONE, Table, count, lettered, on_its_side, with_interval

MOST_ALONG = 2
"""Checks whose columns fit beside each other."""

BREAKDOWNS = {
    "context": ("context length", "by_context_length"),
    "sets": ("prompt set", "by_prompt_set"),
}


def difference_text(difference: Difference) -> str:
    """A paired difference with its interval, signed."""
    return with_interval(difference.mean, difference.ci95, sign="+")


def accept_len_text(bucket: Bucket) -> str:
    """A group's accept_len with its interval."""
    return with_interval(bucket.accept_len_mean, bucket.accept_len_ci95)


def _row(name: str, bucket: Bucket) -> tuple[str, str, str, str]:
    """The four columns of the baseline report."""
    return name, f"{bucket.num_anchors:,}", accept_len_text(bucket), f"{bucket.token_acc_mean:.3f}"


def _groups(check: Check) -> list[tuple[str, Bucket, int | None]]:
    """Every row of a check: name, statistics, and the offset where it is one."""
    rows: list[tuple[str, Bucket, int | None]] = [
        (str(offset), bucket, offset) for offset, bucket in check.by_offset.items()
    ]
    named = {"all": check.total, "unseen": check.unseen, "seen": check.seen, "untrained": check.untrained}
    return rows + [(name, bucket, None) for name, bucket in named.items() if bucket is not None]


def seen_warning(check: Check) -> str | None:
    """The line that must stand wherever a number of a drafter's own training prompts is shown."""
    if not check.only_seen:
        return None
    return (
        "WARNING: ONLY PROMPTS THE DRAFTER WAS TRAINED ON were measured. These numbers show what it remembers and say"
        " nothing about new prompts."
    )


def _notes(check: Check) -> list[str]:
    """What n and the intervals are."""
    prompts = (
        f" over the {check.total.num_prompts:,} prompts" if check.total.num_prompts is not None else " over prompts"
    )
    notes = [
        f"n counts anchors; accept_len is 0 to {check.block_size - 1} (block_size {check.block_size}, bonus excluded);"
        f" [95 % intervals] are bootstraps{prompts}."
    ]
    if check.anchors and check.anchors != "all":
        notes.append(f"Anchors: {check.anchors} of each response.")
    if check.total.num_unlabelled:
        notes.append(
            f"{check.total.num_unlabelled:,} slots without a label (past the text's end, or where it leaves the"
            " target's greedy path) are not counted."
        )
    return notes


def _rule(check: Check) -> int | None:
    """The first row that sums up."""
    return len(check.by_offset) or None


def baseline_table(check: Check) -> Table:
    """The baseline report's four columns; warnings, paired differences and the replay's tau are notes."""
    warning = seen_warning(check)
    notes = ([warning] if warning else []) + _notes(check)
    if check.differences:
        differences = "; ".join(f"{offset}: {difference_text(item)}" for offset, item in check.differences.items())
        notes.append(f"Paired difference of accept_len to offset {first_offset(check)}: {differences}")
    if check.main.replay:
        tau = with_interval(check.main.replay.tau_micro, check.main.replay.tau_ci95)
        notes.append(f"Replay tau (tokens per target pass, bonus included, micro), {check.group.lower()}: {tau}")
    return Table(
        title=f"Offline accept check: {check.label}",
        columns=("ctx_pos_start", "n", "accept_len_mean", "token_acc_mean"),
        rows=tuple(_row(name, bucket) for name, bucket, _ in _groups(check)),
        notes=tuple(notes),
        rule=_rule(check),
    )


def first_offset(check: Check) -> int:
    """The offset that the others are compared to: the smallest."""
    return min(check.by_offset, default=0)


def page_table(check: Check) -> Table:
    """The baseline report's columns with prompts, the paired difference and replay's tau where the check has them."""
    groups = _groups(check)
    has_tau = any(bucket.replay for _, bucket, _ in groups)
    has_prompts = any(bucket.num_prompts is not None for _, bucket, _ in groups)
    rows: list[tuple[str, ...]] = []
    for name, bucket, offset in groups:
        cells: tuple[str, ...] = _row(name, bucket)
        if has_prompts:
            cells = (cells[0], count(bucket.num_prompts), *cells[1:])
        if check.differences:
            difference = check.differences.get(offset) if offset is not None else None
            cells += (difference_text(difference) if difference else NONE,)
        if has_tau:
            replay = bucket.replay
            cells += (with_interval(replay.tau_micro, replay.tau_ci95) if replay else NONE,)
        rows.append(cells)
    columns: tuple[str, ...] = ("ctx_pos_start", *(("prompts",) if has_prompts else ()), "n")
    columns += ("accept_len_mean [95 %]", "token_acc_mean")
    columns += (f"difference to offset {first_offset(check)} [95 %]",) if check.differences else ()
    columns += ("replay tau micro [95 %]",) if has_tau else ()
    warning = seen_warning(check)
    notes = ([warning] if warning else []) + _notes(check)
    if check.main.replay and check.main.replay.why:
        notes.append(f"All anchors against the chain: {check.main.replay.why}")
    title = f"Check: {check.label}"
    return Table(title=title, columns=columns, rows=tuple(rows), notes=tuple(notes), rule=_rule(check))


def lettered_labels(checks: Sequence[Check]) -> list[str]:
    """The names of checks, with a letter each where there are several."""
    labels = [check.label for check in checks]
    if len(labels) == 1:
        return labels
    return [f"{letter}) {label}" for letter, label in zip(lettered(labels), labels, strict=True)]


def _legend(letters: Sequence[str], checks: Sequence[Check]) -> list[str]:
    """Which letter is which check, and what stands against it."""
    lines = []
    for letter, check in zip(letters, checks, strict=True):
        seen = " (ONLY PROMPTS IT WAS TRAINED ON)" if check.only_seen else ""
        lines.append(f"{letter}) {check.label}{seen}")
    return lines


def _readable(table: Table, checks: Sequence[Check]) -> Table:
    """A table with columns for each check, on its side where they are too many for a page."""
    return table if len(checks) <= MOST_ALONG else on_its_side(table)


def side_by_side(checks: Sequence[Check]) -> Table:
    """accept_len and token_acc of several checks, before and after, by ctx_pos_start and over all."""
    letters = lettered([check.label for check in checks])
    groups = [{name: bucket for name, bucket, _ in _groups(check)} for check in checks]
    offsets = sorted({offset for check in checks for offset in check.by_offset})
    names = [str(offset) for offset in offsets] + ["all", "unseen", "seen", "untrained"]
    rows = []
    for name in names:
        buckets = [group.get(name) for group in groups]
        if not any(buckets):
            continue
        cells = [name]
        for bucket in buckets:
            cells += [accept_len_text(bucket), f"{bucket.token_acc_mean:.3f}"] if bucket else [NONE, NONE]
        rows.append(tuple(cells))
    columns = [column for letter in letters for column in (f"{letter} accept_len_mean [95 %]", f"{letter} token_acc")]
    sizes = sorted({check.block_size for check in checks})
    drafted = ", ".join(f"0 to {size - 1} (block_size {size})" for size in sizes)
    table = Table(
        title="Side by side",
        columns=("ctx_pos_start", *columns),
        rows=tuple(rows),
        notes=(*_legend(letters, checks), f"accept_len is {drafted}, bonus excluded; intervals are over prompts."),
        rule=len(offsets) or None,
    )
    return _readable(table, checks)


def breakdown_table(checks: Sequence[Check], kind: str) -> Table | None:
    """accept_len by context length or by prompt set, a pair of columns per check. None where no check has it."""
    word, attribute = BREAKDOWNS[kind]
    parts: list[Mapping[str, Bucket]] = [getattr(check, attribute) for check in checks]
    names = list(dict.fromkeys(name for part in parts for name in part))
    if not names:
        return None
    letters = lettered([check.label for check in checks]) if len(checks) > 1 else [""]
    rows = []
    for name in names:
        cells = [name]
        for part in parts:
            bucket = part.get(name)
            cells += list(_row(name, bucket)[1:]) if bucket else [NONE] * 3
        rows.append(tuple(cells))
    columns = [
        f"{letter} {column}".strip() for letter in letters for column in ("n", "accept_len_mean [95 %]", "token_acc")
    ]
    warning = seen_warning(checks[0]) if len(checks) == 1 else None
    notes = _legend(letters, checks) if len(checks) > 1 else [warning] if warning else []
    title = f"accept_len by {word}"
    return _readable(Table(title=title, columns=(word, *columns), rows=tuple(rows), notes=tuple(notes)), checks)


def slot_table(checks: Sequence[Check]) -> Table | None:
    """By slot: token_acc, and survival over all anchors and along the chain. None where no check has any of them."""
    slots = range(1, max(check.block_size for check in checks))
    columns: list[str] = []
    cells: list[list[str]] = []
    letters = lettered([check.label for check in checks]) if len(checks) > 1 else [""]
    for letter, check in zip(letters, checks, strict=True):
        token_acc = {slot.slot: with_interval(slot.token_acc, slot.ci95) for slot in check.by_slot}
        main = check.main
        for name, values in (
            ("token_acc", token_acc),
            ("survival", _by_slot(main.survival)),
            ("chain survival", _by_slot(main.replay.survival if main.replay else None)),
        ):
            if values:
                columns.append(f"{letter} {name}".strip())
                cells.append([values.get(slot, NONE) for slot in slots])
    if not columns:
        return None
    rows = tuple((str(slot), *(column[place] for column in cells)) for place, slot in enumerate(slots))
    notes = _legend(letters, checks) if len(checks) > 1 else []
    groups = dict.fromkeys(check.group.lower() for check in checks)
    notes.append(
        f"token_acc pools all that was checked; survival is of {' or '.join(groups)}: the share of blocks with at"
        " least that many accepted tokens."
    )
    table = Table(title="By slot of the block", columns=("slot", *columns), rows=rows, notes=tuple(notes))
    return _readable(table, checks)


def _by_slot(survival: Sequence[float] | None) -> dict[int, str]:
    """A survival curve's values by slot."""
    return {slot: f"{value:.3f}" for slot, value in enumerate(survival or (), start=1)}


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """One row per metric of each comparison: both sides, the difference and its interval."""
    rows = tuple(
        (
            f"{item.a} → {item.b}",
            name,
            f"{metric.a:.3f}",
            f"{metric.b:.3f}",
            with_interval(metric.difference, metric.ci95, sign="+"),
            "yes" if item.paired else "no",
            count(item.num_prompts),
            count(item.num_anchors),
        )
        for item in comparisons
        for name, metric in item.metrics.items()
    )
    columns = ("a → b", "metric", "a", "b", "b − a [95 %]", "paired", "prompts", "anchors")
    note = "Paired: both sides saw the same anchors of the same texts. Not paired: the difference of two means."
    return Table(title="Comparisons", columns=columns, rows=rows, notes=(note,), left=2)


def render_table(check: Mapping[str, Any]) -> rich.table.Table:
    """A check's JSON document as a terminal table in the form of the baseline report.

    Args:
        check: the document that `check` writes.

    Raises:
        InputError: a key is missing or has another kind.
    """
    table = baseline_table(check_from_json(check, where="the check", label=_title(check)))
    # Text objects, not strings: whether or not the console reads markup, brackets are shown as they are.
    rendered = rich.table.Table(title=Text(table.title), caption=Text("\n".join(table.notes)), caption_justify="left")
    for place, column in enumerate(table.columns):
        rendered.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    for place, row in enumerate(table.rows):
        rendered.add_row(*map(Text, row), end_section=table.rule == place + 1)
    return rendered


def markdown_table(check: Mapping[str, Any]) -> str:
    """A check's JSON document as a Markdown table in the form of the baseline report.

    Args:
        check: the document that `check` writes.

    Raises:
        InputError: a key is missing or has another kind.
    """
    return baseline_table(check_from_json(check, where="the check", label=_title(check))).markdown


def _title(check: Mapping[str, Any]) -> str:
    """What was checked: the drafter's path as recorded, or a word for it."""
    drafter = check.get("drafter")
    return drafter if isinstance(drafter, str) else check_label(check) or "drafter"
