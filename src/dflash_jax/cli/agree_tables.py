"""An agreement's result for people: blocks by offset, what differs and why, the verdict last."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from dflash_jax.cli.check_tables import number_text, text_table

MAX_DIFFERENCES = 20
_COLUMNS = ("ctx_pos_start", "texts", "blocks", "equal", "differences", "replay tau", "decode tau")


def is_agree(value: Any) -> bool:
    """Whether a JSON value is the result of an agree."""
    return isinstance(value, Mapping) and {"num_blocks", "num_equal", "differences"} <= value.keys()


def _by_offset(result: Mapping[str, Any]) -> Any:
    rows = [
        (
            f"{int(offset):,}",
            f"{row['num_texts']:,}",
            f"{row['num_blocks']:,}",
            f"{row['num_equal']:,}",
            f"{row['num_differences']:,}",
            number_text(row["replay_tau_micro"]),
            number_text(row["decode_tau_micro"]),
        )
        for offset, row in result["by_ctx_pos_start"].items()
    ]
    note = "equal: decoding starts a block at the same anchor as the replay and commits the same tokens"
    return text_table("Blocks of decoding, by position offset", _COLUMNS, rows, note=note)


def _token(difference: Mapping[str, Any], side: str) -> str:
    token, piece = difference["tokens"][side], difference["text"][side]
    return "–" if token is None else f"{token} {piece!r}"


def _differences(result: Mapping[str, Any]) -> Any:
    rows = [
        (
            one["prompt"],
            f"{one['ctx_pos_start']:,}",
            f"{one['anchor']:,}",
            str(one["slot"]),
            _token(one, "offline"),
            _token(one, "online"),
            number_text(one["margin"]),
            one["cause"],
            f"{one['num_blocks']:,}",
        )
        for one in result["differences"][:MAX_DIFFERENCES]
    ]
    left = len(result["differences"]) - len(rows)
    columns = ("prompt", "ctx_pos_start", "anchor", "slot", "offline", "online", "margin", "cause", "blocks")
    note = "blocks: decoding's that are not the replay's because of it" + (f"; {left:,} more in --json" if left else "")
    return text_table("Differences", columns, rows, note=note)


def show_agree(result: Mapping[str, Any], *, console: Console) -> None:
    """Print an agreement's result.

    Args:
        result: the document that `agree` returns.
        console: where to print.
    """
    served = f", decoded with {result['served_drafter']}" if result["served_drafter"] else ""
    features = f"{result['features_dtype']} features"
    console.print(Text(f"drafter {result['drafter']} on {result['cache']} ({features}){served}; rope {result['rope']}"))
    console.print(_by_offset(result))
    if result["differences"]:
        console.print(_differences(result))
        for found in dict.fromkeys(f"{one['cause']}: {one['found']}" for one in result["differences"]):
            console.print(Text(found))
    if result["warnings"]:
        text = Text("\n\n".join(result["warnings"]))
        console.print(Panel(text, title="WARNING", box=box.HEAVY, style="bold red", expand=False))
    equal, blocks = result["num_equal"], result["num_blocks"]
    if not result["differences"]:
        verdict = Text(f"agree: every block is equal ({blocks:,} of {blocks:,})", style="green")
    else:
        causes = ", ".join(f"{name} {count:,}" for name, count in result["causes"].items())
        share = equal / blocks if blocks else 0.0
        verdict = Text(f"agree: {equal:,} of {blocks:,} blocks are equal ({share:.2%}); causes: {causes}", style="red")
    console.print(Panel(verdict, box=box.HEAVY, expand=False))
