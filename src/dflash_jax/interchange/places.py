"""Where an import or an export goes: a new folder, which appears whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dflash_jax.core import InputError, staged_folder


@contextmanager
def whole_folder(out: Path, what: str) -> Iterator[Path]:
    """Give a staged folder whose system errors are one line.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with staged_folder(out) as folder:
            yield folder
    except OSError as error:
        raise InputError(
            f"cannot write the {what} {out}: {error}: see to it, then run the same command again"
        ) from error


def check_free(out: Path) -> None:
    """Refuse a taken `--out` before the work, not after it.

    Raises:
        InputError: it exists and is no empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already: choose another --out or remove it")
