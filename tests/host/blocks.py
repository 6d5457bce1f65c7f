"""A process with huge pages, and their way to a device that is a plain object (`fakes`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hmmnet.host.interfaces import Select
from hmmnet.host.migrate import Grant, Outcome, migrate_to_device
from hmmnet.host.mm import pte
from hmmnet.host.mm.invariants import check
from hmmnet.host.mm.space import Space
from hmmnet.pages import HUGE_PAGES, LARGE, PAGE_SIZE, Words

from .fakes import FIRST_FRAME, Bench, words

BASE = 1 << 30
FIRST = BASE // PAGE_SIZE
BLOCK = HUGE_PAGES * PAGE_SIZE
WHOLE = Select.SYSTEM | Select.COMPOUND
HEADS = words(FIRST_FRAME, FIRST_FRAME + HUGE_PAGES) | np.uint64(LARGE)
"""Two large frames of the device."""
EXPECTED = np.arange(2 * BLOCK // 8, dtype=np.uint64)
"""What two huge pages hold."""


async def huge_space(bench: Bench, blocks: int = 2, *, written: bool = True) -> Space:
    """A process with `blocks` huge pages; every page has bytes of its own."""
    space = bench.space()
    await space.mmap(blocks * BLOCK, "rw", BASE)
    await space.madvise(BASE, blocks * BLOCK, "HUGEPAGE")
    if written:
        await space.store(BASE, np.arange(blocks * BLOCK // 8, dtype=np.uint64))
    return space


async def go(
    bench: Bench, space: Space, frames: Words = HEADS, first: int = FIRST, *, select: Select = WHOLE, then: Callable[[], None] | None = None
) -> Outcome:
    """Migrate to the device; what it was told. `then` happens before its table is up to date."""
    told: list[Outcome] = []

    async def tell(outcome: Outcome, finalize: Callable[[], None]) -> None:
        told.append(outcome)
        if then is not None:
            then()
        finalize()

    grant = Grant(bench.page_map.zone, frames)
    await migrate_to_device(space, bench.spaces, bench.link, [bench.domain], first, select, grant, tell)
    return told[0]


def sound(bench: Bench) -> None:
    """The invariants hold."""
    check(bench.memory, [space.mm for space in bench.spaces.values()])


def shape(space: Space, blocks: int = 2) -> list[int]:
    """Of each block: the kind of the one entry that maps it, 0 where pages have entries of their own (or none)."""
    return [space.mm.table.pmd(FIRST + i * HUGE_PAGES) & pte.KIND for i in range(blocks)]


async def contents(space: Space, blocks: int = 2) -> Words:
    """What the pages hold now."""
    return np.frombuffer(await space.load(BASE, blocks * BLOCK), np.uint64)
