"""Explicit migration: what a program moves with `Process.migrate`, to a device or home, in pieces of which a few are under way at once."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from hmmnet.errors import HmmnetError, KernelError
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE

from .device import Context
from .handles import command_device
from .homing import Homing
from .link import SessionLink
from .mm.space import Space

PREFETCH_PAGES = 1 << 16
"""Pages of one piece of an explicit migration (256 MiB). Long, because one stream is faster than two side by side; the bookkeeping of what
follows hides behind it."""
PIECES_AT_ONCE = 2


async def migrate(space: Space, homing: Homing, start: int, end: int, to: Context | Sequence[SessionLink]) -> int:
    """Move pages [start, end) to the device with context `to`, or home from the devices behind those links; how many bytes have moved.

    Raises KernelError: EINVAL (see `_migratable_until`), ENOMEM; PeerLost.
    """
    stop, why = _migratable_until(space, start, end)
    if isinstance(to, Context):
        moved = await _in_pieces(space, start, stop, partial(_piece_out, to))
    else:
        moved = sum([await _in_pieces(space, start, stop, partial(_piece_home, space, homing, link)) for link in to])
    if stop < end:
        before = f"{moved} bytes before it have moved" if moved else "nothing has moved"
        raise KernelError(errno.EINVAL, "migrate", f"address 0x{stop << PAGE_SHIFT:x} of process {space.number} {why}; {before}")
    return moved


def _migratable_until(space: Space, start: int, end: int) -> tuple[int, str]:
    """The first page of [start, end) that migrate_vma_setup refuses (`end`: none), and why: drivers go on mapping by mapping up to it.

    What lies before it moves all the same, as on a real kernel (h04, h75).
    """
    page = start
    while page < end:
        stop = min(end, max(space.vma_end(page), page + 1))
        if why := space.unmigratable(page, stop):
            return page, why
        page = stop
    return end, ""


async def _piece_out(context: Context, start: int, end: int) -> int:
    return (await command_device(context, "migrate_to_dev", start << PAGE_SHIFT, end - start, b"", 0, 0)).cpages


async def _piece_home(space: Space, homing: Homing, link: SessionLink, start: int, end: int) -> int:
    if not space.leads_to(link.zone, start, end):
        return 0  # a migration would tell all mirrors of the range, and move nothing
    return (await homing.migrate_to_system(space, link, start, end)).moved


async def _in_pieces(space: Space, start: int, end: int, move: Callable[[int, int], Awaitable[int]]) -> int:
    """Move what is mapped in [start, end), a few pieces at a time: while one streams, the next is collected. Returns bytes moved."""
    all_pieces = [
        (low, min(low + PREFETCH_PAGES, end, vma.end))
        for vma in space.vmas(start, end)
        for low in range(max(start, vma.start), min(end, vma.end), PREFETCH_PAGES)
    ]
    if len(all_pieces) == 1:
        return await move(*all_pieces[0]) * PAGE_SIZE
    pieces = iter(all_pieces)
    moved = 0
    failures: list[HmmnetError] = []

    async def work() -> None:
        nonlocal moved
        try:
            for low, high in pieces:
                if failures:
                    return
                count = await move(low, high)
                moved += count
        except HmmnetError as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(PIECES_AT_ONCE):
            nursery.start_soon(work)
    if failures:
        raise failures[0]
    return moved * PAGE_SIZE
