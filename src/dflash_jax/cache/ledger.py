"""Who may write to a cache folder, what is finished in it, and how a shard is entered.

One builder holds the folder, or several that each build a share of the shards (`Share`). Every change of the manifest
is a read and a write under one lock, so that builders of different shares enter their shards one after the other. All
locks are the kernel's (`flock`): they cannot outlive their process.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from dflash_jax.cache.config import CacheBuildConfig
from dflash_jax.cache.manifest import LOCK_NAME, LOCK_NAMES, MANIFEST_NAME, read_manifest, write_manifest
from dflash_jax.cache.plan import ShardPlan
from dflash_jax.cache.shards import Layout, file_problem, write_shard
from dflash_jax.core import InputError

# where things lie, and who builds what, may change between runs; what is built may not
_FREE = ("target", "responses", "out", "process_index", "process_count")
_MANIFEST_LOCK = f"{LOCK_NAME}-manifest"
_PARTIAL = re.compile(r"\.(.+)\.[^.]+\.partial")


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which of a build's shards this process builds: one run of them, so that it compiles few of its shapes.

    Attributes:
        index: of this process, from 0.
        count: of processes.
    """

    index: int = 0
    count: int = 1

    def of(self, shards: tuple[ShardPlan, ...]) -> list[ShardPlan]:
        """Return the shards of this process. Worked: of 5 shards, process 0 of 2 builds 0 and 1, process 1 the rest."""
        first, end = (len(shards) * place // self.count for place in (self.index, self.index + 1))
        return list(shards[first:end])


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn what a full disk, a quota or a read-only folder raises into one line.

    Raises:
        InputError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write the cache {out}: {error}: see to it, then run the same `cache build` again"
        ) from error


def _lock(path: Path, kind: int) -> IO[bytes]:
    """Open and lock a file that is still at its path once it is locked: its last holder may have removed it.

    Raises:
        BlockingIOError: another process has it, and `kind` says not to wait.
    """
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, kind)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


@contextmanager
def locked(out: Path, share: Share) -> Iterator[None]:
    """Hold the folder for one share: alone where there is one share, else beside the builders of the others.

    Raises:
        InputError: another builder of this share, or one of all shares, is at work; the folder cannot be written.
    """
    alone = share.count == 1
    wanted = [(LOCK_NAME, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)]
    wanted += [] if alone else [(f"{LOCK_NAME}-{share.index}", fcntl.LOCK_EX)]
    with ExitStack() as held:
        for name, kind in wanted:
            with writing(out):
                out.mkdir(parents=True, exist_ok=True)
                try:
                    held.enter_context(_lock(out / name, kind | fcntl.LOCK_NB))
                except BlockingIOError as error:
                    which = "" if name == LOCK_NAME else f" with --process-index {share.index}"
                    raise InputError(
                        f"another `cache build`{which} is writing {out}: wait for it, or stop it first"
                    ) from error
        yield
        if not alone:
            (out / wanted[-1][0]).unlink(missing_ok=True)
        if alone or read_manifest(out)["complete"]:  # every other builder has entered all its shards
            for name in (LOCK_NAME, _MANIFEST_LOCK):
                (out / name).unlink(missing_ok=True)


@contextmanager
def _manifest_held(out: Path) -> Iterator[None]:
    """Keep other builders from the manifest; they wait."""
    with writing(out), _lock(out / _MANIFEST_LOCK, fcntl.LOCK_EX):
        yield


def _settings(manifest: dict[str, Any]) -> dict[str, Any]:
    """What must not change between the runs of one build.

    A setting that a build of an older version did not know was what its default is now.
    """
    known = {field.name: field.default for field in fields(CacheBuildConfig)}
    return {
        **{name: value for name, value in (known | manifest["config"]).items() if name not in _FREE},
        **manifest["fingerprint"],
        **{name: manifest[name] for name in ("format_version", "hidden_size", "responses_sha256", "max_new_tokens")},
    }


