"""Cutting and punching files that somebody may have mapped (mm/truncate.c, shmem_fallocate): page tables change from the file's side.

Every mapping of the pages goes first, in every process, and mirrors are told (CLEAR); then the page cache drops them. A truncation takes
along the private copies that processes have made of those pages (even_cows of unmap_mapping_range), wherever they live; a hole does not.

No mmap lock is held, as in the kernel, so a process may map the file while mirrors are being told: whoever is new is told too, before
anything changes, and the change itself is one step. Who goes on and on mapping it waits in the end (`told_everywhere`).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
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
    if file.memory.emptied:
        file.memory.bury_emptied()


async def told_everywhere(stack: AsyncExitStack, file: File, first: int, end: int) -> None:
    """Announce CLEAR wherever pages [first, end) are mapped until `stack` is left; whoever maps them meanwhile is told, too.

    This ends. In the kernel whoever maps a file waits for i_mmap_rwsem while unmap_mapping_range goes through its mappings; here that would
    be for as long as the slowest device takes, so it is only who comes once somebody has come meanwhile that waits, until `stack` is left.
    The second round has all who came before, and nothing is new after it: mappings that are split, shrink or go are none.
    """
    told: dict[int, list[tuple[int, int]]] = {}
    await _tell(stack, file, _mapped(file, first, end, told), told)
    if not _mapped(file, first, end, told):
        return
    await stack.enter_async_context(file.mapping.write())
    await _tell(stack, file, _mapped(file, first, end, told), told)
    assert not _mapped(file, first, end, told), "somebody has come to map a file while that is held off"


async def _tell(stack: AsyncExitStack, file: File, where: list[tuple[int, int, int]], told: dict[int, list[tuple[int, int]]]) -> None:
    for number, low, high in where:
        told.setdefault(number, []).append((low, high))
        space = file.mappers.get(number)
        if space is not None:
            await stack.enter_async_context(space.hub.invalidate(Event.CLEAR, low, high))


def _mapped(file: File, first: int, end: int, told: Mapping[int, Sequence[tuple[int, int]]]) -> list[tuple[int, int, int]]:
    """Where pages [first, end) are mapped that were not `told`: (process, first page, end), ascending."""
    return sorted(
        (number, low, high)
        for number, space in file.mappers.items()
        for _, start, stop in ranges_of(space.mm, file, first, end)
        for low, high in _left(start, stop, told.get(number, ()))
    )


def _left(low: int, high: int, told: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of [low, high) no range of `told` covers."""
    left = [(low, high)]
    for start, end in told:
        left = [part for low, high in left for part in ((low, min(high, start)), (max(low, end), high)) if part[0] < part[1]]
    return left
