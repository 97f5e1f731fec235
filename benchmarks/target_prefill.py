"""Features and next_ids of whole sequences: how fast, against transformers and the device's own matrix products.

On a CPU, float32 SmolLM2, each round in turn: ours, transformers doing the same (hidden states of the captured layers,
argmax of the logits at every position), and a large matrix product, the ceiling:

    .venv-dev/bin/python benchmarks/target_prefill.py --target TARGET --rounds 5

On an accelerator, the shapes of gpt-oss-20b with random weights in bfloat16 (no transformers, MFU against the device's
published peak too):

    .venv-dev/bin/python benchmarks/target_prefill.py --shapes gpt-oss-20b --rounds 20
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from common import (
    Times,
    Work,
    compiled_flops,
    machine,
    matmul_work,
    paired_ratio,
    peak_flops,
    peak_memory_bytes,
    time_interleaved,
    write_result,
)
from dflash_jax import targets
from dflash_jax.targets import Target, TargetConfig

# The published config.json of openai/gpt-oss-20b, without what does not reach the maths.
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "rms_norm_eps": 1e-5,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "attention_bias": True, "hidden_act": "silu", "swiglu_limit": 7.0,
    "rope_theta": 150000, "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 8, "num_local_experts": 8}
SHAPES = {
    "gpt-oss-20b": GPT_OSS_20B,
    # to see the script run where there is no accelerator
    "gpt-oss-tiny": GPT_OSS_20B | TINY | {"layer_types": ["sliding_attention", "full_attention"] * 4},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line says."""

    target: Path | None
    shapes: str | None
    batch: int
    length: int
    capture: int
    rounds: int
    dtype: str
    mesh: str
    ceiling_size: int
    threads: int
    alone: bool


def parse() -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--target", type=Path, help="target folder (dflash-jax target import --smollm2 --out TARGET)")
    source.add_argument("--shapes", choices=sorted(SHAPES), help="random weights of these shapes")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--capture", type=int, default=4, help="captured layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--mesh", default="data=1", help="such as data=2,model=4")
    parser.add_argument("--ceiling-size", type=int, help="rows of the large product: 2048 on a CPU, else 8192")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--alone", action="store_true", help="leave transformers out")
    given = vars(parser.parse_args())
    on_cpu = jax.default_backend() == "cpu"
    given["dtype"] = given["dtype"] or ("float32" if on_cpu else "bfloat16")
    given["ceiling_size"] = given["ceiling_size"] or (2048 if on_cpu else 8192)
    return Options(**given)


def random_target(raw: dict[str, Any], dtype: str, mesh_text: str) -> Target:
    """A target of these shapes, made on its devices. Routers are random too, so experts get about equal shares."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        config = targets.read_target_config(Path(folder))
    mesh, axes, kind = targets.open_mesh(config, mesh_text), targets.tensor_axes(config), jnp.dtype(dtype)
    shapes = targets.tensor_shapes(config)
    number = {name: index for index, name in enumerate(shapes)}

    # compiled once per shape, not once per tensor
    @lru_cache
    def maker(shape: tuple[int, ...], is_norm: bool, sharding: Any) -> Any:
        def make(key: jax.Array) -> jax.Array:
            return (
                jnp.ones(shape, kind) if is_norm else jax.random.normal(key, shape, kind) * kind.type(shape[-1] ** -0.5)
            )

        return jax.jit(make, out_shardings=sharding)

    def take(name: str) -> jax.Array:
        sharding = targets.weight_sharding(config, axes[name], mesh)
        return maker(shapes[name], "norm" in name, sharding)(jax.random.key(number[name]))

    return targets.assemble(config, take, mesh=mesh)


def forward(
    target: Target,
    tokens: Int32[Array, "batch seq"],
    lengths: Int32[Array, " batch"],
    position_offset: Int32[Array, " batch"],
    capture_layers: tuple[int, ...],
) -> tuple[Float[Array, "batch seq features"], Int32[Array, "batch seq"]]:
    """What a cache stores of a batch."""
    output = targets.prefill(
        target, tokens, lengths=lengths, position_offset=position_offset, capture_layers=capture_layers
    )
    return output.features, targets.next_ids(target, output.hidden)


def transformers_work(folder: Path, tokens: np.ndarray, layers: tuple[int, ...], threads: int) -> Work:
    """The same of transformers, as its users write it."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(tokens.astype(np.int64))

    def run() -> tuple[Any, Any]:
        with torch.inference_mode():
            output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
            features = torch.cat([output.hidden_states[layer + 1] for layer in layers], dim=-1)
            return features.numpy(), output.logits.argmax(-1).numpy()

    return run


