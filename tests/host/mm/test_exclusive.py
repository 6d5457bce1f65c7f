"""Exclusive access of devices: which pages, what is told to whom, and the two ways with a large page (A7).

Oracle: mm/memory.c and mm/rmap.c today (make_device_exclusive) and in Linux 6.12 (folio_make_device_exclusive).
"""

from __future__ import annotations

import numpy as np
import pytest

from hmmnet.errors import KernelError
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Event
from hmmnet.host.mm import pte
from hmmnet.host.mm.space import Space
from hmmnet.pages import HMM_PFN_VALID, HUGE_PAGES
from tests.host.fakes import FakeLink

from .files import BASE, PAGE, symbols
from .machine import Machine, page_bytes

FIRST = BASE // PAGE
BLOCK = HUGE_PAGES * PAGE


async def huge(machine: Machine) -> Space:
    space = machine.process()
    await space.mmap(BLOCK, "rw", BASE)
    await space.madvise(BASE, BLOCK, "HUGEPAGE")
    await space.store(BASE, b"huge")
    return space


async def test_today_a_page_of_a_large_one_is_had_alone() -> None:
    """Mapped page by page first; the neighbours stay as they are."""
    machine = Machine(host_pages=4 * HUGE_PAGES)
    space = await huge(machine)
    assert await space.make_exclusive(FIRST + 3, FIRST + 5, 64) == 2
    assert symbols(space, BASE, 6) == "PPPSSP"
    assert len(space.exclusive_words(FIRST + 3, FIRST + 6)) == 2
    machine.check()


async def test_in_612_the_head_takes_all_and_a_tail_nothing() -> None:
    """The reverse map is walked for the folio; a PageTail is passed over. What the CPU takes back it takes page by page."""
    machine = Machine(host_pages=4 * HUGE_PAGES)
    space = await huge(machine)
    assert (await space.make_exclusive_folios(FIRST + 3, FIRST + 5, 64)).tolist() == [0, 0]
    assert symbols(space, BASE, 6) == "PPPPPP"
    words = await space.make_exclusive_folios(FIRST, FIRST + 2, 64)
    assert [word & HMM_PFN_VALID != 0 for word in words.tolist()] == [True, False]
    assert symbols(space, BASE, HUGE_PAGES) == "S" * HUGE_PAGES
    assert await space.load(BASE, 4) == b"huge"
    assert symbols(space, BASE, 3) == "PSS"
    machine.check()


async def test_in_612_pages_behind_one_that_is_not_had_are() -> None:
    """Small pages behind a large one: GUP got them all, so each is tried."""
    machine = Machine(host_pages=4 * HUGE_PAGES)
    space = machine.process()
    await space.mmap(BLOCK + 2 * PAGE, "rw", BASE)
    await space.madvise(BASE, BLOCK, "HUGEPAGE")
    await space.store(BASE, b"huge")
    await space.madvise(BASE, BLOCK, "NOHUGEPAGE")
    assert len(space.mm.vmas) == 2
    words = await space.make_exclusive_folios(FIRST + HUGE_PAGES - 1, FIRST + HUGE_PAGES + 2, 64)
    assert (words != 0).tolist() == [False, True, True]
    machine.check()


async def test_mirrors_of_others_are_told_and_the_owner_named() -> None:
    """EXCLUSIVE for the range, with the zone of the device that asks; then CLEAR when a CPU takes a page back."""
    machine = Machine()
    space = machine.process()
    await space.mmap(2 * PAGE, "rw", BASE)
    await space.store(BASE, page_bytes(1))
    link = FakeLink("gpu0", 64)
    assert isinstance(space.hub, Hub)
    space.hub.insert(0, 1 << 30, link, 1)
    assert await space.make_exclusive(FIRST, FIRST + 2, 65) == 2
    assert await space.load(BASE, 1) == b"\1"
    assert [(start, end, event) for _, start, end, event, *_ in link.told] == [
        (FIRST, FIRST + 2, Event.EXCLUSIVE),
        (FIRST, FIRST + 1, Event.CLEAR),
    ]


async def test_what_changes_while_mirrors_are_told_is_tried_again() -> None:
    """make_device_exclusive loops: somebody takes the right to write away in between (clear_refs), and it is had all the same."""
    machine = Machine()
    space = machine.process()
    await space.mmap(PAGE, "rw", BASE)
    await space.store(BASE, page_bytes(1))
    hub, rounds = space.hub, []

    class Meddling:
        """A hub in which, the first time, the entry turns read-only while the announcement is under way."""

        def invalidate(self, event: Event, start: int, end: int, owner: int = -1) -> object:
            if event is Event.EXCLUSIVE:
                rounds.append(start)
                if len(rounds) == 1:
                    space.mm.table.write(FIRST, space.mm.table.read(FIRST, FIRST + 1) & ~np.uint64(pte.WRITE))
            return hub.invalidate(event, start, end, owner)

    space.hub = Meddling()  # type: ignore[assignment]
    assert await space.make_exclusive(FIRST, FIRST + 1, 64) == 1
    assert rounds == [FIRST, FIRST]
    assert symbols(space, BASE, 1) == "S"


@pytest.mark.parametrize("folios", [False, True])
async def test_not_writable_is_efault(folios: bool) -> None:
    """A read-only mapping, and none at all."""
    space = Machine().process()
    await space.mmap(PAGE, "r", BASE)
    for page in (FIRST, 17):
        with pytest.raises(KernelError, match="EFAULT"):
            await (space.make_exclusive_folios if folios else space.make_exclusive)(page, page + 1, 64)
