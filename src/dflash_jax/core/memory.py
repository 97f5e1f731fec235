"""Host memory that was freed and not given back."""

import contextlib
import ctypes


def give_back_freed() -> None:
    """Give what the C library keeps of freed memory back to the system. Only glibc keeps any to speak of.

    XLA's compiler frees hundreds of megabytes in pieces, and glibc holds on to them: without this they stay part of a
    process for as long as it trains. To be called where something large was just compiled, not in a loop.
    """
    # no such function elsewhere: musl, macOS, Windows
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
