"""System calls that change what is mapped, or how.

Each takes byte addresses and lengths as its man page says, answers with the kernel's errno, and changes what it can before the page at
which it fails. Every change to entries is announced to the hub first, VMA by VMA as the kernel does it, with the kernel's event.
"""

from __future__ import annotations

import errno

from hmmnet.errors import KernelError
from hmmnet.host.interfaces import Event
from hmmnet.pages import ADDRESS_BITS, PAGE_SHIFT, PAGES_MAX

from . import fault
from .access import PAGE_MASK, CpuAccess
from .vma import VM_WRITE, Vma, protection_flags


class SystemCalls(CpuAccess):
    """mmap(2) and its kin, on a process's address space."""

    async def mmap(self, length: int, protection: str = "rw", address: int | None = None, flags: int = 0) -> int:
        """mmap(2) of anonymous private memory: MAP_FIXED at `address`, or where there is room. `flags` are further VM_* bits.

        Raises KernelError: EINVAL (empty, unaligned), ENOMEM (no room).
        """
        rights = protection_flags(protection)
        count = _whole_pages("mmap", length)
        if count == 0:
            raise KernelError(errno.EINVAL, "mmap", "length is 0")
        async with self.mmap_lock.write():
            if address is None:
                gap = self.mm.vmas.find_gap(count)
                if gap is None:
                    raise KernelError(errno.ENOMEM, "mmap", f"no gap of {count} pages in process {self.number}")
                start = gap
            else:
                start = _aligned("mmap", address)
                if start + count > PAGES_MAX:
                    raise KernelError(errno.ENOMEM, "mmap", f"0x{address:x} + {length} bytes leaves the address space")
                await self._unmap(start, start + count)
            self.mm.vmas.add(Vma(start, start + count, rights | flags, start))
        return start << PAGE_SHIFT

    async def munmap(self, address: int, length: int) -> None:
        """munmap(2). Holes in the range are fine. Raises KernelError(EINVAL): unaligned, empty, outside."""
        start, count = _aligned("munmap", address), _whole_pages("munmap", length)
        if count == 0 or start + count > PAGES_MAX:
            raise KernelError(errno.EINVAL, "munmap", f"0x{address:x} + {length} bytes is empty or leaves the address space")
        async with self.mmap_lock.write():
            await self._unmap(start, start + count)

    async def _unmap(self, start: int, end: int) -> None:
        for vma in self.mm.vmas.overlapping(start, end):
            low, high = max(start, vma.start), min(end, vma.end)
            async with self.hub.invalidate(Event.UNMAP, low, high):
                self._zap(low, high)
                self.mm.vmas.remove(low, high)

    def _zap(self, start: int, end: int) -> None:
        fault.zap(self.mm, self.mm.table.occupied(start, end))

    async def mprotect(self, address: int, length: int, protection: str) -> None:
        """mprotect(2). Raises KernelError: EINVAL (unaligned), ENOMEM at the first hole, what lies before it being changed already."""
        rights = protection_flags(protection)
        start, count = _aligned("mprotect", address), _whole_pages("mprotect", length)
        end = start + count
        async with self.mmap_lock.write():
            covered = self.mm.vmas.covered_until(start, end)
            for vma in self.mm.vmas.overlapping(start, covered):
                await self._protect(max(start, vma.start), min(covered, vma.end), vma.flags & ~7 | rights, vma.flags)
        if covered < end:
            raise KernelError(errno.ENOMEM, "mprotect", f"page 0x{covered:x} of process {self.number} is not mapped")

    async def _protect(self, start: int, end: int, flags: int, old: int) -> None:
        if flags == old:
            return

        def change(piece: Vma) -> Vma:
            piece.flags = flags
            return piece

        async with self.hub.invalidate(Event.PROTECTION_VMA, start, end):
            self.mm.vmas.update(start, end, change)
            fault.protect(self.mm, start, end, bool(flags & VM_WRITE))

    async def madvise(self, address: int, length: int, advice: str) -> None:
        """madvise(2). Raises KernelError: EINVAL (unaligned, unknown advice), ENOMEM (holes; what is mapped was advised)."""
        start, count = _aligned("madvise", address), _whole_pages("madvise", length)
        if advice != "DONTNEED":
            raise KernelError(errno.EINVAL, "madvise", f"unknown advice {advice!r}")
        end = start + count
        async with self.mmap_lock.read():
            for vma in self.mm.vmas.overlapping(start, end):
                low, high = max(start, vma.start), min(end, vma.end)
                async with self.hub.invalidate(Event.CLEAR, low, high):
                    self._zap(low, high)
            hole = self.mm.vmas.covered_until(start, end)
        if hole < end:
            raise KernelError(errno.ENOMEM, "madvise", f"page 0x{hole:x} of process {self.number} is not mapped")

    async def exit(self) -> None:
        """exit_mmap: mirrors are told once, for everything; then all is unmapped."""
        async with self.mmap_lock.write(), self.hub.invalidate(Event.RELEASE, 0, PAGES_MAX):
            self._zap(0, PAGES_MAX)
            self.mm.vmas.remove(0, PAGES_MAX)
            self.mm.close()


def _aligned(call: str, address: int) -> int:
    if address & PAGE_MASK or not 0 <= address < 1 << ADDRESS_BITS:
        raise KernelError(errno.EINVAL, call, f"address 0x{address:x} is not the start of a page of user memory")
    return address >> PAGE_SHIFT


def _whole_pages(call: str, length: int) -> int:
    if not 0 <= length <= 1 << ADDRESS_BITS:
        raise KernelError(errno.ENOMEM if call == "mmap" else errno.EINVAL, call, f"length {length} is larger than the address space")
    return length + PAGE_MASK >> PAGE_SHIFT
