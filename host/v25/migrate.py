"""migrate_vma as v25 had it: one call with two callbacks, in the place of today's four calls (mm/migrate.c of Linux 4.14).

Collecting, unmapping, changing over and putting back are the steps of `host.migrate`, with v25's choice: everything that can move is
collected, of system memory and of *every* device, and the driver leaves out what it does not want (`dst` 0). In between the driver

- `alloc_and_copy`: for each entry of `src` with MIGRATE gets a page, locks it, copies, and puts its word in `dst` (with LOCKED, and
  DEVICE where it is a device's);
- `finalize_and_map`: looks which entries kept MIGRATE, and updates its own table.

Towards system memory every page that a CPU waits for should get a destination. If its data cannot be had any more, the driver says ERROR,
and whoever touches the page gets SIGBUS from then on.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Mapping
from typing import Any, Protocol

import numpy as np

from hmmnet.errors import KernelError
from hmmnet.host.interfaces import NO_OWNER, AddressSpace, Select
from hmmnet.host.migrate import MigrateVma, collect, set_targets
from hmmnet.host.mm import pte
from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.host.mm.rmap import mappings
from hmmnet.host.mm.zones import LOCKED
from hmmnet.pages import PAGE_SHIFT, ZONE_SHIFT, Words

from .mirror import VmArea, is_special
from .pfn import (
    DEVICE_FRAME_MIN,
    MIGRATE_PFN_DEVICE,
    MIGRATE_PFN_ERROR,
    MIGRATE_PFN_LOCKED,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    frames_of,
)

EVERYTHING = Select.SYSTEM | Select.DEVICE_PRIVATE | Select.DEVICE_COHERENT | Select.ANY_OWNER | Select.PARTS_STAY
_USED = np.uint64(MIGRATE_PFN_VALID | MIGRATE_PFN_LOCKED)


class MigrateVmaOps(Protocol):
    """struct migrate_vma_ops: the driver's two callbacks. Each returns when it is done, or something to be awaited."""

    def alloc_and_copy(self, vma: VmArea, src: Words, dst: Words, start: int, end: int, private: Any) -> Awaitable[None] | None:
        """Give pages with MIGRATE in `src` a destination in `dst`, with their bytes (zeros where `src` is not VALID)."""
        ...

    def finalize_and_map(self, vma: VmArea, src: Words, dst: Words, start: int, end: int, private: Any) -> Awaitable[None] | None:
        """What kept MIGRATE in `src` lives at `dst` now."""
        ...


async def migrate_vma(
    ops: MigrateVmaOps,
    vma: VmArea | None,
    start: int,
    end: int,
    src: Words,
    dst: Words,
    private: Any,
    spaces: Mapping[int, AddressSpace],
) -> None:
    """Migrate pages of addresses [start, end) of `vma`, whose mmap lock is held for reading; `src` and `dst` have an entry for each.

    Returns normally also when nothing could be collected: then no callback is called. Raises KernelError(EINVAL): no VMA, hugetlb or a
    special mapping, a range that is empty or leaves the VMA, arrays that are too short; and for a destination that is not a locked, unused
    page, after everything is back where it was.
    """
    vma = _checked(ops, vma, start, end, src, dst)
    first, last = start >> PAGE_SHIFT, end - 1 >> PAGE_SHIFT
    count = last - first + 1
    src[:count] = dst[:count] = 0
    work = MigrateVma(vma.mm, spaces, EVERYTHING, None)
    lost = np.zeros(count, np.bool_)
    targets = np.zeros(count, np.uint64)
    try:
        await collect(work.parts, vma.mm, spaces, first, last + 1, EVERYTHING, NO_OWNER)
        (part,) = work.parts  # nothing goes as a huge page
        if not part.cpages:
            return
        src[:count] = _as_v25(part.source)
        await _call(ops.alloc_and_copy(vma, src[:count], dst[:count], start, end, private))
        lost = (dst[:count] & MIGRATE_PFN_ERROR != 0) & (src[:count] & MIGRATE_PFN_DEVICE != 0)
        targets = _destinations(vma.mm.memory, part.source, dst[:count])
        set_targets(part, targets)
        await work.install()
        src[:count] = _as_v25(part.source)
        await _call(ops.finalize_and_map(vma, src[:count], dst[:count], start, end, private))
    except BaseException:
        work.give_up()
        raise
    finally:
        work.finalize()
        lose(vma.mm.memory, frames_of(src[:count][lost]))
        unlock(vma.mm.memory, targets)


