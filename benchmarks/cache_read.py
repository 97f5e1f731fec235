"""Reading a cache into host batches, against numpy's memmap copying the same rows into the same batch.

Both read warm files in the same shuffled order. Ours goes the way training goes: the grain source, its shuffle, views
of the mapped shards, padded batches. memmap's way is the least there is: the places of all rows are looked up
beforehand, one batch is allocated beforehand, nothing is padded. Verification (SHA-256 at the first touch) is timed
apart: a run pays it once. GB/s are of stored bytes that reach the batch: features, token_ids, next_ids.

    python benchmarks/cache_read.py                 about 0.4 GB in the temporary folder, removed afterwards
"""

import argparse
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from common import Work, machine, paired_ratio, time_interleaved, write_result
from dflash_jax.cache import (
    Cache,
    FeatureLayout,
    NewCache,
    Sequence,
    TextGroup,
    open_cache,
    sequence_source,
    stack_on_host,
    write_cache,
)

SEED = 7
WIDTH_STEP = 64


def _texts(count: int, *, shortest: int, longest: int, columns: int) -> Iterator[TextGroup]:
    """Random sequences; features are cut from one block of random numbers, which reading cannot tell."""
    draw = np.random.default_rng(SEED)
    block = draw.standard_normal((2 * longest, columns), np.float32).astype(ml_dtypes.bfloat16)
    for index in range(count):
        length = int(draw.integers(shortest, longest + 1))
        first = int(draw.integers(0, longest))
        ids = draw.integers(0, 49152, (2, length), dtype=np.int32)
        yield (
            Sequence(
                stored_features=block[first : first + length],
                feature_scales=None,
                token_ids=ids[0],
                next_ids=ids[1],
                loss_mask=np.ones(length, np.uint8),
                position_offset=0,
                prompt_len=1,
                prompt_hash=index,
                sequence_index=index,
                prompt_set="random",
                features_len=length,
            ),
        )


def _write(folder: Path, arguments: argparse.Namespace) -> None:
    layout = FeatureLayout(num_layers=arguments.layers, hidden_size=arguments.hidden, dtype="bfloat16")
    texts = _texts(arguments.sequences, shortest=arguments.shortest, longest=arguments.longest, columns=layout.columns)
    new = NewCache(
        layout=layout,
        capture_layers=tuple(range(arguments.layers)),
        fingerprint={},
        config={},
        record={},
        source_sha256="",
        tokens_per_shard=arguments.tokens_per_shard,
    )
    folder.mkdir()
    write_cache(folder, texts, new)


def _ours(cache: Cache, *, rows: int, width: int) -> Work:
    """An epoch through the grain source into host batches; each is let go before the next is asked for."""
    batches = sequence_source(cache, seed=SEED, shuffle=True)

    def run() -> None:
        for first in range(0, cache.num_sequences, rows):
            sequences = [batches[index] for index in range(first, min(first + rows, cache.num_sequences))]
            stack_on_host([row for row in sequences if row is not None], width=width, max_new_tokens=None)

    return run


def _map(path: Path) -> dict[str, np.ndarray]:
    """A shard's tensors by np.memmap, from the header of its safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    kinds = {"features": np.uint16, "token_ids": np.int32, "next_ids": np.int32, "seq_starts": np.int64}
    return {
        name: np.memmap(path, kind, "r", 8 + size + header[name]["data_offsets"][0], tuple(header[name]["shape"]))
        for name, kind in kinds.items()
    }


def _memmap(folder: Path, cache: Cache, *, rows: int, width: int) -> Work:
    """The same rows, in the same order, by slices of np.memmap into one batch."""
    slices = []
    for entry in cache.manifest["shards"]:
        shard = _map(folder / entry["file"])
        for first, end in itertools.pairwise(shard["seq_starts"].tolist()):
            slices.append(tuple(shard[name][first:end] for name in ("features", "token_ids", "next_ids")))
    source = sequence_source(cache, seed=SEED, shuffle=True)
    order = [row.sequence_index for index in range(cache.num_sequences) if (row := source[index]) is not None]
    plan = [slices[index] for index in order]
    features = np.zeros((rows, width, slices[0][0].shape[1]), np.uint16)
    token_ids, next_ids = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)

    def run() -> None:
        for first in range(0, len(plan), rows):
            for place, (stored, ids, following) in enumerate(plan[first : first + rows]):
                length = len(ids)
                features[place, :length] = stored
                token_ids[place, :length], next_ids[place, :length] = ids, following

    return run


def _verify(folder: Path) -> float:
    """Seconds that the first touch of every shard takes, from warm files."""
    begin = time.perf_counter()
    open_cache(folder).prompt_hashes()
    return time.perf_counter() - begin


def _measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    _verify(folder)  # and the files are in memory
    verify_s = sorted(_verify(folder) for _ in range(3))[1]
    cache = open_cache(folder)
    width = -(-cache.max_length // WIDTH_STEP) * WIDTH_STEP
    work = {
        "ours": _ours(cache, rows=arguments.rows, width=width),
        "memmap": _memmap(folder, cache, rows=arguments.rows, width=width),
    }
    times = time_interleaved(work, rounds=arguments.rounds, warmups=2)
    num_bytes = cache.num_tokens * (arguments.layers * arguments.hidden * 2 + 8)
    return {
        "benchmark": "cache_read",
        "sequences": cache.num_sequences,
        "tokens": cache.num_tokens,
        "shards": len(cache.manifest["shards"]),
        "bytes": num_bytes,
        "rows": arguments.rows,
        "width": width,
        "padding": 1 - cache.num_tokens / (cache.num_sequences * width),
        "wall_s": {name: one.median() for name, one in times.items()},
        "cpu_s": {name: one.median("cpu_s") for name, one in times.items()},
        "gigabytes_per_s": {name: num_bytes / one.median() / 1e9 for name, one in times.items()},
        "ratio": paired_ratio(times["memmap"], times["ours"]),
        "ratio_cpu": paired_ratio(times["memmap"], times["ours"], clock="cpu_s"),
        "verify_gigabytes_per_s": num_bytes / verify_s / 1e9,
        "machine": machine(("grain", "numpy")),
    }


def main() -> None:
    """Write a cache, read it, tell."""
    parser = argparse.ArgumentParser(description="Cache reading against np.memmap.")
    parser.add_argument("--sequences", type=int, default=320)
    parser.add_argument("--shortest", type=int, default=96, help="tokens")
    parser.add_argument("--longest", type=int, default=512, help="tokens")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--rows", type=int, default=8, help="sequences per batch")
    parser.add_argument("--tokens-per-shard", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--folder", type=Path, help="where the cache is written; default: a temporary folder")
    arguments = parser.parse_args()
    parent = Path(tempfile.mkdtemp(prefix="cache-read-", dir=arguments.folder))
    try:
        _write(parent / "cache", arguments)
        write_result(_measure(parent / "cache", arguments))
    finally:
        shutil.rmtree(parent)


if __name__ == "__main__":
    main()
