"""The check against one-anchor-at-a-time evaluation: the same anchors of the same cache, in turns, with equal answers.

One at a time is the baseline report's way: every anchor has a context of its own, padded to one length; a compiled
function projects it, drafts the block, meets the whole head, takes the argmax and compares. It is given every
advantage that costs no answer: features stay on the device, all anchors are launched before the first answer is waited
for, reading the cache is not timed. The check is timed as users have it: from the cache's files to per-anchor results.

    .venv-dev/bin/python benchmarks/check.py --target DIR --cache DIR --drafter DIR

takes a few minutes on two cores with 2 sequences of 1024 tokens; `--width` is the baseline's padded context.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import machine, matmul_work, paired_ratio, time_interleaved, write_result
from dflash_jax.accept import AnchorChoice, SequenceResult, evaluate_cache
from dflash_jax.cache import Cache, open_cache, stack_sequences
from dflash_jax.core import no_progress
from dflash_jax.decode import accept_len
from dflash_jax.drafter import Drafter, DrafterConfig, StoredSequence, block_labels, draft_blocks, load_drafter
from dflash_jax.nn import greedy_tokens
from dflash_jax.targets import Target, load_target, with_screen


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("target", "cache", "drafter"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=2, help="longest sequences of the cache that are evaluated")
    parser.add_argument("--anchors-per-sequence", type=int, default=64)
    parser.add_argument("--anchors-per-chunk", type=int, default=64)
    parser.add_argument("--width", type=int, default=None, help="tokens of the padded context; default: the longest")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--matmul-size", type=int, default=2048)
    return parser.parse_args(arguments)


class Longest(Cache):
    """A cache cut down to its longest sequences at the first of its offsets, which is all that is timed."""

    def __init__(self, cache: Cache, count: int) -> None:
        """Take the cache to cut."""
        super().__init__(cache.path, cache.manifest)
        offset = min(cache.manifest["position_offsets"])
        lengths = [
            (-len(stored.token_ids), index)
            for index, stored in ((index, cache.sequence(index)) for index in range(cache.num_sequences))
            if stored.position_offset == offset
        ]
        self.kept = [index for _, index in sorted(lengths)[:count]]

    @property
    def num_sequences(self) -> int:
        """Sequences kept."""
        return len(self.kept)

    def sequence(self, index: int) -> Any:
        """Return kept sequence `index`, longest first."""
        return super().sequence(self.kept[index])


@partial(jax.jit, static_argnames=("block_size",))
def one_anchor(
    drafter: Drafter, target: Target, text: StoredSequence, anchor: jax.Array, *, block_size: int
) -> jax.Array:
    """accept_len of the block at one anchor, by its own context and the argmax of its own logits."""
    blocks = block_labels(text, anchor[None], block_size=block_size)
    hidden = draft_blocks(
        drafter,
        target.embed_tokens,
        text.features,
        text.token_ids,
        anchor[None],
        block_lengths=blocks.lengths,
        block_size=block_size,
        position_offset=text.position_offset,
    )
    drafted = greedy_tokens(hidden, target.head)
    return accept_len(drafted, blocks.labels, num_drafted=blocks.labelled.sum(axis=1, dtype=jnp.int32))[0]


def one_at_a_time(
    drafter: Drafter, target: Target, texts: Sequence[StoredSequence], chosen: Sequence[np.ndarray]
) -> list[list[jax.Array]]:
    """Every chosen anchor of every text by itself."""
    run = partial(one_anchor, drafter, target, block_size=drafter.config.block_size)
    return [[run(text, anchor) for anchor in jnp.asarray(anchors)] for text, anchors in zip(texts, chosen, strict=True)]


def on_device(cache: Cache, *, width: int, max_positions: int) -> list[StoredSequence]:
    """The cache's sequences, each padded to `width`."""
    texts = []
    for index in range(cache.num_sequences):
        batch = stack_sequences([cache.sequence(index)], width=width, max_new_tokens=cache.manifest["max_new_tokens"])
        one = jax.tree_util.tree_map(lambda leaf: jnp.array(leaf[0]), batch)
        texts.append(replace(one, limit=jnp.minimum(one.limit, max_positions)))
    return texts