def _checked(ops: MigrateVmaOps | None, vma: VmArea | None, start: int, end: int, src: Words, dst: Words) -> VmArea:
    why = ""
    if ops is None or vma is None or is_special(vma):
        why = "ops and a mapping are wanted that is neither hugetlb nor special"
    elif not vma.start <= start < end <= vma.end:
        why = "the range is empty, or leaves its mapping"
    elif min(len(src), len(dst)) < (end - 1 >> PAGE_SHIFT) - (start >> PAGE_SHIFT) + 1:
        why = f"src and dst have {len(src)} and {len(dst)} entries"
    elif not vma.mm.mmap_lock.held:
        why = "the mmap lock is not held"
    if why or vma is None:
        raise KernelError(errno.EINVAL, "migrate_vma", f"[0x{start:x}, 0x{end:x}): {why}")
    return vma


async def _call(waits: Awaitable[None] | None) -> None:
    if waits is not None:
        await waits


def _as_v25(source: Words) -> Words:
    """Today's source words in v25's: what was collected is locked, and a device's page says so."""
    out = source.copy()
    there = source & MIGRATE_PFN_VALID != 0
    out[there] |= np.uint64(MIGRATE_PFN_LOCKED)
    out[there & (frames_of(source) >= DEVICE_FRAME_MIN)] |= np.uint64(MIGRATE_PFN_DEVICE)
    return out


def _destinations(memory: PhysicalMemory, source: Words, dst: Words) -> Words:
    """The frames in `dst` for what is to move. Raises KernelError(EINVAL) for what is no locked, unused page."""
    wanted = (dst & np.uint64(MIGRATE_PFN_VALID) != 0) & (dst & np.uint64(MIGRATE_PFN_ERROR) == 0) & (source & MIGRATE_PFN_MIGRATE != 0)
    frames = frames_of(dst[wanted])
    why = ""
    if not bool((dst[wanted] & _USED == _USED).all()):
        why = "a destination is not locked (MIGRATE_PFN_LOCKED)"
    elif len(np.unique(frames)) != len(frames):
        why = "a page is the destination of two"
    elif not bool(np.isin(frames >> np.uint64(ZONE_SHIFT), list(memory.zones)).all()):
        why = "a destination lies in no memory of this machine"
    else:
        device = frames >= DEVICE_FRAME_MIN
        used = memory.field(frames, "refcount") != np.where(device, 0, 1)
        used |= memory.field(frames, "flags") & LOCKED != 0
        if bool((used | (memory.field(frames, "mapcount") != 0)).any()):
            why = "a destination is in use"
        elif bool((device != (dst[wanted] & np.uint64(MIGRATE_PFN_DEVICE) != 0)).any()):
            why = "MIGRATE_PFN_DEVICE does not say where a destination lies"
    if why:
        raise KernelError(errno.EINVAL, "migrate_vma", f"alloc_and_copy broke its promise: {why}")
    for zone, _, at in memory.groups(frames[frames >= DEVICE_FRAME_MIN]):
        zone.flags[at] = LOCKED
    out = np.zeros(len(dst), np.uint64)
    out[wanted] = frames
    return out


def unlock(memory: PhysicalMemory, frames: Words) -> None:
    """Destinations on devices that nothing moved to are unlocked, and the driver's again."""
    for zone, _, at in memory.groups(frames[frames >= DEVICE_FRAME_MIN]):
        idle = zone.refcount[at] == 0
        zone.flags[at] = np.where(idle, zone.flags[at] & ~np.uint32(LOCKED), zone.flags[at])


def lose(memory: PhysicalMemory, frames: Words) -> None:
    """The data of device `frames` are gone: whoever maps them has SIGBUS there instead, and the driver has its pages back."""
    for mapped in mappings(memory, frames) if len(frames) else ():
        poison = np.full(len(mapped.pages), pte.entry(pte.MARKER, pte.MARKER_POISON), np.uint64)
        mapped.mm.table.scatter(mapped.pages, poison)
        mapped.mm.rss -= len(mapped.pages)
        memory.unmap(frames[mapped.rows])
