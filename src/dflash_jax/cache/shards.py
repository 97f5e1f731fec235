"""One shard file: its tensors, made, written, mapped into memory, and checked against the ledger."""

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dflash_jax.cache.features import FeatureLayout, feature_layout
from dflash_jax.cache.manifest import FORMAT_VERSION
from dflash_jax.core import InputError, atomic_file, read_header, sha256_file

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""safetensors' dtype name and shape of every tensor of a shard."""

_WHAT = "the cache's shard"
# safetensors' names of the types a shard may hold
_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U64": np.dtype(np.uint64),
}
_PER_TOKEN = ("features", "feature_scales", "token_ids", "next_ids", "loss_mask", "top_ids", "top_logprobs")
_WRITE_BYTES = 1 << 24  # a piece of a tensor: hashed while it is in the processor's cache, then written


def tensor_layout(
    *, version: int, tokens: int, sequences: int, features: FeatureLayout, partial: bool = False
) -> Layout:
    """Return safetensors' dtype name and shape of every tensor of a shard.

    Args:
        version: the manifest's `format_version`.
        tokens: tokens stored, of all its sequences.
        sequences: sequences stored.
        features: how features are stored, and how many likeliest tokens.
        partial: whether some tokens at the ends of sequences have no features, as an imported cache may have it.
    """
    layout: Layout = {
        "features": (features.safetensors_dtype, (tokens, features.columns)),
        "token_ids": ("I32", (tokens,)),
        "next_ids": ("I32", (tokens,)),
        "loss_mask": ("U8", (tokens,)),
        "seq_starts": ("I64", (sequences + 1,)),
        "position_offset": ("I32", (sequences,)),
        "prompt_len": ("I32", (sequences,)),
        "prompt_hash": ("U64", (sequences,)),
        "sequence_index": ("I32", (sequences,)),
    }
    if version == 1:
        return layout
    if features.quantised:
        layout["feature_scales"] = ("BF16", (tokens, features.scales))
    if features.top_k:
        layout["top_ids"] = ("I32", (tokens, features.top_k))
        layout["top_logprobs"] = ("F16", (tokens, features.top_k))
    per_sequence = {"prefix_start": "I64", "prefix_len": "I32", "prompt_set": "U16"}
    if partial:
        per_sequence["features_len"] = "I32"
    return layout | {name: (kind, (sequences,)) for name, kind in per_sequence.items()}


def empty_tensors(layout: Layout) -> dict[str, np.ndarray]:
    """Uninitialised arrays for a layout."""
    return {name: np.empty(shape, _DTYPES[kind]) for name, (kind, shape) in layout.items()}


def tensor_bytes(layout: Layout) -> dict[str, int]:
    """Bytes of every tensor of a layout."""
    return {name: int(np.prod(shape)) * _DTYPES[kind].itemsize for name, (kind, shape) in layout.items()}


def bytes_per_token(features: FeatureLayout) -> int:
    """Bytes a token takes in a shard, without the bytes per sequence and the header."""
    layout = tensor_layout(version=FORMAT_VERSION, tokens=1, sequences=0, features=features)
    return sum(size for name, size in tensor_bytes(layout).items() if name in _PER_TOKEN)


def _header(layout: Layout) -> tuple[list[str], bytes]:
    """The order of a shard's tensors, and the bytes before them.

    Widest elements first, then by name: every tensor starts at a multiple of its element's size.
    """
    names = sorted(layout, key=lambda name: (-_DTYPES[layout[name][0]].itemsize, name))
    sizes = tensor_bytes(layout)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    first = 0
    for name in names:
        kind, shape = layout[name]
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [first, first + sizes[name]]}
        first += sizes[name]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return names, len(text).to_bytes(8, "little") + text


def shard_bytes(layout: Layout) -> int:
    """Size of a shard's file: what `write_shard` writes, to the byte."""
    return len(_header(layout)[1]) + sum(tensor_bytes(layout).values())


def write_shard(path: Path, layout: Layout, tensors: dict[str, np.ndarray]) -> tuple[int, str]:
    """Write a shard atomically and return its size and SHA-256, made while it is written: nothing is read again.

    Args:
        path: where to.
        layout: of `tensors`, which are C-contiguous.
        tensors: by name.

    Raises:
        OSError: the folder cannot be written, or the disk is full; nothing is left behind.
    """
    names, header = _header(layout)
    digest = hashlib.sha256(header)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for name in names:
            raw = tensors[name].reshape(-1).view(np.uint8).data
            for first in range(0, len(raw), _WRITE_BYTES):
                piece = raw[first : first + _WRITE_BYTES]
                digest.update(piece)
                file.write(piece)
        size = file.tell()
    return size, digest.hexdigest()


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
    if path.is_symlink():
        return f"{path} is a symbolic link, which may lead out of the cache's folder"
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
        features=feature_layout(manifest),
        partial="features_len" in tensors,
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
    problem = _bounds_problem(tensors, entry, manifest)
    return [f"{path}: {problem}"] if problem else []


def _bounds_problem(tensors: dict[str, np.ndarray], entry: dict[str, Any], manifest: dict[str, Any]) -> str | None:
    """What is wrong with the bounds of a shard's sequences; None where nothing is."""
    starts, prompt_len = tensors["seq_starts"], tensors["prompt_len"]
    own = np.diff(starts)
    if starts[0] != 0 or starts[-1] != entry["tokens"] or (own <= 0).any():
        return f"seq_starts does not rise from 0 to {entry['tokens']}"
    shared = np.zeros_like(prompt_len)
    if manifest["format_version"] > 1:
        shared, first = tensors["prefix_len"], tensors["prefix_start"]
        if ((shared < 0) | (first < 0) | (first + shared > starts[:-1])).any():
            return "a prefix does not lie before its sequence"
        if (shared > prompt_len).any():
            return "a prefix_len is more than its sequence's prompt_len"
        if tensors["prompt_set"].max() >= len(manifest["prompt_sets"]):
            return f"a prompt_set is not one of the manifest's {len(manifest['prompt_sets'])}"
    if ((prompt_len < 1) | (prompt_len >= own + shared)).any():
        return "a prompt_len is not between 1 and its sequence's length"
    known = tensors.get("features_len", own + shared)
    if ((known < prompt_len) | (known > own + shared)).any():
        return "a features_len is not between its sequence's prompt_len and length"
    if (own + shared).max() > manifest["max_length"]:
        return f"a sequence is longer than the manifest's max_length {manifest['max_length']}"
    return None
