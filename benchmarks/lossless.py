"""Is speculative decoding lossless? Every HumanEval prompt, plainly and with four drafters, token for token.

    trained   a drafter folder
    random    one of the same shape with random weights
    wrong     guesses that are never the target's token: nothing is ever accepted
    oracle    guesses that always are: every block is accepted whole

The last two are texts that are verified block by block (`decode.guided_loop`): all but the drafter's forward is real.

    .venv-dev/bin/python benchmarks/lossless.py --target DIR --drafter DIR --out OUT.jsonl

OUT holds a line per prompt and is continued where it is there. The last line of stdout is one JSON document; exit 1
where any token differs, or where the oracle's blocks are not accepted whole.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import machine, write_result
from dflash_jax.core import InputError
from dflash_jax.decode import (
    Decoded,
    DecodeState,
    decode_capacity,
    explain_flip,
    guided_loop,
    plain_loop,
    speculative_loop,
    start_decoding,
)
from dflash_jax.drafter import Drafter, drafter_fingerprint, init_drafter, load_drafter
from dflash_jax.targets import Target, load_target, with_screen
from dflash_jax.text import EncodedPrompt, encode_prompts, load_tokenizer

WAYS = ("trained", "random", "wrong", "oracle")
BUCKET = 64

_start = jax.jit(start_decoding, static_argnames=("capacity", "max_new_tokens"))
_plain = jax.jit(plain_loop)
_speculative = jax.jit(speculative_loop, static_argnames=("block_size",))
_guided = jax.jit(guided_loop, static_argnames=("block_size",))


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, required=True, help="the trained drafter's folder")
    parser.add_argument("--out", type=Path, required=True, help="JSONL, a line per prompt; continued where it exists")
    parser.add_argument("--prompts", default="humaneval", help="a prompt file or a built-in set")
    parser.add_argument("--limit", type=int, default=None, help="only so many prompts, of a shuffle")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=None, help="default: the drafter's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the random drafter's weights, and of --limit's shuffle")
    return parser.parse_args(arguments)


class Batch:
    """A batch of prompts, decoded plainly and in every way."""

    def __init__(
        self, target: Target, stop_ids: Sequence[int], items: Sequence[EncodedPrompt], options: argparse.Namespace
    ) -> None:
        """Pad the prompts; rows that are missing repeat the first one."""
        self._target, self._items, self._new = target, items, options.max_new_tokens
        self._rows, self._block_size = options.batch_size, options.block_size
        filled = [item.ids for item in items] + [items[0].ids] * (self._rows - len(items))
        self._width = -(-max(map(len, filled)) // BUCKET) * BUCKET
        self._tokens = np.zeros((self._rows, self._width), np.int32)
        for row, ids in enumerate(filled):
            self._tokens[row, : len(ids)] = ids
        self._lengths = np.array([len(ids) for ids in filled], np.int32)
        self._stop_ids = jnp.asarray(np.array(stop_ids, np.int32))

    def start(self, drafter: Drafter) -> DecodeState:
        """The state after the prompts' pass."""
        limit = np.minimum(self._lengths + self._new, self._target.config.max_positions).astype(np.int32)
        return _start(
            self._target,
            drafter,
            jnp.asarray(self._tokens),
            jnp.asarray(self._lengths),
            position_offset=jnp.zeros(self._rows, jnp.int32),
            limit=jnp.asarray(limit),
            stop_ids=self._stop_ids,
            capacity=decode_capacity(self._width, self._new, self._block_size),
            max_new_tokens=self._new,
        )

    def outcomes(self, state: DecodeState) -> list[Decoded]:
        """What each prompt came to."""
        tokens, start, committed, accepted, blocks = jax.device_get(
            (state.tokens, state.start, state.committed, state.accepted, state.num_blocks)
        )
        return [
            Decoded(
                tokens=tokens[row, self._lengths[row] : start[row] + 1].tolist(),
                committed=committed[row, : blocks[row]].tolist(),
                accepted=accepted[row, : blocks[row]].tolist(),
                stopped=bool(np.isin(tokens[row, start[row]], self._stop_ids)),
            )
            for row in range(len(self._items))
        ]

    def run(self, drafters: Mapping[str, Drafter]) -> tuple[list[Decoded], dict[str, list[Decoded]]]:
        """Decode plainly and in every way."""
        sizes, target = {"block_size": self._block_size}, self._target
        state = self.start(drafters["random"])
        plain = _plain(target, replace(state, context=None))
        text, vocab = plain.tokens, jnp.int32(target.config.vocab_size)
        found = {
            "random": _speculative(target, drafters["random"], state, **sizes),
            "wrong": _guided(target, drafters["random"], state, (text + 1) % vocab, **sizes),
            "oracle": _guided(target, drafters["random"], state, text, **sizes),
            "trained": _speculative(target, drafters["trained"], self.start(drafters["trained"]), **sizes),
        }
        return self.outcomes(plain), {way: self.outcomes(found[way]) for way in WAYS}

    def explain(self, row: int, plain: Decoded, other: Decoded) -> dict[str, Any] | None:
        """Where and why a prompt's outcome is another than plain decoding's."""
        flip = explain_flip(
            self._target,
            self._items[row].ids,
            plain,
            other,
            block_size=self._block_size,
            rows=self._rows,
            prompt_bucket=BUCKET,
            max_new_tokens=self._new,
        )
        return None if flip is None else asdict(flip)


