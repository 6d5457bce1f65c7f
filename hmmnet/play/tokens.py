"""How the trace syntax writes what an operation saw: pages, snapshot bytes and page table entries as short tokens.

The recordings were made by a C program in a virtual machine; these functions must give exactly its spelling. Page contents are written as
``z`` (all zero), ``uHH`` (all bytes HH) or the zlib crc32 of the 4096 bytes, so that a line stays readable and still tells every byte.
"""

from __future__ import annotations

import zlib

from hmmnet.pages import PAGE_SIZE

SNAPSHOT_READ = 0x01
SNAPSHOT_WRITE = 0x02
SNAPSHOT_PMD = 0x04
SNAPSHOT_PUD = 0x08
SNAPSHOT_ERROR = 0xFF
SNAPSHOT_PLACES = {0x00: "", 0x10: "Z", 0x20: "L", 0x30: "X", 0x40: "CL", 0x50: "CX"}
"""Upper bits of HMM_DMIRROR_PROT_*: system memory, zero page, private here and on another unit, coherent here and on another unit."""
PAGEMAP_ONCE = 0x80
"""Bit of a pagemap letter that says "mapped exactly once" (PM_MMAP_EXCLUSIVE)."""


def page_token(page: bytes | memoryview) -> str:
    """The token of one page of data."""
    data = bytes(page)
    first = data[0]
    if data.count(first) == len(data):
        return f"u{first:02x}" if first else "z"
    return f"{zlib.crc32(data):08x}"


def page_tokens(data: bytes) -> list[str]:
    """One token for each page of `data`."""
    view = memoryview(data)
    return [page_token(view[i : i + PAGE_SIZE]) for i in range(0, len(data), PAGE_SIZE)]


def snapshot_symbol(value: int) -> str:
    """The symbol of one HMM_DMIRROR_PROT_* byte. A byte that the driver never writes comes out as ``?HH``."""
    if value == SNAPSHOT_ERROR:
        return "E"
    place = SNAPSHOT_PLACES.get(value & 0x70)
    rights = {0: "", SNAPSHOT_READ: "R", SNAPSHOT_WRITE: "W", SNAPSHOT_READ | SNAPSHOT_WRITE: "W"}[value & 0x03]
    if value == 0:
        return "-"
    if place is None or not rights or value & 0x80:
        return f"?{value:02x}"
    huge = "/PMD" if value & SNAPSHOT_PMD else "/PUD" if value & SNAPSHOT_PUD else ""
    return f"{place}{rights}{huge}"


def pagemap_symbol(value: int) -> str:
    """The symbol of one byte of `Process.pagemap`: letter, ``f`` for a file page, ``x`` when mapped exactly once."""
    letter = chr(value & 0x7F)
    of_file = "f" if letter.islower() else ""
    once = "x" if value & PAGEMAP_ONCE else ""
    return f"{letter.upper()}{of_file}{once}"


def listed(tokens: list[str]) -> str:
    """Tokens as a result line shows them: ``[a b c]``."""
    return f"[{' '.join(tokens)}]"
