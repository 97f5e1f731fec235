"""The check as a table in the form of the baseline report: one source for the terminal, Markdown and the page."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.text import Text

from dflash_jax.report.fields import Interval
from dflash_jax.report.records import Bucket, Check, Decode, Difference, check_from_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Text cells under column names; `notes` are lines under the table. The first column is left-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def markdown(self) -> str:
        """The table as GitHub Markdown, its notes below."""

        def line(cells: tuple[str, ...]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = ("---",) + ("---:",) * (len(self.columns) - 1)
        lines = [line(self.columns), line(rule), *map(line, self.rows)]
        return "\n".join(lines + ([""] + [f"- {note}" for note in self.notes] if self.notes else [])) + "\n"


def with_interval(mean: float, interval: Interval | None, *, sign: str = "") -> str:
    """A mean with its 95 % interval, three decimals: `0.512 [0.480, 0.544]`; `sign="+"` shows the sign of all three."""
    if interval is None:
        return f"{mean:{sign}z.3f}"
    return f"{mean:{sign}z.3f} [{interval.low:{sign}z.3f}, {interval.high:{sign}z.3f}]"


def difference_text(difference: Difference) -> str:
    """A paired difference with its interval, signed."""
    return with_interval(difference.mean, difference.ci95, sign="+")


def _row(name: str, bucket: Bucket) -> tuple[str, str, str, str]:
    """The four columns of the baseline report."""
    mean = with_interval(bucket.accept_len_mean, bucket.accept_len_ci95)
    return name, f"{bucket.num_anchors:,}", mean, f"{bucket.token_acc_mean:.3f}"


def _groups(check: Check) -> list[tuple[str, Bucket, int | None]]:
    """Every row of a check: name, statistics, and the offset where it is one."""
    rows: list[tuple[str, Bucket, int | None]] = [
        (str(offset), bucket, offset) for offset, bucket in check.by_offset.items()
    ]
    named = {"all": check.total, "unseen": check.unseen, "seen": check.seen, "untrained": check.untrained}
    return rows + [(name, bucket, None) for name, bucket in named.items() if bucket is not None]


def _notes(check: Check) -> list[str]:
    """What n and the intervals are."""
    prompts = (
        f" over the {check.total.num_prompts:,} prompts" if check.total.num_prompts is not None else " over prompts"
    )
    return [
        f"n counts anchors; accept_len is 0 to {check.block_size - 1} (block_size {check.block_size}, bonus excluded);"
        f" [95 % intervals] are bootstraps{prompts}."
    ]


def baseline_table(check: Check) -> Table:
    """The baseline report's four columns; paired differences and the replay's tau are notes."""
    notes = _notes(check)
    if check.differences:
        differences = "; ".join(f"{offset}: {difference_text(item)}" for offset, item in check.differences.items())
        notes.append(f"Paired difference of accept_len to offset 0: {differences}")
    if check.main.replay:
        tau = with_interval(check.main.replay.tau_micro, check.main.replay.tau_ci95)
        notes.append(f"Replay tau (tokens per target pass, bonus included, micro), {check.group.lower()}: {tau}")
    return Table(
        title=f"Offline accept check: {check.label}",
        columns=("ctx_pos_start", "n", "accept_len_mean", "token_acc_mean"),
        rows=tuple(_row(name, bucket) for name, bucket, _ in _groups(check)),
        notes=tuple(notes),
    )


def page_table(check: Check) -> Table:
    """The baseline report's columns, then the paired difference and the replay's tau where the check has them."""
    groups = _groups(check)
    has_tau = any(bucket.replay for _, bucket, _ in groups)
    rows: list[tuple[str, ...]] = []
    for name, bucket, offset in groups:
        cells: tuple[str, ...] = _row(name, bucket)
        if check.differences:
            difference = check.differences.get(offset) if offset is not None else None
            cells += (difference_text(difference) if difference else "–",)
        if has_tau:
            replay = bucket.replay
            cells += (with_interval(replay.tau_micro, replay.tau_ci95) if replay else "–",)
        rows.append(cells)
    columns: tuple[str, ...] = ("ctx_pos_start", "n", "accept_len_mean [95 %]", "token_acc_mean")
    columns += ("difference to offset 0 [95 %]",) if check.differences else ()
    columns += ("replay tau micro [95 %]",) if has_tau else ()
    return Table(title=f"Check: {check.label}", columns=columns, rows=tuple(rows), notes=tuple(_notes(check)))


def decode_table(decodes: tuple[Decode, ...]) -> Table:
    """One row per decode record."""

    def row(decode: Decode) -> tuple[str, ...]:
        plain, speedup = decode.plain_tokens_per_s, decode.speedup
        return (
            decode.label,
            f"{decode.num_prompts:,}",
            f"{decode.num_tokens:,}",
            "–" if decode.tokens_equal is None else "yes" if decode.tokens_equal else "NO",
            f"{decode.tau_micro:.3f}",
            "–" if decode.tau_macro is None else f"{decode.tau_macro:.3f}",
            f"{decode.tokens_per_s:,.1f}",
            "–" if plain is None else f"{plain:,.1f}",
            "–" if speedup is None else f"{speedup:.2f}×",
        )

    columns = ("decode", "prompts", "tokens", "equal to plain", "tau micro", "tau macro", "tokens/s", "plain tokens/s")
    return Table(title="Decoding", columns=(*columns, "speed-up"), rows=tuple(map(row, decodes)))


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
        # A rule parts the offsets from the rows that sum up.
        last_offset = place + 1 < len(table.rows) and table.rows[place + 1][0] == "all"
        rendered.add_row(*map(Text, row), end_section=last_offset)
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
    return drafter if isinstance(drafter, str) else "drafter"
