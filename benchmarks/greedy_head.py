"""The head's greedy tokens: all columns in float32, and by screens of 8 and 16 bits, for a few rows and for many.

Hidden states are those of a target on real prompts. A few rows, as a decoding step has, meet a screen that is there
already; many, as a prefill has, make their own, and its time counts. Where the two differ in a token, the exit status
is 1.

    .venv-dev/bin/python benchmarks/greedy_head.py --target TARGET > greedy_head.json

Screens pay where products of 8 and 16 bits are fast: on CPUs with AMX, or AVX-512 with VNNI and bfloat16. Elsewhere
this shows by how much they would not.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from common import Work, machine, paired_ratio, time_interleaved, write_result
from dflash_jax.nn import Screen, best_tokens, greedy_tokens, make_screen
from dflash_jax.nn.head_screens import few_rows_for_8_bits, screened_tokens
from dflash_jax.nn.product import has_fast_16_bit_products
from dflash_jax.targets import Target, load_target, prefill
from dflash_jax.text import encode_prompts, load_tokenizer

PASSES = 20
"""A few rows meet the head so many times in one call, each time other rows."""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="target folder, read in float32")
    parser.add_argument("--prompts", default="humaneval", help="a prompts file or a built-in set")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 32, 64], help="of a decoding step")
    parser.add_argument("--many", type=int, default=4096, help="rows of a prefill")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


@eqx.filter_jit
def hidden_rows(target: Target, tokens: Int32[Array, "batch seq"]) -> Float[Array, "row hidden"]:
    """What the head reads at every token."""
    batch, seq = tokens.shape
    start = jnp.zeros(batch, jnp.int32)
    hidden = prefill(target, tokens, lengths=start + seq, position_offset=start).hidden
    return hidden.reshape(batch * seq, -1)


def rows_of(options: argparse.Namespace, target: Target) -> Float[Array, "row hidden"]:
    """Hidden states of `--many` tokens of the prompts, one after the other, 256 at a time."""
    tokenizer = load_tokenizer(options.target)
    prompts = encode_prompts(options.prompts, tokenizer, max_positions=target.config.max_positions, limit=None, seed=0)
    ids = np.concatenate([item.ids for item in prompts])
    width = 256
    return hidden_rows(target, jnp.asarray(np.resize(ids, (-(-options.many // width), width)), jnp.int32))


def in_passes(tokens_of: Callable[..., Array], rows: int) -> Callable[..., Array]:
    """Jitted: the tokens of `PASSES` times so many rows."""

    def run(hidden: Array, head: Array, screen: Screen) -> Array:
        some = hidden[: PASSES * rows].reshape(PASSES, rows, -1)
        return jax.lax.map(lambda few: tokens_of(few, head, screen), some)

    return jax.jit(run)


def screen_bytes(screen: Any) -> int:
    """Of all its arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(screen))


def main() -> int:
    """Run it."""
    options = parse()
    target = load_target(options.target, dtype=jnp.dtype("float32"))
    hidden, head = rows_of(options, target), target.head
    screen = jax.jit(make_screen)(head)
    whole = lambda rows, head, _: best_tokens(rows, head)[1]
    runs: dict[str, dict[str, Any]] = {
        str(rows): {
            "whole": in_passes(whole, rows),
            "screen": in_passes(lambda few, head, screen: greedy_tokens(few, head, screen=screen), rows),
        }
        for rows in options.rows
    }
    runs[str(options.many)] = {
        "whole": jax.jit(whole),
        "screen": jax.jit(lambda rows, head, _: greedy_tokens(rows, head, screen=make_screen(head))),
    }
    differ = {
        name: int((pair["whole"](hidden, head, screen) != pair["screen"](hidden, head, screen)).sum())
        for name, pair in runs.items()
    }
    settled = jax.jit(lambda rows: jax.lax.map(lambda some: screened_tokens(some, head, screen)[1], rows))
    open_rows = {
        f"{bits} bits": 1 - float(settled(hidden[: len(hidden) // 64 * 64].reshape(-1, count, hidden.shape[1])).mean())
        for bits, count in ((8, few_rows_for_8_bits()), (16, 64))
    }
    work: dict[str, Work] = {
        f"{kind} {name}": lambda run=run: run(hidden, head, screen)
        for name, pair in runs.items()
        for kind, run in pair.items()
    }
    times = time_interleaved(work, rounds=options.rounds)
    result: dict[str, Any] = {
        "benchmark": "greedy_head",
        "machine": machine(),
        "fast_16_bit_products": has_fast_16_bit_products(),
        "vocab": head.shape[0],
        "hidden": head.shape[1],
        "head_bytes": head.nbytes,
        "screen_bytes": {"8 bits": screen_bytes(screen.eight), "16 bits": screen_bytes(screen.sixteen)},
        "open_rows": open_rows,
        "tokens_that_differ": differ,
        "rows": {},
    }
    for name in runs:
        passes = 1 if name == str(options.many) else PASSES
        ratio = paired_ratio(times[f"whole {name}"], times[f"screen {name}"], clock="wall_s")
        each = {kind: times[f"{kind} {name}"].median() / passes * 1e3 for kind in ("whole", "screen")}
        result["rows"][name] = {f"{kind}_ms": each[kind] for kind in each} | {"speedup": ratio}
        sys.stderr.write(
            f"{name:>6} rows: whole {each['whole']:8.2f} ms   screen {each['screen']:8.2f} ms   {ratio.median:.2f}\n"
        )
    write_result(result)
    return int(any(differ.values()))


if __name__ == "__main__":
    sys.exit(main())
