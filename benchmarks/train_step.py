"""A training step: anchors/s and memory, against speculators' own DFlash step and against a large matrix product.

Same shapes, same weights, same anchors, same labels, one AdamW step; the losses are compared before anything is timed:

    .venv-dev/bin/python benchmarks/train_step.py --rounds 9

speculators (PyTorch, CPU) runs as its trainer runs it, sdpa attention, cross-entropy, its forward compiled; where a
step has several sequences it takes them in turn and then makes one AdamW step, as its packed rows are slow on a CPU. It
makes each label from the target's last hidden state and the frozen head, where ours reads next_ids that the cache
stores: what that would cost us is timed as a contestant of its own. Memory peaks are those of processes that do one
thing and hold one library (--memory; train_step_speculators.py).

`--sampled-vocab 8192` times a step whose softmax is estimated from so many tokens beside them: not the same computation
(docs/design/018-sampled-head.md), for which its ratio to speculators stands apart.

Without a reference, for another machine or other shapes: --alone, and the sizes as flags.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
    peak_flops,
    peak_memory_bytes,
    time_interleaved,
    write_result,
)
from dflash_jax.core import give_back_freed, load_tensors
from dflash_jax.drafter import Drafter, DrafterConfig, StoredSequence, eligible_anchors, init_drafter, save_drafter
from dflash_jax.nn import greedy_tokens
from dflash_jax.train import TrainConfig, step_bytes
from dflash_jax.train.loss import draw_anchors
from dflash_jax.train.step import make_step, new_state

MASK_ID = 1
GAMMA = 4.0
SIZES = {
    "tokens": 1024, "anchors": 64, "block_size": 8, "layers": 4, "capture": 4, "hidden": 576, "intermediate": 1536,
    "heads": 9, "kv_heads": 3, "head_dim": 64, "vocab": 49152, "threads": 2,
}  # fmt: skip
"""Defaults: the shapes of SmolLM2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line says."""

    tokens: int
    anchors: int
    block_size: int
    layers: int
    capture: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    sequences: int
    accumulate: int
    sampled_vocab: int | None
    dtype: str
    remat: bool
    rounds: int
    threads: int
    ceiling_size: int
    alone: bool
    memory: str | None

    @property
    def drafter(self) -> DrafterConfig:
        """The drafter's shapes."""
        return DrafterConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            attention_bias=False,
            rms_norm_eps=1e-5,
            rope_theta=1e5,
            max_positions=8192,
            block_size=self.block_size,
            mask_token_id=MASK_ID,
            capture_layers=tuple(range(1, self.capture + 1)),
            num_target_layers=self.capture + 2,
            vocab_size=self.vocab,
        )

    def training(self, sequences: int, *, is_sampled: bool = False) -> TrainConfig:
        """A run whose denominator is that of speculators, with all of the vocabulary or a sample."""
        return TrainConfig(
            target=Path(),
            cache=Path(),
            out=Path(),
            steps=1000,
            block_size=self.block_size,
            num_layers=self.layers,
            sequences_per_step=sequences,
            accumulate=min(self.accumulate, sequences),
            anchors_per_sequence=self.anchors,
            loss_denominator="labels",
            sampled_vocab=self.sampled_vocab if is_sampled else None,
            decay_gamma=GAMMA,
            dtype="bfloat16" if self.dtype == "bfloat16" else "float32",
            remat=self.remat,
        )


