"""Keep the memory of freed message buffers in the process.

libzmq allocates a buffer for each megabyte that arrives. glibc gives freed buffers of that size back to the operating system at once, which
takes them apart page by page and hands out zeroed ones for the next: a third of what a stream costs its receiver (measured: 139 ms of
processor time for 256 MiB, 122 without; blocking pyzmq alone gains nothing, as it reuses its one buffer). So tell malloc to keep
them. The price is that a process keeps up to `KEPT_BYTES_MAX` more than it uses at the moment.

What the user has set (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``) counts more. Other C libraries have no mallopt, and get none.
"""

from __future__ import annotations

import ctypes
import os

KEPT_BYTES_MAX = 64 << 20
"""The largest heap that glibc gives to a thread of its own, such as a ZeroMQ io thread: more would change nothing."""
MAPPED_BYTES_MIN = 32 << 20
"""The largest threshold that every glibc takes; from here on an allocation is a mapping of its own, and freed as one."""
ARENAS_MAX = 2
"""One for Python, one for all io threads: with one for each, a device holds 1 to 2 MB more, and nothing is faster."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_buffers() -> bool:
    """Tell malloc, for the whole process; whether it was told. Calling twice does nothing more."""
    if any(variable in os.environ for variable in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    wanted = ((_M_TRIM_THRESHOLD, KEPT_BYTES_MAX), (_M_MMAP_THRESHOLD, MAPPED_BYTES_MIN), (_M_ARENA_MAX, ARENAS_MAX))
    return all(mallopt(parameter, value) for parameter, value in wanted)


def give_back_buffers() -> None:
    """Give what `keep_freed_buffers` has kept back to the operating system: when nothing moves, a process shall be small."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
