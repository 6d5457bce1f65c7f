"""Who has to be told before pages move: the mirrors of every process that maps them.

Most pages have one mapping, and the MIGRATE of the process whose range it is tells everybody. After fork pages are shared; then CLEAR is
announced too, page by page, wherever they may be mapped (try_to_migrate walks the reverse map the same way), the process itself included.
All announcements stand until the pages are collected, so nobody mirrors one anew in between. A page that came to be shared, or came here,
while they were made (a further fork, a migration that ended) was not announced everywhere: `collect` is given what was (`Told`), and leaves
such a page where it is. Who cannot leave it (a folio is split, memory breaks: `clear_wherever`) looks again, and tells who is new.

The kernel holds the reverse map's lock while it looks, so fork and mmap wait; here others go on while devices are waited for, and who maps
the memory anew each time would keep us looking for ever. So that ends after some rounds, as the kernel's migration does.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from errno import EBUSY
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from hmmnet.errors import KernelError
from hmmnet.pages import Words, announced_runs, distinct

from .interfaces import NO_OWNER, NOBODY, AddressSpace, Event, Select, Told

if TYPE_CHECKING:
    from .mm.huge import Large
    from .mm.mm import Mm

ROUNDS_MAX = 10
"""How often is looked who has come to map memory while others were told (NR_MAX_MIGRATE_PAGES_RETRY): twice is rare."""

log = logging.getLogger("hmmnet.host")


class MappedAnew(KernelError):
    """EBUSY: somebody came to map memory in each of so many rounds, so it is never mapped by those alone who have been told."""


def announced(
    space: AddressSpace, spaces: Mapping[int, AddressSpace], start: int, end: int, pages: Words, select: Select, owner: int
) -> AbstractAsyncContextManager[Told]:
    """While the block runs, nobody mirrors those pages of [start, end), in one VMA, that `collect` with the same arguments may take.

    `pages` (ascending) are those of them that may be shared.

    Yields what was announced beyond the process's own MIGRATE, for `collect`. Hold the mmap lock for reading.
    """
    sharers = space.sharers(pages, select, owner) if len(pages) else []
    own = space.hub.invalidate(Event.MIGRATE, start, end, owner)
    return _announced(spaces, sharers, own, owner) if sharers else _Alone(own)


class _Alone:
    """Nobody shares the pages, as mostly: only the process's own mirrors are told."""

    __slots__ = ("_own",)

    def __init__(self, own: AbstractAsyncContextManager[object]) -> None:
        self._own = own

    async def __aenter__(self) -> Told:
        await self._own.__aenter__()
        return NOBODY

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        return await self._own.__aexit__(kind, error, trace)


@asynccontextmanager
async def _announced(
    spaces: Mapping[int, AddressSpace], sharers: Sequence[tuple[Mm, Words]], own: AbstractAsyncContextManager[object], owner: int
) -> AsyncIterator[Told]:
    async with AsyncExitStack() as stack:
        told: dict[int, list[Words]] = {}
        for mm, places in sharers:
            await clear(stack, spaces, mm, places, owner, told)
        await stack.enter_async_context(own)
        yield told


async def split_large(
    space: AddressSpace, spaces: Mapping[int, AddressSpace], pages: Words, owner: int, *, compound: bool, parts_stay: bool = False
) -> None:
    """Split what is larger than a page among `pages`, for everybody who maps it, before zone `owner` migrates some of them.

    With `compound`, huge pages that `pages` hold whole are left; with `parts_stay`, what is mapped page by page. What somebody holds, or
    maps anew again and again, stays whole, and does not migrate. Hold the mmap lock for reading.
    """
    for found in space.large(pages, compound=compound, parts_stay=parts_stay):
        if space.points.armed and _split_fails(space, found):
            continue
        try:
            async with AsyncExitStack() as stack:
                await clear_wherever(stack, spaces, found.where, owner)
                found.split()
        except MappedAnew as error:
            log.warning("a huge page is not split: %s", error)


def _split_fails(space: AddressSpace, found: Large) -> bool:
    """Whether a fault is injected there. While others were told it may have been unmapped: then nothing can fail."""
    where = found.where()
    if not where:
        return False
    pages = where[0][1]
    return space.points.fails("migrate.split", process=space.number, start=int(pages[0]), pages=len(pages))


async def clear_wherever(
    stack: AsyncExitStack,
    spaces: Mapping[int, AddressSpace],
    where: Callable[[], Iterable[tuple[Mm, Words]]],
    owner: int = NO_OWNER,
) -> None:
    """Announce CLEAR until `stack` is left for what `where` finds, also for what it finds by the time that everybody has been told.

    A process may have forked meanwhile, or map a file a second time: its mirrors must not keep what is about to change either. Raises
    MappedAnew when somebody has done so in each of `ROUNDS_MAX` rounds: nothing may change then.
    """
    told: dict[int, list[Words]] = {}
    for _ in range(ROUNDS_MAX):
        fresh = _fresh(where, told)
        if not fresh:
            return
        for mm, pages in fresh:
            told.setdefault(mm.number, []).append(pages)
            await clear(stack, spaces, mm, pages, owner)
    if fresh := _fresh(where, told):
        mm, pages = fresh[0]
        who = f"process {mm.number} has come to map it at page 0x{int(pages[0]):x} while others were told"
        raise MappedAnew(EBUSY, "try_to_migrate", f"{who}, as somebody did {ROUNDS_MAX} times")


def _fresh(where: Callable[[], Iterable[tuple[Mm, Words]]], told: Mapping[int, Sequence[Words]]) -> list[tuple[Mm, Words]]:
    """What `where` finds now beyond what was told."""
    return [(mm, left) for mm, pages in where() if len(left := _untold(pages, told.get(mm.number, ())))]


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