def parse(arguments: list[str] | None) -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sequences", type=int, default=4, help="of the larger step; 1 is always timed")
    parser.add_argument("--accumulate", type=int, default=1, help="parts that its sequences are taken in")
    parser.add_argument(
        "--sampled-vocab", type=int, help="time a step with a sampled vocabulary too, of so many tokens"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--ceiling-size", type=int, help="rows of the large product: 2048 on a CPU, else 8192")
    parser.add_argument("--alone", action="store_true", help="leave speculators out")
    parser.add_argument("--memory", choices=["ours", "ours_sampled"], help="only this, and its peak (used by itself)")
    given = vars(parser.parse_args(arguments))
    given["ceiling_size"] = given["ceiling_size"] or (2048 if jax.default_backend() == "cpu" else 8192)
    return Options(**given)


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What both train on.

    Attributes:
        drafter: first weights.
        head: the target's embedding and head, tied.
        last_hidden: the target's last hidden states after its norm, whose greedy tokens are next_ids.
        batch: the sequences, greedy text throughout, every token a response.
    """

    drafter: Drafter
    head: jax.Array
    last_hidden: jax.Array
    batch: StoredSequence

    def first(self, count: int) -> StoredSequence:
        """The first sequences."""
        return jax.tree_util.tree_map(lambda leaf: leaf[:count], self.batch)


def make_world(options: Options) -> World:
    """Random weights and features; text that follows the labels, so that every slot has one."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    count, tokens = options.sequences, options.tokens
    config, kind = options.drafter, jnp.dtype(options.dtype)
    head = jax.random.normal(next(keys), (options.vocab, options.hidden), jnp.float32) * 0.05
    hidden = jax.random.normal(next(keys), (count, tokens, options.hidden), jnp.float32)
    next_ids = jax.jit(greedy_tokens)(hidden, head)
    token_ids = jnp.concatenate([jnp.full((count, 1), 2, jnp.int32), next_ids[:, :-1]], axis=1)
    numbers = jnp.full(count, tokens, jnp.int32)
    features = jax.random.normal(next(keys), (count, tokens, config.num_features), jnp.bfloat16)
    batch = StoredSequence(
        features=features.astype(kind),
        token_ids=token_ids,
        next_ids=next_ids,
        length=numbers,
        prompt_len=jnp.ones(count, jnp.int32),
        limit=numbers * 2,
        position_offset=numbers * 0,
        # speculators' anchors leave room for a whole block behind them
        features_len=numbers - options.block_size - 1,
    )
    drafter = jax.jit(lambda key: init_drafter(config, key=key))(next(keys))
    return World(drafter=drafter, head=head.astype(kind), last_hidden=hidden, batch=batch)


class Ours:
    """Our step; its state goes on from call to call, as in training."""

    def __init__(self, world: World, options: Options, *, sequences: int, is_sampled: bool = False) -> None:
        config = options.training(sequences, is_sampled=is_sampled)
        self._state = new_state(jax.tree_util.tree_map(jnp.copy, world.drafter), config)
        self._ends, self._batch = (world.head, world.head), world.first(sequences)
        self._step = make_step(config).lower(self._state, *self._ends, self._batch).compile()
        self.seed = config.seed

    @property
    def xla_bytes(self) -> int:
        """What XLA says the step holds at once, its arguments among it; the tied head is two of them and one array."""
        memory: Any = self._step.memory_analysis()
        arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return arrays - self._ends[0].nbytes + memory.temp_size_in_bytes

    def __call__(self) -> jax.Array:
        """One step; returns its loss."""
        self._state, result = self._step(self._state, *self._ends, self._batch)
        return result.statistics.loss


def first_anchors(world: World, options: Options, *, seed: int) -> np.ndarray:
    """The anchors that our first step draws for its one sequence, rising."""
    one = jax.tree_util.tree_map(lambda leaf: leaf[0], world.batch)
    key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0), 1)[0]
    anchors, valid = draw_anchors(eligible_anchors(one), options.anchors, key=key)
    assert bool(valid.all()), "more tokens than anchors are needed"
    return np.sort(np.asarray(anchors))


def torch_world(world: World, options: Options) -> Any:
    """The same as NumPy arrays, for speculators. PyTorch comes in here: it would count in the peak of our process."""
    from train_step_speculators import TorchWorld

    with tempfile.TemporaryDirectory() as folder:
        save_drafter(world.drafter, Path(folder))
        stored = load_tensors(Path(folder) / "model.safetensors", what="weights")
        weights = {name: np.array(value, np.float32) for name, value in stored.items()}
    return TorchWorld(
        sizes={
            **{name: getattr(options, name) for name in SIZES},
            "capture_layers": list(options.drafter.capture_layers),
            "mask_id": MASK_ID,
            "gamma": GAMMA,
        },
        weights=weights,
        head=np.asarray(world.head, np.float32),
        features=np.asarray(world.batch.features, np.float32),
        last_hidden=np.asarray(world.last_hidden),
        token_ids=np.asarray(world.batch.token_ids),
    )


