"""Our loop and z-lab's, block by block: the same accepted lengths on the same prompts, greedy, float32.

z-lab's `dflash_generate` (PyTorch, transformers' target) and our compiled loop decode the same prompts with the same
drafter folder; the last line of stdout is one JSON document, and the exit code is 1 where a block differs.

    .venv-dev/bin/python benchmarks/zlab_agreement.py --target TARGET --drafter RUN/run-600 --limit 32

Prompts are HumanEval's by default. `differences` has the place where the two part: prompt, anchor, slot, and whether
they accept differently there (`draft`) or the target itself says another token (`token`).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import machine, write_result
from decode_others import Zlab, load_hf_target, use_torch
from dflash_jax.agree.blocks import compare_chains
from dflash_jax.decode import Decoded, Decoder
from dflash_jax.drafter import load_drafter
from dflash_jax.targets import load_target
from dflash_jax.text import EncodedPrompt, encode_prompts, load_tokenizer


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("target", "drafter"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--prompts", default="humaneval", help="a prompts file or a built-in set")
    parser.add_argument("--limit", type=int, default=32, help="prompts, after a shuffle")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8, help="ours; z-lab's loop takes one prompt at a time")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    return parser.parse_args(arguments)


def decode_ours(prompts: list[EncodedPrompt], options: argparse.Namespace, stop_ids: Sequence[int]) -> list[Decoded]:
    """Every prompt through our loop."""
    decoder = Decoder(
        load_target(options.target),
        stop_ids=stop_ids,
        max_new_tokens=options.new_tokens,
        batch_size=min(options.batch_size, len(prompts)),
        prompt_bucket=-(-max(len(item.ids) for item in prompts) // 64) * 64,
    )
    drafter, rows = load_drafter(options.drafter), []
    for first in range(0, len(prompts), options.batch_size):
        some = [item.ids for item in prompts[first : first + options.batch_size]]
        rows += decoder.decode(some, drafter=drafter).rows
    return rows


def compare(item: EncodedPrompt, ours: Decoded, theirs: Any) -> tuple[int, int, list[dict[str, Any]]]:
    """Our blocks, those that are z-lab's, and where they part."""
    anchors = np.cumsum([len(item.ids), *theirs.committed[:-1]]).tolist() if theirs.committed else []
    found = compare_chains(
        dict(zip(anchors, theirs.committed, strict=True)),
        np.array([*item.ids, *theirs.tokens], np.int32),
        prompt_len=len(item.ids),
        tokens=ours.tokens,
        committed=ours.committed,
    )
    differences = [
        {
            "prompt": item.prompt.id,
            "anchor": parting.anchor,
            "slot": parting.slot,
            "kind": parting.kind,
            "num_blocks": parting.num_blocks,
        }
        for parting in found.partings
    ]
    return len(found.online), found.num_equal, differences


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 where a block differs."""
    options, about = read_arguments(arguments), machine(("jax", "torch", "transformers", "dflash"))
    tokenizer, target_config = load_tokenizer(options.target), load_target(options.target).config
    limit = target_config.max_positions - options.new_tokens
    prompts = encode_prompts(options.prompts, tokenizer, max_positions=limit, limit=options.limit, seed=options.seed)
    ours = decode_ours(prompts, options, tokenizer.stop_ids)
    use_torch(options.threads)
    zlab = Zlab(options.drafter, load_hf_target(options.target))
    blocks, equal, differences, tokens_equal = 0, 0, [], 0
    for number, (item, row) in enumerate(zip(prompts, ours, strict=True), start=1):
        theirs = zlab(item.ids, new_tokens=options.new_tokens, stop_ids=tokenizer.stop_ids)
        some_blocks, some_equal, some = compare(item, row, theirs)
        blocks, equal, differences = blocks + some_blocks, equal + some_equal, differences + some
        tokens_equal += row.tokens == theirs.tokens
        sys.stderr.write(f"{number} of {len(prompts)} prompts: {equal} of {blocks} blocks equal\n")
    committed = [count for row in ours for count in row.committed]
    write_result(
        {
            "benchmark": "zlab_agreement",
            "machine": about,
            "num_prompts": len(prompts),
            "new_tokens": options.new_tokens,
            "num_blocks": blocks,
            "num_equal": equal,
            "differences": differences,
            "num_prompts_with_equal_tokens": tokens_equal,
            "tau_micro": sum(committed) / len(committed),
        }
    )
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
