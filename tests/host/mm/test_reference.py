"""Histories of processes, private and coherent devices with mirrors, small and huge pages: all equals the reference model (`model.py`).

The operations are those of `player.py`, and what is particular to anonymous memory; what is compared after each stands in `comparison.py`.
Hypothesis shrinks what fails to the shortest history; `derandomize` makes every run the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hmmnet.host.hub import Invalidation
from hmmnet.host.interfaces import Event
from hmmnet.host.mm import pte
from hmmnet.host.mm.space import Space
from hmmnet.pages import HUGE_PAGES, PAGES_MAX, ZERO_FRAME

from .machine import Machine
from .model import PAGE, Cell, Model, Place
from .player import Player, Range, code_of

FIRST = 4 * HUGE_PAGES
SMALL = 12
"""Pages of the small mapping; one aligned block for huge pages follows, and a few pages behind it."""
BLOCK = FIRST + HUGE_PAGES
END = BLOCK + HUGE_PAGES + 4
INTERESTING = (*range(FIRST, FIRST + SMALL), BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 255, BLOCK + 511, BLOCK + 512, END - 1)
ZONES = (64, 65, 66)
PRIVATE = frozenset((64, 65))
PROCESSES_MAX = 4

which = st.integers(0, PROCESSES_MAX - 1)
pages = st.sampled_from(INTERESTING)
counts = st.sampled_from((1, 2, 3, 8, 512, 516))
ranges = st.tuples(pages, counts)
zones = st.sampled_from(ZONES)
operations = st.one_of(
    st.tuples(st.just("store"), which, pages, st.integers(0, PAGE - 1), st.integers(1, 255)),
    st.tuples(st.just("store"), which, pages, st.integers(0, PAGE - 1), st.integers(1, 255)),
    st.tuples(st.just("load"), which, pages),
    st.tuples(st.just("todev"), which, ranges, zones, st.booleans()),
    st.tuples(st.just("todev"), which, ranges, zones, st.booleans()),
    st.tuples(st.just("tosys"), which, ranges, zones),
    st.tuples(st.just("evict"), zones),
    st.tuples(st.just("fork"), which),
    st.tuples(st.just("exit"), which),
    st.tuples(st.just("mprotect"), which, ranges, st.sampled_from(("rw", "r"))),
    st.tuples(st.just("munmap"), which, ranges),
    st.tuples(st.just("mmap"), which, ranges),
    st.tuples(st.just("dontneed"), which, ranges),
    st.tuples(st.just("advise"), which, ranges, st.sampled_from(("HUGEPAGE", "NOHUGEPAGE", "FREE", "COLD", "PAGEOUT", "PAGEOUT"))),
    st.tuples(st.just("collapse"), which),
    st.tuples(st.just("exclusive"), which, st.tuples(pages, st.integers(1, 3)), zones),
    st.tuples(st.just("dread"), which, ranges, zones),
    st.tuples(st.just("dread"), which, ranges, zones),
    st.tuples(st.just("dwrite"), which, ranges, zones, st.integers(0, PAGE - 1), st.integers(1, 255)),
    st.tuples(st.just("dwrite"), which, ranges, zones, st.integers(0, PAGE - 1), st.integers(1, 255)),
    st.tuples(st.just("snapshot"), which, ranges, zones),
    st.tuples(st.just("attach"), which, zones, ranges),
    st.tuples(st.just("hold"), which, st.sampled_from(INTERESTING[:SMALL])),
    st.tuples(st.just("release")),
    st.tuples(st.just("mremap"), which, st.sampled_from(INTERESTING[:SMALL]), st.integers(1, 4)),
)


class AnonymousPlayer(Player):
    """Anonymous memory of small and huge pages."""

    processes_max = PROCESSES_MAX

    def __init__(self) -> None:
        machine = Machine(16 * HUGE_PAGES, kinds=("private", "private", "coherent"), device_pages=16 * HUGE_PAGES)
        super().__init__(machine, Model(PRIVATE), FIRST)

    async def begin(self) -> None:
        """One process, mirrored by all: small pages, then a block that asks for huge ones, and a few pages more."""
        space = self.machine.process()
        self.spaces[space.number] = space
        space.mm.cgroup = self.machine.memory.cgroups.create("all", None)  # children are members, too: the machine's check counts (I4)
        for zone in ZONES:
            self.attach_to(space, zone, 0, PAGES_MAX)
        await self._map(space, FIRST, END - FIRST)
        await space.madvise(BLOCK * PAGE, HUGE_PAGES * PAGE, "HUGEPAGE")

    def watched(self) -> Iterable[Place]:
        """Those that the model knows, and those that hold zeros for all it knows."""
        return {*self.model.cells, *((number, page) for number in self.spaces for page in INTERESTING)}

    async def _map(self, space: Space, first: int, count: int) -> None:
        await space.mmap(count * PAGE, "rw", first * PAGE)
        for page in range(first, first + count):
            self.model.unmap((space.number, page))
            self.model.rights[space.number, page] = "rw"

    async def mmap(self, which: int, where: Range) -> None:
        """Fresh memory over whatever is there."""
        await self._map(self.space(which), *where)

    def home_along(self, place: Place) -> None:
        """A huge page comes home as one: the machine says which pages did, the model knows whether they may."""
        process, page = place
        cell = self.model.cells.get(place)
        if cell is None or cell.zone not in PRIVATE or not BLOCK <= page < BLOCK + HUGE_PAGES:
            return
        for other in range(BLOCK, BLOCK + HUGE_PAGES):
            if self.entry((process, other)) & pte.KIND != pte.DEVICE:
                self.model.load((process, other))

    async def advise(self, which: int, where: Range, advice: str) -> None:
        """Advice that changes nothing but what FREE finds in swap."""
        space = self.space(which)
        gone = self._stay(space, where, pte.SWAP) if advice == "FREE" else ()
        await self.advised(space, where, advice)
        for page in gone:
            self.model.zap((space.number, page))

    async def collapse(self, which: int) -> None:
        """MADV_COLLAPSE of the block, if that can be; what it has brought home by then is home."""
        space = self.space(which)
        if await code_of(space.madvise(BLOCK * PAGE, HUGE_PAGES * PAGE, "COLLAPSE")) == 0:
            for page in range(BLOCK, BLOCK + HUGE_PAGES):
                cell = self.model.cells.get((space.number, page))
                if cell is not None and len(cell.places) > 1 and not self._is_mapped_by_all(cell, space):
                    self.model.own((space.number, page))
        for page in range(BLOCK, BLOCK + HUGE_PAGES):
            if self.entry((space.number, page)) & pte.KIND == pte.PRESENT:
                self.model.load((space.number, page))

    def _is_mapped_by_all(self, cell: Cell, space: Space) -> bool:
        """Whether the sharers still map one frame: a block that was huge already was not copied."""
        frames = {self.entry(place) >> pte.FRAME_SHIFT for place in cell.places}
        assert space.number in {process for process, _ in cell.places}
        return len(frames) == 1

    async def hold(self, which: int, page: int) -> None:
        """get_user_pages of one page."""
        space = self.space(which)
        place = space.number, page
        if not self.model.readable(place):
            return
        frames = await space.get_pages(page, 1)
        self.model.load(place)
        cell = self.model.cells.get(place)
        if cell is not None:
            cell.held += 1
        elif frames[0] != ZERO_FRAME:  # a page of zeros that the model need not know, and so cannot know as held
            space.put_pages(frames)
            return
        self.holds.append((space, frames, cell))

    async def mremap(self, which: int, page: int, count: int) -> None:
        """To a place of its own."""
        space = self.space(which)
        target = END + 8
        vma = space.vma_at(page)
        if vma is None or page + count > vma.end:
            return
        await space.mremap(page * PAGE, count * PAGE, count * PAGE, target * PAGE)
        for i in range(count):
            self.model.unmap((space.number, target + i))
            cell = self.model.cells.get((space.number, page + i))
            rights = self.model.rights[space.number, page + i]
            if cell is not None:
                self.model.put((space.number, target + i), cell)
            self.model.unmap((space.number, page + i))
            self.model.rights[space.number, target + i] = rights


async def played(history: list[tuple[Any, ...]]) -> AnonymousPlayer:
    """A player that has played `history`, compared after every operation."""
    player = AnonymousPlayer()
    await player.begin()
    for name, *arguments in history:
        await getattr(player, name)(*arguments)
        player.compare()
    return player


FORGOTTEN: list[tuple[Any, ...]] = [
    ("todev", 0, (FIRST, 3), 66, False),
    ("hold", 0, FIRST),
    ("store", 0, FIRST, 0, 7),
    ("tosys", 0, (FIRST, 1), 66),
]
"""A page of zeros in coherent memory, which somebody refers to for a moment."""
REFERRED_TO: list[tuple[Any, ...]] = [
    ("store", 0, FIRST, 0, 7),
    ("fork", 0),
    ("store", 1, FIRST, 0, 8),
    ("hold", 0, FIRST),
    ("dwrite", 0, (FIRST, 1), 65, 0, 9),
    ("todev", 0, (FIRST, 1), 66, False),
]
"""A page that fork shared, and that one process has left: a store of the other copies it, because somebody refers to it, and the copy may
go to a device (wp_can_reuse_anon_folio)."""


@pytest.mark.timeout(900)  # a minute, on a busy machine several
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(operations, min_size=40, max_size=200))
@example(REFERRED_TO)
@example(FORGOTTEN)
def test_memory_equals_the_reference(history: list[tuple[Any, ...]]) -> None:
    """Up to 200 operations; at the end everything exits and no frame is in use anywhere."""

    async def main() -> None:
        player = await played(history)
        await player.release()
        await player.end()
        assert player.machine.memory.nodes[0].allocator.used_count == 0

    trio.run(main)


def test_a_machine_that_forgets_is_found_out() -> None:
    """One byte, changed behind everybody's back."""

    async def main() -> None:
        player = await played([("store", 0, FIRST, 3, 9)])
        player.space(0).memory.write_small(player.entry((1, FIRST)) >> pte.FRAME_SHIFT, 3, b"\0")
        with pytest.raises(AssertionError, match="holds something else"):
            player.compare()

    trio.run(main)


