"""Errors, files, safetensors, records and the device mesh: what every room stands on. Imports no other room.

It promises that a file it wrote is whole or absent, and that bad input raises `InputError` with one line.
"""

from dflash_jax.core.devices import DEVICES, Device, parse_device
from dflash_jax.core.errors import InputError
from dflash_jax.core.files import (
    atomic_file,
    read_json,
    read_jsonl,
    sha256_file,
    sha256_json,
    staged_folder,
    sync_folder,
    write_json,
)
from dflash_jax.core.memory import give_back_freed
from dflash_jax.core.mesh import (
    LOGICAL_AXES,
    MeshShape,
    make_mesh,
    mesh_shape,
    parse_mesh,
    replicated_axes,
    require_one_process,
    split_axes,
    start_processes,
)
from dflash_jax.core.progress import Move, no_progress, progress_bar
from dflash_jax.core.records import RECORD_NAME, make_record, write_record
from dflash_jax.core.tensors import check_names_and_shapes, load_tensors, read_header, save_tensors

__all__ = [
    "DEVICES",
    "LOGICAL_AXES",
    "RECORD_NAME",
    "Device",
    "InputError",
    "MeshShape",
    "Move",
    "atomic_file",
    "check_names_and_shapes",
    "give_back_freed",
    "load_tensors",
    "make_mesh",
    "make_record",
    "mesh_shape",
    "no_progress",
    "parse_device",
    "parse_mesh",
    "progress_bar",
    "read_header",
    "read_json",
    "read_jsonl",
    "replicated_axes",
    "require_one_process",
    "save_tensors",
    "sha256_file",
    "sha256_json",
    "split_axes",
    "staged_folder",
    "start_processes",
    "sync_folder",
    "write_json",
    "write_record",
]
