"""hmm_mirror: register, snapshot, fault, ask whether it still holds (mm/hmm.c of Linux 4.14, with its return codes).

A driver does, with the mmap lock held for reading::

    hmm_vma_get_pfns(vma, tracked, start, end, pfns)     # or: await hmm_vma_fault(...)
    async with my_own_lock:
        if hmm_vma_range_done(vma, tracked):
            ...                                          # program the device from pfns
        else:
            ...                                          # begin again

and drops translations when `sync_cpu_device_pagetables` says so. `start` and `end` are byte addresses, as everywhere in this room.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

import numpy as np
import trio

from hmmnet.errors import KernelError
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.userfault import MissingPage
from hmmnet.host.mm.vma import VM_HUGETLB, VM_READ, VM_SPECIAL, Vma
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, Words

from .hmm import Hmm, HmmMirror, HmmRange
from .order import hub_of
from .pfn import HMM_PFN_ERROR, HMM_PFN_SPECIAL
from .walk import look

ROUNDS_MAX = 10_000
"""Rounds of faulting after which a range whose pages are taken away each time counts as a bug."""


@dataclass(frozen=True)
class VmArea:
    """struct vm_area_struct: a VMA with the address space that it belongs to. Good for as long as the mmap lock is held."""

    mm: Space
    vma: Vma

    @property
    def start(self) -> int:
        """Its first address."""
        return self.vma.start << PAGE_SHIFT

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.vma.end << PAGE_SHIFT

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.end


def find_vma(mm: Space, address: int) -> VmArea | None:
    """The VMA that holds `address`. Hold the mmap lock."""
    assert mm.mmap_lock.held, "find_vma without the mmap lock"
    found = mm.mm.vmas.find(address >> PAGE_SHIFT)
    return None if found is None else VmArea(mm, found)


# --- mirrors --------------------------------------------------------------------------------------------------------------------------


async def hmm_mirror_register(mirror: HmmMirror | None, mm: Space | None) -> None:
    """Begin to mirror `mm`, whose mmap lock is held for writing.

    Raises KernelError: EINVAL (no mirror, no mm, no ops, no lock), EBUSY (registered already), EOPNOTSUPP (the device lacks what v25 takes
    for granted, see `Hardware`; or the machine has today's personality).
    """
    call = "hmm_mirror_register"
    if mirror is None or mm is None or mirror.ops is None:
        raise KernelError(errno.EINVAL, call, "a mirror with ops, and an address space, are wanted")
    hub, order = hub_of(mm.hub, call)
    if not mm.mmap_lock.written:
        raise KernelError(errno.EINVAL, call, f"the mmap lock of process {mm.number} is not held for writing")
    if mirror.hmm is not None:
        raise KernelError(errno.EBUSY, call, "this mirror is registered already; unregister it first")
    mirror.hardware.check()
    if hub.core.dying:
        raise KernelError(errno.EINVAL, call, f"process {mm.number} is being torn down")
    _check_outside_callback(order.calling, call)
    mirror.hmm = order.hmm
    try:
        async with order.mirrors_sem.write():
            order.hmm.mirrors.append(mirror)
    except BaseException:
        mirror.hmm = None
        raise


async def hmm_mirror_unregister(mirror: HmmMirror, mm: Space) -> None:
    """Mirror `mm` no more; when this returns no callback runs, nor will one. ``struct hmm`` lives on with the mm.

    Raises KernelError: EINVAL (not registered there), EDEADLK (called from a callback, for whose end it would wait).
    """
    call = "hmm_mirror_unregister"
    order = hub_of(mm.hub, call)[1]
    if mirror.hmm is not order.hmm:
        raise KernelError(errno.EINVAL, call, f"this mirror is not registered with process {mm.number}")
    _check_outside_callback(order.calling, call)
    async with order.mirrors_sem.write():
        order.hmm.mirrors.remove(mirror)
    mirror.hmm = None


def _check_outside_callback(calling: list[trio.lowlevel.Task], call: str) -> None:
    if trio.lowlevel.current_task() in calling:
        raise KernelError(errno.EDEADLK, call, "called from sync_cpu_device_pagetables, which it would wait for")


# --- snapshots and faults -------------------------------------------------------------------------------------------------------------


def hmm_vma_get_pfns(vma: VmArea, tracked: HmmRange, start: int, end: int, pfns: Words) -> None:
    """A snapshot of [start, end), which lies in `vma`, into `pfns`; nothing is faulted in.

    Raises KernelError: EINVAL (outside of the VMA; the mm is not mirrored; hugetlb or a special mapping, every entry being SPECIAL then),
    EPERM (no right to read; the entries are cleared), EBUSY (the range is tracked already).
    """
    hmm, first, last = _checked(vma, start, end, pfns, "hmm_vma_get_pfns")
    if is_special(vma):
        pfns[: last - first] = HMM_PFN_SPECIAL
        raise KernelError(errno.EINVAL, "hmm_vma_get_pfns", f"0x{start:x} lies in a mapping without pages of its own (hugetlb, or special)")
    _check_readable(vma, start, last - first, pfns, "hmm_vma_get_pfns")
    hmm.track(tracked, first, last, pfns)
    pfns[: last - first] = look(vma.mm.entries(np.arange(first, last, dtype=np.uint64)), write=False).words


def hmm_vma_range_done(vma: VmArea, tracked: HmmRange) -> bool:
    """Whether what the last successful call read still holds. To be called exactly once after each. Raises KernelError(EINVAL)."""
    return hub_of(vma.mm.hub, "hmm_vma_range_done")[1].hmm.done(tracked)


async def hmm_vma_fault(vma: VmArea, tracked: HmmRange, start: int, end: int, pfns: Words, *, write: bool, block: bool) -> None:
    """As `hmm_vma_get_pfns`, but what is missing is faulted in, and with `write` what is read-only is made writable.

    A page in a device's memory stays there, unless it is to be written and is mapped read-only. A page that cannot be had has an entry with
    ERROR. A special mapping is no error here: its entries are SPECIAL. Without `block`, a fault that drops the mmap lock (a userfaultfd's)
    ends the call when it has been resolved; with it, such a page is an ERROR.

    Raises KernelError: EINVAL, EPERM, EBUSY as `hmm_vma_get_pfns`; EAGAIN (the lock was dropped: look the VMA up again), ENOMEM.
    """
    call = "hmm_vma_fault"
    await trio.lowlevel.checkpoint()  # who begins again and again lets those go on for whom it waits
    hmm, first, last = _checked(vma, start, end, pfns, call)
    if not is_special(vma):
        _check_readable(vma, start, last - first, pfns, call)
    hmm.track(tracked, first, last, pfns)
    if is_special(vma):
        pfns[: last - first] = HMM_PFN_SPECIAL
        return
    try:
        await _fault(vma.mm, first, last, pfns, write=write, block=block)
    except BaseException:
        pfns[: last - first] = 0
        hmm.done(tracked)
        raise


async def _fault(mm: Space, first: int, last: int, pfns: Words, *, write: bool, block: bool) -> None:
    pages = np.arange(first, last, dtype=np.uint64)
    errors = np.zeros(len(pages), np.bool_)
    for _ in range(ROUNDS_MAX):
        found = look(mm.entries(pages), write=write)
        missing = found.missing & ~errors
        if found.moving.any():
            await mm.wait_migration(int(pages[np.argmax(found.moving)]))
        elif missing.any():
            errors[np.isin(pages, await _fault_in(mm, pages[missing], write=write, block=block))] = True
        else:
            pfns[: len(pages)] = np.where(errors & found.missing, np.uint64(HMM_PFN_ERROR), found.words)
            return
    raise AssertionError(f"pages 0x{first:x} to 0x{last:x} of process {mm.number} were taken away {ROUNDS_MAX} times")


async def _fault_in(mm: Space, pages: Words, *, write: bool, block: bool) -> Words:
    """handle_mm_fault for each of `pages`; those that cannot be had, found by halving. Raises KernelError(EAGAIN, ENOMEM)."""
    try:
        await mm.fault_in(pages, np.full(len(pages), write))
    except MissingPage as missing:
        if not block:
            await _wait_unlocked(mm, missing)
    except KernelError as error:
        if error.code not in (errno.EFAULT, errno.EPERM):
            raise
    else:
        return pages[:0]
    if len(pages) == 1:
        return pages
    half = len(pages) // 2
    parts = [await _fault_in(mm, part, write=write, block=block) for part in (pages[:half], pages[half:])]
    return np.concatenate(parts)


async def _wait_unlocked(mm: Space, missing: MissingPage) -> None:
    """VM_FAULT_RETRY: the mmap lock is dropped until the page is filled in, and taken again, for the caller to let go of."""
    mm.mmap_lock.release_read()
    try:
        await missing.registration.wait(missing.page)
    finally:
        with trio.CancelScope(shield=True):
            await mm.mmap_lock.read().__aenter__()
    raise KernelError(errno.EAGAIN, "hmm_vma_fault", f"the mmap lock was dropped for page 0x{missing.page:x}: look the mapping up again")


def is_special(vma: VmArea) -> bool:
    """Whether v25 reports a mapping as SPECIAL, whatever is in it."""
    return bool(vma.vma.flags & (VM_HUGETLB | VM_SPECIAL))


def _checked(vma: VmArea, start: int, end: int, pfns: Words, call: str) -> tuple[Hmm, int, int]:
    """The mm's `Hmm` and the pages of a range. Raises KernelError(EINVAL)."""
    hub, order = hub_of(vma.mm.hub, call)
    hmm = order.hmm
    count = end - start >> PAGE_SHIFT
    why = ""
    if not vma.mm.mmap_lock.held:
        why = "the mmap lock is not held"
    elif (start | end) & PAGE_SIZE - 1 or not vma.start <= start < end <= vma.end:
        why = "it is no range of whole pages inside the mapping"
    elif not hmm.mirrors and not hub.core.index:
        why = f"nobody mirrors process {vma.mm.number}; call hmm_mirror_register first"
    elif len(pfns) < count or pfns.dtype != np.uint64:
        why = f"the array has room for {len(pfns)} entries of {pfns.dtype}, {count} of uint64 are wanted"
    if why:
        raise KernelError(errno.EINVAL, call, f"[0x{start:x}, 0x{end:x}): {why}")
    return hmm, start >> PAGE_SHIFT, end >> PAGE_SHIFT


def _check_readable(vma: VmArea, start: int, count: int, pfns: Words, call: str) -> None:
    if not vma.vma.flags & VM_READ:
        pfns[:count] = 0
        raise KernelError(errno.EPERM, call, f"the mapping at 0x{start:x} cannot be read; every entry is cleared")
