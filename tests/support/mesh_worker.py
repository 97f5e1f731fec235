"""A program that runs a target over several meshes, or as one of several processes, and writes what came out.

It is a program and not a fixture because the number of devices is fixed when jax starts.

    python mesh_worker.py OUT.npz TARGET MESH [TARGET MESH ...]

writes the outputs under the names `TARGET/MESH/features` and so on (the target folder's last name), and prints the
shapes of every shard as one JSON line.
"""

import json
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.experimental import multihost_utils

from dflash_jax.core import make_mesh, parse_mesh, start_processes
from dflash_jax.nn import MoE
from dflash_jax.targets import extend, load_target, next_ids, next_top, prefill, put_batch

CAPTURE_LAYERS = (1, 0)
ROWS, LENGTH, NEW = 8, 11, 3  # sequences, tokens of the prefill and of the block after it
TOP = 20  # likeliest tokens: more than a device has of a vocabulary of 104 split eight ways


def batch(vocab_size):
    draw = np.random.default_rng(3)
    return {
        "tokens": draw.integers(0, vocab_size, (ROWS, LENGTH)).astype(np.int32),
        "lengths": np.array([LENGTH, 4, 9, 7, 1, LENGTH, 10, 2], np.int32),
        "position_offset": np.array([0, 5, 4096, 2**30, 0, 0, 1, 77], np.int32),
        "block": draw.integers(0, vocab_size, (ROWS, NEW)).astype(np.int32),
    }


def forward(target, given):
    """A prefill, and a block after it: what `cache build` and decoding do."""
    first = prefill(
        target, given["tokens"], lengths=given["lengths"], position_offset=given["position_offset"],
        capture_layers=CAPTURE_LAYERS, capacity=LENGTH + NEW,
    )  # fmt: skip
    second = extend(target, first.kv, given["block"], capture_layers=CAPTURE_LAYERS)
    ids = next_ids(target, first.hidden), next_ids(target, second.hidden)
    top_ids, top_logprobs = next_top(target, first.hidden, count=TOP)
    outputs = {"features": first.features, "next_ids": ids[0], "block_features": second.features, "block_ids": ids[1]}
    return outputs | {"top_ids": top_ids, "top_logprobs": top_logprobs}, second.kv


def shard_shapes(arrays):
    """The shape of every shard that lies in this process, by array; one entry where all are alike."""
    return {name: sorted({shard.data.shape for shard in array.addressable_shards}) for name, array in arrays.items()}


def gathers(compiled):
    """Shapes of everything that the compiled program gathers from several devices into one."""
    lines = [line for line in compiled.as_text().splitlines() if " all-gather" in line and "=" in line]
    return sorted({line.split("=")[1].split("{")[0].strip() for line in lines})


def run(folder, text):
    mesh = make_mesh(parse_mesh(text))
    target = load_target(folder, mesh=mesh)
    given = put_batch(mesh, batch(target.config.vocab_size))
    jitted: Any = eqx.filter_jit(forward)
    compiled = jitted.lower(target, given).compile()
    outputs, kv = compiled(target, given)
    layer = target.layers[1]
    arrays = {
        "embed_tokens": target.embed_tokens,
        "head": target.head,
        "q_proj": layer.self_attn.q_proj.weight,
        "k_proj": layer.self_attn.k_proj.weight,
        "o_proj": layer.self_attn.o_proj.weight,
        "norm": target.norm.weight,
        "keys": kv.layers[1].k,
        "features": outputs["features"],
    }
    if isinstance(layer.mlp, MoE):
        arrays |= {"gate_up_proj": layer.mlp.experts.gate_up_proj, "down_proj": layer.mlp.experts.down_proj}
    else:
        arrays |= {"up_proj": layer.mlp.up_proj.weight, "down_proj": layer.mlp.down_proj.weight}
    told = {"shards": shard_shapes(arrays), "gathers": gathers(compiled.compiled)}
    if jax.process_count() > 1:
        outputs = multihost_utils.process_allgather(outputs, tiled=True)
    return {name: np.asarray(value) for name, value in outputs.items()}, told


def main():
    out, pairs = Path(sys.argv[1]), sys.argv[2:]
    start_processes()
    outputs: dict[str, Any] = {}
    told: dict[str, Any] = {"processes": jax.process_count(), "devices": jax.device_count()}
    for folder, text in zip(map(Path, pairs[::2]), pairs[1::2], strict=True):
        name = f"{folder.name}/{text}"
        values, told[name] = run(folder, text)
        outputs |= {f"{name}/{key}": value for key, value in values.items()}
    np.savez(out, **outputs)
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
