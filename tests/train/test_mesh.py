"""Training over several devices and processes is training on one: the same losses, and no device holds all of it."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import support.train_worker
from dflash_jax.core import InputError, MeshShape, make_mesh, parse_mesh
from dflash_jax.drafter import load_drafter
from dflash_jax.nn import online_pass
from dflash_jax.targets import load_target
from dflash_jax.train import train
from dflash_jax.train.init import drafter_config, new_drafter
from dflash_jax.train.sharding import check_batch, head_pass
from support import tiny, tiny_chain

WORKER = Path(support.train_worker.__file__)
MESHES = ("data=1", "data=8", "data=2,model=4", "model=8")


def start(arguments, *, devices, **environment):
    devices_flag = f"--xla_force_host_platform_device_count={devices}"
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices_flag}", "JAX_PLATFORMS": "cpu"}
    path = {"PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), *filter(None, sys.path)])}
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, arguments)],
        env=os.environ | flags | path | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    told, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return json.loads(told.splitlines()[-1])


def losses(run):
    return np.array([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])


def held_out_numbers(run):
    """Everything measured on held-out prompts, but for the seconds."""
    rows = [json.loads(line).get("eval") for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows if row]


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """A target whose vocabulary of 56 divides by 8, and a cache of its responses to eight texts."""
    folder = tmp_path_factory.mktemp("even")
    target = tiny.write_tiny_target(folder / "target", seed=tiny.TARGET_SEED, vocab_size=56)
    return target, tiny_chain.make_cache(folder / "chain", target, tiny.TEXTS)


@pytest.fixture(scope="module")
def held_out(even, tmp_path_factory):
    """A cache of the same target's responses to other texts."""
    texts = [text[::-1] for text in tiny.TEXTS[:3]]
    return tiny_chain.make_cache(tmp_path_factory.mktemp("held-out") / "chain", even[0], texts)


