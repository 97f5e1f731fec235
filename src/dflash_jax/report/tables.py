"""Tables: one source for the terminal, Markdown and the page; and how a number, an interval, a name is written."""

from collections.abc import Sequence
from dataclasses import dataclass

from dflash_jax.report.fields import Interval
from dflash_jax.report.run_record import Decode, HeldOut, Run

NONE = "–"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_ROWS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Text cells under column names; `notes` are lines under the table.

    The first `left` columns hold words and stand left, the others numbers and stand right. `rule` is the row that a
    line is drawn above, where the rows turn from parts to sums.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    rule: int | None = None
    left: int = 1

    @property
    def markdown(self) -> str:
        """The table as GitHub Markdown, its notes below."""

        def line(cells: tuple[str, ...]) -> str:
            return "| " + " | ".join(escape(cell).replace("|", "\\|") for cell in cells) + " |"

        rule = ("---",) * self.left + ("---:",) * (len(self.columns) - self.left)
        lines = [line(self.columns), line(rule), *map(line, self.rows)]
        return "\n".join(lines + (["", *(f"- {escape(note)}" for note in self.notes)] if self.notes else [])) + "\n"


def escape(text: str) -> str:
    """A text for Markdown: one line, and none of its marks makes an HTML tag or a link out of what a record holds."""
    return " ".join(text.split()).replace("<", "&lt;").replace("](", "]\\(").replace("][", "]\\[")


def code(text: str) -> str:
    """A name or path in Markdown's code quotes, longer ones than any in it."""
    text = " ".join(text.split())
    fence = "`"
    while fence in text:
        fence += "`"
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def with_interval(mean: float, interval: Interval | None, *, sign: str = "") -> str:
    """A mean with its 95 % interval, three decimals: `0.512 [0.480, 0.544]`; `sign="+"` shows the sign of all three."""
    if interval is None:
        return f"{mean:{sign}z.3f}"
    return f"{mean:{sign}z.3f} [{interval.low:{sign}z.3f}, {interval.high:{sign}z.3f}]"


def count(value: int | None) -> str:
    """A count with thousands parted, a dash where it is not known."""
    return NONE if value is None else f"{value:,}"


def plural(value: int, one: str) -> str:
    """A count and its noun: `1 prompt`, `2 prompts`."""
    return f"{value:,} {one}{'' if value == 1 else 's'}"


def scientific(value: float | None) -> str:
    """A small number: `0`, `3.1e-07`; a dash where it is not known."""
    if value is None:
        return NONE
    return "0" if value == 0 else f"{value:.1e}"


def on_its_side(table: Table) -> Table:
    """The table with a row for each of its columns: many records side by side are read down, not along.

    Names are shortened for their column, and a mean's interval goes to a line of its own.
    """
    columns = (table.columns[0], *(row[0] for row in table.rows))
    rows = [
        (name.replace("accept_len_mean", "accept_len"), *(row[place].replace(" [", "\n[") for row in table.rows))
        for place, name in enumerate(table.columns[1:], start=1)
    ]
    return Table(title=table.title, columns=columns, rows=tuple(rows), notes=table.notes)


def lettered(labels: Sequence[str]) -> list[str]:
    """`A`, `B`, ... for records side by side; their number beyond Z."""
    return [LETTERS[place] if place < len(LETTERS) else str(place + 1) for place in range(len(labels))]


def _equal_to_plain(decode: Decode) -> str:
    """Whether tokens are plain decoding's, and how many prompts flip where rounding explains them all."""
    if decode.only_rounding:
        return f"but for rounding ({len(decode.flips or ()):,} of {decode.num_prompts:,})"
    return NONE if decode.tokens_equal is None else "yes" if decode.tokens_equal else "NO"


