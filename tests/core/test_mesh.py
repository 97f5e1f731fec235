import subprocess
import sys

import jax
import pytest

from dflash_jax.core import (
    InputError,
    MeshShape,
    make_mesh,
    mesh_shape,
    parse_mesh,
    replicated_axes,
    split_axes,
    start_processes,
)


def test_a_mesh_by_its_text():
    assert parse_mesh("data=2,model=4") == MeshShape(data=2, model=4)
    assert parse_mesh(" model = 8 ") == MeshShape(model=8)
    assert parse_mesh("expert=3,data=5,model=7").size == 105
    for text in ("data=2,model=4", "data=2,expert=2,model=2", "data=1"):
        assert str(parse_mesh(text)) == text


@pytest.mark.parametrize(
    "text", ["", "data", "data=", "data=0", "data=-1", "rows=2", "data=2,data=2", "data=2;model=4", "data=²"]
)
def test_what_is_no_mesh(text):
    with pytest.raises(InputError, match=r"--mesh is .*: give each of data, expert, model at most once, .* such as"):
        parse_mesh(text)


def test_the_table_by_hand():
    mesh = MeshShape(data=2, expert=2, model=4)
    weight = split_axes(("experts", "hidden", "gate_up"), (32, 2880, 2880), mesh)
    assert weight == (("expert",), None, ("model",))
    assert split_axes(("vocab", "hidden"), (201088, 2880), mesh) == (("model",), None)
    assert split_axes(("batch", None, "kv_heads", None), (8, 8, 8, 8), mesh) == (
        ("data", "expert"),
        None,
        ("model",),
        None,
    )


def test_what_does_not_divide_is_whole():
    mesh = MeshShape(data=2, expert=2, model=4)
    assert split_axes(("heads", "hidden"), (9, 576), mesh) == (None, None)  # SmolLM2's 9 heads of 64 channels
    assert split_axes(("batch",), (6,), mesh) == (("data",),)
    assert split_axes(("batch",), (5,), mesh) == (None,)
    assert split_axes(("heads",), (9,), MeshShape(data=8)) == (None,)
    units = {"vocab": 49152, "heads": 9, "kv_heads": 3, "mlp": 1536, "hidden": 577, "batch": 5}
    assert replicated_axes(units, mesh) == [
        "heads: 9 do not divide by model=4, every device holds all of them",
        "kv_heads: 3 do not divide by model=4, every device holds all of them",
        "batch: 5 do not divide by data=2 * expert=2, every device holds all of them",
    ]
    assert replicated_axes(units, MeshShape(model=3)) == []


def test_a_mesh_over_this_machines_devices():
    assert make_mesh(MeshShape()) is None
    mesh = make_mesh(MeshShape(model=2))
    assert mesh is not None
    assert dict(mesh.shape) == {"data": 1, "expert": 1, "model": 2}
    assert (mesh_shape(mesh), mesh_shape(None)) == (MeshShape(model=2), MeshShape())
    with pytest.raises(InputError, match=rf"--mesh data=3 needs 3 devices, there are {jax.device_count()} \(cpu\): "):
        make_mesh(MeshShape(data=3))


def test_one_process_starts_nothing_and_a_bad_number_is_told():
    assert start_processes({}) is False
    assert start_processes({"TPU_WORKER_HOSTNAMES": "localhost", "JAX_PROCESS_ID": "x"}) is False
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES is 'two': a whole number is needed"):
        start_processes({"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "two"})
    # devices were touched in this process: jax refuses, and the reason is one line
    with pytest.raises(InputError, match="could not join the others .* check JAX_COORDINATOR_ADDRESS"):
        start_processes({"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"})


def test_meshes_are_read_without_jax():
    code = "import sys; from dflash_jax.core import parse_mesh; parse_mesh('model=2'); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
