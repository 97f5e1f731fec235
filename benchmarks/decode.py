"""Decoding: plain against transformers' `generate`, with a drafter against plain, with an oracle, against z-lab's loop.

Everything runs in turns in one process and is compared within rounds. On a CPU, float32, with a drafter:

    .venv-dev/bin/python benchmarks/decode.py --target TARGET --drafter RUN/run-600 --rounds 7 > decode.json

takes about three minutes a round with 8 prompts of 64 new tokens. On an accelerator, the shapes of gpt-oss-20b and of
its published drafter with random weights in bfloat16, drafts from an oracle, at several acceptances:

    python benchmarks/decode.py --shapes gpt-oss-20b --batch-sizes 1 8 32 --prompt-tokens 1024 --new-tokens 128

`benchmarks/how_fast.py` draws the JSON.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import (
    Ratio,
    Times,
    Work,
    machine,
    matmul_work,
    paired_ratio,
    peak_memory_bytes,
    time_interleaved,
    warm_up,
    write_result,
)
from decode_others import Generate, Zlab, load_hf_target, use_torch
from decode_work import KINDS, Batch, Runs, new_tokens_of, passes_made, tau_of, weight_bytes
from dflash_jax.accept import check_block_size
from dflash_jax.drafter import Drafter, DrafterConfig, init_drafter, load_drafter, read_drafter_config
from dflash_jax.targets import Target, load_target, with_screen
from dflash_jax.text import encode_prompts, load_tokenizer
from target_prefill import SHAPES, random_target

# z-lab/gpt-oss-20b-DFlash's config.json, what reaches the maths (YaRN changes no time and is left out)
GPT_OSS_DRAFTER = {
    "hidden_size": 2880, "intermediate_size": 7680, "num_layers": 8, "num_heads": 64, "num_kv_heads": 8,
    "head_dim": 64, "attention_bias": True, "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "max_positions": 131072,
    "block_size": 8, "mask_token_id": 200000, "capture_layers": (1, 6, 11, 16, 21), "num_target_layers": 24,
    "vocab_size": 201088,
}  # fmt: skip
TINY_DRAFTER = {
    "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "mask_token_id": 500, "capture_layers": (1, 4),
    "num_target_layers": 8, "vocab_size": 512, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
}  # fmt: skip
DRAFTERS = {"gpt-oss-20b": GPT_OSS_DRAFTER, "gpt-oss-tiny": GPT_OSS_DRAFTER | TINY_DRAFTER}
WIDTH = 64
COMPILE_THREADS = 8


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, defaults that hang on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--target", type=Path, help="target folder; --drafter goes with it")
    source.add_argument("--shapes", choices=sorted(DRAFTERS), help="random weights of these shapes")
    parser.add_argument("--drafter", type=Path, help="drafter folder")
    parser.add_argument("--prompts", default="humaneval", help="a prompts file or a built-in set, held out")
    parser.add_argument("--limit", type=int, default=8, help="prompts, after a shuffle; as many for every batch size")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="with --shapes: tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--accept", type=int, nargs="+", help="slots at which the oracle is right; default: 0, half, all"
    )
    parser.add_argument("--passes", type=int, default=16, help="of each kind in a row, where T_* are measured apart")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block-size", type=int, help="positions per block; default, and z-lab's loop: as trained")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--ceiling-size", type=int, help="rows of the large product: 2048 on a CPU, else 8192")
    parser.add_argument("--uncompiled", action="store_true", help="leave transformers' compiled form out")
    parser.add_argument("--alone", action="store_true", help="leave transformers and z-lab out")
    options = parser.parse_args(arguments)
    on_cpu = jax.default_backend() == "cpu"
    options.dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    options.ceiling_size = options.ceiling_size or (2048 if on_cpu else 8192)
    options.alone = options.alone or options.shapes is not None
    if (options.target is None) != (options.drafter is None):
        parser.error("--target and --drafter go together")
    return options


def load_models(options: argparse.Namespace) -> tuple[Target, Drafter]:
    """Target and drafter, of folders or random."""
    dtype = jnp.dtype(options.dtype)
    if options.shapes is None:
        return with_screen(load_target(options.target, dtype=dtype)), load_drafter(options.drafter, dtype=dtype)
    drafter = init_drafter(DrafterConfig(**DRAFTERS[options.shapes]), key=jax.random.key(1))
    cast = jax.tree_util.tree_map(lambda leaf: leaf.astype(dtype), drafter)
    return random_target(SHAPES[options.shapes], options.dtype, "data=1"), cast


def load_prompts(options: argparse.Namespace, target: Target) -> list[list[int]]:
    """Token ids of every prompt."""
    if options.shapes is not None:
        draw = np.random.default_rng(options.seed)
        number = max(options.batch_sizes)
        return draw.integers(0, target.config.vocab_size, (number, options.prompt_tokens)).tolist()
    tokenizer = load_tokenizer(options.target)
    limit = target.config.max_positions - options.new_tokens
    prompts = encode_prompts(options.prompts, tokenizer, max_positions=limit, limit=options.limit, seed=options.seed)
    return [item.ids for item in prompts]


@dataclass(frozen=True, kw_only=True, slots=True)
class Others:
    """What is measured beside ours.

    Attributes:
        hf_target: transformers' model.
        zlab: z-lab's loop on it.
        forms: names of `generate`'s forms, and whether they are compiled.
    """

    hf_target: Any
    zlab: Zlab
    forms: dict[str, bool]


def load_others(options: argparse.Namespace) -> Others | None:
    """Return what is measured beside ours: transformers' model, and z-lab's loop on it."""
    if options.alone:
        return None
    if read_drafter_config(options.drafter).draft_vocab_size is not None:
        raise SystemExit(f"{options.drafter} has a draft vocabulary, which z-lab's loop does not know: give --alone")
    use_torch(options.threads)
    model = load_hf_target(options.target)
    forms = {"transformers": False} | ({} if options.uncompiled else {"transformers_compiled": True})
    return Others(hf_target=model, zlab=Zlab(options.drafter, model), forms=forms)


def contestants(runs: Runs, prompts: list[list[int]], accepts: list[int], others: Others | None, size: int,
                ceiling: Work) -> dict[str, Work]:  # fmt: skip
    """Everything that is timed at one batch size."""
    work: dict[str, Work] = {
        "ceiling": ceiling,
        "plain_prefill": partial(runs.prefill, speculative=False),
        "plain": runs.plain,
        "dflash_prefill": partial(runs.prefill, speculative=True),
        "dflash": runs.speculative,
        **{f"oracle_{accept}": partial(runs.oracle, accept) for accept in accepts},
        **{kind: partial(runs.passes_of, kind) for kind in KINDS},
    }
    if others is not None:
        width = runs.batches[0].tokens.shape[1]
        groups = [prompts[first : first + size] for first in range(0, len(prompts), size)]
        for name, compiled in others.forms.items():
            generate = Generate(
                model=others.hf_target, batches=groups, compiled=compiled, width=width if compiled else None
            )
            work[f"{name}_prefill"] = partial(generate, 1)
            work[name] = partial(generate, runs.new_tokens)
        if size == 1:
            work["zlab"] = lambda: [others.zlab(one, new_tokens=runs.new_tokens, stop_ids=None) for one in prompts]
    return work


def less(times: Times, prefill: Times) -> Times:
    """A whole run's times without its prompts' passes, within rounds."""
    return Times(
        wall_s=tuple(max(a - b, 1e-9) for a, b in zip(times.wall_s, prefill.wall_s, strict=True)),
        cpu_s=tuple(max(a - b, 1e-9) for a, b in zip(times.cpu_s, prefill.cpu_s, strict=True)),
    )


def scaled(ratio: Ratio, factor: float) -> Ratio:
    """A ratio times a number."""
    return Ratio(
        median=ratio.median * factor, ci95=(ratio.ci95[0] * factor, ratio.ci95[1] * factor), rounds=ratio.rounds
    )


def rates(times: Times, tokens: int) -> dict[str, float]:
    """Medians of one contestant's decoding."""
    return {"wall_s": times.median(), "cpu_s": times.median("cpu_s"), "tokens_per_s": tokens / times.median()}