def decode_table(decodes: Sequence[Decode]) -> Table:
    """One row per decode record."""

    def row(decode: Decode) -> tuple[str, ...]:
        plain, speedup = decode.plain_tokens_per_s, decode.speedup
        return (
            decode.label,
            f"{decode.num_prompts:,}",
            f"{decode.num_tokens:,}",
            _equal_to_plain(decode),
            f"{decode.tau_micro:.3f}",
            NONE if decode.tau_macro is None else f"{decode.tau_macro:.3f}",
            f"{decode.tokens_per_s:,.1f}",
            NONE if plain is None else f"{plain:,.1f}",
            NONE if speedup is None else _times(speedup, decode.speedup_ci95),
        )

    columns = ("decode", "prompts", "tokens", "equal to plain", "tau micro", "tau macro", "tokens/s", "plain tokens/s")
    note = "Speeds are of the decoding loops, timed once: prompts' passes and compiling are outside"
    if any(decode.speedup_ci95 for decode in decodes):
        note += "; intervals are over batches, and hold the machine's noise too."
    else:
        note += ", no interval is known."
    return Table(title="Decoding", columns=(*columns, "speed-up"), rows=tuple(map(row, decodes)), notes=(note,))


def _times(speedup: float, interval: Interval | None) -> str:
    """A speed-up with its interval."""
    return f"{speedup:.2f}×" + (f" [{interval.low:.2f}, {interval.high:.2f}]" if interval else "")


def run_table(run: Run) -> Table:
    """One row per drafter that a run kept, with the curve where it was kept."""

    def row(name: str) -> tuple[str, ...]:
        step = run.step_of(name)
        if step is None:
            return (name, *(NONE,) * 5)
        slots = [value for value in step.accuracy_by_slot[:1] if value is not None]
        return (
            name,
            NONE if step.loss is None else f"{step.loss:.3f}",
            NONE if step.accuracy is None else f"{step.accuracy:.3f}",
            f"{slots[0]:.3f}" if slots else NONE,
            NONE if step.learning_rate is None else f"{step.learning_rate:.1e}",
            NONE if step.seconds is None else f"{step.seconds:,.0f}",
        )

    names = list(run.records)
    notes = [
        "Loss and accuracies are of the training batch of that step: they say nothing about prompts not trained on."
    ]
    columns = ("drafter", "loss", "accuracy", "slot 1", "learning rate", "seconds")
    return Table(title=f"Kept drafters: {run.label}", columns=columns, rows=tuple(map(row, names)), notes=tuple(notes))


def held_out_table(run: Run) -> Table | None:
    """One row per held-out measurement of a run, the best one marked. None where there is none."""
    found, best = run.held_out, run.best
    if best is None:
        return None
    shown = found
    if len(found) > MOST_ROWS:
        even = {found[round(place * (len(found) - 1) / (MOST_ROWS - 1))].step for place in range(MOST_ROWS)}
        shown = [one for one in found if one.step in even or one is best]

    def row(one: HeldOut) -> tuple[str, ...]:
        return (
            f"{one.step:,}" + (" (best)" if one is best else ""),
            with_interval(one.tau_micro, one.tau_ci95),
            _three(one.tau_macro),
            _three(one.accept_len_mean),
            _three(one.token_acc_mean),
            count(one.num_prompts),
        )

    notes = [
        "The replay of decoding on held-out prompts (`--eval-cache`); tau is tokens per target pass, 1 is no gain."
        + ("" if any(one.tau_ci95 for one in found) else " The run recorded no intervals.")
    ]
    if best.num_seen:
        notes.append(f"{plural(best.num_seen, 'prompt')} of that cache were trained on and are left out.")
    if len(found) > 1:
        notes.append("The best is chosen by these very prompts and flattered by them: report numbers on others.")
    if len(shown) < len(found):
        notes.append(f"{len(shown):,} of {len(found):,} measurements, evenly spaced.")
    columns = ("step", "tau micro [95 %]", "tau macro", "accept_len_mean", "token_acc_mean", "prompts")
    rows = tuple(map(row, shown))
    return Table(title=f"Held-out replay tau: {run.label}", columns=columns, rows=rows, notes=tuple(notes))


def _three(value: float | None) -> str:
    """A number with three decimals; a dash where it is not known."""
    return NONE if value is None else f"{value:.3f}"
