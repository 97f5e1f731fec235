"""Writing a cache from features that are there already: what imports use. A build is in `build`."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dflash_jax.cache.features import FeatureLayout, first_not_finite
from dflash_jax.cache.manifest import FORMAT, FORMAT_VERSION, shard_name, write_manifest
from dflash_jax.cache.reader import Sequence
from dflash_jax.cache.shards import empty_tensors, tensor_layout, write_shard
from dflash_jax.core import InputError

TextGroup = tuple[Sequence, ...]
"""Sequences of one text, the longest first; the prompts of the others are the first tokens of it, stored once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewCache:
    """What a cache is to say of itself.

    Attributes:
        layout: columns of the features and how they are stored, "bfloat16" or "float32".
        capture_layers: 0-based decoder layers whose outputs the columns are.
        fingerprint: what the features are of; see docs/cache-format.md.
        config: settings of the command that makes it.
        record: its provenance record.
        source_sha256: of what the cache is made from, in the manifest's `responses_sha256`.
        tokens_per_shard: most tokens in a shard (one text may be larger).
    """

    layout: FeatureLayout
    capture_layers: tuple[int, ...]
    fingerprint: dict[str, Any]
    config: dict[str, Any]
    record: dict[str, Any]
    source_sha256: str
    tokens_per_shard: int = 65536


@dataclass(kw_only=True, slots=True)
class _Totals:
    """What the manifest counts, so far."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    offsets: set[int] = field(default_factory=set)
    prompt_sets: list[str] = field(default_factory=list)
    sequences: int = 0
    tokens: int = 0
    texts: int = 0
    max_length: int = 0


def _own_tokens(group: TextGroup) -> int:
    """Tokens that a group takes in a shard."""
    first, *others = group
    return len(first.token_ids) + sum(len(other.token_ids) - other.prompt_len for other in others)


def _fill_shard(groups: list[TextGroup], tensors: dict[str, np.ndarray], prompt_sets: list[str]) -> None:
    """Copy sequences into a shard's arrays, one after the other."""
    at, number = 0, 0
    tensors["seq_starts"][0] = 0
    for group in groups:
        base = at
        for place, sequence in enumerate(group):
            shared = sequence.prompt_len if place else 0
            end = at + len(sequence.token_ids) - shared
            bad = first_not_finite(sequence.features)
            if bad is not None:
                raise InputError(f"text {sequence.sequence_index}: the features of its token {bad} are not finite")
            tensors["features"][at:end] = sequence.features[shared:]
            for name in ("token_ids", "next_ids", "loss_mask"):
                tensors[name][at:end] = getattr(sequence, name)[shared:]
            tensors["seq_starts"][number + 1] = end
            tensors["prefix_start"][number], tensors["prefix_len"][number] = base if place else 0, shared
            tensors["prompt_set"][number] = prompt_sets.index(sequence.prompt_set)
            for name in ("position_offset", "prompt_len", "prompt_hash", "sequence_index"):
                tensors[name][number] = getattr(sequence, name)
            if "features_len" in tensors:
                tensors["features_len"][number] = sequence.features_len
            at, number = end, number + 1


def _write_shard(folder: Path, groups: list[TextGroup], new: NewCache, totals: _Totals) -> None:
    """Write one shard, unless there is nothing for it, and count it."""
    if not groups:
        return
    sequences = [sequence for group in groups for sequence in group]
    layout = tensor_layout(
        version=FORMAT_VERSION,
        tokens=sum(map(_own_tokens, groups)),
        sequences=len(sequences),
        features=new.layout,
        partial=any(sequence.features_len < len(sequence.token_ids) for sequence in sequences),
    )
    for sequence in sequences:
        if sequence.prompt_set not in totals.prompt_sets:
            totals.prompt_sets.append(sequence.prompt_set)
    tensors = empty_tensors(layout)
    _fill_shard(groups, tensors, totals.prompt_sets)
    name = shard_name(len(totals.entries))
    size, sha256 = write_shard(folder / name, layout, tensors)
    tokens = int(tensors["seq_starts"][-1])
    totals.entries.append(
        {"file": name, "bytes": size, "sha256": sha256, "sequences": len(sequences), "tokens": tokens}
    )
    totals.offsets |= {sequence.position_offset for sequence in sequences}
    totals.texts += len({sequence.sequence_index for sequence in sequences})
    totals.sequences, totals.tokens = totals.sequences + len(sequences), totals.tokens + tokens
    totals.max_length = max(totals.max_length, *(len(sequence.token_ids) for sequence in sequences))


def write_cache(folder: Path, groups: Iterable[TextGroup], new: NewCache) -> dict[str, Any]:
    """Write a complete cache and return its manifest. One shard is in memory at a time.

    Args:
        folder: an empty folder, such as `core.staged_folder` gives.
        groups: the texts; their arrays are read once.
        new: the rest of the manifest.

    Raises:
        InputError: there is no sequence, or features are NaN or infinite.
        OSError: the folder cannot be written, or the disk is full.
    """
    totals, waiting, tokens = _Totals(), [], 0
    for group in groups:
        if waiting and tokens + _own_tokens(group) > new.tokens_per_shard:
            _write_shard(folder, waiting, new, totals)
            waiting, tokens = [], 0
        waiting.append(group)
        tokens += _own_tokens(group)
    _write_shard(folder, waiting, new, totals)
    if not totals.entries:
        raise InputError("there is no sequence to store: a response of at least one token is needed")
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": new.fingerprint
        | {"capture_layers": list(new.capture_layers), "features_dtype": new.layout.dtype},
        "config": new.config,
        "records": [new.record],
        "responses_sha256": new.source_sha256,
        "hidden_size": new.layout.hidden_size,
        "capture_layers": list(new.capture_layers),
        "position_offsets": sorted(totals.offsets),
        "features_dtype": new.layout.dtype,
        "prompt_sets": totals.prompt_sets,
        "max_new_tokens": None,
        "max_length": totals.max_length,
        "num_shards": len(totals.entries),
        "num_sequences": totals.sequences,
        "num_texts": totals.texts,
        "num_tokens": totals.tokens,
        "shards": totals.entries,
        "complete": True,
    }
    write_manifest(folder, manifest)
    return manifest