@pytest.fixture(scope="module")
def runs(even, held_out, tmp_path_factory):
    """A run on every mesh of eight devices, all in one program."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, finish(start([*even, folder, *MESHES], devices=8, EVAL_CACHE=str(held_out)))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_a_mesh_gives_the_losses_of_one_device(runs, mesh):
    folder, told = runs
    one, many = losses(folder / "data=1"), losses(folder / mesh)
    assert told["devices"] == 8
    assert len(one) == len(many) == 20
    assert one[-1] < one[0] - 0.05
    assert np.abs(many / one - 1).max() < 1e-5
    measured = held_out_numbers(folder / mesh)
    assert len(measured) == 2  # at each checkpoint
    assert measured == held_out_numbers(folder / "data=1")


@pytest.mark.slow
def test_no_device_holds_what_is_split(runs):
    _, told = runs
    whole = {"head": [56, 24], "fc": [24, 48], "features": [8, 64, 48], "fc_moment": [24, 48]}
    wanted = {
        "data=8": whole | {"features": [1, 64, 48], "fc_moment": [3, 48]},
        "data=2,model=4": whole | {"head": [14, 24], "features": [4, 64, 48], "fc_moment": [3, 48]},
        "model=8": whole | {"head": [7, 24], "fc_moment": [3, 48]},
    }
    for mesh, shapes in wanted.items():
        assert {name: told[mesh][name] for name in whole} == shapes, mesh
        # neither the head, nor the embedding, nor a row of logits is ever put together
        assert not [shape for shape in told[mesh]["gathers"] if "56" in re.split(r"[\[\],]", shape)], mesh


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(runs, even, held_out, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    together |= {"EVAL_CACHE": str(held_out)}
    both = [
        start([*even, tmp_path, "data=2,model=2"], devices=2, JAX_PROCESS_ID=str(number), **together)
        for number in range(2)
    ]
    for process in both:
        assert finish(process)["processes"] == 2
    one = losses(runs[0] / "data=1")
    assert np.abs(losses(tmp_path / "data=2,model=2") / one - 1).max() < 1e-5
    # neither process has the whole head, and both have measured with it
    assert held_out_numbers(tmp_path / "data=2,model=2") == held_out_numbers(runs[0] / "data=1")
    assert (tmp_path / "data=2,model=2" / "best").readlink() == (runs[0] / "data=1" / "best").readlink()
    weights = [load_drafter(out / "last") for out in (runs[0] / "data=1", tmp_path / "data=2,model=2")]
    for a, b in zip(*map(jax.tree_util.tree_leaves, weights), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-4


class StoppedError(Exception):
    pass


@pytest.mark.slow
def test_a_run_goes_on_on_other_devices(even, tmp_path):
    """One device, then two, then one."""
    target, cache = even
    config = tiny_chain.train_config(
        target, cache, tmp_path / "whole", steps=6, num_layers=1, sequences_per_step=2, checkpoint_every=2
    )
    train(config)

    def stop_at(step):
        def stop(done, *_):
            if done == step:
                raise StoppedError

        return stop

    moved = dataclasses.replace(config, out=tmp_path / "moved")
    # a stop comes before the checkpoint of its step: 4 is where the first two calls end, 2 and 4 what they left
    for mesh, step, resume in (("data=1", 4, False), ("data=2", 6, True)):
        with pytest.raises(StoppedError):
            train(dataclasses.replace(moved, mesh=mesh, resume=resume), progress=stop_at(step))
    said = train(dataclasses.replace(moved, mesh="data=1", resume=True))
    assert said["steps_this_run"] == 2
    assert np.abs(losses(tmp_path / "moved") / losses(tmp_path / "whole") - 1).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cross-entropy", "kl"])
def test_live_features_on_a_mesh(even, tmp_path, loss):
    target, cache = even
    config = support.train_worker.config_of(target, cache.parent / "responses.jsonl", tmp_path / "one", "data=1")
    config = dataclasses.replace(config, steps=3, loss=loss)
    train(config)
    train(dataclasses.replace(config, out=tmp_path / "two", mesh="model=2"))
    assert np.abs(losses(tmp_path / "two") / losses(tmp_path / "one") - 1).max() < 1e-5


def some_rows(*, rows=6, hidden=5, vocab=12):
    draw = np.random.default_rng(2)
    given = draw.normal(0, 1, (rows, hidden)), draw.normal(0, 1, (vocab, hidden))
    ids = np.stack([draw.permutation(vocab)[:3] for _ in range(rows)]).astype(np.int32)
    probabilities = draw.dirichlet(np.ones(3), rows)
    values = [jnp.asarray(value, jnp.float32) for value in (*given, probabilities)]
    return values[0], values[1], jnp.asarray(ids), values[2]


def test_a_split_head_says_what_a_whole_one_does():
    hidden, head, ids, probabilities = some_rows()
    # a tie across the parts: the lowest id must win
    head = head.at[7].set(head[2])
    hidden = hidden.at[0].set(head[2] * 3)
    mesh = make_mesh(MeshShape(model=2))
    one_pass = head_pass(mesh, head.shape[0])
    assert one_pass is not online_pass
    expected, slope = online_pass(hidden, head, ids, probabilities)
    got, split_slope = jax.jit(one_pass)(hidden, head, ids, probabilities)
    assert np.asarray(got.tokens).tolist() == np.asarray(expected.tokens).tolist()
    assert int(got.tokens[0]) == 2
    assert np.abs(np.asarray(got.loss) - np.asarray(expected.loss)).max() < 1e-5
    assert np.abs(np.asarray(split_slope) - np.asarray(slope)).max() < 1e-5
    # 12 rows do not divide by 5 devices, and one device splits nothing
    assert head_pass(make_mesh(MeshShape(model=2)), 13) is online_pass
    assert head_pass(None, 12) is online_pass


@pytest.mark.slow
def test_a_split_head_samples_each_part():
    given = some_rows()
    mesh, key = make_mesh(MeshShape(model=2)), jax.random.key(1)
    everything, slope = online_pass(*given)
    got, split_slope = jax.jit(head_pass(mesh, 12, sampled=12))(*given, key)
    assert np.abs(np.asarray(got.loss) - np.asarray(everything.loss)).max() < 1e-5
    assert np.abs(np.asarray(split_slope) - np.asarray(slope)).max() < 1e-5
    # five of six of either part: what is left out, another draw has
    keys = jax.random.split(key, 2000)
    total = jax.jit(jax.vmap(lambda key: jnp.exp(head_pass(mesh, 12, sampled=10)(*given, key)[0].loss)))(keys)
    np.testing.assert_allclose(np.mean(total, axis=0), np.exp(everything.loss), rtol=0.05)
    assert np.std(np.asarray(total), axis=0).max() > 0.01


@pytest.mark.parametrize(("mesh", "batch"), [("data=4", 6), ("data=2,expert=2", 2), ("data=2,model=4", 3)])
def test_sequences_must_divide(mesh, batch):
    with pytest.raises(InputError, match=rf"--sequences-per-step is {batch}, --mesh {mesh} splits it into"):
        check_batch(parse_mesh(mesh), batch)
    check_batch(parse_mesh("model=8"), batch)


def test_every_device_has_sequences_of_every_part():
    check_batch(parse_mesh("data=2"), 8, parts=4)
    message = (
        r"--sequences-per-step is 4, --mesh data=2 splits it into 2 in 4 parts \(--accumulate\): make it a multiple"
    )
    with pytest.raises(InputError, match=message):
        check_batch(parse_mesh("data=2"), 4, parts=4)


@pytest.mark.slow
def test_parts_on_a_mesh_give_the_losses_of_one_device_at_once(even, tmp_path):
    target, cache = even
    settings = {"steps": 6, "num_layers": 1, "sequences_per_step": 8, "anchors_per_sequence": 8, "checkpoint_every": 6}
    for name, changes in {"whole": {}, "parts": {"accumulate": 4}, "mesh": {"accumulate": 2, "mesh": "data=2"}}.items():
        train(tiny_chain.train_config(target, cache, tmp_path / name, **settings, **changes))
    for name in ("parts", "mesh"):
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "whole"), rtol=1e-5)


@pytest.mark.slow
def test_a_bfloat16_target_starts_a_float32_drafter(even):
    target = load_target(even[0], dtype=jnp.bfloat16)
    shape = drafter_config(target, capture_layers=(1, 3), num_layers=2, block_size=5, mask_token_id=3)
    drafter = new_drafter(shape, target, init="target", key=jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree_util.tree_leaves(drafter)} == {jnp.dtype(jnp.float32)}
