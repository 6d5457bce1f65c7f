"""Who has to be told before pages move: the mirrors of every process that maps them.

Most pages have one mapping, and the MIGRATE of the process whose range it is tells everybody. After fork pages are shared; then CLEAR is
announced too, page by page, wherever they may be mapped (try_to_migrate walks the reverse map the same way), the process itself included.
All announcements stand until the pages are collected, so nobody mirrors one anew in between. A page that came to be shared, or came here,
while they were made (a further fork, a migration that ended) was not announced everywhere: `collect` is given what was (`Told`), and leaves
such a page where it is. Who cannot leave it (a folio is split, memory breaks: `clear_wherever`) looks again, and tells who is new.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np

from hmmnet.pages import Words, announced_runs, distinct

from .interfaces import NO_OWNER, AddressSpace, Event, Select, Told

if TYPE_CHECKING:
    from .mm.huge import Large
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


async def split_large(
    space: AddressSpace, spaces: Mapping[int, AddressSpace], pages: Words, owner: int, *, compound: bool, parts_stay: bool = False
) -> None:
    """Split what is larger than a page among `pages`, for everybody who maps it, before zone `owner` migrates some of them.

    With `compound`, huge pages that `pages` hold whole are left; with `parts_stay`, what is mapped page by page. Hold the mmap lock for
    reading.
    """
    for found in space.large(pages, compound=compound, parts_stay=parts_stay):
        if space.points.armed and _split_fails(space, found):
            continue
        async with AsyncExitStack() as stack:
            await clear_wherever(stack, spaces, found.where, owner)
            found.split()


def _split_fails(space: AddressSpace, found: Large) -> bool:
    """Whether a fault is injected there. While others were told it may have been unmapped: then nothing can fail."""
    where = found.where()
    if not where:
        return False
    pages = where[0][1]
    return space.points.fails("migrate.split", start=int(pages[0]), pages=len(pages))


async def clear_wherever(
    stack: AsyncExitStack,
    spaces: Mapping[int, AddressSpace],
    where: Callable[[], Iterable[tuple[Mm, Words]]],
    owner: int = NO_OWNER,
) -> None:
    """Announce CLEAR until `stack` is left for what `where` finds, also for what it finds by the time that everybody has been told.

    A process may have forked meanwhile, or map a file a second time: its mirrors must not keep what is about to change either.
    """
    told: dict[int, list[Words]] = {}
    while fresh := [(mm, left) for mm, pages in where() if len(left := _untold(pages, told.get(mm.number, ())))]:
        for mm, pages in fresh:
            told.setdefault(mm.number, []).append(pages)
            await clear(stack, spaces, mm, pages, owner)


def _untold(pages: Words, told: Sequence[Words]) -> Words:
    """Those of `pages` that are not among `told`."""
    for some in told:
        pages = pages[~np.isin(pages, some)]
    return pages


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
