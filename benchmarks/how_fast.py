"""The figure and the table of docs/how-fast.md, from the JSON lines of `decode.py`.

    .venv-dev/bin/python benchmarks/how_fast.py --inputs decode.json --figure docs/images/how_fast.svg \
        --page docs/how-fast.md

Each input may have other lines before its JSON line. Lines of the figure are the cost model, `tau * T_plain /
(T_draft + T_verify)`, with times measured apart; circles are runs with an oracle's drafts, diamonds with the drafter
itself. The page's part between its two marks is written anew; without --page the table is printed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- measured: benchmarks/how_fast.py writes from here -->", "<!-- to here -->"
# Okabe and Ito's colours, told apart by everybody
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 420, 60, 34, 190, 56
MOST_LINES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One batch size on one machine: the model's line and the measured points on it.

    Attributes:
        name: what the figure and the table call it.
        result: its entry of `by_batch_size`.
        block_size: the largest tau.
    """

    name: str
    result: dict[str, Any]
    block_size: int

    @property
    def per_tau(self) -> float:
        """Speed-up that the model gives for each token of tau."""
        times = {kind: part["wall_s"] for kind, part in self.result["passes_apart"].items()}
        return times["t_plain"] / (times["t_draft"] + times["t_verify"])

    @property
    def points(self) -> list[tuple[float, float, bool]]:
        """tau, measured speed-up, and whether the drafter itself made the drafts."""
        runs = [(one, False) for one in self.result["oracle"]] + [(self.result["dflash"], True)]
        return [(one["tau_of_slowest_rows"], one["speedup"]["median"], own) for one, own in runs]


def read_curves(paths: Sequence[Path]) -> list[Curve]:
    """Every batch size of every input; the size of blocks is in the names where it is not the same everywhere."""
    documents = [json.loads(path.read_text(encoding="utf-8").strip().splitlines()[-1]) for path in paths]
    differ = len({document["block_size"] for document in documents}) > 1
    curves = []
    for document in documents:
        name = "SmolLM2-135M" if document["drafter"] else document["target"]
        machine = document["machine"]
        device = (machine["device"] == "cpu" and machine.get("processor")) or machine["device"]
        blocks = f" in blocks of {document['block_size']}" if differ else ""
        tokens = document.get("draft_vocab_size")
        drafts = f", drafts of {tokens:,} tokens" if tokens else ""
        curves += [
            Curve(
                name=f"{name}, {device}, batch {size}{blocks}{drafts}",
                result=result,
                block_size=document["block_size"],
            )
            for size, result in document["by_batch_size"].items()
        ]
    return curves


def draw(curves: Sequence[Curve]) -> str:
    """Return the figure as SVG: no script, no font file."""
    most_tau = max(curve.block_size for curve in curves)
    most = 1.08 * max(
        1.5,
        *(curve.per_tau * curve.block_size for curve in curves),
        *(speedup for curve in curves for _, speedup, _ in curve.points),
    )

    def place(tau: float, speedup: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (tau - 1) / (most_tau - 1)
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * speedup / most

    text = lambda x, y, words, extra="": f'<text x="{x:.1f}" y="{y:.1f}" {extra}>{words}</text>'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 20, "Speed-up over plain decoding against tau", 'font-size="13" font-weight="bold"'),
    ]
    # a speed-up of noise over nothing (runs of a millisecond) may be in the millions
    for step in range(0, int(most) + 1, max(1, round(most / MOST_LINES))):
        _, y = place(1, step)
        colour = "#888" if step == 1 else "#ddd"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>')
        parts.append(text(LEFT - 8, y + 4, str(step), 'text-anchor="end"'))
    for tau in range(1, most_tau + 1):
        x, y = place(tau, 0)
        parts.append(text(x, y + 18, str(tau), 'text-anchor="middle"'))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "tau (tokens per row and target pass)",
                      'text-anchor="middle"'))  # fmt: skip
    y_name = TOP + 14.0
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        (x1, y1), (x2, y2) = (place(tau, tau * curve.per_tau) for tau in (1, curve.block_size))
        parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
                     'stroke-width="2"/>')  # fmt: skip
        for tau, speedup, own in curve.points:
            x, y = place(tau, speedup)
            parts.append(
                f'<path d="M{x - 6:.1f},{y:.1f} l6,-6 l6,6 l-6,6 z" fill="{colour}" stroke="white"/>'
                if own
                else f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="white" stroke="{colour}" stroke-width="2"/>'
            )
        for words in curve.name.split(", "):
            parts.append(text(WIDTH - RIGHT + 14, y_name, words, f'fill="{colour}" font-weight="bold"'))
            y_name += 15
        y_name += 7
    return "\n".join([*parts, "</svg>", ""])


def _ratio(ratio: dict[str, Any]) -> str:
    low, high = ratio["ci95"]
    return f"{ratio['median']:.2f} [{low:.2f}, {high:.2f}]"


def table(curves: Sequence[Curve]) -> str:
    """Return the measured numbers as Markdown."""
    lines = [
        "| where | drafts | tau | T_plain, ms | T_draft, ms | T_verify, ms | pays from tau | model | measured [95 %] "
        "| share of model |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for curve in curves:
        apart = {kind: part["wall_s"] * 1e3 for kind, part in curve.result["passes_apart"].items()}
        times = " | ".join(f"{apart[kind]:.1f}" for kind in ("t_plain", "t_draft", "t_verify"))
        runs = [(f"oracle, {one['accept']} right", one) for one in curve.result["oracle"]]
        for drafts, one in [*runs, ("the drafter's own", curve.result["dflash"])]:
            lines.append(
                f"| {curve.name} | {drafts} | {one['tau_of_slowest_rows']:.2f} | {times} | {1 / curve.per_tau:.2f} "
                f"| {one['predicted_speedup']:.2f} | {_ratio(one['speedup'])} | {one['share_of_predicted']:.0%} |"
            )
    if not any("transformers" in curve.result for curve in curves):
        return "\n".join(lines) + "\n"
    lines += ["", "| where | plain, tokens/s | weights read, GB/s | transformers, tokens/s | compiled | ours over the "
              "faster [95 %] |", "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for curve in curves:
        if "transformers" not in curve.result:
            continue
        forms = [curve.result.get(name) for name in ("transformers", "transformers_compiled")]
        best = max(filter(None, forms), key=lambda form: form["tokens_per_s"])
        plain, rates = curve.result["plain"], ["–" if form is None else f"{form['tokens_per_s']:.1f}" for form in forms]
        lines.append(
            f"| {curve.name} | {plain['tokens_per_s']:.1f} | {plain['weight_bytes_per_s'] / 1e9:.1f} "
            f"| {rates[0]} | {rates[1]} | {_ratio(best['plain_speedup'])} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, and write or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, nargs="+", required=True, help="outputs of decode.py")
    parser.add_argument("--figure", type=Path, required=True, help="SVG to write")
    parser.add_argument("--page", type=Path, help="Markdown page whose marked part is to be written")
    options = parser.parse_args(arguments)
    curves = read_curves(options.inputs)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    options.figure.write_text(draw(curves), encoding="utf-8")
    if options.page is None:
        sys.stdout.write(table(curves))
        return
    before, _, rest = options.page.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        parser.error(f"{options.page} has not both marks, {BEGIN} and {END}")
    figure = f"![Speed-up against tau](images/{options.figure.name})"
    options.page.write_text(f"{before}{BEGIN}\n\n{figure}\n\n{table(curves)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
