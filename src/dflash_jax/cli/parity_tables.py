"""A parity's result for people: the verdict per offset, what exchanging links did, the cause, and warnings."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from dflash_jax.cli.check_tables import bucket_table, interval_text, number_text, text_table

_SETTINGS = ("rope", "drafter_rope", "drafter_positions", "context_shift", "block_shift")
_COLUMNS = (
    "ctx_pos_start",
    "verdict",
    "accept_len_mean",
    "difference",
    "anchors differing",
    "feature drift",
    "argmax agreement",
    "drafter drift",
)
_STYLE = {"holds": "green", "broken": "bold red", "undecided": "yellow"}


def is_parity(value: Any) -> bool:
    """Whether a JSON value is the result of a parity."""
    return isinstance(value, Mapping) and "by_ctx_pos_start" in value and "cause_id" in value


def _drift(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _by_offset(parity: Mapping[str, Any]) -> Any:
    rows = []
    for offset, row in parity["by_ctx_pos_start"].items():
        more = row["more_prompts_needed"]
        verdict = row["verdict"] if more is None else f"{row['verdict']}: needs {more:,} more prompts"
        rows.append(
            (
                f"{int(offset):,}",
                verdict,
                interval_text(row["accept_len_mean"], row["accept_len_ci95"]),
                interval_text(row["accept_len_difference"], row["ci95"], sign="+"),
                f"{row['num_anchors_differing']:,} of {row['num_anchors']:,}",
                _drift(row["feature_drift"]),
                f"{row['argmax_agreement']:.1%}",
                _drift(row["drafter_drift"]),
            )
        )
    return text_table(
        f"By position offset, against the reference ({number_text(parity['reference']['accept_len_mean'])})",
        _COLUMNS,
        rows,
        note=f"holds: the 95 % interval of the difference lies within ±{parity['margin']:g}",
    )


def _exchanges(parity: Mapping[str, Any]) -> Any:
    """A row per link, a column pair per broken offset; None where nothing is broken."""
    broken = {offset: row for offset, row in parity["by_ctx_pos_start"].items() if row["swaps"]}
    if not broken:
        return None
    names = dict.fromkeys(name for row in broken.values() for name in row["swaps"])
    rows = [
        (name, *(number_text(row[part].get(name)) for row in broken.values() for part in ("swaps", "spoils")))
        for name in names
    ]
    columns = [f"{what} at {int(offset):,}" for offset in broken for what in ("mended", "spoils")]
    return text_table(
        "accept_len with one link mended in the engine's chain, and with the engine's link in a sound chain",
        ("link", *columns),
        rows,
    )


def show_parity(parity: Mapping[str, Any], *, console: Console) -> None:
    """Print a parity's result.

    Args:
        parity: the document that `parity` returns.
        console: where to print.
    """
    settings = ", ".join(f"{name} {parity[name]}" for name in _SETTINGS)
    source = f"the cache {parity['cache']}, " if parity["cache"] else ""
    console.print(Text(f"drafter {parity['drafter']} on {parity['num_prompts']:,} prompts; engine: {source}{settings}"))
    console.print(_by_offset(parity))
    exchanges = _exchanges(parity)
    if exchanges is not None:
        console.print(exchanges)
    if parity["by_context_length"]:
        console.print(bucket_table("By real context length", "tokens", parity["by_context_length"]))
    for item in parity["evidence"]:
        console.print(Text(f"{item['test']}:\n    {item['result']}"))
    for note in parity["notes"]:
        console.print(Text(f"note: {note}"))
    if parity["warnings"]:
        text = Text("\n\n".join(parity["warnings"]))
        console.print(Panel(text, title="WARNING", box=box.HEAVY, style="bold red", expand=False))
    verdict = Text(f"parity: {parity['verdict']}", style=_STYLE[parity["verdict"]])
    if parity["cause"] is not None:
        verdict.append(f"\n{parity['cause_id']}: {parity['cause']}")
    console.print(Panel(verdict, box=box.HEAVY, expand=False))
