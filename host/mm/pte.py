"""Page table entries: one uint64 for each virtual page.

An entry that is not zero has a *kind* in its lowest three bits, the bits of the table below, and a frame number from bit 12 on, so that a
present entry without its low bits is a physical address, as on x86. Linux keeps the non-present kinds as swap entries of special types
(include/linux/swapops.h); the meaning of each is the same here:

- `PRESENT`: the CPU may use it, as far as WRITE and the VMA allow. `SPECIAL` marks the shared zero page, which belongs to nobody.
- `DEVICE`: device-private memory. A CPU access faults and brings the page home.
- `MIGRATION`: the page is on its way. Whoever meets it waits; this is the page's lock. The frame is where it comes from.
- `EXCLUSIVE`: the frame is ordinary memory, but a device has atomic access; the next CPU access takes it away.
- `SWAP`: the "frame" is a slot of swap.
- `HINT`: present, but for a trap: NUMA balancing wants to know who touches it (pte_protnone). The next access makes it present again.
- `MARKER`: no page, but not empty either; the "frame" tells why (`MARKER_*`).

WRITE and ANON_EXCLUSIVE mean the same on a migration, device or exclusive entry as on the present entry that it stands for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmmnet.pages import DEVICE_ZONE_MIN, ZONE_SHIFT, Words, unlike, word_of

KIND = 7
NONE = 0
PRESENT = 1
DEVICE = 2
MIGRATION = 3
EXCLUSIVE = 4
SWAP = 5
MARKER = 6
HINT = 7

WRITE = 1 << 3
YOUNG = 1 << 4
DIRTY = 1 << 5
SOFT_DIRTY = 1 << 6
ANON_EXCLUSIVE = 1 << 7
"""The page belongs to this process alone, so a write need not copy it (PageAnonExclusive)."""
SPECIAL = 1 << 8
UFFD_WP = 1 << 9
HUGE = 1 << 10
"""One of the 512 of a block that is mapped as one (`huge.py`)."""

FRAME_SHIFT = 12
BITS = (1 << FRAME_SHIFT) - 1
"""Everything that is not the frame."""
CARRIED = YOUNG | DIRTY | SOFT_DIRTY | UFFD_WP | WRITE | ANON_EXCLUSIVE | HUGE
"""What a migration entry remembers of the entry that it replaced."""

MARKER_UFFD_WP = 1
MARKER_POISON = 2
MARKER_GUARD = 3

ALIKE = KIND | SPECIAL | HUGE | (1 << 64) - (1 << FRAME_SHIFT + ZONE_SHIFT)
"""What decides how an entry is treated: what it is, and in which memory its frame lies."""

DEVICE_MIN = DEVICE_ZONE_MIN << ZONE_SHIFT + FRAME_SHIFT
"""From here on entries lead to the memory of devices; a present one to coherent memory."""

FRESH_WRITE = PRESENT | WRITE | YOUNG | DIRTY | SOFT_DIRTY | ANON_EXCLUSIVE
"""A page that was just made by a store."""
ZERO_ENTRY = PRESENT | SPECIAL | YOUNG
"""The zero page, read-only: what a load of a never-touched page maps."""
WRITABLE = PRESENT | WRITE


def entry(kind: int, frame: int, bits: int = 0) -> int:
    """The entry of `kind` for `frame` with `bits`."""
    return frame << FRAME_SHIFT | kind | bits


def frames_of(entries: Words) -> Words:
    """The frame of each entry."""
    return entries >> word_of(FRAME_SHIFT)


def zones_of(entries: Words) -> Words:
    """The zone in which each entry's frame lies."""
    return entries >> word_of(FRAME_SHIFT + ZONE_SHIFT)


def kinds_of(entries: Words) -> Words:
    """The kind of each entry."""
    return entries & word_of(KIND)


def is_present(entries: Words) -> npt.NDArray[np.bool_]:
    """pte_present: which entries lead to a page that is there for the CPU, trapped or not."""
    kinds = entries & word_of(KIND)
    present: npt.NDArray[np.bool_] = (kinds == PRESENT) | (kinds == HINT)
    return present


def entries_of(kind: int, frames: Words, bits: int = 0) -> Words:
    """Entries of `kind` for `frames`, with `bits`."""
    entries = frames << word_of(FRAME_SHIFT)
    entries |= word_of(kind | bits)
    return entries


def sample(entries: Words) -> Words:
    """`entries`, or only the first where all are `ALIKE`: what is found out of it holds for each, and costs nothing."""
    if len(entries) > 1 and not unlike(entries) & ALIKE:
        return entries[:1]
    return entries


def with_bits(entries: Words, bits: int) -> Words:
    """`entries` with `bits` set."""
    return entries | word_of(bits)


def masked(entries: Words, mask: int) -> Words:
    """`entries` with only `mask` kept."""
    return entries & word_of(mask)
