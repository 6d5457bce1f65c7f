"""Who has to be told before pages move: the mirrors of every process that maps them.

Most pages have one mapping, and the MIGRATE of the process whose range it is tells everybody. After fork pages are shared; then CLEAR is
announced too, page by page, wherever they may be mapped (try_to_migrate walks the reverse map the same way), the process itself included.
All announcements stand until the pages are collected, so nobody mirrors one anew in between. A page that came to be shared, or came here,
while they were made (a further fork, a migration that ended) was not announced everywhere: `collect` is given what was (`Told`), and leaves
such a page where it is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from hmmnet.pages import Words, announced_runs, distinct

from .interfaces import NO_OWNER, AddressSpace, Event, Select, Told

if TYPE_CHECKING:
    from .mm.mm import Mm


@asynccontextmanager
async def announced(
    space: AddressSpace, spaces: Mapping[int, AddressSpace], start: int, end: int, pages: Words, select: Select, owner: int
) -> AsyncIterator[Told]:
    """While the block runs, nobody mirrors those pages of [start, end), in one VMA, that `collect` with the same arguments may take.

    `pages` (ascending) are those of them that may be shared.

    Yields what was announced beyond the process's own MIGRATE, for `collect`. Hold the mmap lock for reading.
    """
    async with AsyncExitStack() as stack:
        told: dict[int, list[Words]] = {}
        for mm, places in space.sharers(pages, select, owner) if len(pages) else ():
            await clear(stack, spaces, mm, places, owner, told)
        await stack.enter_async_context(space.hub.invalidate(Event.MIGRATE, start, end, owner))
        yield told


async def split_large(space: AddressSpace, spaces: Mapping[int, AddressSpace], pages: Words, owner: int, *, compound: bool) -> None:
    """Split what is larger than a page among `pages`, for everybody who maps it, before zone `owner` migrates some of them.

    With `compound`, huge pages that `pages` hold whole are left. Hold the mmap lock for reading.
    """
    for found in space.large(pages, compound=compound):
        if space.points.armed and space.points.fails("migrate.split", start=int(found.places[0][1][0]), pages=len(found.places[0][1])):
            continue
        async with AsyncExitStack() as stack:
            for mm, places in found.places:
                await clear(stack, spaces, mm, places, owner)
            found.split()


async def clear(
    stack: AsyncExitStack,
    spaces: Mapping[int, AddressSpace],
    mm: Mm,
    pages: Words,
    owner: int = NO_OWNER,
    told: dict[int, list[Words]] | None = None,
) -> None:
    """Announce CLEAR for `pages` of a process until `stack` is left, for zone `owner`, and enter them in `told`.

    Nothing is announced when the process has ended.
    """
    space = spaces.get(mm.number)
    if space is None:
        return
    pages = distinct(pages)  # ascending: frames, which they were found by, may lie otherwise
    for start, end in announced_runs(pages, ascend=True):
        await stack.enter_async_context(space.hub.invalidate(Event.CLEAR, start, end, owner))
    if told is not None:
        told.setdefault(mm.number, []).append(pages)