def rows_of(batch: Batch, items: Sequence[EncodedPrompt], drafters: Mapping[str, Drafter]) -> list[dict[str, Any]]:
    """A line of the out file per prompt."""
    plain, ways = batch.run(drafters)
    rows = []
    for index, (item, ours) in enumerate(zip(items, plain, strict=True)):
        told = {}
        for way, outcomes in ways.items():
            theirs = outcomes[index]
            equal = theirs.tokens == ours.tokens
            told[way] = {
                "equal": equal,
                "committed": theirs.committed,
                "difference": None if equal else batch.explain(index, ours, theirs),
            }
        rows.append({"id": item.prompt.id, "num_tokens": len(ours.tokens), "stopped": ours.stopped, "ways": told})
    return rows


def read_rows(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows that are there already, by prompt; begins the file where there is none.

    Raises:
        InputError: the file was begun with other settings.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]  # a kill may have cut the last line
    path.write_bytes(whole)
    head, *rows = (json.loads(line) for line in whole.splitlines())
    if head != settings:
        raise InputError(f"{path} was begun with other settings: {head}, now {settings}: choose another --out")
    return {row["id"]: row for row in rows}


def summary(rows: Sequence[Mapping[str, Any]], way: str) -> dict[str, Any]:
    """One way over all prompts. `tau_whole` leaves out every sequence's last block, which its end may cut."""
    told = [row["ways"][way] for row in rows]
    blocks = [count for one in told for count in one["committed"]]
    whole = [count for one in told for count in one["committed"][:-1]]
    mean = lambda counts: sum(counts) / len(counts) if counts else None
    differences = [
        {"id": row["id"], **(row["ways"][way]["difference"] or {})} for row in rows if not row["ways"][way]["equal"]
    ]
    return {
        "num_equal": sum(one["equal"] for one in told),
        "tau_micro": mean(blocks),
        "tau_whole": mean(whole),
        "num_blocks": len(blocks),
        "differences": differences,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 where anything is lost."""
    options = read_arguments(arguments)
    dtype = jnp.dtype(options.dtype)
    trained = load_drafter(options.drafter, dtype=dtype)
    options.block_size = options.block_size or trained.config.block_size
    untrained = init_drafter(trained.config, key=jax.random.key(options.seed))
    drafters = {"trained": trained, "random": jax.tree_util.tree_map(lambda leaf: leaf.astype(dtype), untrained)}
    target, tokenizer = with_screen(load_target(options.target, dtype=dtype)), load_tokenizer(options.target)
    positions = target.config.max_positions
    prompts = encode_prompts(
        options.prompts, tokenizer, max_positions=positions, limit=options.limit, seed=options.seed
    )
    names = ("prompts", "limit", "max_new_tokens", "block_size", "dtype", "seed")
    settings = {name: getattr(options, name) for name in names} | {"drafter": drafter_fingerprint(options.drafter)}
    done = read_rows(options.out, settings)
    todo = sorted((item for item in prompts if item.prompt.id not in done), key=lambda item: -len(item.ids))
    begin = time.perf_counter()
    for first in range(0, len(todo), options.batch_size):
        items = todo[first : first + options.batch_size]
        rows = rows_of(Batch(target, tokenizer.stop_ids, items, options), items, drafters)
        with options.out.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        done |= {row["id"]: row for row in rows}
        sys.stderr.write(f"lossless {len(done)} of {len(prompts)}, {time.perf_counter() - begin:.0f} s\n")
    rows = [done[item.prompt.id] for item in prompts]
    ways = {way: summary(rows, way) for way in WAYS}
    whole = ways["oracle"]["tau_whole"] in (None, options.block_size)
    equal = all(way["num_equal"] == len(rows) for way in ways.values())
    result = {
        "tokens_equal": equal,
        "oracle_is_accepted_whole": whole,
        "num_prompts": len(rows),
        "num_tokens": sum(row["num_tokens"] for row in rows),
        "ways": ways,
        **settings,
        "batch_size": options.batch_size,
        "machine": machine(),
    }
    write_result(result)
    return 0 if equal and whole else 1


if __name__ == "__main__":
    sys.exit(main())
