"""Freed memory goes back to the system."""

import ctypes
import os
from pathlib import Path

import pytest

from dflash_jax.core import give_back_freed

BLOCK, COUNT = 2048, 50_000


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_what_the_c_library_keeps_is_given_back():
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim") or not Path("/proc/self/statm").exists():
        pytest.skip("only glibc on Linux keeps freed memory and can be told to give it back")
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    blocks = [library.malloc(BLOCK) for _ in range(COUNT)]
    last = library.malloc(BLOCK)  # above all of them, so that the heap cannot shrink from its end by itself
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
        library.free(block)
    before = resident()
    give_back_freed()
    given = before - resident()
    library.free(last)
    assert given > BLOCK * COUNT / 2
