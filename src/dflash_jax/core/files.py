"""Files that are either whole or absent: atomic writes, staged folders, JSON and JSONL with line numbers, hashes.

Everything here survives a kill at any instant: content is written to a temporary name beside its destination, synced,
and renamed over it, so that a reader sees the old state or the new one and never a part.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dflash_jax.core.errors import InputError


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename inside it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success sync it and rename it to `path`, on failure remove it.

    Raises:
        OSError: the folder cannot be written (read-only, disk full); the destination is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path`; on success rename it to `path`, on failure remove it.

    Raises:
        InputError: `path` exists already and is not an empty folder (nothing is ever overwritten).
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists already: choose another --out or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        temporary.chmod(0o755)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically, indented, with a final newline. NaN and infinity are refused (not JSON)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, *, what: str) -> Any:
    """Return a JSON document.

    Args:
        path: the file.
        what: what the file is to the user ("the target's config", "the cache's manifest"), for the message.

    Raises:
        InputError: the file is missing, or is not JSON.
    """
    if not path.is_file():
        raise InputError(f"{what} is missing: {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{what} is not JSON: {path}: {error}") from error


def read_jsonl(path: Path, *, what: str) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; blank lines are skipped.

    Raises:
        InputError: the file is missing or empty, or a line is not a JSON object (the message gives its number).
    """
    if not path.is_file():
        raise InputError(f"{what} is missing: {path}")
    rows: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip().decode())
            except UnicodeDecodeError as error:
                raise InputError(f"{what}: {path} is not UTF-8 in line {number}") from error
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{what}: {path} line {number} is not JSON: {error.msg} at column {error.colno}"
                ) from error
            if not isinstance(row, dict):
                raise InputError(f"{what}: {path} line {number} is a JSON {type(row).__name__}, an object is needed")
            rows.append(row)
    if not rows:
        raise InputError(f"{what} holds no rows: {path}")
    return rows