def _stored(out: Path, new: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a build that was begun here with the same settings; None in an empty folder."""
    if not (out / MANIFEST_NAME).exists():
        foreign = [
            path.name
            for path in out.iterdir()
            if not (LOCK_NAMES.fullmatch(path.name) or path.name.endswith(".partial"))
        ]
        if foreign:
            raise InputError(f"{out} holds files and is not a cache ({min(foreign)}): choose another --out")
        return None
    stored = read_manifest(out)
    was, now = _settings(stored), _settings(new)
    changed = [f"{k} was {was.get(k)!r}, now {now.get(k)!r}" for k in sorted(was | now) if was.get(k) != now.get(k)]
    if changed:
        raise InputError(
            f"{out} was begun with other settings: {'; '.join(changed)}: keep them or choose another --out"
        )
    if stored.get("plan_sha256") != new["plan_sha256"]:
        version = stored["records"][0].get("versions", {}).get("dflash-jax")
        raise InputError(
            f"{out} was begun by dflash-jax {version}, which makes other batches of the same texts: finish it with "
            "that version, or choose another --out"
        )
    return stored


def _remove_partial(out: Path, names: set[str], *, alone: bool) -> None:
    """Remove what killed runs left half-written: of some files, or of any where there is no other builder."""
    for path in out.glob(".*.partial"):
        match = _PARTIAL.fullmatch(path.name)
        if alone or (match and match[1] in names):
            path.unlink()


def check_settings(out: Path, new: dict[str, Any]) -> set[str]:
    """Refuse a folder that holds something else, or a build with other settings, before anything is computed.

    Returns:
        The shards that are finished there, intact or not.

    Raises:
        InputError: it does; or the folder cannot be read; or a version that plans otherwise began it.
    """
    if not out.exists():
        return set()
    with writing(out):
        stored = _stored(out, new)
    return {entry["file"] for entry in stored["shards"]} if stored else set()


def resume(out: Path, new: dict[str, Any], shards: list[ShardPlan], share: Share) -> tuple[dict[str, Any], int]:
    """Return the manifest to go on with, and how many of this process's shards are no longer intact.

    Those are taken off the ledger, to be built again.

    Args:
        out: the folder, locked.
        new: the manifest of a build of which no shard is finished.
        shards: this process's.
        share: what it builds.

    Raises:
        InputError: see `check_settings`; the folder cannot be written.
    """
    mine = {shard.file for shard in shards}
    with _manifest_held(out):
        stored = _stored(out, new)
        _remove_partial(out, mine | {MANIFEST_NAME}, alone=share.count == 1)
        if stored is None:
            write_manifest(out, new)
            return new, 0
    # not under the lock: it takes long, and nobody else enters these shards
    damaged = {e["file"] for e in stored["shards"] if e["file"] in mine and file_problem(out / e["file"], e)}
    if stored["complete"] and not damaged:
        return stored, 0
    with _manifest_held(out):
        stored = read_manifest(out)
        intact = [entry for entry in stored["shards"] if entry["file"] not in damaged]
        whole = len(intact) == stored["num_shards"]
        stored |= {"shards": intact, "complete": whole, "records": stored["records"] + new["records"]}
        write_manifest(out, stored)
    return stored, len(damaged)


def commit(out: Path, shard: ShardPlan, layout: Layout, tensors: dict[str, np.ndarray]) -> None:
    """Write a shard aside, hash, sync, rename, then enter it in the ledger; the last one completes the cache.

    Raises:
        InputError: the folder cannot be written.
    """
    with writing(out):
        size, digest = write_shard(out / shard.file, layout, tensors)
    entry = {
        "file": shard.file,
        "bytes": size,
        "sha256": digest,
        "sequences": shard.sequences,
        "tokens": shard.tokens,
    }
    with _manifest_held(out):
        manifest = read_manifest(out)
        others = [each for each in manifest["shards"] if each["file"] != shard.file]
        # a rebuilt shard goes back to its place among those kept
        entries = sorted([*others, entry], key=lambda each: each["file"])
        write_manifest(out, manifest | {"shards": entries, "complete": len(entries) == manifest["num_shards"]})