def make_speculators(world: World, options: Options, *, sequences: int) -> Any:
    """The reference's step."""
    from train_step_speculators import Speculators

    return Speculators(torch_world(world, options), sequences=sequences)


def flops(options: Options) -> dict[str, float]:
    """FLOPs of a step of one sequence by formula: products of forward and backward, masked scores included.

    Twice a product's numbers forward; backward twice that again, but for `fc`, whose input needs no gradient, and the
    head, whose weights need none.
    """
    config, rows, tokens = options.drafter, options.anchors * options.block_size, options.tokens
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    drafted = options.anchors * (options.block_size - 1)
    return {
        "fc": 4.0 * tokens * config.num_features * hidden,
        "context": 6.0 * options.layers * tokens * 2 * hidden * kv,
        "layers": 6.0 * options.layers * rows * hidden * (2 * q + 2 * kv + 3 * inner),
        "attention": 6.0 * options.layers * rows * 2 * q * (tokens + options.block_size),
        "head": 4.0 * drafted * hidden * options.vocab,
    }


def sum_of(first: Times, second: Times) -> Times:
    """Two contestants one after the other, round by round."""
    return Times(
        wall_s=tuple(a + b for a, b in zip(first.wall_s, second.wall_s, strict=True)),
        cpu_s=tuple(a + b for a, b in zip(first.cpu_s, second.cpu_s, strict=True)),
    )


def scaled(ratio: Ratio, scale: float) -> Ratio:
    """The ratio of rates where that of times is given."""
    low, high = ratio.ci95
    return replace(ratio, median=ratio.median * scale, ci95=(low * scale, high * scale))


def measure_memory(options: Options, arguments: list[str], world: World) -> dict[str, Any]:
    """Peak of a process that does nothing but some steps, by contestant, one sequence and several."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        commands = {"ours": [__file__, *arguments, "--memory", "ours"]}
        if options.sampled_vocab:
            commands["ours_sampled"] = [__file__, *arguments, "--memory", "ours_sampled"]
        if not options.alone:
            torch_world(world, options).save(Path(folder))
            commands["speculators"] = [str(Path(__file__).with_name("train_step_speculators.py")), folder]
        for name, command in commands.items():
            for sequences in sorted({1, options.sequences}):
                run = [sys.executable, *command, "--sequences", str(sequences)]
                done = subprocess.run(run, capture_output=True, text=True, check=True)
                found[f"{name}_{sequences}"] = json.loads(done.stdout.splitlines()[-1])["memory"]
    return found


def memory_alone(options: Options) -> None:
    """Three of our steps, then this process's peak. What only the beginning needed is given back."""
    world = make_world(options)
    step = Ours(world, options, sequences=options.sequences, is_sampled=options.memory == "ours_sampled")
    del world
    for _ in range(3):
        give_back_freed()
        jax.block_until_ready(step())
    write_result({"memory": peak_memory_bytes()})


def compared(times: Mapping[str, Times], options: Options, ceiling_flops: float) -> dict[str, Any]:
    """Ratios within rounds, by wall clock and by CPU seconds."""
    many, one_flops = options.sequences, sum(flops(options).values())
    result: dict[str, Any] = {}
    for clock in ("wall_s", "cpu_s"):

        def ratio(slow: Times, fast: Times, scale: float = 1.0, clock: Any = clock) -> Ratio:
            return scaled(paired_ratio(slow, fast, clock=clock), scale)

        ours = times["ours"]
        found = {"share_of_ceiling": ratio(times["ceiling"], ours, one_flops / ceiling_flops)}
        if many > 1:
            found["per_anchor_at_many_over_one"] = ratio(times["ours_many"], ours, 1 / many)
        if "ours_sampled" in times:
            found["sampled_speedup"] = ratio(ours, times["ours_sampled"])
        if "speculators" in times:
            if "ours_sampled" in times:
                found["speedup_sampled"] = ratio(times["speculators"], times["ours_sampled"])
            found["speedup"] = ratio(times["speculators"], ours)
            found["speedup_with_label_logits"] = ratio(times["speculators"], sum_of(ours, times["label_logits"]))
            if many > 1:
                found["speedup_at_many"] = ratio(times["speculators_many"], times["ours_many"])
        found["label_logits_over_ours"] = ratio(times["label_logits"], ours)
        result[clock] = found
    return result


