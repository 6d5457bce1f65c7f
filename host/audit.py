"""What must hold of a whole machine, asked of a running host: the invariants of the books, and of what devices believe.

`mm/invariants.py` looks at the host's own tables (I2 to I5, I8). Here the rest of what the host can see: that no device may reach a page
with a right that the page table does not give (I1), as far as its IOMMU domain goes, and, where the device's own mirror can be seen (in a
simulated machine), there too; and that nothing has leaked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from hmmnet.pages import Words

from .device import Context, Device
from .mm import pte
from .mm.frames import PhysicalMemory
from .mm.invariants import check
from .mm.space import Space

Mask = npt.NDArray[np.bool_]


def books(memory: PhysicalMemory, spaces: Iterable[Space], *, quiet: bool) -> list[str]:
    """What is wrong with tables and frames. `quiet`: nothing is under way, so nothing may be in transit; without processes nothing is used.

    Silent while somebody changes a layout: in the middle of a fork or an exit pages are counted that nobody has, or the other way round.
    """
    spaces = list(spaces)
    if any(space.mmap_lock.written for space in spaces):
        return []
    mms = [space.mm for space in spaces]
    try:
        check(memory, mms, quiet=quiet)
    except AssertionError as wrong:
        return [str(wrong)]
    if mms or not quiet:
        return []
    used = {
        zone.owner: int(np.count_nonzero(zone.referenced(zone.used.stop)[1 if zone.number == 0 else 0 :]))
        for zone in memory.zones.values()
        if not zone.lost
    }
    return [f"{owner}: {frames} frames are left over" for owner, frames in used.items() if frames]


def domains(devices: Mapping[str, Device]) -> list[str]:
    """I1 of every translation that a living device's IOMMU domain holds."""
    found: list[str] = []
    for device in devices.values():
        for context in [] if device.life is None else device.life.contexts.values():
            pages, frames, writable = context.domain.translations()
            found += believed(context, f"the IOMMU of {device.spec.name}", pages, frames, writable)
    return found


def believed(context: Context, who: str, pages: Words, frames: Words, writable: Mask) -> list[str]:
    """I1: the first of the translations that somebody holds of a process which the page table has not, with that right; mostly none."""
    bad = stale(context, pages, frames, writable)
    return [described(context, who, int(pages[i]), int(frames[i]), may_write=bool(writable[i])) for i in np.flatnonzero(bad)[:1].tolist()]


def stale(context: Context, pages: Words, frames: Words, writable: Mask) -> Mask:
    """Which of those translations the page table does not have, with that right.

    None while an invalidation of that process is open, and none of pages that are in transit: then the device is being told.
    """
    if context.hub.core.active or len(pages) == 0:
        return np.zeros(len(pages), np.bool_)
    entries = context.space.entries(pages)
    kinds = pte.kinds_of(entries)
    present = (kinds == pte.PRESENT) | (kinds == pte.DEVICE) | (kinds == pte.EXCLUSIVE)
    rights = (entries & np.uint64(pte.WRITE) != 0) | (kinds == pte.EXCLUSIVE)
    good: Mask = (kinds == pte.MIGRATION) | (present & (pte.frames_of(entries) == frames) & (rights | ~writable))
    return ~good


def described(context: Context, who: str, page: int, frame: int, *, may_write: bool) -> str:
    """A translation that is stale, in words."""
    entry = int(context.space.entries(np.array([page], np.uint64))[0])
    where = f"page 0x{page:x} of process {context.space.number} as frame 0x{frame:x}"
    table = f"0x{entry:x}" if entry else "nothing"
    return f"{who} {'may write' if may_write else 'may read'} {where}, the page table has {table} there (I1)"
