"""userfaultfd for missing pages (fs/userfaultfd.c, mm/userfaultfd.c): a program fills in its own memory, or another's.

Who touches a missing page of a registered range waits, holding no lock, until somebody has put a page there (`copy`), or the
registration is closed. Whoever cannot let go of the mmap lock meanwhile cannot wait: for it the page is an error (VM_FAULT_SIGBUS; a
device sees EFAULT). With `sigbus` (UFFD_FEATURE_SIGBUS) nobody waits.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import trio

from hmmnet.errors import KernelError
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE

from . import fault, pte
from .vma import VM_UFFD_MISSING, VM_WRITE, Vma

if TYPE_CHECKING:
    from .syscalls import SystemCalls


class MissingPage(KernelError):
    """A fault has to wait for `registration` to get `page` filled in."""

    def __init__(self, number: int, page: int, registration: UserFault) -> None:
        self.page = page
        self.registration = registration
        super().__init__(errno.EFAULT, "handle_userfault", f"page 0x{page:x} of process {number} is missing and its faulter cannot wait")


class UserFault:
    """A registered range of `space`; see `hmmnet.program.UserFaults`."""

    def __init__(self, space: SystemCalls, *, sigbus: bool) -> None:
        self.sigbus = sigbus
        self._space = space
        self._pending: dict[int, None] = {}
        """Pages that are waited for and that `read` has not given out, in the order in which they were touched."""
        self._asked = trio.Event()
        self._filled = trio.Event()
        self._closed = False

    async def wait(self, page: int) -> None:
        """handle_userfault: return when it makes sense to look at `page` again."""
        if self._closed:
            await trio.lowlevel.checkpoint()  # whoever closes it takes it from the VMAs next
            return
        self._pending[page] = None
        self._asked.set()
        await self._filled.wait()

    async def read(self) -> int:
        """The address of a page that somebody waits for. Raises KernelError(EBADF) when the registration is closed."""
        self._space.memory.there()
        while not self._pending:
            if self._closed:
                raise KernelError(errno.EBADF, "read", "the userfaultfd registration is closed")
            self._asked = trio.Event()
            await self._asked.wait()
        page = next(iter(self._pending))
        del self._pending[page]
        return page << PAGE_SHIFT

    async def copy(self, address: int, data: bytes) -> None:
        """UFFDIO_COPY: whole pages appear with `data`. Somebody may be killed for memory.

        Raises KernelError: EINVAL (not whole pages), ENOENT (not registered), EEXIST, ENOMEM.
        """
        self._space.memory.there()
        await self._space.relieving(lambda: self._copy(address, data))

    async def _copy(self, address: int, data: bytes) -> None:
        if address & PAGE_SIZE - 1 or len(data) % PAGE_SIZE or not data:
            raise KernelError(errno.EINVAL, "UFFDIO_COPY", f"{len(data)} bytes at 0x{address:x} are not whole pages")
        first = address >> PAGE_SHIFT
        end = first + len(data) // PAGE_SIZE
        mm = self._space.mm
        async with self._space.mmap_lock.read():
            vma = mm.vmas.find(first)
            if self._closed or vma is None or end > vma.end or vma.userfault is not self or not vma.is_anonymous:
                raise KernelError(errno.ENOENT, "UFFDIO_COPY", f"pages [0x{first:x}, 0x{end:x}) are not registered here, or of a file")
            pages = np.arange(first, end, dtype=np.uint64)
            if mm.table.gather(pages).any():
                raise KernelError(errno.EEXIST, "UFFDIO_COPY", f"a page of [0x{first:x}, 0x{end:x}) is there already")
            bits = pte.FRESH_WRITE if vma.flags & VM_WRITE else pte.FRESH_WRITE & ~pte.WRITE
            frames = fault.make(mm, vma, pages, bits, slice(0, len(pages)))
            mm.memory.write(frames, 0, np.frombuffer(data, np.uint8))
        self._wake()

    def _wake(self) -> None:
        filled, self._filled = self._filled, trio.Event()
        filled.set()

    async def close(self) -> None:
        """UFFDIO_UNREGISTER and close(2): missing pages are what they are elsewhere. A second time does nothing."""
        self._space.memory.there()
        if self._closed:
            return
        self.abandon()
        async with self._space.mmap_lock.write():
            for vma in self._space.mm.vmas.all():
                if vma.userfault is self:
                    self._space.mm.vmas.update(vma.start, vma.end, _unregistered)
        self._wake()

    def abandon(self) -> None:
        """Its address space is gone, or it is being closed: nobody waits any more."""
        self._closed = True
        self._pending.clear()
        self._asked.set()
        self._wake()


def _unregistered(vma: Vma) -> Vma:
    return replace(vma, flags=vma.flags & ~VM_UFFD_MISSING, userfault=None)
