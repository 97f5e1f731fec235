"""A command's result as tables for people.

One rule for all: scalars and lists make a table of two columns, a mapping inside makes a table of its own, a mapping of
mappings one with a row each. A check, wherever it stands, is shown in the form of the baseline report.
"""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from dflash_jax.cli.agree_tables import is_agree, show_agree
from dflash_jax.cli.check_tables import is_check, show_check
from dflash_jax.cli.parity_tables import is_parity, show_parity

MAX_SHOWN = 12
"""Most items of a list that are shown."""


def _text(value: Any) -> str:
    """One cell. Numbers keep four digits, which is more than the intervals of any of our metrics deserve."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        more = [f"and {len(value) - MAX_SHOWN:,} more"] if len(value) > MAX_SHOWN else []
        lines = any(isinstance(item, str) for item in value)
        return ("\n" if lines else "  ").join([*map(_text, value[:MAX_SHOWN]), *more]) or "none"
    return str(value)


def _rows(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table with a line per mapping; numbers line up at the right."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table("", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in rows.items():
        table.add_row(name, *(_text(row.get(column)) for column in columns))
    return table


def show(title: str, result: Mapping[str, Any], *, console: Console) -> None:
    """Print a command's result.

    Args:
        title: what the tables are of: the command's name.
        result: the command's JSON document, or a part of it.
        console: where to print; it must not read markup, for results hold text from outside.
    """
    for is_one, show_one in ((is_check, show_check), (is_parity, show_parity), (is_agree, show_agree)):
        if is_one(result):
            console.print(title)
            show_one(result, console=console)
            return
    scalars = Table(show_header=False)
    scalars.add_column()
    scalars.add_column(overflow="fold")  # a hash or a path that ends in "…" is of no use
    parts = {name: value for name, value in result.items() if isinstance(value, Mapping) and value}
    for name, value in result.items():
        if name not in parts:
            scalars.add_row(name, _text(value))
    # What matters most stands last, where the eye is: the demo ends with its check and the path of its page.
    for name, part in sorted(parts.items(), key=lambda item: is_check(item[1])):
        if all(isinstance(item, Mapping) for item in part.values()):
            console.print(name, _rows(part), sep="\n")
        else:
            show(name, part, console=console)
    if scalars.rows:
        console.print(title, scalars, sep="\n")
