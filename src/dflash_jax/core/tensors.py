"""safetensors files checked before use: names, dtypes, shapes and bytes, every mismatch listed at once."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dflash_jax.core.errors import InputError
from dflash_jax.core.files import atomic_file

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file atomically. Tensors are made C-contiguous; bfloat16 is ml_dtypes' numpy type."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata or {"format": "pt"}))


def read_header(path: Path, *, what: str) -> dict[str, Any]:
    """Return a safetensors header `{name: {dtype, shape, data_offsets}}` without reading any tensor.

    Raises:
        InputError: the file is missing, is not safetensors, or is shorter or longer than its header says.
    """
    if not path.is_file():
        raise InputError(f"{what} is missing: {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise InputError(f"{what} is not a safetensors file, or is truncated: {path} ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{what} is not a safetensors file: {path}: its header is not JSON") from error
    try:
        header.pop("__metadata__", None)
        wanted = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{what} is not a safetensors file: {path}: its header has another form") from error
    if wanted != size:
        raise InputError(f"{what} is truncated or damaged: {path} has {size} bytes, its header needs {wanted}")
    return header


def check_names_and_shapes(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], *, what: str
) -> None:
    """Compare tensor names and shapes and raise once, with every difference.

    Raises:
        InputError: a tensor is missing, extra or misshaped; all of them are named.
    """
    problems = [f"missing {name} {list(wanted[name])}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"unexpected {name} {list(found[name])}" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} is {list(found[name])}, {list(wanted[name])} is needed"
        for name in sorted(wanted.keys() & found.keys())
        if tuple(found[name]) != tuple(wanted[name])
    ]
    if problems:
        raise InputError(f"{what}: {len(problems)} tensor(s) do not fit its config: " + "; ".join(problems))


def load_tensors(path: Path, *, what: str) -> dict[str, np.ndarray]:
    """Return every tensor of one safetensors file as numpy arrays (bfloat16 as ml_dtypes' type).

    Raises:
        InputError: the file is missing, truncated or damaged.
    """
    read_header(path, what=what)
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise InputError(f"{what} is not a readable safetensors file: {path}: {error}") from error
