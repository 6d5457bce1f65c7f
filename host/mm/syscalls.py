"""System calls that change what is mapped, or how (mm/mmap.c, mm/mprotect.c, mm/mremap.c, mm/mlock.c).

Each takes byte addresses and lengths as its man page says, answers with the kernel's errno, and changes what it can before the page at
which it fails. Every change to entries is announced to the hub first, VMA by VMA as the kernel does it, with the kernel's event.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import numpy as np

from hmmnet.errors import KernelError, OutOfMemory
from hmmnet.host.interfaces import Event
from hmmnet.pages import ADDRESS_BITS, HUGE_PAGES, PAGE_SHIFT, PAGES_MAX

from . import fault, pte, views
from .access import PAGE_MASK
from .exclusive import ExclusiveAccess
from .filemap import File, file_offsets, map_file
from .huge import HUGE_MASK, block_of
from .userfault import UserFault
from .vma import (
    VM_ACCESS,
    VM_DAX,
    VM_HUGETLB,
    VM_LOCKED,
    VM_MIXEDMAP,
    VM_PFNMAP,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_SPECIAL,
    VM_UFFD_MISSING,
    VM_WRITE,
    Vma,
    protection_flags,
)


class SystemCalls(ExclusiveAccess):
    """mmap(2) and its kin, on a process's address space."""

    # --- mmap, munmap -------------------------------------------------------------------------------------------------------------

    async def mmap(
        self,
        length: int,
        protection: str = "rw",
        address: int | None = None,
        flags: int = 0,
        *,
        shared: bool = False,
        file: File | None = None,
        offset: int = 0,
    ) -> int:
        """mmap(2): MAP_FIXED at `address`, or where there is room; of `file` from byte `offset` on, or anonymous; private or `shared`.

        `flags` are further VM_* bits. Raises KernelError: EINVAL (empty, unaligned), ENOMEM (no room).
        """
        rights = protection_flags(protection)
        count = whole_pages("mmap", length)
        if count == 0:
            raise KernelError(errno.EINVAL, "mmap", f"the length is 0 (asked for by process {self.number})")
        if offset & PAGE_MASK or not 0 <= offset <= PAGES_MAX << PAGE_SHIFT:
            raise KernelError(errno.EINVAL, "mmap", f"offset {offset} is not the start of a page of a file")
        if shared and file is None:
            file = File(self.memory, count << PAGE_SHIFT)  # shmem_zero_setup
        with contextlib.nullcontext() if file is None else file.held():
            return await self._map(count, rights, address, flags, shared=shared, file=file, offset=offset)

    async def _map(self, count: int, rights: int, address: int | None, flags: int, *, shared: bool, file: File | None, offset: int) -> int:
        """mmap of `count` pages, once its arguments make sense."""
        async with self.mmap_lock.write():
            if address is None:
                start = self._gap(count, "mmap")
            else:
                start = aligned("mmap", address)
                if start + count > PAGES_MAX:
                    raise KernelError(errno.ENOMEM, "mmap", f"0x{address:x} + {count} pages leaves the address space")
                await self._unmap(start, start + count)
            rights |= flags | VM_SOFTDIRTY | (VM_SHARED if shared else 0)
            await self._add(Vma(start, start + count, rights, start if file is None else offset >> PAGE_SHIFT, file=file))
        return start << PAGE_SHIFT

    async def _add(self, vma: Vma) -> None:
        """vma_link: one more VMA, when who changes its file from the other side lets it (`truncate.told_everywhere`)."""
        if vma.file is None:
            self.mm.vmas.add(vma)
            return
        async with vma.file.mapping.read():
            vma.file.mapped_by(self)
            self.mm.vmas.add(vma)

    async def mmap_hugetlb(self, length: int, protection: str, address: int | None, *, shared: bool = False) -> int:
        """mmap(2) with MAP_HUGETLB: anonymous memory of huge pages, private or `shared`, reserved as far as the host has memory now.

        Raises KernelError as `mmap`: EINVAL for an address that is not a huge page's, ENOMEM.
        """
        if address is not None and address & (HUGE_PAGES << PAGE_SHIFT) - 1:
            raise KernelError(errno.EINVAL, "mmap", f"0x{address:x} is not the start of a huge page")
        if length >> PAGE_SHIFT > sum(node.allocator.free_count for node in self.memory.nodes):
            why = f"process {self.number} wants {length >> 20} MiB of huge pages, more than the host has left"
            raise KernelError(errno.ENOMEM, "mmap", why)
        if not shared:
            return await self.mmap(length, protection, address, VM_HUGETLB)
        file = File(self.memory, length, pool=True)  # hugetlb_file_setup
        with file.held():
            return await self.mmap(length, protection, address, VM_HUGETLB, shared=True, file=file)

    async def mmap_inserted(self, length: int, protection: str, address: int | None, *, shared: bool) -> int:
        """mmap(2) of a device file whose driver makes the pages and inserts them all at once (vm_insert_page; VM_MIXEDMAP).

        Such a mapping does not fault: what is dropped from it is SIGBUS. Its pages are the driver's (GFP_KERNEL, as in dmirror_fops_mmap):
        somebody may be killed for them, and they are charged to nobody. Raises KernelError as `mmap`.
        """
        return await self.relieving(partial(self._map_inserted, length, protection, address, shared=shared))

    async def _map_inserted(self, length: int, protection: str, address: int | None, *, shared: bool) -> int:
        file = File(self.memory, whole_pages("mmap", length) << PAGE_SHIFT)
        with file.held():
            mapped = await self.mmap(length, protection, address, VM_MIXEDMAP, shared=shared, file=file)
            try:
                vma = self.mm.vmas.find(mapped >> PAGE_SHIFT)
                if vma is not None and vma.file is file:
                    self._insert(vma, file)
            except KernelError:
                file.size = 0
                await self.munmap(mapped, length)
                raise
            file.size = 0
            return mapped

    def _insert(self, vma: Vma, file: File) -> None:
        """vm_insert_page for every page of `vma`. Raises KernelError(ENOMEM).

        More than the host has at all is refused before anybody is killed for it; the kernel finds out when everybody is dead.
        """
        wanted = vma.end - vma.start
        if wanted > sum(node.count for node in self.memory.nodes):
            raise KernelError(errno.ENOMEM, "mmap", f"the driver wants {wanted} pages, more than all memory of the host")
        if self.memory.lacks(wanted):
            raise OutOfMemory(errno.ENOMEM, "mmap", f"the driver wants {wanted} pages and the host's memory is used up", wanted)
        pages = np.arange(vma.start, vma.end, dtype=np.uint64)
        pages = pages[self.mm.table.gather(pages) == 0]
        map_file(self.mm, vma, pages, file.filled(file_offsets(vma, pages), self.mm.node, None), write=False)

    def _gap(self, count: int, call: str) -> int:
        gap = self.mm.vmas.find_gap(count)
        if gap is None:
            raise KernelError(errno.ENOMEM, call, f"no gap of {count} pages in process {self.number}")
        return gap

    async def munmap(self, address: int, length: int) -> None:
        """munmap(2). Holes in the range are fine. Raises KernelError(EINVAL): unaligned, empty, outside."""
        start, count = aligned("munmap", address), whole_pages("munmap", length)
        if count == 0 or start + count > PAGES_MAX:
            raise KernelError(errno.EINVAL, "munmap", f"0x{address:x} + {length} bytes is empty or leaves the address space")
        async with self.mmap_lock.write():
            await self._unmap(start, start + count)

    async def _unmap(self, start: int, end: int) -> None:
        for vma in self.mm.vmas.overlapping(start, end):
            low, high = max(start, vma.start), min(end, vma.end)
            await self.split_edges(low, high)
            async with self.hub.invalidate(Event.UNMAP, low, high):
                self._zap(low, high)
                for piece in self.mm.vmas.remove(low, high):
                    self._forget_file(piece)
        if self.mm.small_blocks:  # free_pgtables
            gone = {block for block in self.mm.small_blocks if start - HUGE_PAGES < block < end}
            self.mm.small_blocks -= {block for block in gone if not self.mm.vmas.overlapping(block, block + HUGE_PAGES)}
        if self.memory.emptied:
            self.memory.bury_emptied()

    def _forget_file(self, vma: Vma) -> None:
        """`vma` was unmapped: its file forgets this address space unless it is mapped elsewhere in it."""
        if vma.file is not None and all(other.file is not vma.file for other in self.mm.vmas.all()):
            vma.file.unmapped_by(self.number)

    def _zap(self, start: int, end: int, *, guards: bool = True) -> None:
        """Drop the entries of [start, end), which lies in one VMA: so no frame is there twice. `guards`: those, too."""
        fault.zap_range(self.mm, start, end, guards=guards)

    async def reap(self) -> None:
        """oom_reap_task_mm: drop the private memory of a process that is being killed, before it gets round to exit itself.

        Nothing may be faulted in any more from here on. The reaper must not wait for devices: what one mirrors is left for `exit`.
        """
        self.mm.unstable = True
        async with self.mmap_lock.read():
            for vma in self.mm.vmas.all():
                if vma.flags & (VM_HUGETLB | VM_PFNMAP) or vma.flags & VM_SHARED:
                    continue
                if self.hub.try_invalidate(vma.start, vma.end):
                    self._zap(vma.start, vma.end)
                    self.hub.range_end()

    async def clear_soft_dirty(self) -> None:
        """/proc/PID/clear_refs with 4: no page counts as written from now on; mirrors are told once, for everything."""
        async with self.mmap_lock.write():
            self.mm.vmas.update(0, PAGES_MAX, lambda piece: replace(piece, flags=piece.flags & ~VM_SOFTDIRTY))
            async with self.hub.invalidate(Event.SOFT_DIRTY, 0, PAGES_MAX):
                views.clear_soft_dirty(self.mm, 0, PAGES_MAX)

    async def clear_referenced(self) -> None:
        """/proc/PID/clear_refs with 1: no page counts as accessed from now on. Mirrors need not know."""
        async with self.mmap_lock.read():
            fault.age(self.mm, 0, PAGES_MAX, pte.YOUNG)

    async def exit(self) -> None:
        """exit_mmap: mirrors are told once, for everything; then all is unmapped."""
        async with self.mmap_lock.write(), self.hub.invalidate(Event.RELEASE, 0, PAGES_MAX):
            gone = self.mm.vmas.remove(0, PAGES_MAX)
            for vma in gone:
                if vma.userfault is not None:
                    vma.userfault.abandon()
                self._zap(vma.start, vma.end)  # one by one: a file that is mapped twice has a frame in both
            for vma in gone:
                self._forget_file(vma)
            self.mm.close()
        if self.memory.emptied:
            self.memory.bury_emptied()

    # --- mprotect, mlock ----------------------------------------------------------------------------------------------------------

    async def mprotect(self, address: int, length: int, protection: str) -> None:
        """mprotect(2). Raises KernelError: EINVAL (unaligned), ENOMEM at the first hole, what lies before it being changed already."""
        rights = protection_flags(protection, "mprotect")
        start, count = aligned("mprotect", address), whole_pages("mprotect", length)
        end = start + count
        late: list[tuple[int, int]] = []
        async with self.mmap_lock.write():
            covered = self.mm.vmas.covered_until(start, end)
            for vma in self.mm.vmas.overlapping(start, covered):
                low, high = max(start, vma.start), min(covered, vma.end)
                if await self._protect(low, high, vma.flags & ~VM_ACCESS | rights, vma.flags):
                    late.append((low, high))
        for low, high in late:
            await self._copy_locked(low, high)
        if covered < end:
            raise KernelError(errno.ENOMEM, "mprotect", f"page 0x{covered:x} of process {self.number} is not mapped")

    async def _protect(self, start: int, end: int, flags: int, old: int) -> bool:
        """mprotect_fixup; whether pages are to be copied for which there is no memory yet."""
        if flags == old:
            return False
        await self.split_edges(start, end)
        async with self.hub.invalidate(Event.PROTECTION_VMA, start, end):
            self.mm.vmas.update(start, end, lambda piece: replace(piece, flags=flags))
            fault.protect(self.mm, start, end, bool(flags & VM_WRITE), bool(flags & VM_SHARED))
        if flags & VM_WRITE and old & (VM_WRITE | VM_SHARED | VM_LOCKED) == VM_LOCKED:
            try:  # copies now what a store would copy later; that it cannot is nobody's error here
                await self.populate_locked(start, end)
            except OutOfMemory:
                return True
            except KernelError:
                return False
        return False

    async def _copy_locked(self, start: int, end: int) -> None:
        """The copies of locked pages for which somebody has to be killed first, which takes a while without the lock."""

        async def again() -> None:
            async with self.mmap_lock.read():
                await self.populate_locked(start, end)

        with contextlib.suppress(KernelError):
            await self.relieving(again)

    async def mlock(self, address: int, length: int) -> None:
        """mlock(2): pages are made, and those on a device come home; a userfaultfd's owner is waited for.

        Raises KernelError: ENOMEM (a hole, memory without access, an access that ends in a signal), EAGAIN (memory is used up).
        """
        await self._lock_range(address, length, VM_LOCKED)

    async def munlock(self, address: int, length: int) -> None:
        """munlock(2). Raises KernelError(ENOMEM) at a hole."""
        await self._lock_range(address, length, 0)

    async def _lock_range(self, address: int, length: int, flag: int) -> None:
        call = "mlock" if flag else "munlock"
        start = address >> PAGE_SHIFT
        end = start + whole_pages(call, length + (address & PAGE_MASK))
        async with self.mmap_lock.write():
            covered = self.mm.vmas.covered_until(start, end)
            if covered > start:
                await self.split_edges(start, covered)
                self.mm.vmas.update(start, covered, lambda piece: replace(piece, flags=piece.flags & ~VM_LOCKED | _lockable(piece, flag)))
        if covered < end:
            raise KernelError(errno.ENOMEM, call, f"page 0x{covered:x} of process {self.number} is not mapped")
        if flag:
            try:
                await self.populate(start, end)
            except KernelError as error:  # __mlock_posix_error_return
                raise KernelError(errno.EAGAIN if error.code == errno.ENOMEM else errno.ENOMEM, call, error.why) from error

    # --- userfaultfd --------------------------------------------------------------------------------------------------------------

    async def userfaultfd(self, address: int, length: int, *, sigbus: bool = False) -> UserFault:
        """UFFDIO_REGISTER of missing pages: who touches one waits until the registration's owner has filled it in.

        With `sigbus` (UFFD_FEATURE_SIGBUS) it is SIGBUS for a CPU and EFAULT for a device. What is there already is used as ever; a
        migration does not make pages there (h56). Raises KernelError: EINVAL (unaligned, empty, nothing mapped, a device's mapping; without
        `sigbus` a file's, too), EBUSY (registered by somebody else).
        """
        start, count = aligned("userfaultfd", address), whole_pages("userfaultfd", length)
        end = start + count
        if count == 0 or length & PAGE_MASK or end > PAGES_MAX:
            raise KernelError(errno.EINVAL, "userfaultfd", f"0x{address:x} + {length} bytes is no range of whole pages")
        made = UserFault(self, sigbus=sigbus)

        def register(piece: Vma) -> Vma:
            return replace(piece, flags=piece.flags | VM_UFFD_MISSING, userfault=made)

        async with self.mmap_lock.write():
            found = self.mm.vmas.overlapping(start, end)
            if not found or any(vma.flags & VM_SPECIAL or not (sigbus or vma.is_anonymous) for vma in found):
                why = "nothing is mapped there, or a device, or a file whose pages cannot be filled in here"
                raise KernelError(errno.EINVAL, "userfaultfd", f"0x{address:x} + {length} bytes: {why}")
            if any(vma.userfault is not None for vma in found):
                raise KernelError(errno.EBUSY, "userfaultfd", f"a part of 0x{address:x} + {length} bytes is registered by somebody else")
            for vma in found:
                low, high = max(start, vma.start), min(end, vma.end)
                await self.split_edges(low, high)
                self.mm.vmas.update(low, high, register)
        return made

    # --- mremap -------------------------------------------------------------------------------------------------------------------

    async def mremap(
        self,
        address: int,
        old_length: int,
        new_length: int,
        new_address: int | None = None,
        *,
        may_move: bool = True,
        dontunmap: bool = False,
    ) -> int:
        """mremap(2): shrink, grow in place, or move (to `new_address`: MREMAP_FIXED); the new address.

        Device-private pages move with their data: entries change place, nothing is copied (h42). Raises KernelError: EFAULT (the old
        range is not in one VMA), EINVAL (unaligned, empty, overlapping), ENOMEM (no room, or it may not move).
        """
        start, old, new = aligned("mremap", address), whole_pages("mremap", old_length), whole_pages("mremap", new_length)
        if new == 0 or (dontunmap and (old != new or not may_move)) or (new_address is not None and not may_move):
            why = f"{old} to {new} pages from page 0x{start:x} of process {self.number} on with these flags makes no sense"
            raise KernelError(errno.EINVAL, "mremap", why)
        async with self.mmap_lock.write():
            vma = self.mm.vmas.find(start)
            if vma is None:
                raise self._bad_remap(start)
            if vma.flags & VM_HUGETLB:
                old, new = self._huge_remap(start, old, new, new_address)
            target = await self._remap(start, old, new, new_address, may_move=may_move, dontunmap=dontunmap)
        if vma.flags & VM_LOCKED and new > old:
            with contextlib.suppress(KernelError):  # mm_populate: what cannot be had now is had later, or never
                await self.populate(target + old, target + new)
        return target << PAGE_SHIFT

    def _huge_remap(self, start: int, old: int, new: int, new_address: int | None) -> tuple[int, int]:
        """What mremap of hugetlb memory asks for in whole huge pages. Raises KernelError(EINVAL) for addresses inside one, and to grow."""
        old, new = (-(-count // HUGE_PAGES) * HUGE_PAGES for count in (old, new))
        if start & HUGE_MASK or (new_address or 0) >> PAGE_SHIFT & HUGE_MASK or new > old:
            raise KernelError(errno.EINVAL, "mremap", f"huge pages (hugetlb) move whole and do not grow, here from page 0x{start:x}")
        return old, new

    async def _remap(self, start: int, old: int, new: int, new_address: int | None, *, may_move: bool, dontunmap: bool) -> int:
        """mremap under the mmap lock; the page where the range is then."""
        if new_address is not None or dontunmap:
            target = await self._fixed_target(start, old, new, new_address)
            old = await self._shrink(start, old, new)
            self._resizable(start, old, new, dontunmap=dontunmap)
        else:
            if await self._shrink(start, old, new) == new:
                return start
            vma = self._resizable(start, old, new)
            if await self._grow(vma, start, old, new):
                return start
            if not may_move:
                raise KernelError(errno.ENOMEM, "mremap", f"no room behind page 0x{start + old:x} of process {self.number}")
            target = self._gap(new, "mremap")
        await self._move(start, old, target, new, dontunmap=dontunmap)
        return target

    def _bad_remap(self, page: int) -> KernelError:
        return KernelError(errno.EFAULT, "mremap", f"the old range at page 0x{page:x} of process {self.number} is not in one mapping")

    async def _fixed_target(self, start: int, old: int, new: int, new_address: int | None) -> int:
        """Where a moved range goes; what is there is unmapped."""
        if new_address is None:
            return self._gap(new, "mremap")
        target = aligned("mremap", new_address)
        if target + new > PAGES_MAX or (start + old > target and target + new > start):
            raise KernelError(errno.EINVAL, "mremap", f"the new range at page 0x{target:x} overlaps the old one or is outside")
        await self._unmap(target, target + new)
        return target

    async def _shrink(self, start: int, old: int, new: int) -> int:
        if old > new:
            await self._unmap(start + new, start + old)
        return min(old, new)

    def _resizable(self, start: int, old: int, new: int, *, dontunmap: bool = False) -> Vma:
        """vma_to_resize: the VMA that holds the whole old range and may change its size."""
        vma = self.mm.vmas.find(start)
        if vma is None:
            raise self._bad_remap(start)
        if old == 0 and not vma.flags & VM_SHARED:
            why = f"an old length of 0 is for shared mappings; page 0x{start:x} of process {self.number} is in a private one"
            raise KernelError(errno.EINVAL, "mremap", why)
        if dontunmap and vma.flags & VM_PFNMAP:
            raise KernelError(
                errno.EINVAL, "mremap", f"the mapping at page 0x{start:x} of process {self.number} cannot be left behind empty"
            )
        if start + old > vma.end or (new > old and vma.flags & VM_PFNMAP):
            raise self._bad_remap(start)
        return vma

    async def _grow(self, vma: Vma, start: int, old: int, new: int) -> bool:
        """Extend `vma` in place when the old range ends it and there is room behind."""
        end = start + new
        if start + old != vma.end or end > PAGES_MAX - 1 or self.mm.vmas.overlapping(vma.end, end):
            return False
        if vma.flags & VM_SPECIAL:  # vma_merge_extend: such a VMA merges with nothing
            raise KernelError(errno.ENOMEM, "mremap", f"the mapping at page 0x{start:x} of process {self.number} cannot grow in place")
        await self._add(replace(vma, start=vma.end, end=end, pgoff=vma.pgoff + vma.end - vma.start))
        return True

    async def _move(self, start: int, old: int, target: int, new: int, *, dontunmap: bool) -> None:
        """move_vma: a VMA like the old at `target`, entries moved there, the old one unmapped (or emptied)."""
        for page in self._migrating(start, start + old):
            await self.wait_migration(page)
        vma = self.mm.vmas.find(start)
        assert vma is not None, "the range to move lies in a VMA"
        pgoff = vma.pgoff + start - vma.start if vma.anon or vma.file is not None else target
        flags = vma.flags & ~VM_UFFD_MISSING | VM_SOFTDIRTY  # and no `userfault`: mremap_userfaultfd_prep, without UFFD_FEATURE_EVENT_REMAP
        await self._add(Vma(target, target + new, flags, pgoff, vma.anon, vma.chain, vma.file))
        await self.split_edges(start, start + old)
        if (start ^ target) & HUGE_MASK:
            await self.split_blocks(range(block_of(start), start + old, HUGE_PAGES))
        async with self.at_rest(Event.UNMAP, start, start + old):
            fault.move_entries(self.mm, start, target, old)
        if not dontunmap:
            self.mm.vmas.remove(start, start + old)
        else:
            whole = vma.start == start and vma.end == start + old
            self.mm.vmas.update(vma.start, vma.end, lambda piece: self._emptied(piece, whole=whole))

    @staticmethod
    def _emptied(vma: Vma, *, whole: bool) -> Vma:
        """What MREMAP_DONTUNMAP leaves of a VMA: unlocked, all of it, and, when the `whole` of it was emptied, as never touched."""
        flags = vma.flags & ~VM_LOCKED
        return replace(vma, flags=flags, anon=0, chain=()) if whole else replace(vma, flags=flags)

    @asynccontextmanager
    async def at_rest(self, event: Event, start: int, end: int) -> AsyncIterator[None]:
        """An invalidation of [start, end) in which no page of it is under migration.

        Who migrates pages that we share, or evicts by frame, does not need our mmap lock: such a migration may begin while mirrors are
        told. It is waited for outside the invalidation, as everywhere, and they are told once more.
        """
        while True:
            for page in self._migrating(start, end):
                await self.wait_migration(page)
            async with self.hub.invalidate(event, start, end):
                if not self._migrating(start, end):
                    yield
                    return

    def _migrating(self, start: int, end: int) -> list[int]:
        """The pages of [start, end) that are under migration now; the first of those that are so together."""
        return [
            first + offset * pages
            for first, part, pages in self.mm.table.parts(start, end)
            for offset in np.flatnonzero(pte.kinds_of(part) == pte.MIGRATION).tolist()
        ]


def _lockable(vma: Vma, flag: int) -> int:
    """mlock_fixup: what mlock sets in the flags of `vma`; nothing for memory that cannot go away."""
    return 0 if vma.flags & (VM_SPECIAL | VM_HUGETLB | VM_DAX) else flag


def aligned(call: str, address: int) -> int:
    """The page that begins at `address`. Raises KernelError(EINVAL)."""
    if address & PAGE_MASK or not 0 <= address < 1 << ADDRESS_BITS:
        raise KernelError(errno.EINVAL, call, f"address 0x{address:x} is not the start of a page of user memory")
    return address >> PAGE_SHIFT


def whole_pages(call: str, length: int) -> int:
    """`length` bytes in pages, rounded up. Raises KernelError when it is negative, or more than the address space."""
    if length < 0:
        raise KernelError(errno.EINVAL, call, f"length {length} is negative")
    if length > 1 << ADDRESS_BITS:
        raise KernelError(errno.ENOMEM if call == "mmap" else errno.EINVAL, call, f"length {length} is larger than the address space")
    return length + PAGE_MASK >> PAGE_SHIFT
