"""A target over several devices and several processes gives what one device gives, and no device holds all of it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import support.mesh_worker
from dflash_jax.core import InputError, MeshShape, make_mesh, save_tensors
from dflash_jax.targets import describe_target, load_target, read_target_config, stored_shapes, whole_axes

WORKER = Path(support.mesh_worker.__file__)
TOP = support.mesh_worker.TOP
SIZES = {
    # whatever a mesh of 8 splits divides by 8
    "even": {"vocab_size": 104, "intermediate_size": 40, "num_attention_heads": 16, "num_key_value_heads": 8},
    # SmolLM2's way: 9 heads on 3, and a vocabulary and an MLP that do not divide either
    "odd": {"vocab_size": 101, "intermediate_size": 37, "num_attention_heads": 9, "num_key_value_heads": 3},
    # queries divide by 4, keys and values do not
    # gpt-oss: experts, sinks, biases, windows that the text crosses
    "experts": {
        "architectures": ["GptOssForCausalLM"],
        "vocab_size": 104,
        "intermediate_size": 20,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "swiglu_limit": 2.0,
    },
    "grouped": {"vocab_size": 101, "intermediate_size": 40, "num_attention_heads": 8, "num_key_value_heads": 2},
}
RUNS = [
    *(("even", mesh) for mesh in ("data=1", "data=8", "data=2,model=4", "model=8")),
    *(("odd", mesh) for mesh in ("data=1", "data=2,model=4")),
    *(("grouped", mesh) for mesh in ("data=1", "data=2,model=4")),
    *(("experts", mesh) for mesh in ("data=1", "data=2,expert=2,model=2")),
]
OUTPUTS = ("features", "next_ids", "block_features", "block_ids", "top_ids", "top_logprobs")


def write_target(folder, sizes):
    """Random weights, large enough that every part moves the output."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 24, "num_hidden_layers": 2, "head_dim": 6,
        "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "max_position_embeddings": 160, "tie_word_embeddings": False,
    } | sizes  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(7)
    weights = {
        name: draw.uniform(0.5, 1.5, shape) if "norm" in name else draw.normal(0, 0.3, shape)
        for name, shape in stored_shapes(read_target_config(folder)).items()
    }
    save_tensors(folder / "model.safetensors", {name: value.astype(np.float32) for name, value in weights.items()})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("sharding")
    return {name: write_target(place / name, sizes) for name, sizes in SIZES.items()}


def start(folders, out, runs, *, devices, **environment):
    """The worker program, which sees so many devices."""
    arguments = [part for name, mesh in runs for part in (str(folders[name]), mesh)]
    devices_flag = f"--xla_force_host_platform_device_count={devices}"
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices_flag}", "JAX_PLATFORMS": "cpu"}
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(out), *arguments],
        env=os.environ | flags | path | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    told, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(told.splitlines()[-1])


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """Every run's outputs by name, and what was told of its shards: one program for all."""
    out = tmp_path_factory.mktemp("runs") / "out.npz"
    told = finish(start(folders, out, RUNS, devices=8))
    assert told["devices"] == 8
    return dict(np.load(out)), told


def assert_same(outputs, run, of):
    for name in OUTPUTS:
        got, want = outputs[f"{run}/{name}"], outputs[f"{of}/{name}"]
        if "ids" in name:
            assert got.tolist() == want.tolist(), name
        else:
            assert np.abs(got - want).max() < 1e-5 * np.abs(want).max(), name  # measured 6e-7


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh"), [run for run in RUNS if run[1] != "data=1"])
def test_a_mesh_gives_what_one_device_gives(runs, name, mesh):
    outputs, _ = runs
    assert outputs[f"{name}/data=1/features"].std() > 0.1
    assert len(set(outputs[f"{name}/data=1/next_ids"].ravel().tolist())) > 10
    assert_same(outputs, f"{name}/{mesh}", f"{name}/data=1")


@pytest.mark.slow
def test_no_device_holds_a_full_copy_of_what_should_be_split(runs):
    shards = {mesh: runs[1][f"even/{mesh}"]["shards"] for name, mesh in RUNS if name == "even"}
    whole = {
        "embed_tokens": [104, 24], "head": [104, 24], "q_proj": [96, 24], "k_proj": [48, 24], "o_proj": [24, 96],
        "up_proj": [40, 24], "down_proj": [24, 40], "norm": [24], "keys": [8, 8, 14, 6], "features": [8, 11, 48],
    }  # fmt: skip
    assert shards["data=1"] == {name: [shape] for name, shape in whole.items()}
    assert shards["data=8"] == shards["data=1"] | {"keys": [[1, 8, 14, 6]], "features": [[1, 11, 48]]}
    assert shards["data=2,model=4"] == {
        "embed_tokens": [[26, 24]], "head": [[26, 24]], "q_proj": [[24, 24]], "k_proj": [[12, 24]],
        "o_proj": [[24, 24]], "up_proj": [[10, 24]], "down_proj": [[24, 10]], "norm": [[24]],
        "keys": [[4, 2, 14, 6]], "features": [[4, 11, 48]],
    }  # fmt: skip
    assert shards["model=8"] == {
        "embed_tokens": [[13, 24]], "head": [[13, 24]], "q_proj": [[12, 24]], "k_proj": [[6, 24]],
        "o_proj": [[24, 12]], "up_proj": [[5, 24]], "down_proj": [[24, 5]], "norm": [[24]],
        "keys": [[8, 1, 14, 6]], "features": [[8, 11, 48]],
    }  # fmt: skip


