"""What becomes of freed memory, where the C library is glibc.

By default, glibc returns a large freed tensor to the system or keeps it, depending on the history of the process. Times
then differ by page faults, and peak memory by what is kept.
"""

import ctypes

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> None:
    """Never return memory to the system, for steady times; until the process ends."""
    _set(_M_MMAP_MAX, 0)
    _set(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Return every freed tensor of more than 64 KiB at once, for a true peak; until the process ends."""
    _set(_M_MMAP_THRESHOLD, 2**16)
    _set(_M_TRIM_THRESHOLD, 2**16)


def _set(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)
