"""The real target of the tests: SmolLM2-135M-Instruct, imported once and kept."""

import fcntl
import hashlib
import os
from pathlib import Path

import dflash_jax.importer
from dflash_jax.importer import import_smollm2

_REPOSITORY = Path(__file__).resolve().parents[2]


def cache_folder() -> Path:
    """Folder for what is costly to make, kept between runs: `$DFLASH_JAX_TEST_CACHE`, else `build/test-cache`."""
    return Path(os.environ.get("DFLASH_JAX_TEST_CACHE", _REPOSITORY / "build" / "test-cache"))


def smollm2_target() -> Path:
    """SmolLM2's target folder, imported (about 10 s) unless this version of the importer did it before."""
    sources = sorted(Path(dflash_jax.importer.__file__).parent.glob("*.py"))
    key = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"smollm2-{key}"
    # Test workers are processes: the first imports while the others wait.
    with (folder / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            import_smollm2(target)
    return target