MAPPED = [("store", 0, FIRST, 0, 7), ("dwrite", 0, (FIRST, 2), 64, 1, 8)]
UNTOLD = {
    Event.UNMAP: [*MAPPED, ("munmap", 0, (FIRST, 1))],
    Event.CLEAR: [*MAPPED, ("fork", 0), ("dread", 0, (FIRST, 1), 64), ("store", 0, FIRST, 0, 9)],
    Event.PROTECTION_VMA: [*MAPPED, ("mprotect", 0, (FIRST, 1), "r")],
    Event.PROTECTION_PAGE: [*MAPPED, ("fork", 0)],
    Event.MIGRATE: [*MAPPED, ("todev", 0, (FIRST, 1), 65, False)],
    Event.EXCLUSIVE: [*MAPPED, ("exclusive", 0, (FIRST, 1), 65)],
    Event.RELEASE: [("fork", 0), *MAPPED, ("exit", 0)],
}
"""For each event, a history in which a mirror has to hear of it."""


@pytest.mark.parametrize("event", UNTOLD)
def test_a_mirror_that_is_not_told_is_found_out(event: Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that one event a mirror keeps what it must not; with it all is well."""
    trio.run(played, UNTOLD[event])
    tell = Invalidation._tell
    monkeypatch.setattr(Invalidation, "_tell", lambda self, found, now: [] if self.event is event else tell(self, found, now))
    with pytest.raises(AssertionError, match="mirror"):
        trio.run(played, UNTOLD[event])


def test_a_callback_after_the_removal_is_found_out() -> None:
    """I7: a mirror that was closed and is told all the same says so."""

    async def main() -> None:
        player = await played(MAPPED)
        player.mirrors[1, 64].closed = True
        with pytest.raises(AssertionError, match="I7"):
            await player.munmap(0, (FIRST, 1))

    trio.run(main)
