"""One shard file: its tensors, made, mapped into memory, and checked against the ledger."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dflash_jax.cache.manifest import FORMAT_VERSION
from dflash_jax.core import InputError, read_header, sha256_file

_WHAT = "the cache's shard"
# safetensors' names of the types a shard may hold
_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U64": np.dtype(np.uint64),
}
_FEATURES = {"bfloat16": "BF16", "float32": "F32"}


def tensor_layout(
    *, version: int, tokens: int, sequences: int, columns: int, features: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return safetensors' dtype name and shape of every tensor of a shard.

    Args:
        version: the manifest's `format_version`.
        tokens: tokens stored, of all its sequences.
        sequences: sequences stored.
        columns: captured layers times hidden size.
        features: "bfloat16" or "float32".
    """
    layout: dict[str, tuple[str, tuple[int, ...]]] = {
        "features": (_FEATURES[features], (tokens, columns)),
        "token_ids": ("I32", (tokens,)),
        "next_ids": ("I32", (tokens,)),
        "loss_mask": ("U8", (tokens,)),
        "seq_starts": ("I64", (sequences + 1,)),
        "position_offset": ("I32", (sequences,)),
        "prompt_len": ("I32", (sequences,)),
        "prompt_hash": ("U64", (sequences,)),
        "sequence_index": ("I32", (sequences,)),
    }
    return layout if version == 1 else layout | {"prompt_set": ("U16", (sequences,))}


def empty_tensors(layout: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Uninitialised arrays for a layout."""
    return {name: np.empty(shape, _DTYPES[kind]) for name, (kind, shape) in layout.items()}


def bytes_per_token(*, columns: int, features: str) -> int:
    """Bytes a token takes in a shard, without the bytes per sequence and the header."""
    layout = tensor_layout(version=FORMAT_VERSION, tokens=1, sequences=0, columns=columns, features=features)
    per_token = ("features", "token_ids", "next_ids", "loss_mask")
    return sum(_DTYPES[layout[name][0]].itemsize * layout[name][1][-1] for name in per_token)


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return a shard's tensors as read-only views of the file mapped into memory: nothing is read until it is used.

    Raises:
        InputError: the file is missing, is not safetensors, is truncated, or holds a dtype that no shard has.
    """
    if not path.is_file():
        raise InputError(f"{_WHAT} is missing: {path}")
    try:
        with safe_open(path, framework="numpy"):  # its strict parser makes the header trustworthy
            header = read_header(path, what=_WHAT)
    except SafetensorError as error:
        raise InputError(f"{_WHAT} is not a readable safetensors file: {path}: {error}") from error
    unknown = [name for name, entry in header.items() if entry["dtype"] not in _DTYPES]
    if unknown:
        raise InputError(f"{_WHAT} {path}: {unknown[0]} is of dtype {header[unknown[0]]['dtype']}, no shard has that")
    raw = np.asarray(np.memmap(path, np.uint8, mode="r"))
    data = raw[8 + int(raw[:8].view("<u8")[0]) :]
    tensors = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        tensors[name] = data[first:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def file_problem(path: Path, entry: dict[str, Any]) -> str | None:
    """How a shard's bytes differ from its ledger entry; None where they are the same. Reads the whole file."""
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path} has {size} bytes, the ledger says {entry['bytes']}"
    if sha256_file(path) != entry["sha256"]:
        return f"{path} is damaged: its sha256 is not the ledger's"
    return None


def layout_problems(
    path: Path, tensors: dict[str, np.ndarray], entry: dict[str, Any], manifest: dict[str, Any]
) -> list[str]:
    """How a shard's tensors disagree with the ledger and the manifest: names, dtypes, shapes, sequence bounds."""
    layout = tensor_layout(
        version=manifest["format_version"],
        tokens=entry["tokens"],
        sequences=entry["sequences"],
        columns=manifest["hidden_size"] * len(manifest["capture_layers"]),
        features=manifest["features_dtype"],
    )
    problems = [f"{path}: {name} is missing" for name in layout if name not in tensors]
    problems += [f"{path}: unexpected tensor {name}" for name in sorted(tensors) if name not in layout]
    for name, (kind, shape) in layout.items():
        found = tensors.get(name)
        if found is not None and (found.dtype != _DTYPES[kind] or found.shape != shape):
            found_text = f"{found.dtype} {list(found.shape)}"
            problems.append(f"{path}: {name} is {found_text}, {_DTYPES[kind]} {list(shape)} is needed")
    if problems:
        return problems
    lengths = np.diff(tensors["seq_starts"])
    if tensors["seq_starts"][0] != 0 or tensors["seq_starts"][-1] != entry["tokens"] or (lengths <= 0).any():
        return [f"{path}: seq_starts does not rise from 0 to {entry['tokens']}"]
    if ((tensors["prompt_len"] < 1) | (tensors["prompt_len"] >= lengths)).any():
        problems.append(f"{path}: a prompt_len is not between 1 and its sequence's length")
    if manifest["format_version"] > 1 and tensors["prompt_set"].max() >= len(manifest["prompt_sets"]):
        problems.append(f"{path}: a prompt_set is not one of the manifest's {len(manifest['prompt_sets'])}")
    if lengths.max() > manifest["max_length"]:
        problems.append(f"{path}: a sequence is longer than the manifest's max_length {manifest['max_length']}")
    return problems
