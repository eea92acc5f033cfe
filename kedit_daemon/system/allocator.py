"""The C library's allocator, which keeps what was freed."""

import ctypes


def release_free_memory() -> None:
    """Give freed memory back to the system. Without glibc nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
