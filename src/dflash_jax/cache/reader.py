"""Reading a cache: sequences as views of files mapped into memory, every shard verified before its first use."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int32, Int64, Shaped, UInt8, UInt64

from dflash_jax.cache.features import load_features_on_host
from dflash_jax.cache.manifest import read_manifest
from dflash_jax.cache.responses import UNKNOWN_SET
from dflash_jax.cache.shards import file_problem, layout_problems, map_tensors
from dflash_jax.core import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequence:
    """One prompt with its response at one position offset. Arrays are read-only views of the shard, not copies.

    Where the prompt is stored with another sequence that shares it, they are copies: the shared rows, then its own.

    Attributes:
        stored_features: target hidden states of the captured layers, joined in the order of `capture_layers`, as they
            are stored; see `features`.
        feature_scales: of features stored in 8 bits (`load_features` gives the features); else None.
        token_ids: prompt, then response.
        next_ids: the target's greedy token after each token.
        loss_mask: 1 on response tokens, 0 on the prompt's.
        position_offset: absolute position of token 0.
        prompt_len: prompt tokens; the first response token has this index.
        prompt_hash: of the prompt's ids; equal prompts have equal hashes.
        sequence_index: row of the responses file, 0-based; equal at every offset of the same text.
        prompt_set: name of the set its prompt is from, as the responses have it; "unknown" where they, or a cache of
            format_version 1, do not say.
        features_len: tokens whose features are known, the first ones; all but in some imported caches. The rest are
            zeros that no drafter may read: see `last_anchor`.
        top_ids: the target's likeliest tokens after each token, likeliest first; None where the cache has none.
        top_logprobs: their log-probabilities under the target's whole softmax, nats, float16.
    """

    stored_features: Shaped[np.ndarray, "seq features"]
    feature_scales: Float[np.ndarray, "seq scales"] | None
    token_ids: Int32[np.ndarray, " seq"]
    next_ids: Int32[np.ndarray, " seq"]
    loss_mask: UInt8[np.ndarray, " seq"]
    position_offset: int
    prompt_len: int
    prompt_hash: int
    sequence_index: int
    prompt_set: str
    features_len: int
    top_ids: Int32[np.ndarray, "seq top"] | None = None
    top_logprobs: Float[np.ndarray, "seq top"] | None = None

    @property
    def last_anchor(self) -> int:
        """Largest index that may be an anchor: a token comes after it, and every token before it has features."""
        return min(len(self.token_ids) - 2, self.features_len)

    @property
    def features(self) -> Float[np.ndarray, "seq features"]:
        """Target features: those stored, or bfloat16 made of the stored 8 bits and their scales by numpy, a copy."""
        if self.feature_scales is None:
            return self.stored_features
        return load_features_on_host(self.stored_features, self.feature_scales)


class Cache:
    """A complete cache opened for reading; safe to share between threads. Use `open_cache`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        """Take a manifest that was checked."""
        self.path = path
        self.manifest = manifest
        counts = [entry["sequences"] for entry in manifest["shards"]]
        self._first = np.cumsum([0, *counts])
        self._shards: dict[int, Future[dict[str, np.ndarray]]] = {}
        self._opening = threading.Lock()
        # hashing leaves the interpreter free: one thread for the shard that is waited for, one for the shard after it
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="cache-verify")

    @property
    def num_sequences(self) -> int:
        """Sequences stored; one text at four offsets counts four times."""
        return self.manifest["num_sequences"]

    @property
    def num_tokens(self) -> int:
        """Tokens stored."""
        return self.manifest["num_tokens"]

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.manifest["max_length"]

    def _start(self, index: int) -> Future[dict[str, np.ndarray]]:
        """Begin to open and verify a shard, unless that was done."""
        with self._opening:
            if index not in self._shards:
                self._shards[index] = self._threads.submit(self._open_shard, self.manifest["shards"][index])
            return self._shards[index]

    def _shard(self, index: int) -> dict[str, np.ndarray]:
        """A shard's tensors, verified the first time; then the next one is verified in the background."""
        shard = self._shards.get(index)
        if shard is None:
            shard = self._start(index)
            self._start((index + 1) % len(self.manifest["shards"]))
        return shard.result()

    def _open_shard(self, entry: dict[str, Any]) -> dict[str, np.ndarray]:
        path = self.path / entry["file"]
        problem = file_problem(path, entry)
        if problem is not None:
            raise InputError(f"{problem}: run the same `cache build` again to make that shard anew")
        tensors = map_tensors(path)
        problems = layout_problems(path, tensors, entry, self.manifest)
        if problems:
            raise InputError(f"{problems[0]}: build the cache again in another folder")
        return tensors

    def sequence(self, index: int) -> Sequence:
        """Return sequence `index`, 0 to `num_sequences - 1`, in the order of the shards.

        Raises:
            InputError: its shard is missing, damaged, or not what the manifest says (first use of the shard only).
            IndexError: there is no such sequence.
        """
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of a cache of {self.num_sequences}")
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        tensors, i = self._shard(shard), index - int(self._first[shard])
        own = slice(int(tensors["seq_starts"][i]), int(tensors["seq_starts"][i + 1]))
        prefix = slice(0, 0)
        if "prefix_len" in tensors and tensors["prefix_len"][i]:
            prefix = slice(int(tensors["prefix_start"][i]), int(tensors["prefix_start"][i] + tensors["prefix_len"][i]))

        def rows(name: str) -> np.ndarray:
            tensor = tensors[name]
            return np.concatenate([tensor[prefix], tensor[own]]) if prefix.stop else tensor[own]

        token_ids = rows("token_ids")
        return Sequence(
            stored_features=rows("features"),
            feature_scales=rows("feature_scales") if "feature_scales" in tensors else None,
            token_ids=token_ids,
            next_ids=rows("next_ids"),
            loss_mask=rows("loss_mask"),
            position_offset=int(tensors["position_offset"][i]),
            prompt_len=int(tensors["prompt_len"][i]),
            prompt_hash=int(tensors["prompt_hash"][i]),
            sequence_index=int(tensors["sequence_index"][i]),
            prompt_set=self._prompt_set(tensors, i),
            features_len=int(tensors["features_len"][i] if "features_len" in tensors else len(token_ids)),
            top_ids=rows("top_ids") if "top_ids" in tensors else None,
            top_logprobs=rows("top_logprobs") if "top_logprobs" in tensors else None,
        )

    def _prompt_set(self, tensors: dict[str, np.ndarray], i: int) -> str:
        """Name of the prompt set of a shard's sequence."""
        if "prompt_set" not in tensors:
            return UNKNOWN_SET
        return self.manifest["prompt_sets"][int(tensors["prompt_set"][i])]

    def prompt_hashes(self) -> UInt64[np.ndarray, " sequences"]:
        """Return the prompt hash of every sequence, in order. Touches, and so verifies, every shard."""
        shards = [self._start(index) for index in range(len(self.manifest["shards"]))]
        return np.concatenate([shard.result()["prompt_hash"] for shard in shards])

    def lengths(self) -> Int64[np.ndarray, " sequences"]:
        """Return the tokens of every sequence, in order. Touches, and so verifies, every shard."""
        shards = [self._start(index) for index in range(len(self.manifest["shards"]))]
        own = [np.diff(shard.result()["seq_starts"].astype(np.int64)) for shard in shards]
        shared = [shard.result().get("prefix_len", np.int64(0)) for shard in shards]
        return np.concatenate([one + other for one, other in zip(own, shared, strict=True)]).astype(np.int64)


def open_cache(path: Path) -> Cache:
    """Open a cache for reading. Only the manifest is read here.

    Raises:
        InputError: see `read_manifest`; or the cache is not complete.
    """
    manifest = read_manifest(path)
    if not manifest["complete"]:
        have, need = len(manifest["shards"]), manifest["num_shards"]
        raise InputError(
            f"the cache {path} is not complete ({have} of {need} shards): run the same `cache build` again"
        )
    return Cache(path, manifest)