def speculation(
    plain: Times, run: Times, states: Any, apart: Mapping[str, Times], *, plain_passes: int
) -> dict[str, Any]:
    """A speculative run against plain decoding, and against what its passes measured apart would allow.

    `blocks_predicted` is `num_passes * (T_draft + T_verify)` over the run's time, within rounds: 1 where the loop adds
    nothing. `predicted` is `tau * T_plain / (T_draft + T_verify)`, of medians; with several rows the passes are those
    of the slowest, so tau is tokens per row and pass.
    """
    passes, block = passes_made(states), apart["t_draft"].median() + apart["t_verify"].median()
    speedup = paired_ratio(plain, run)
    # every row is done in as many passes as the slowest needs: tokens per row and pass, to be held against plain's 1
    effective = plain_passes / passes
    predicted = effective * apart["t_plain"].median() / block
    both = Times(
        wall_s=tuple(a + b for a, b in zip(apart["t_draft"].wall_s, apart["t_verify"].wall_s, strict=True)),
        cpu_s=tuple(a + b for a, b in zip(apart["t_draft"].cpu_s, apart["t_verify"].cpu_s, strict=True)),
    )
    return {
        "tau_micro": tau_of(states),
        "tau_of_slowest_rows": effective,
        "num_passes": passes,
        "speedup": speedup,
        "predicted_speedup": predicted,
        "share_of_predicted": speedup.median / predicted,
        "blocks_predicted": scaled(paired_ratio(both, run), passes),
    }


