"""Memory breaks (mm/memory-failure.c): who maps it is told and finds poison, and nobody gets such a frame again.

Either somebody says so of what a process maps (MADV_HWPOISON), or it is so, where the pages are: at the host or on a device. What a driver
is told of frames of its device is in `devmem.py`.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from contextlib import AsyncExitStack

import numpy as np
import numpy.typing as npt

from hmmnet.errors import KernelError
from hmmnet.pages import Words

from .announce import clear_wherever, split_large
from .interfaces import NO_OWNER, AddressSpace
from .mm import pte
from .mm.frames import PhysicalMemory
from .mm.rmap import mappings
from .mm.zones import ANON, COMPOUND, HWPOISON, LOCKED

ROUNDS_MAX = 64
"""How often pages may be moved by others while memory_failure() looks for them."""


async def memory_failure(memory: PhysicalMemory, spaces: Mapping[int, AddressSpace], space: AddressSpace, start: int, end: int) -> None:
    """madvise(MADV_HWPOISON): the memory under pages [start, end) breaks, for everybody who maps it (mm/memory-failure.c).

    Pages of devices come home first. An access is SIGBUS from then on, a device's is EFAULT; unmapping is all that helps. Raises
    KernelError: EFAULT, ENOMEM; EBUSY at the first page that is nobody's own (the zero page, a file's), or that belongs to a huge page that
    somebody holds on to (MF_MSG_UNSPLIT_THP), those before it being poisoned; EBUSY, none being, where others map it anew again and again,
    or move it.
    """
    for _ in range(ROUNDS_MAX):
        frames = await space.get_pages(start, end - start)
        pages = np.arange(start, end, dtype=np.uint64)[: len(frames)]
        own = memory.field(frames, "flags") & ANON != 0
        count, why = _until(~own), "is no page of anonymous memory"
        try:
            async with space.mmap_lock.read():
                held, frames = frames, frames[:0]
                space.put_pages(held)  # a folio that is held cannot be split
                await split_large(space, spaces, pages[:count], NO_OWNER, compound=False)
                if await memory.breaking.wait(held[:count]) or not _stayed(space, pages[:count], held[:count]):
                    continue
                whole = _until(memory.field(held[:count], "flags") & COMPOUND != 0)
                if whole < count:
                    count, why = whole, "is part of a huge page that somebody holds on to"
                await _break(memory, spaces, held[:count])
        finally:
            space.put_pages(frames)
        if count < end - start:
            raise KernelError(errno.EBUSY, "madvise", f"page 0x{start + count:x} of process {space.number} {why}")
        return
    why = f"pages 0x{start:x} to 0x{end - 1:x} of process {space.number} were moved by others {ROUNDS_MAX} times"
    raise KernelError(errno.EBUSY, "madvise", why)


def _stayed(space: AddressSpace, pages: Words, frames: Words) -> bool:
    """Whether `pages` are still mapped to `frames`: nobody has moved them, nor is about to (a migration entry), since they were let go."""
    entries = space.entries(pages)
    return bool(((entries & (pte.KIND | pte.SPECIAL) == pte.PRESENT) & (pte.frames_of(entries) == frames)).all())


def _until(stops: npt.NDArray[np.bool_]) -> int:
    """How many come before the first that `stops`."""
    return int(np.argmax(stops)) if stops.any() else len(stops)


async def break_memory(memory: PhysicalMemory, spaces: Mapping[int, AddressSpace], space: AddressSpace, start: int, end: int) -> int:
    """The memory under pages [start, end) breaks where it is, at the host or on a device, for everybody who maps it; how many did.

    Only anonymous pages that are there break; those that are under migration do not. Raises KernelError(EBUSY) as `memory_failure`.
    """
    pages = np.arange(start, end, dtype=np.uint64)
    async with space.mmap_lock.read():
        await split_large(space, spaces, pages, NO_OWNER, compound=False)
        frames = breakable(memory, space, start, end, LOCKED, pte.HUGE)
        await _break(memory, spaces, frames)
        return len(frames)


def breakable(memory: PhysicalMemory, space: AddressSpace, start: int, end: int, flags: int = 0, bits: int = 0) -> Words:
    """The frames of anonymous pages that are there, of pages [start, end), but those with any of `flags`, or `bits` in their entries."""
    entries = space.entries(np.arange(start, end, dtype=np.uint64))
    kinds = entries & pte.KIND
    frames = pte.frames_of(entries[((kinds == pte.PRESENT) | (kinds == pte.DEVICE)) & (entries & (pte.SPECIAL | bits) == 0)])
    return frames[memory.field(frames, "flags") & (ANON | flags) == ANON] if len(frames) else frames


async def _break(memory: PhysicalMemory, spaces: Mapping[int, AddressSpace], frames: Words) -> None:
    """`frames` get one more reference, which nobody lets go; who maps them is told, and finds poison.

    They are locked meanwhile, so that no migration takes them away: that of a device's page would not mind the reference. Whoever needs one
    waits (`Breaking`).

    Raises MappedAnew (EBUSY: the kernel fails to unmap it, MF_MSG_UNMAP_FAILED); then nothing has broken.
    """
    for zone, _, at in memory.groups(frames):
        zone.refcount[at] += 1
        zone.flags[at] |= np.uint32(LOCKED)
    async with AsyncExitStack() as stack:
        stack.enter_context(memory.breaking.hold(frames))
        try:
            await clear_wherever(stack, spaces, lambda: [(mapped.mm, mapped.pages) for mapped in mappings(memory, frames)])
        except BaseException:  # cancelled, too
            for zone, _, at in memory.groups(frames):
                zone.flags[at] &= ~np.uint32(LOCKED)
            memory.put(frames)
            raise
        poison(memory, frames)


def poison(memory: PhysicalMemory, frames: Words) -> None:
    """Whoever maps `frames` has poisoned entries instead; they are not locked any more.

    Their last reference, the caller's, stays: nobody gets such a frame again.
    """
    for mapped in mappings(memory, frames):
        mapped.mm.table.scatter(mapped.pages, np.full(len(mapped.pages), pte.entry(pte.MARKER, pte.MARKER_POISON), np.uint64))
        mapped.mm.rss -= len(mapped.pages)
        memory.unmap(frames[mapped.rows])
    memory.uncharge(frames)
    for zone, _, at in memory.groups(frames):
        zone.flags[at] = zone.flags[at] & ~np.uint32(LOCKED) | np.uint32(HWPOISON)
    memory.poisoned += len(frames)
