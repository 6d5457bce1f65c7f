"""Malloc keeps freed message buffers, unless the user has said otherwise."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from hmmnet.wire.allocator import keep_freed_buffers

PROBE = """
import ctypes, sys
from hmmnet.wire.allocator import keep_freed_buffers
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "keep":
    assert keep_freed_buffers() and keep_freed_buffers()
def faults():
    return int(open("/proc/self/stat").read().rsplit(") ", 1)[1].split()[7])
def use():
    places = [libc.malloc(1 << 20) for _ in range(8)]
    for place in places:
        ctypes.memset(place, 1, 1 << 20)
    for place in places:
        libc.free(place)
for _ in range(3):
    use()
before = faults()
for _ in range(20):
    use()
print(faults() - before)
"""
TOLD = hasattr(ctypes.CDLL(None), "mallopt")


def faults(what: str) -> int:
    """Page faults of twenty rounds of buffers, after three to warm up, in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", PROBE, what], env=clean, capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)


@pytest.mark.skipif(not TOLD, reason="this C library has no mallopt")
def test_buffers_are_not_faulted_in_again() -> None:
    """The pages of a freed buffer serve the next."""
    assert faults("keep") < 100


@pytest.mark.parametrize("variable", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_user_decides(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings from the environment stay."""
    monkeypatch.setenv(variable, "1")
    assert not keep_freed_buffers()
