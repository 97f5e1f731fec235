"""How features drift with the position offset under each way of computing rotary angles: a table and a figure.

One text is fed to a target at offset 0 with exact angles, then at every offset with every rope setting. Drift is the
root mean square of a layer's difference over that of its features, the largest of all layers (the last one's output is
left out, as no drafter reads it); beside it, how many tokens keep their argmax.

    python benchmarks/rope_drift.py --target TARGET --name SmolLM2-135M-Instruct --out docs/images/rope_drift.svg
"""

import argparse
import json
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from dflash_jax.targets import Target, load_target, next_ids, prefill
from dflash_jax.text import load_tokenizer

OFFSETS = (0, 64, 512, 4096, 16384, 65536, 131072, 2**20, 2**22, 2**24, 2**27, 2**30)
ROPES = ("exact", "float32", "bfloat16", "table:8192")
ROWS_PER_FORWARD = 4
TEXT = (
    "Write a solution to the following problem and make sure that it passes the tests: return the longest palindrome "
    "that a text begins with. An empty text has none, and a text of one letter is its own. Explain your reasoning."
)
# Okabe and Ito's colours, told apart by everybody, and a marker each for print
STYLES = {"exact": "#0072B2", "float32": "#E69F00", "bfloat16": "#D55E00", "table": "#009E73"}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 400, 76, 30, 130, 58
LOWEST, HIGHEST = -7.0, 0.5  # decades of drift


@eqx.filter_jit
def _forward(
    target: Target, tokens: Int32[Array, "batch seq"], position_offset: Int32[Array, " batch"]
) -> tuple[Float[Array, "batch seq features"], Int32[Array, "batch seq"]]:
    layers = tuple(range(target.config.num_layers - 1))
    lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    output = prefill(target, tokens, lengths=lengths, position_offset=position_offset, capture_layers=layers)
    return output.features, next_ids(target, output.hidden)


def measure(folder: Path, *, offsets: tuple[int, ...], ropes: tuple[str, ...]) -> dict[str, list[dict[str, float]]]:
    """Return drift and argmax agreement for every rope setting at every offset, against exact angles at offset 0."""
    ids = load_tokenizer(folder).encode(TEXT)
    tokens = jnp.asarray(np.repeat(np.array([ids], np.int32), ROWS_PER_FORWARD, axis=0))
    reference, found = None, {}
    for rope in ropes:
        target, found[rope] = load_target(folder, rope=rope), []
        for start in range(0, len(offsets), ROWS_PER_FORWARD):
            some = offsets[start : start + ROWS_PER_FORWARD]
            padded = jnp.asarray(np.resize(np.array(some, np.int32), ROWS_PER_FORWARD))
            features, greedy = (np.asarray(part) for part in _forward(target, tokens, padded))
            if reference is None:
                reference = features[0].astype(np.float64).reshape(len(ids), -1, target.config.hidden_size), greedy[0]
            for offset, row, labels in zip(some, features, greedy, strict=False):
                squares = np.square(row.reshape(reference[0].shape) - reference[0]).mean(axis=(0, 2))
                difference = np.sqrt((squares / np.square(reference[0]).mean(axis=(0, 2))).max())
                agreement = float((labels == reference[1]).mean())
                found[rope].append({"offset": offset, "drift": float(difference), "argmax_agreement": agreement})
    return found


def _place(index: int, drift: float, num_offsets: int) -> tuple[float, float]:
    """Where a point lies in the figure; offsets are evenly spaced, drift is in decades."""
    x = LEFT + (WIDTH - LEFT - RIGHT) * index / (num_offsets - 1)
    decades = min(max(np.log10(drift) if drift else LOWEST, LOWEST), HIGHEST)
    return x, TOP + (HEIGHT - TOP - BOTTOM) * (HIGHEST - decades) / (HIGHEST - LOWEST)


def _offset_text(offset: int) -> str:
    power = offset.bit_length() - 1
    return str(offset) if offset < 1000 else f"{offset // 1024}k" if offset < 2**20 else f"2^{power}"


def draw(found: dict[str, list[dict[str, float]]], *, title: str) -> str:
    """Return the figure as SVG: one line per rope setting, no script, no font file."""
    offsets = [int(point["offset"]) for point in next(iter(found.values()))]
    text = lambda x, y, words, extra="": f'<text x="{x:.1f}" y="{y:.1f}" {extra}>{words}</text>'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 18, title, 'font-size="13" font-weight="bold"'),
    ]
    for decade in range(int(LOWEST) + 1, 1, 2):
        _, y = _place(0, 10.0**decade, len(offsets))
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        label = "1" if decade == 0 else f"1e{decade}"
        parts.append(text(LEFT - 8, y + 4, label, 'text-anchor="end"'))
    for index, offset in enumerate(offsets):
        x, _ = _place(index, 1.0, len(offsets))
        parts.append(text(x, HEIGHT - BOTTOM + 18, _offset_text(offset), 'text-anchor="middle"'))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(text(middle, HEIGHT - 14, "position offset of the text (tokens)", 'text-anchor="middle"'))
    ends: list[tuple[float, str]] = []
    for rope, points in found.items():
        # the reference itself, drift 0, has no place on a scale of decades
        places = [_place(i, point["drift"], len(offsets)) for i, point in enumerate(points) if point["drift"]]
        colour = STYLES[rope.split(":")[0]]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        y = places[-1][1]
        while any(abs(y - other) < 14 for other, _ in ends):  # names of lines that end together stand below each other
            y += 15
        ends.append((y, rope))
        parts.append(text(WIDTH - RIGHT + 10, y + 4, rope, f'fill="{colour}" font-weight="bold"'))
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Measure, draw, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="target folder, such as SmolLM2's")
    parser.add_argument("--name", help="the target's name in the title; default: its folder's")
    parser.add_argument("--out", type=Path, required=True, help="SVG to write")
    config = parser.parse_args()
    found = measure(config.target, offsets=OFFSETS, ropes=ROPES)
    title = f"Drift of features against offset 0 with exact angles, {config.name or config.target.name}"
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(draw(found, title=title), encoding="utf-8")
    print(json.dumps({"target": str(config.target), "figure": str(config.out), "by_rope": found}))  # noqa: T201


if __name__ == "__main__":
    main()
