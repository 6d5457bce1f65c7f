"""Cutting and punching files that somebody may have mapped (mm/truncate.c, shmem_fallocate): page tables change from the file's side.

Every mapping of the pages goes first, in every process, and mirrors are told (CLEAR); then the page cache drops them. A truncation takes
along the private copies that processes have made of those pages (even_cows of unmap_mapping_range), wherever they live; a hole does not.

No mmap lock is held, as in the kernel, so a process may map the file while mirrors are being told: whoever is new is told too, before
anything changes, and the change itself is one step.
"""

from __future__ import annotations

import errno
from contextlib import AsyncExitStack

from hmmnet.errors import KernelError
from hmmnet.host.interfaces import Event
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_MAX

from . import fault
from .filemap import File, ranges_of
from .huge import drop_file_pages

FILE_PAGES_MAX = PAGES_MAX
"""MAX_LFS_FILESIZE, as far as it can be mapped."""


async def truncate(file: File, length: int) -> None:
    """ftruncate(2): what lies behind byte `length` is gone; a growing file gets a hole. Cancelled, it has had no effect."""
    with file.held():
        await _truncate(file, length)


async def _truncate(file: File, length: int) -> None:
    async with file.lock.write():
        before, file.size = file.size, length
        if length < before:
            first = length + PAGE_SIZE - 1 >> PAGE_SHIFT
            try:
                await _unmap(file, first, FILE_PAGES_MAX, even_cows=True)
            except BaseException:
                file.size = before
                raise
        if length <= before:
            file.zero(length, -length % PAGE_SIZE)


async def punch(file: File, offset: int, length: int) -> None:
    """fallocate(2) with FALLOC_FL_PUNCH_HOLE: whole pages become a hole, bytes at the edges zero. Raises KernelError(EINVAL)."""
    if offset < 0 or length <= 0:
        raise KernelError(errno.EINVAL, "fallocate", f"a hole of {length} bytes at byte {offset} makes no sense")
    end = min(offset + length, FILE_PAGES_MAX << PAGE_SHIFT)
    with file.held():
        await _punch(file, offset, end)


async def _punch(file: File, offset: int, end: int) -> None:
    first, last = offset + PAGE_SIZE - 1 >> PAGE_SHIFT, end >> PAGE_SHIFT
    async with file.lock.write():
        if first > last:
            file.zero(offset, end - offset)
            return
        if first < last:
            await _unmap(file, first, last, even_cows=False)
        file.zero(offset, (first << PAGE_SHIFT) - offset)
        file.zero(last << PAGE_SHIFT, end - (last << PAGE_SHIFT))


async def _unmap(file: File, first: int, end: int, *, even_cows: bool) -> None:
    """unmap_mapping_range, and truncate_inode_pages, of pages [first, end). Where a part of a large folio goes, all of it is unmapped."""
    low_first, high_end = file.around(first, end)
    async with AsyncExitStack() as stack:
        await told_everywhere(stack, file, low_first, high_end)
        for space in file.mappers.values():
            for _, low, high in ranges_of(space.mm, file, low_first, high_end):
                drop_file_pages(space.mm, low, high)
            for _, low, high in ranges_of(space.mm, file, first, end) if even_cows else ():
                fault.zap_range(space.mm, low, high)
        file.drop(first, end)


async def told_everywhere(stack: AsyncExitStack, file: File, first: int, end: int) -> None:
    """Announce CLEAR wherever pages [first, end) are mapped until `stack` is left; whoever maps them meanwhile is told, too."""
    told: set[tuple[int, int, int]] = set()
    while fresh := _mapped(file, first, end) - told:
        for number, low, high in sorted(fresh):
            told.add((number, low, high))
            space = file.mappers.get(number)
            if space is not None:
                await stack.enter_async_context(space.hub.invalidate(Event.CLEAR, low, high))


def _mapped(file: File, first: int, end: int) -> set[tuple[int, int, int]]:
    """Where pages [first, end) are mapped: (process, first page, end)."""
    return {(space.number, low, high) for space in file.mappers.values() for _, low, high in ranges_of(space.mm, file, first, end)}