@pytest.mark.slow
def test_the_forward_gathers_nothing_but_a_few_numbers_per_row_of_the_head(runs):
    for mesh, model in (("data=8", None), ("data=2,model=4", 4), ("model=8", 8)):
        rows = 8 if mesh == "model=8" else 4
        greedy, top = (f"[{model},{rows},{{}}]".format, f"[{11 * rows},{TOP * (model or 1)}]")
        wanted = (
            [f"{kind}{shape}" for kind in ("f32", "s32") for shape in (greedy(11), greedy(3), top)] if model else []
        )
        assert runs[1][f"even/{mesh}"]["gathers"] == sorted(wanted)


@pytest.mark.slow
def test_what_does_not_divide_is_whole_on_every_device_and_told(runs, folders):
    shards = runs[1]["odd/data=2,model=4"]["shards"]
    for name in ("embed_tokens", "head", "q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "norm"):
        assert shards[name] == runs[1]["odd/data=1"]["shards"][name], name
    assert shards["keys"] == [[4, 3, 14, 6]]  # the batch still is split
    grouped = runs[1]["grouped/data=2,model=4"]["shards"]
    assert (grouped["q_proj"], grouped["k_proj"], grouped["up_proj"]) == ([[12, 24]], [[12, 24]], [[10, 24]])
    told = whole_axes(read_target_config(folders["grouped"]), MeshShape(data=2, model=4))
    assert told == [
        "vocab: 101 do not divide by model=4, every device holds all of them",
        "kv_heads: 2 do not divide by model=4, every device holds all of them",
    ]
    assert describe_target(folders["grouped"], mesh=MeshShape(data=2, model=4))["whole_axes"] == told
    assert whole_axes(read_target_config(folders["even"]), MeshShape(model=8)) == []


@pytest.mark.slow
def test_experts_lie_on_their_own_devices_and_rows_on_both_axes(runs):
    shards = runs[1]["experts/data=2,expert=2,model=2"]["shards"]
    assert (shards["gate_up_proj"], shards["down_proj"]) == ([[3, 24, 20]], [[3, 10, 24]])
    assert (shards["keys"], shards["features"]) == ([[2, 2, 14, 6]], [[2, 11, 48]])
    # gathered: rows along the expert axis (4 of 8), the router (6 x 24, its biases), the head's few numbers per row
    gathers = runs[1]["experts/data=2,expert=2,model=2"]["gathers"]
    rows = {f"f32[4,{tokens},24]" for tokens in (11, 3)}
    head = {f"{kind}{shape}" for kind in ("f32", "s32") for shape in ("[2,2,11]", "[2,2,3]", f"[{2 * 11},{2 * TOP}]")}
    assert set(gathers) <= rows | head | {"f32[6,24]", "f32[6]"}


def test_an_expert_axis_needs_experts(folders):
    with pytest.raises(InputError, match="--mesh expert=2: the target has no experts to split, give those devices to"):
        load_target(folders["even"], mesh=make_mesh(MeshShape(expert=2)))


@pytest.mark.slow
def test_two_processes_give_what_one_gives(runs, folders, tmp_path):
    """Two devices each; the second mesh splits every matrix across the two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    meshes = [("even", "data=2,model=2"), ("even", "model=4")]
    started = [
        start(
            folders, tmp_path / f"{index}.npz", meshes, devices=2,
            JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]  # fmt: skip
    told = [finish(process) for process in started]
    outputs = {
        **runs[0],
        **{f"{i}/{name}": value for i in range(2) for name, value in np.load(tmp_path / f"{i}.npz").items()},
    }
    for index in range(2):
        assert (told[index]["processes"], told[index]["devices"]) == (2, 4)
        assert told[index]["even/model=4"]["shards"]["embed_tokens"] == [[26, 24]]
        for name, mesh in meshes:
            assert_same(outputs, f"{index}/{name}/{mesh}", "even/data=1")
