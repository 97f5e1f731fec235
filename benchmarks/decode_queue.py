"""Many prompts through few rows: a queue decoded plainly, a queue with a drafter, and batches with the drafter.

What `responses` does: rows that are done take the next prompts. Texts end where they end (stop ids, `--new-tokens`),
times hold the prompts' passes, all contestants run in turns. Exit status 1 where any token differs.

    .venv-dev/bin/python benchmarks/decode_queue.py --target TARGET --drafter RUN --block-size 4 > decode_queue.json

About two minutes a round on two cores for SmolLM2 with the defaults.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from common import machine, paired_ratio, time_interleaved, write_result
from dflash_jax.accept import check_block_size
from dflash_jax.decode import Decoded, Decoder
from dflash_jax.drafter import load_drafter, read_drafter_config
from dflash_jax.targets import load_target
from dflash_jax.text import encode_prompts, load_tokenizer


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("target", "drafter"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--prompts", default="humaneval", help="a prompts file or a built-in set, held out")
    parser.add_argument("--limit", type=int, default=32, help="prompts, after a shuffle")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle")
    parser.add_argument("--batch-size", type=int, default=8, help="rows")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--block-size", type=int, help="positions per block; default: as trained")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def main() -> int:
    """Run it."""
    options = read_arguments()
    dtype = jnp.dtype(options.dtype)
    block_size = check_block_size(options.block_size, read_drafter_config(options.drafter))
    target, drafter = load_target(options.target, dtype=dtype), load_drafter(options.drafter, dtype=dtype)
    tokenizer = load_tokenizer(options.target)
    limit = target.config.max_positions - options.new_tokens
    items = encode_prompts(options.prompts, tokenizer, max_positions=limit, limit=options.limit, seed=options.seed)
    prompts = sorted((item.ids for item in items), key=len, reverse=True)
    # one width: the same shapes for queues and batches
    decoder = Decoder(
        target,
        stop_ids=tokenizer.stop_ids,
        max_new_tokens=options.new_tokens,
        batch_size=options.batch_size,
        prompt_bucket=-(-len(prompts[0]) // 64) * 64,
    )
    how: dict[str, Any] = {"drafter": drafter, "block_size": block_size}
    texts: dict[str, list[Decoded]] = {}

    def queue(name: str, **how: Any) -> None:
        found = dict(pair for part in decoder.queue(prompts, **how) for pair in part)
        texts[name] = [found[place] for place in range(len(prompts))]

    def batches(name: str, **how: Any) -> None:
        some = [prompts[at : at + options.batch_size] for at in range(0, len(prompts), options.batch_size)]
        texts[name] = [row for batch in some for row in decoder.decode(batch, **how).rows]

    work = {
        "plain_queue": lambda: queue("plain_queue"),
        "dflash_queue": lambda: queue("dflash_queue", **how),
        "dflash_batches": lambda: batches("dflash_batches", **how),
    }
    times = time_interleaved(work, rounds=options.rounds)
    plain = texts["plain_queue"]
    num_tokens = sum(len(row.tokens) for row in plain)
    equal = {
        name: sum(ours.tokens == theirs.tokens for ours, theirs in zip(rows, plain, strict=True))
        for name, rows in texts.items()
    }
    committed = [count for row in texts["dflash_queue"] for count in row.committed]
    write_result(
        {
            "benchmark": "decode_queue",
            "machine": machine(),
            "num_prompts": len(prompts),
            "num_tokens": num_tokens,
            "batch_size": options.batch_size,
            "block_size": block_size,
            "dtype": options.dtype,
            "prompts_equal": equal,
            "tau_micro": sum(committed) / len(committed),
            "tokens_per_s": {name: num_tokens / each.median() for name, each in times.items()},
            "speedup": {
                name: paired_ratio(times["plain_queue"], times[name]) for name in ("dflash_queue", "dflash_batches")
            },
            "queue_over_batches": paired_ratio(times["dflash_batches"], times["dflash_queue"]),
        }
    )
    return int(any(count != len(prompts) for count in equal.values()))


if __name__ == "__main__":
    sys.exit(main())