def count_flops(config: DrafterConfig, *, width: int) -> dict[str, float]:
    """Products of a projected context and of one drafted block, multiplications and additions apart, by hand."""
    hidden, d, block = config.hidden_size, config.head_dim, config.block_size
    queries, keys = config.num_heads * d, 2 * config.num_kv_heads * d
    context = 2 * width * hidden * (config.num_features + config.num_layers * keys)
    weights = hidden * (2 * queries + keys) + 3 * hidden * config.intermediate_size
    layers = config.num_layers * block * (2 * weights + 4 * queries * (width + block))
    return {
        "context": float(context),
        "block": float(layers),
        "head": 2.0 * (block - 1) * hidden * config.vocab_size,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where any anchor's answer differs."""
    options = read_arguments(arguments)
    target, drafter = load_target(options.target), load_drafter(options.drafter)
    cache = Longest(open_cache(options.cache), options.sequences)
    width = options.width or -(-max(len(cache.sequence(i).token_ids) for i in range(cache.num_sequences)) // 64) * 64
    texts = on_device(cache, width=width, max_positions=target.config.max_positions)
    choice = AnchorChoice(kind="random", number=options.anchors_per_sequence)
    begin = time.perf_counter()
    screen = jax.block_until_ready(with_screen(target, for_few_rows=False).screen)
    screen_s = time.perf_counter() - begin

    def check() -> list[SequenceResult]:
        return evaluate_cache(
            drafter,
            target.embed_tokens,
            target.head,
            cache,
            max_positions=target.config.max_positions,
            block_size=drafter.config.block_size,
            anchors_per_chunk=options.anchors_per_chunk,
            position_offsets=None,
            progress=no_progress,
            anchors=choice,
            screen=screen,
        )

    ours = check()
    chosen = [result.anchors for result in ours]
    theirs = one_at_a_time(drafter, target, texts, chosen)
    pairs = list(zip(ours, theirs, strict=True))
    differing = sum(int((np.array(alone) != result.accepted).sum()) for result, alone in pairs)
    matmul, matmul_flops = matmul_work(size=options.matmul_size)
    times = time_interleaved(
        {
            "check": check,
            "one_at_a_time": lambda: one_at_a_time(drafter, target, texts, chosen),
            "matmul": matmul,
        },
        rounds=options.rounds,
    )
    num_anchors = sum(map(len, chosen))
    flops = count_flops(drafter.config, width=width)
    labelled = sum(int(result.labelled.sum()) for result in ours)
    write_result(
        {
            "benchmark": "check",
            "machine": machine(),
            "sequences": cache.num_sequences,
            "width": width,
            "block_size": drafter.config.block_size,
            "drafter_layers": drafter.config.num_layers,
            "num_features": drafter.config.num_features,
            "screen_s": None if screen is None else screen_s,
            "num_anchors": num_anchors,
            "num_differing": differing,
            "accept_len_mean": float(np.concatenate([result.accepted for result in ours]).mean()),
            "token_acc": sum(int(result.correct.sum()) for result in ours) / max(labelled, 1),
            "anchors_per_s": {
                name: {clock: num_anchors / times[name].median(clock) for clock in ("wall_s", "cpu_s")}
                for name in ("check", "one_at_a_time")
            },
            "wall_s": {name: part.median() for name, part in times.items()},
            "cpu_s": {name: part.median("cpu_s") for name, part in times.items()},
            "ratio": paired_ratio(times["one_at_a_time"], times["check"]),
            "ratio_cpu": paired_ratio(times["one_at_a_time"], times["check"], clock="cpu_s"),
            "matmul_flops_per_s": matmul_flops / times["matmul"].median(),
            "flops": flops,
            "flops_per_anchor": {
                "one_at_a_time": sum(flops.values()),
                "check_at_most": flops["block"] + flops["head"] + flops["context"] * cache.num_sequences / num_anchors,
            },
        }
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
