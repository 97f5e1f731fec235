"""A check's result for people: the baseline report's form, buckets, both means, the comparison, and warnings."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_FACTS = (
    "drafter",
    "cache",
    "block_size",
    "draft_vocab_size",
    "anchors",
    "num_prompts",
    "num_anchors",
    "num_unlabelled",
    "num_departures",
)


def is_check(value: Any) -> bool:
    """Whether a JSON value is the result of a check."""
    return isinstance(value, Mapping) and "by_ctx_pos_start" in value and "accept_len_mean" in value


def number_text(value: float | None, *, sign: str = "") -> str:
    """A number to three places, with a sign where it is asked for; a dash where there is none."""
    return "–" if value is None else f"{value:{sign}z.3f}"


def interval_text(mean: float | None, ci95: Sequence[float] | None, *, sign: str = "") -> str:
    """A mean with its interval, where it has one."""
    if ci95 is None:
        return number_text(mean, sign=sign)
    return f"{number_text(mean, sign=sign)} [{', '.join(number_text(end, sign=sign) for end in ci95)}]"


def text_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, note: str = "") -> Table:
    """Text cells, the first column to the left; Text and not str, so that no bracket is read as markup."""
    table = Table(title=Text(title), title_justify="left", caption=Text(note) if note else None, caption_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _facts(check: Mapping[str, Any]) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name in _FACTS:
        # no draft vocabulary is worth no row
        if (value := check.get(name)) is not None:
            table.add_row(name, Text(f"{value:,}" if isinstance(value, int) else str(value)))
    return table


def bucket_table(title: str, column: str, groups: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per bucket: anchors, prompts, acceptance over all anchors, tau of the chain's blocks in it."""
    rows = []
    for name, group in groups.items():
        replay = group.get("replay") or {}
        rows.append(
            (
                name,
                f"{group['num_anchors']:,}",
                f"{group['num_prompts']:,}",
                interval_text(group["accept_len_mean"], group.get("accept_len_ci95")),
                number_text(group["token_acc_mean"]),
                interval_text(replay.get("tau_micro"), replay.get("tau_ci95")),
            )
        )
    return text_table(title, (column, "n", "prompts", "accept_len_mean", "token_acc_mean", "tau_micro"), rows)


def _slots(check: Mapping[str, Any]) -> Table:
    """The curve over a block's slots, alone and as a run."""
    chain = (check.get("replay") or {}).get("survival") or [None] * len(check["by_slot"])
    rows = [
        (str(slot["slot"]), f"{slot['num_labelled']:,}", *map(number_text, (slot["token_acc"], run, chained)))
        for slot, run, chained in zip(check["by_slot"], check["survival"], chain, strict=True)
    ]
    return text_table("By slot", ("slot", "labelled", "token_acc", "survival, all anchors", "survival, chain"), rows)


def _means(check: Mapping[str, Any]) -> Table:
    """The all-anchor mean and the chain's side by side, and why they are not equal."""
    replay = check.get("replay")
    rows = [
        (
            "all anchors",
            f"{check['num_anchors']:,}",
            interval_text(check["accept_len_mean"], check.get("accept_len_ci95")),
            "–",
            "–",
        )
    ]
    if replay is None:
        note = "replay (tau) walks the chain of blocks, which needs every anchor: --anchors all"
    else:
        tau = interval_text(replay["tau_micro"], replay.get("tau_ci95"))
        mean, macro = number_text(replay.get("accept_len_mean")), number_text(replay.get("tau_macro"))
        rows.append(("chain (replay)", f"{replay['num_blocks']:,}", mean, tau, macro))
        note = replay.get("why", "")
    return text_table(
        "All anchors and chain", ("mean over", "blocks", "accept_len_mean", "tau_micro", "tau_macro"), rows, note=note
    )


def _name(side: Mapping[str, str], other: Mapping[str, str]) -> str:
    """What tells a side of a comparison from the other: its drafter or its cache, by the end of its path."""
    key = "drafter" if side["drafter"] != other["drafter"] else "cache"
    return "/".join(PurePath(side[key]).parts[-2:])


def _comparison(found: Sequence[Mapping[str, Any]]) -> Table:
    """Three rows for each two: the means of both, b minus a; below the table what that allows to say."""
    rows, notes = [], []
    for pair in found:
        names = (_name(pair["a"], pair["b"]), _name(pair["b"], pair["a"]))
        kind = "the same anchors" if pair["paired"] else "different texts"
        notes.append(f"a = {names[0]}, b = {names[1]} ({kind}, {pair['num_prompts']:,} prompts): {pair['verdict']}.")
        left = [f"a: {names[0]}", f"b: {names[1]}", ""]
        for label, metric in zip(left, ("accept_len", "token_acc", "tau"), strict=True):
            value = pair.get(metric) or {}
            means = (number_text(value.get("a")), number_text(value.get("b")))
            rows.append((label, metric, *means, interval_text(value.get("difference"), value.get("ci95"), sign="+")))
    return text_table("Comparison", ("", "mean", "a", "b", "b - a"), rows, note="\n".join(notes))


def _warnings(checks: Sequence[Mapping[str, Any]]) -> Panel | None:
    """Every warning once, in a frame that stands last, where the eye is."""
    lines: dict[str, list[str]] = {}
    for check in checks:
        for line in check.get("warnings") or ():
            lines.setdefault(line, []).append(f"{check.get('drafter')} on {check.get('cache')}")
    if not lines:
        return None
    several = len(checks) > 1
    text = "\n\n".join(line + (f"\n({'; '.join(where)})" if several else "") for line, where in lines.items())
    return Panel(Text(text), title="WARNING", box=box.HEAVY, style="bold red", expand=False)


def show_check(check: Mapping[str, Any], *, console: Console) -> None:
    """Print a check's result; with several drafters or caches, the table of each and the comparison.

    Args:
        check: the document that `check` returns.
        console: where to print.
    """
    from dflash_jax.report import render_table

    checks = check.get("checks") or [check]
    for one in checks:
        console.print(_facts(one), render_table(one), sep="\n")
    if len(checks) == 1:
        for key, title, column in (
            ("by_context_length", "By context length", "tokens"),
            ("by_prompt_set", "By prompt set", "set"),
        ):
            if check.get(key):
                console.print(bucket_table(title, column, check[key]))
        if check.get("by_slot"):
            console.print(_slots(check))
        console.print(_means(check))
    if check.get("comparison"):
        console.print(_comparison(check["comparison"]))
    panel = _warnings(checks)
    if panel is not None:
        console.print(panel)