def apart_times(times: Mapping[str, Times], passes: int) -> dict[str, Times]:
    """Times of one pass of each kind."""
    return {
        kind: Times(
            wall_s=tuple(t / passes for t in times[kind].wall_s), cpu_s=tuple(t / passes for t in times[kind].cpu_s)
        )
        for kind in KINDS
    }


def equal_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of prompts whose new tokens are all the same."""
    return float(np.mean([a == b for a, b in zip(ours, theirs, strict=True)]))


def beside(
    work: Mapping[str, Work], times: Mapping[str, Times], plain: Times, ours: list[list[int]], bytes_read: float
) -> dict[str, Any]:
    """Return transformers' and z-lab's numbers, each against ours.

    Args:
        work: contestants.
        times: of each.
        plain: ours, without the prompts' passes.
        ours: every prompt's new tokens.
        bytes_read: weights that plain decoding reads in all.
    """
    found: dict[str, Any] = {}
    decoded = sum(len(tokens) - 1 for tokens in ours)
    for name in ("transformers", "transformers_compiled"):
        if name in times:
            theirs = less(times[name], times[f"{name}_prefill"])
            found[name] = {
                **rates(theirs, decoded),
                "weight_bytes_per_s": bytes_read / theirs.median(),
                "plain_speedup": paired_ratio(theirs, plain),
                "prompts_equal": equal_share(ours, work[name]()),
            }
    if "zlab" in times:
        runs: Any = work["zlab"]()
        blocks = [count for run in runs for count in run.committed]
        found["zlab"] = {
            # whole runs, prompts' passes included, on both sides
            **rates(times["zlab"], decoded),
            "tau_micro": sum(blocks) / len(blocks),
            "dflash_speedup": paired_ratio(times["zlab"], times["dflash"]),
            "prompts_equal": equal_share(ours, [run.tokens for run in runs]),
        }
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """One batch size: what is run, and every contestant."""

    runs: Runs
    accepts: list[int]
    work: dict[str, Work]


def prepare(runs: Runs, prompts: list[list[int]], options: argparse.Namespace, others: Others | None, size: int,
            ceiling: Work) -> Size:  # fmt: skip
    """The contestants of one batch size."""
    accepts = options.accept or sorted({0, (runs.block_size - 1) // 2, runs.block_size - 1})
    return Size(runs=runs, accepts=accepts, work=contestants(runs, prompts, accepts, others, size, ceiling))


def measure(prepared: Size, options: argparse.Namespace, size: int, ceiling_flops: float) -> dict[str, Any]:
    """One batch size's entry; everything has been run once before, the oracle's texts among it."""
    runs, accepts, work = prepared.runs, prepared.accepts, prepared.work
    times = time_interleaved(work, rounds=options.rounds, warmups=0)
    plain_states, states = runs.plain(), runs.speculative()
    ours = new_tokens_of(plain_states, runs.batches)
    plain = less(times["plain"], times["plain_prefill"])
    dflash = less(times["dflash"], times["dflash_prefill"])
    decoded, passes = sum(len(tokens) - 1 for tokens in ours), passes_made(plain_states)
    apart = apart_times(times, runs.passes)
    target_bytes = weight_bytes(runs.target)
    against = partial(speculation, plain, apart=apart, plain_passes=passes)
    for name in times:
        sys.stderr.write(f"batch {size}: {name:24} {times[name].median():9.4f} s\n")
    return {
        "num_prompts": len(ours),
        "passes_apart": {
            kind: {"wall_s": part.median(), "cpu_s": part.median("cpu_s")} for kind, part in apart.items()
        },
        "plain": {**rates(plain, decoded), "weight_bytes_per_s": target_bytes * passes / plain.median()},
        "dflash": {
            **rates(dflash, decoded),
            **against(run=dflash, states=states),
            "prompts_equal": equal_share(ours, new_tokens_of(states, runs.batches)),
        },
        "oracle": [
            {
                "accept": accept,
                **against(run=less(times[f"oracle_{accept}"], times["dflash_prefill"]), states=runs.oracle(accept)),
            }
            for accept in accepts
        ],
        "ceiling_flops_per_s": ceiling_flops / times["ceiling"].median(),
        **beside(work, times, plain, ours, target_bytes * passes),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it."""
    options, about = read_arguments(arguments), machine()
    target, drafter = load_models(options)
    prompts, others = load_prompts(options, target), load_others(options)
    block_size = check_block_size(options.block_size, drafter.config)
    width = -(-max(map(len, prompts)) // WIDTH) * WIDTH
    ceiling, ceiling_flops = matmul_work(size=options.ceiling_size, dtype=options.dtype)
    sizes: dict[int, Size] = {}
    for size in options.batch_sizes:
        # with random weights one batch of prompts is as good as several
        used = prompts if options.shapes is None else prompts[:size]
        batches = [
            Batch.of(used[first : first + size], width=width, new_tokens=options.new_tokens)
            for first in range(0, len(used), size)
        ]
        runs = Runs(
            target, drafter, batches, new_tokens=options.new_tokens, block_size=block_size, passes=options.passes
        )
        sizes[size] = prepare(runs, used, options, others, size, ceiling)
    # an accelerator's programs take minutes to compile in turn; a CPU that compiles has nothing left
    threads = 1 if jax.default_backend() == "cpu" else COMPILE_THREADS
    warm_up((run for size in sizes.values() for run in size.work.values()), threads=threads)
    by_batch = {str(size): measure(prepared, options, size, ceiling_flops) for size, prepared in sizes.items()}
    write_result(
        {
            "benchmark": "decode",
            "machine": about,
            "target": str(options.target or options.shapes),
            "drafter": None if options.drafter is None else str(options.drafter),
            "dtype": options.dtype,
            "block_size": block_size,
            "drafter_layers": drafter.config.num_layers,
            "draft_vocab_size": drafter.config.draft_vocab_size,
            "new_tokens": options.new_tokens,
            "prompt_width": width,
            "target_weight_bytes": weight_bytes(target),
            "drafter_weight_bytes": weight_bytes(drafter),
            "by_batch_size": by_batch,
            "memory": peak_memory_bytes(),
        }
    )


if __name__ == "__main__":
    main()
