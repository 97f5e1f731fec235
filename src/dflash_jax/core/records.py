"""Provenance: what made an artefact, written beside it."""

import dataclasses
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import dflash_jax
from dflash_jax.core.files import write_json

RECORD_NAME = "record.json"
_VERSIONED = ("jax", "jaxlib", "equinox", "optax", "orbax-checkpoint", "grain", "safetensors", "transformers", "numpy")


def git_revision() -> str | None:
    """Commit of the working tree this package runs from, with "+dirty" for uncommitted changes; None outside git."""
    folder = Path(dflash_jax.__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _plain(value: Any) -> Any:
    """`value` as JSON: dataclasses become objects, paths strings, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def make_record(command: str, config: Any, *, seed: int | None = None, **extra: Any) -> dict[str, Any]:
    """Return a command's record: resolved config, argv, versions, devices, seed, git revision, time.

    Args:
        command: the command's name, such as "cache build".
        config: the resolved config, a dataclass or a mapping.
        seed: the seed of everything random in it; None where nothing is.
        extra: further JSON values that belong to this artefact (fingerprints, hashes).
    """
    # Here and not above: every room imports core, and the command line's help must not wait two seconds for jax.
    import jax

    return {
        "command": command,
        "config": _plain(config),
        "argv": sys.argv,
        "seed": seed,
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"dflash-jax": dflash_jax.__version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in _VERSIONED},
        "devices": [str(device) for device in jax.devices()],
        "git_revision": git_revision(),
        **{key: _plain(value) for key, value in extra.items()},
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `record.json` into an artefact's folder, atomically."""
    write_json(folder / RECORD_NAME, dict(record))