def agreement(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> dict[str, float]:
    """How far the two are the same work: largest relative difference of a feature, share of equal next_ids."""
    features, ids = np.asarray(ours[0]), np.asarray(ours[1])
    return {
        "feature_error": float(np.abs(features - theirs[0]).max() / np.abs(theirs[0]).max()),
        "next_ids_equal": float((ids == theirs[1]).mean()),
    }


def rates(times: Times, tokens: int) -> dict[str, float]:
    """Medians of one contestant."""
    wall, cpu = times.median("wall_s"), times.median("cpu_s")
    return {"wall_s": wall, "cpu_s": cpu, "tokens_per_s": tokens / wall}


def describe(config: TargetConfig, options: Options, compiled: Any) -> dict[str, Any]:
    """What was run: sizes, FLOPs by formula and as XLA counts them, memory of the compiled program."""
    memory = compiled.compiled.memory_analysis()
    return {
        "architecture": config.architecture,
        "num_layers": config.num_layers,
        "dtype": options.dtype,
        "mesh": options.mesh,
        "batch": options.batch,
        "length": options.length,
        "flops": targets.prefill_flops(config, batch=options.batch, length=options.length),
        "xla_flops": compiled_flops(compiled.compiled),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "logits_would_take_bytes": 4 * options.batch * options.length * config.vocab_size,
    }


def main() -> None:
    """Run it."""
    options = parse()
    about = machine()
    if options.target is None:
        target = random_target(SHAPES[options.shapes or ""], options.dtype, options.mesh)
    else:
        mesh = targets.open_mesh(targets.read_target_config(options.target), options.mesh)
        target = targets.load_target(options.target, dtype=jnp.dtype(options.dtype), mesh=mesh)
    config = target.config
    layers = targets.default_capture_layers(config.num_layers, options.capture)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (options.batch, options.length)).astype(np.int32)
    given = targets.put_batch(
        target.mesh,
        {
            "tokens": tokens,
            "lengths": np.full(options.batch, options.length, np.int32),
            "position_offset": np.zeros(options.batch, np.int32),
        },
    )
    jitted: Any = eqx.filter_jit(forward)
    compiled = jitted.lower(target, **given, capture_layers=layers).compile()
    ceiling, ceiling_flops = matmul_work(size=options.ceiling_size, products=2, dtype=options.dtype)
    work: dict[str, Work] = {"ours": lambda: compiled(target, **given, capture_layers=layers), "ceiling": ceiling}
    result: dict[str, Any] = {"benchmark": "target_prefill", "machine": about, **describe(config, options, compiled)}
    if options.target is not None and not options.alone:
        work["transformers"] = transformers_work(options.target, tokens, layers, options.threads)
        result["agreement"] = agreement(work["ours"](), work["transformers"]())
    times = time_interleaved(work, rounds=options.rounds)
    count, flops = options.batch * options.length, result["flops"]
    result |= {name: rates(times[name], count) for name in work if name != "ceiling"}
    result["ceiling"] = {"flops_per_s": ceiling_flops / times["ceiling"].median(), "size": options.ceiling_size}
    result["ceiling"]["tokens_per_s"] = result["ceiling"]["flops_per_s"] / flops * count
    result["share_of_ceiling"] = share_of_ceiling(times, flops, ceiling_flops)
    if "transformers" in times:
        result["speedup"] = {
            clock: paired_ratio(times["transformers"], times["ours"], clock=clock) for clock in ("wall_s", "cpu_s")
        }
    peak = peak_flops()
    result["mfu"] = None if peak is None else flops / times["ours"].median() / (peak * math.prod(shape_of(target)))
    result["memory"] = peak_memory_bytes()
    for name in work:
        sys.stderr.write(f"{name:14} {times[name].median():8.3f} s   {times[name].median('cpu_s'):8.3f} CPU s\n")
    write_result(result)


def shape_of(target: Target) -> tuple[int, ...]:
    """Devices along each axis of the target's mesh."""
    return (1,) if target.mesh is None else tuple(target.mesh.shape.values())


def share_of_ceiling(times: dict[str, Times], flops: float, ceiling_flops: float) -> dict[str, Any]:
    """Our FLOP/s over the ceiling's, within rounds: 1 would be one large product from beginning to end."""
    shares = {}
    for clock in ("wall_s", "cpu_s"):
        ratio = paired_ratio(times["ceiling"], times["ours"], clock=clock)
        scale = flops / ceiling_flops
        shares[clock] = {
            "median": ratio.median * scale,
            "ci95": [bound * scale for bound in ratio.ci95],
            "rounds": ratio.rounds,
        }
    return shares


if __name__ == "__main__":
    main()
