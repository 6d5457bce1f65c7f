"""What the drivers of our device processes do on a v25 kernel, between the device's requests and the calls of `mirror.py`.

A device process asks as drivers of today do: a range fault with flags for each page, a migration, an eviction by frame. A v25 kernel has
other calls, so the part of such a driver that lives in the kernel has more to do:

- a range is mirrored mapping by mapping, and with one wish (read or write) for the whole of a call;
- a page in another device's private memory is reported, not brought home: the driver has a CPU touch it, and looks again;
- migrate_vma offers the pages of every device: those of others go from device to device by way of the host, the own ones stay;
- there is no eviction by frame: who maps the frames is looked up, and their ranges are migrated home.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise

import numpy as np
import trio

from hmmnet.errors import KernelError, PeerError
from hmmnet.host.homing import Homing
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import AddressSpace, DeviceLink, Select
from hmmnet.host.iommu import Domain
from hmmnet.host.landing import HostFrames
from hmmnet.host.migrate import MIGRATE, SHIFT, VALID, Copy, Grant, MigrateVma, copy_in
from hmmnet.host.mirror import ROUNDS_MAX, Request
from hmmnet.host.mm.rmap import mappings
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.vma import VM_HUGETLB, VM_WRITE
from hmmnet.host.notifier import Subscription
from hmmnet.pages import (
    HMM_PFN_ERROR,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    PAGE_SHIFT,
    ZONE_SHIFT,
    Words,
    page_by_page,
    runs_of,
)

from . import pfn
from .hmm import HmmRange
from .migrate import EVERYTHING
from .mirror import VmArea, find_vma, hmm_vma_fault, hmm_vma_get_pfns, hmm_vma_range_done
from .walk import Flags

_SHIFT = np.uint64(pfn.HMM_PFN_SHIFT)
_NOTHING = np.uint64(0)


async def range_fault(space: Space, hub: Hub, subscription: Subscription, request: Request, timeout_s: float) -> tuple[int, Words]:
    """Today's words of a range, and the sequence that they are good for; see `host.mirror.range_fault`, whose arguments and errors it has.

    A page of another device that is not to be faulted in has a frame and no VALID. A special mapping is EINVAL where nothing is to be
    faulted in, EFAULT else.
    """
    points = hub.points
    deadline = trio.current_time() + timeout_s
    while True:
        if trio.current_time() > deadline:
            why = f"pages 0x{request.start:x}+{request.pages} kept changing until the time was up"
            raise KernelError(errno.EBUSY, "hmm_vma_fault", why)
        if points.armed:
            await _at("retry.before_read_begin", hub, subscription, request)
        sequence = await hub.read_begin(subscription)
        try:
            if points.armed:
                await _at("retry.after_read_begin", hub, subscription, request)
            async with space.read_killable():
                words = await _mirror(space, request)
        except KernelError as error:
            if error.code != errno.EAGAIN and not await space.relieved(error):
                raise
            deadline = trio.current_time() + timeout_s
            continue
        if points.armed:
            await _at("retry.before_read_retry", hub, subscription, request)
        if words is not None and not hub.read_retry(subscription, sequence):
            return sequence, words


async def _at(name: str, hub: Hub, subscription: Subscription, request: Request) -> None:
    """A step boundary (`hmmnet.faults.points`)."""
    await hub.points.at(name, device=subscription.link.name, process=hub.process, start=request.start, pages=request.pages)


async def _mirror(space: Space, request: Request) -> Words | None:
    """The words of a whole request; None when a part of it changed meanwhile."""
    words = np.zeros(request.pages, np.uint64)
    page = request.start
    while page < request.end:
        vma = find_vma(space, page << PAGE_SHIFT)
        behind = [found.start for found in space.vmas(page, request.end)] if vma is None else [vma.vma.end]
        stop = min([request.end, *behind])
        for low, high, fault, write in _wishes(request, page, stop):
            part = await _piece(space, vma, request, low, high, fault=fault, write=write)
            if part is None:
                return None
            words[low - request.start : high - request.start] = part
        page = stop
    return words


def _wishes(request: Request, start: int, end: int) -> Iterator[tuple[int, int, bool, bool]]:
    """[start, end) in pieces that want the same: (first page, page behind, to be faulted in, for writing)."""
    if request.inputs is None:
        flags = np.full(end - start, request.default_flags, np.uint64)
    else:
        flags = request.inputs[start - request.start : end - request.start] & np.uint64(request.flags_mask) | np.uint64(
            request.default_flags
        )
    wish = (flags & np.uint64(HMM_PFN_REQ_FAULT) != 0).astype(np.int8)
    wish += wish & (flags & np.uint64(HMM_PFN_REQ_WRITE) != 0)
    cuts = [0, *(np.flatnonzero(np.diff(wish)) + 1).tolist(), len(wish)]
    for low, high in pairwise(cuts):
        yield start + low, start + high, bool(wish[low] > 0), bool(wish[low] > 1)


async def _piece(space: Space, vma: VmArea | None, request: Request, start: int, end: int, *, fault: bool, write: bool) -> Words | None:
    """Pages of one mapping (or of none) with one wish; None when they changed meanwhile. Raises KernelError as table A3."""
    call = "hmm_vma_fault" if fault else "hmm_vma_get_pfns"
    if vma is None:
        if fault:
            raise KernelError(errno.EFAULT, call, _why_not(space, request, start, write=write))
        return np.full(end - start, HMM_PFN_ERROR, np.uint64)
    pages, pfns = np.arange(start, end, dtype=np.uint64), np.zeros(end - start, np.uint64)
    for _ in range(ROUNDS_MAX):
        tracked = HmmRange()
        try:
            if fault:
                at = start << PAGE_SHIFT, end << PAGE_SHIFT
                await hmm_vma_fault(vma, tracked, *at, pfns, write=write, block=not request.unlocked)
            else:
                hmm_vma_get_pfns(vma, tracked, start << PAGE_SHIFT, end << PAGE_SHIFT, pfns)
        except KernelError as error:
            if error.code != errno.EPERM:
                raise
            if fault:
                raise KernelError(errno.EFAULT, call, _why_not(space, request, start, write=write)) from error
            return np.full(end - start, HMM_PFN_ERROR, np.uint64)
        if not hmm_vma_range_done(vma, tracked):
            return None
        foreign = pfns & np.uint64(pfn.HMM_PFN_DEVICE_UNADDRESSABLE) != 0
        foreign &= pfns >> np.uint64(ZONE_SHIFT + pfn.HMM_PFN_SHIFT) != np.uint64(max(request.owner, 0))
        if not (fault and foreign.any()):
            if fault:
                _check_had(space, vma, request, pages, pfns, write=write)
            return as_today(pfns, foreign)
        await space.fault_in(pages[foreign], np.full(int(np.count_nonzero(foreign)), write), request.node)
    return None


def _why_not(space: Space, request: Request, page: int, *, write: bool) -> str:
    vma = space.mm.vmas.find(page)
    if vma is not None and vma.flags & VM_HUGETLB:
        return f"page 0x{page:x} of process {space.number} is of the huge page pool (hugetlb), which v25 does not mirror"
    return space.why_not(page, write=write, start=request.start, end=request.end)


def _check_had(space: Space, vma: VmArea, request: Request, pages: Words, pfns: Words, *, write: bool) -> None:
    """Everything that was to be faulted in is there. Raises KernelError: EPERM (no right to write), EFAULT."""
    wanting = pfns & np.uint64(pfn.HMM_PFN_VALID) == 0
    if wanting.any():
        code = errno.EPERM if write and not vma.vma.flags & VM_WRITE else errno.EFAULT
        first = int(pages[np.argmax(wanting)])
        raise KernelError(code, "hmm_vma_fault", _why_not(space, request, first, write=write))


def as_today(pfns: Words, foreign: Flags) -> Words:
    """v25's words in today's; `foreign` pages, which the device cannot use, have a frame without VALID."""
    valid = pfns & np.uint64(pfn.HMM_PFN_VALID) != 0
    words = np.where(valid, pfns >> _SHIFT, _NOTHING)
    words[valid & ~foreign] |= np.uint64(HMM_PFN_VALID)
    words[valid & (pfns & np.uint64(pfn.HMM_PFN_WRITE) != 0)] |= np.uint64(HMM_PFN_WRITE)
    words[~valid & (pfns & np.uint64(pfn.HMM_PFN_ERROR | pfn.HMM_PFN_SPECIAL) != 0)] = HMM_PFN_ERROR
    return words


# --- migration ------------------------------------------------------------------------------------------------------------------------


def selected(select: Select) -> Select:
    """What a migration to a device collects: everything, and nothing as a huge page."""
    return EVERYTHING | select & ~Select.COMPOUND


def alloc_and_copy(homing: Homing, links: Mapping[int, DeviceLink], context_of: Callable[[int, int], int]) -> Copy:
    """How a driver copies to its device: what is there already stays, what is in another's private memory comes by way of the host."""

    async def copy(work: MigrateVma, domains: Sequence[Domain], start: int, grant: Grant) -> None:
        froms = []
        with ExitStack() as stack:
            for part in work.parts:
                frames = part.source >> SHIFT
                zones = frames >> np.uint64(ZONE_SHIFT)
                going = (part.source & (MIGRATE | VALID) == MIGRATE | VALID) & (grant.for_part(part, start) != 0)
                for zone in np.unique(zones[going & (frames >= np.uint64(pfn.DEVICE_FRAME_MIN))]).tolist():
                    rows = np.flatnonzero(going & (zones == np.uint64(zone)))
                    frames[rows] = await fetched(work, zone, part.pages[rows], frames[rows], stack)
                froms.append(frames)
            await copy_in(work, domains, start, grant, froms)

    async def fetched(work: MigrateVma, zone: int, pages: Words, frames: Words, stack: ExitStack) -> Words:
        """From where the data in `frames` of a device can be streamed until `stack` ends; 0: they stay where they are."""
        other = links.get(zone)
        if other is None or work.link is None or zone == work.link.zone:
            return np.zeros(len(frames), np.uint64)
        if other.kind == "coherent":
            return frames
        bounce = HostFrames(homing.memory, len(frames), work.link.node)
        stack.callback(bounce.release)
        try:
            await other.copy_out(context_of(work.space.number, zone), pages, frames, bounce)
        except PeerError:  # its device is going: what becomes of the pages is told by its loss
            return np.zeros(len(frames), np.uint64)
        return bounce.frames()

    return copy


async def evict(homing: Homing, link: DeviceLink, frames: Words, cause: str) -> int:
    """Bring `frames` of the device home, range by range of those who map them; how many pages went.

    Raises PeerLost, KernelError(ENOMEM).
    """
    moved = 0
    for mapped in list(mappings(homing.memory, page_by_page(frames))) if homing.is_there(link) else ():
        space = homing.spaces.get(mapped.mm.number)
        if space is not None:
            for start, end in runs_of(np.sort(mapped.pages)):
                moved += await _home(homing, space, link, start, end, cause)
    return moved


async def _home(homing: Homing, space: AddressSpace, link: DeviceLink, start: int, end: int, cause: str) -> int:
    """Bring what the device has of [start, end) home, mapping by mapping."""
    moved = 0
    async with space.mmap_lock.read():
        page = start
        while page < end:
            vma = space.vma_at(page)
            stop = page + 1 if vma is None else min(end, vma.end)
            if vma is not None:
                moved += await homing.home_range(space, link, page, stop, cause, [])
            page = stop
    return moved
