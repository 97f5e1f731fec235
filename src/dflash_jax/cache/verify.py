"""What a cache is, and whether it is intact."""

import json
from pathlib import Path
from typing import Any

from dflash_jax.cache.features import feature_layout
from dflash_jax.cache.manifest import LOCK_NAMES, MANIFEST_NAME, read_manifest
from dflash_jax.cache.shards import bytes_per_token, file_problem, layout_problems, map_tensors
from dflash_jax.core import InputError


def cache_info(path: Path) -> dict[str, Any]:
    """Return what a cache is, from its manifest alone (no shard is read).

    Keys: `cache`, `complete`, `format_version`, `num_sequences`, `num_texts` (sequences over offsets), `num_tokens`,
    `max_length`, `max_new_tokens`, `position_offsets`, `capture_layers`, `hidden_size`, `features_dtype`,
    `bytes_per_token`, `bytes` and `shards` (finished), `num_shards` (in all), `prompt_sets`
    (empty for format_version 1), `fingerprint`.

    Raises:
        InputError: see `read_manifest`.
    """
    manifest = read_manifest(path)
    return {
        "cache": str(path),
        **{name: manifest[name] for name in ("complete", "format_version", "num_sequences")},
        "num_texts": manifest.get("num_texts", manifest["num_sequences"] // len(manifest["position_offsets"])),
        **{name: manifest[name] for name in ("num_tokens", "max_length", "max_new_tokens")},
        **{name: manifest[name] for name in ("position_offsets", "capture_layers", "hidden_size", "features_dtype")},
        "top_k": manifest.get("top_k", 0),
        "bytes_per_token": bytes_per_token(feature_layout(manifest)),
        "bytes": sum(entry["bytes"] for entry in manifest["shards"]),
        "shards": len(manifest["shards"]),
        "num_shards": manifest["num_shards"],
        "prompt_sets": manifest.get("prompt_sets", []),
        "fingerprint": manifest["fingerprint"],
    }


def _shard_problems(path: Path, entry: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """Everything wrong with one shard. Where its bytes are not the ledger's, what they mean is not asked."""
    problem = file_problem(path, entry)
    if problem:
        return [problem]
    try:
        return layout_problems(path, map_tensors(path), entry, manifest)
    except InputError as error:
        return [str(error)]


def verify_cache(path: Path) -> dict[str, Any]:
    """Read every byte of a cache and return what is wrong with it.

    Found are: any changed byte, a truncated, missing or foreign file, tensors that are not what the manifest says,
    sequence bounds that do not rise, a build that was not finished.

    Returns:
        `cache`, `ok`, `problems` (one line each, naming the file), and of the ledger `num_shards`, `num_sequences`,
        `num_tokens`, `bytes`.

    Raises:
        InputError: there is no cache at `path` (no folder, or no manifest).
    """
    counts = {"num_shards": 0, "num_sequences": 0, "num_tokens": 0, "bytes": 0}
    try:
        manifest = read_manifest(path)
    except InputError as error:
        if not (path / MANIFEST_NAME).is_file():
            raise
        return {"cache": str(path), "ok": False, "problems": [str(error)], **counts}
    problems = []
    # JSON forgives a byte in its white space; the format does not
    canonical = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    if (path / MANIFEST_NAME).read_bytes() != canonical.encode():
        problems.append(f"{path / MANIFEST_NAME} was changed after it was written")
    entries = manifest["shards"]
    if not manifest["complete"]:
        problems.append(f"{path} is not complete ({len(entries)} of {manifest['num_shards']} shards)")
    for entry in entries:
        problems += _shard_problems(path / entry["file"], entry, manifest)
    known = {entry["file"] for entry in entries} | {MANIFEST_NAME}
    foreign = [file for file in sorted(path.iterdir()) if file.name not in known]
    problems += [f"{file} does not belong to the cache" for file in foreign if not LOCK_NAMES.fullmatch(file.name)]
    counts = {
        "num_shards": len(entries),
        "num_sequences": sum(entry["sequences"] for entry in entries),
        "num_tokens": sum(entry["tokens"] for entry in entries),
        "bytes": sum(entry["bytes"] for entry in entries),
    }
    return {"cache": str(path), "ok": not problems, "problems": problems, **counts}