def accounts(options: Options, steps: Mapping[int, Ours]) -> dict[str, dict[str, int]]:
    """What our steps need, as `step_bytes` says and as XLA does, by sequences."""
    said = {
        str(count): step_bytes(options.drafter, options.training(count), width=options.tokens, tied=True).total
        for count in steps
    }
    return {"said_bytes": said, "xla_bytes": {str(count): step.xla_bytes for count, step in steps.items()}}


def agreement(ours: float, theirs: float) -> dict[str, float]:
    """The losses of both first steps."""
    return {"ours": ours, "speculators": theirs, "relative_difference": abs(ours - theirs) / theirs}


def main(arguments: list[str] | None = None) -> int:
    """Run it; 1 where the losses of the two are not the same."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.memory:
        memory_alone(options)
        return 0
    about = machine(("jax", "jaxlib") if options.alone else ("jax", "jaxlib", "torch", "speculators"))
    world, many = make_world(options), options.sequences
    # an accelerator's peak is XLA's own account, and a process that holds it leaves none to another
    memory = measure_memory(options, arguments, world) if jax.default_backend() == "cpu" else None
    # an accelerator's compiler leaves most of the host's cores to the other step
    with ThreadPoolExecutor(1 if jax.default_backend() == "cpu" else 2) as pool:
        counts = sorted({1, many})
        steps = dict(zip(counts, pool.map(lambda count: Ours(world, options, sequences=count), counts), strict=True))
    ours = steps[1]
    ceiling, ceiling_flops = matmul_work(size=options.ceiling_size, dtype=options.dtype)
    labels = jax.jit(greedy_tokens)
    rows = world.last_hidden[0, : options.anchors * options.block_size].astype(options.dtype)
    work: dict[str, Work] = {"ours": ours, "ceiling": ceiling, "label_logits": lambda: labels(rows, world.head)}
    result: dict[str, Any] = {"benchmark": "train_step", "machine": about}
    agree = True
    if not options.alone:
        reference = make_speculators(world, options, sequences=1)
        theirs = reference.loss_at(first_anchors(world, options, seed=ours.seed))
        result["first_loss"] = agreement(float(ours()), theirs)
        agree = options.dtype == "bfloat16" or result["first_loss"]["relative_difference"] < 1e-4
        work["speculators"] = reference
    if many > 1:
        work["ours_many"] = steps[many]
        if not options.alone:
            work["speculators_many"] = make_speculators(world, options, sequences=many)
    if options.sampled_vocab:
        work["ours_sampled"] = Ours(world, options, sequences=1, is_sampled=True)
    times = time_interleaved(work, rounds=options.rounds, warmups=2)
    result |= {
        "rates": rates(times, options),
        "ratio": compared(times, options, ceiling_flops),
        "flops": flops(options),
    }
    one, peak = sum(flops(options).values()), peak_flops()
    result["matmul_flops_per_s"] = ceiling_flops / times["ceiling"].median()
    result["mfu"] = None if peak is None else one / times["ours"].median() / peak
    if peak is not None and many > 1:
        result["mfu_at_many"] = many * one / times["ours_many"].median() / peak
    result |= {"memory": memory or peak_memory_bytes()} | accounts(options, steps)
    for name, part in times.items():
        sys.stderr.write(f"{name:18} {part.median():8.3f} s   {part.median('cpu_s'):8.3f} CPU s\n")
    write_result(result)
    return 0 if agree else 1


def rates(times: Mapping[str, Times], options: Options) -> dict[str, dict[str, float]]:
    """Medians, and anchors a second where a contestant has anchors."""
    anchors = {
        "ours": 1,
        "ours_sampled": 1,
        "speculators": 1,
        "ours_many": options.sequences,
        "speculators_many": options.sequences,
    }
    found = {}
    for name, part in times.items():
        wall, cpu = part.median("wall_s"), part.median("cpu_s")
        found[name] = {"wall_s": wall, "cpu_s": cpu}
        if name in anchors:
            count = anchors[name] * options.anchors
            found[name] |= {"anchors_per_s": count / wall, "anchors_per_cpu_s": count / cpu}
    return found


if __name__ == "__main__":
    sys.exit(main())
