"""A program that trains over several meshes, or as one of several processes: the number of devices is fixed at start.

    python train_worker.py TARGET SOURCE FOLDER MESH [MESH ...]

trains 20 steps on every mesh into FOLDER/<mesh>. SOURCE is a cache, or a responses file for live features; drafters
are measured on the cache of the environment's EVAL_CACHE, where it is set. The last line is JSON: by mesh what `train`
returned, the shapes that lie on a device, and what the compiled step gathers.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax

from dflash_jax.cache import open_cache
from dflash_jax.core import start_processes
from dflash_jax.targets import load_target, open_mesh
from dflash_jax.train import train
from dflash_jax.train.data import CachedSource, make_batches
from dflash_jax.train.init import drafter_config, new_drafter
from dflash_jax.train.step import make_step, new_state, put_state
from support import tiny, tiny_chain
from support.mesh_worker import gathers

STEPS = 20


def config_of(target, source, out, mesh):
    settings: dict[str, Any] = {
        "steps": STEPS, "num_layers": 1, "sequences_per_step": 8, "anchors_per_sequence": 8, "checkpoint_every": 10,
        "learning_rate": 1e-3, "mesh": mesh,
    }  # fmt: skip
    if held_out := os.environ.get("EVAL_CACHE"):
        settings |= {"eval_cache": Path(held_out)}
    if source.is_file():
        settings |= {"features": "live", "responses": source, "capture_layers": tiny.CAPTURE_LAYERS}
        source = None
    return tiny_chain.train_config(target, source, out, **settings)


def shards(config):
    """The shapes of some arrays on the first device, and everything the compiled step gathers, on a cached source."""
    cache = open_cache(config.cache)
    mesh = open_mesh(load_target(config.target).config, config.mesh)
    target = load_target(config.target, mesh=mesh)
    shape = drafter_config(
        target, capture_layers=CachedSource(cache).capture_layers, num_layers=1, block_size=5, mask_token_id=3
    )
    state = new_state(new_drafter(shape, target, init="target", key=jax.random.key(0)), config)
    state = put_state(state, mesh)
    batch = make_batches(cache, sequences_per_step=8, max_positions=160, seed=0, mesh=mesh)(0)
    compiled = make_step(config, mesh=mesh).lower(state, target.embed_tokens, target.head, batch).compile()
    moments = [leaf for leaf in jax.tree_util.tree_leaves(state.optimizer) if leaf.shape == (24, 48)]
    arrays = {"head": target.head, "fc": state.drafter.fc.weight, "features": batch.features, "fc_moment": moments[0]}
    told = {name: list(array.addressable_shards[0].data.shape) for name, array in arrays.items()}
    return told | {"gathers": gathers(compiled)}


def main():
    target, source, folder = map(Path, sys.argv[1:4])
    start_processes()
    told: dict[str, Any] = {"processes": jax.process_count(), "devices": jax.device_count()}
    with tiny_chain.quick_compiles():
        for mesh in sys.argv[4:]:
            config = config_of(target, source, folder / mesh, mesh)
            told[mesh] = train(config)
            if source.is_dir() and jax.process_count() == 1 and mesh != "data=1":
                told[mesh] |= shards(config)
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
