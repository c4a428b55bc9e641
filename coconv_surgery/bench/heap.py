"""What becomes of freed memory, where the C library is glibc.

By itself, glibc gives large tensors back to the system as soon as they are free, or keeps them, as the history of the
process has it. The times of what comes next then differ by the page faults, and peak memory by what is kept.
"""

import ctypes

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> None:
    """Never give memory back, for steady times; until the process ends."""
    _set(_M_MMAP_MAX, 0)
    _set(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Give every tensor of more than 64 KiB back at once, for a true peak; until the process ends."""
    _set(_M_MMAP_THRESHOLD, 2**16)
    _set(_M_TRIM_THRESHOLD, 2**16)


def _set(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)
