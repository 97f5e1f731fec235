"""Errors, files, safetensors and records: what every room stands on. Imports no other room.

It promises that a file it wrote is whole or absent, and that bad input raises `InputError` with one line.
"""

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
from dflash_jax.core.progress import Move, no_progress, progress_bar
from dflash_jax.core.records import RECORD_NAME, make_record, write_record
from dflash_jax.core.tensors import check_names_and_shapes, load_tensors, read_header, save_tensors

__all__ = [
    "RECORD_NAME",
    "InputError",
    "Move",
    "atomic_file",
    "check_names_and_shapes",
    "load_tensors",
    "make_record",
    "no_progress",
    "progress_bar",
    "read_header",
    "read_json",
    "read_jsonl",
    "save_tensors",
    "sha256_file",
    "sha256_json",
    "staged_folder",
    "sync_folder",
    "write_json",
    "write_record",
]
