"""The manifest: what a cache is, and the ledger of its finished shards (format: docs/cache-format.md)."""

import re
from pathlib import Path
from typing import Any

from dflash_jax.cache.features import FEATURES_DTYPES
from dflash_jax.core import InputError, read_json, sha256_json, write_json

FORMAT = "dflash-jax-cache"
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
LOCK_NAME = ".lock"
LOCK_NAMES = re.compile(r"\.lock(-manifest|-[0-9]+)?")
# a name of this form has no separator, so a ledger cannot lead out of its folder
SHARD_NAME = re.compile(r"shard-[0-9]{5}\.safetensors")
_WHAT = "the cache's manifest"

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "fingerprint": dict,
    "config": dict,
    "records": list,
    "responses_sha256": str,
    "hidden_size": int,
    "capture_layers": list,
    "position_offsets": list,
    "features_dtype": str,
    "max_new_tokens": (int, type(None)),
    "max_length": int,
    "num_shards": int,
    "num_sequences": int,
    "num_tokens": int,
    "shards": list,
    "complete": bool,
}
_FIELDS_SINCE_2: dict[str, type] = {"prompt_sets": list}
_ENTRY_FIELDS = {"file": str, "bytes": int, "sha256": str, "sequences": int, "tokens": int}


def shard_name(index: int) -> str:
    """File name of shard `index` (0-based)."""
    return f"shard-{index:05d}.safetensors"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json` atomically, with the hash of its own content in `manifest_sha256`."""
    content = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    write_json(folder / MANIFEST_NAME, content | {"manifest_sha256": sha256_json(content)})


def _ledger_problem(manifest: dict[str, Any]) -> str | None:
    """What is wrong with the ledger; None where nothing is."""
    names = []
    for entry in manifest["shards"]:
        if not isinstance(entry, dict) or any(not isinstance(entry.get(k), kind) for k, kind in _ENTRY_FIELDS.items()):
            return f"shard entry {len(names)} lacks one of {', '.join(_ENTRY_FIELDS)}"
        if not SHARD_NAME.fullmatch(entry["file"]):
            return f"{entry['file']!r} is not a shard's name"
        if min(entry["bytes"], entry["sequences"], entry["tokens"]) < 1:
            return f"{entry['file']} is entered with a count below 1"
        names.append(entry["file"])
    if names != sorted(set(names)):
        return "its shards are not in order"
    if manifest["complete"]:
        if not names or names != [shard_name(index) for index in range(manifest["num_shards"])]:
            return f"it calls itself complete, with {len(names)} of {manifest['num_shards']} shards"
        for total, part in (("num_sequences", "sequences"), ("num_tokens", "tokens")):
            if sum(entry[part] for entry in manifest["shards"]) != manifest[total]:
                return f"its shards do not add up to {total} {manifest[total]}"
    return None


def _content_problem(manifest: dict[str, Any]) -> str | None:
    """What is wrong with a manifest of a known version; None where nothing is."""
    fields = _FIELDS if manifest["format_version"] == 1 else _FIELDS | _FIELDS_SINCE_2
    missing = [name for name, kind in fields.items() if not isinstance(manifest.get(name), kind)]
    if missing:
        return f"{missing[0]} is missing or of the wrong type"
    if not all(isinstance(name, str) for name in manifest.get("prompt_sets", [])):
        return "prompt_sets holds something that is not a name"
    if not isinstance(manifest.get("top_k", 0), int) or manifest.get("top_k", 0) < 0:
        return f"top_k {manifest['top_k']!r} is not a number from 0 up"
    if manifest["features_dtype"] not in FEATURES_DTYPES:
        return f"features_dtype {manifest['features_dtype']!r} is unknown"
    content = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    if manifest.get("manifest_sha256") != sha256_json(content):
        return "it was changed or damaged after it was written (manifest_sha256 differs)"
    return _ledger_problem(manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a cache's manifest, of a complete cache or not.

    Raises:
        InputError: no such folder; no manifest, or a link to one; not JSON; another format or a newer version; a field
            missing or of the wrong type; changed after it was written; a shard's name that is not of the form
            shard-00000.safetensors; counts that do not add up.
    """
    if not folder.is_dir():
        raise InputError(f"no cache at {folder}: make one with `dflash-jax cache build`")
    path = folder / MANIFEST_NAME
    if path.is_symlink():
        raise InputError(f"{path} is a symbolic link, which may lead out of the cache's folder: put the file there")
    if not path.is_file():
        raise InputError(f"{folder} is not a cache: it has no {MANIFEST_NAME}")
    manifest = read_json(path, what=_WHAT)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not a {FORMAT} manifest: its format field says otherwise")
    version = manifest.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise InputError(f"{path}: format_version {version!r} is not a positive number")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path} is a cache of format_version {version}, this dflash-jax reads up to {FORMAT_VERSION}: "
            "upgrade dflash-jax"
        )
    problem = _content_problem(manifest)
    if problem:
        raise InputError(f"{path}: {problem}: build the cache again in another folder")
    return manifest


def check_fingerprint(manifest: dict[str, Any], wanted: dict[str, Any], *, what: str) -> None:
    """Compare the cache's fingerprint with that of something it is to be used with.

    Args:
        manifest: the cache's manifest.
        wanted: fields to compare; fields of the cache that are not named here are not compared.
        what: what they describe to the user, such as "the target models/smollm2".

    Raises:
        InputError: fields differ, or the cache has no such field; each is named with both values.
    """
    differences = []
    for name, value in wanted.items():
        stored = manifest["fingerprint"].get(name)
        if stored != (list(value) if isinstance(value, tuple) else value):  # JSON gives lists back
            differences.append(f"{name} is {stored!r} in the cache, {value!r} in {what}")
    if differences:
        raise InputError(f"the cache was not made for {what}: {'; '.join(differences)}: build a cache for it")
