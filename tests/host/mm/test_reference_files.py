"""Histories with files, shared memory, missing pages, locked and pinned memory, huge pages of the pool, a memory cgroup, and mirrors.

The operations are those of `player.py`, and what is particular to files (`model_files.py`); what is compared after each stands in
`comparison.py`. What the other reference test does for anonymous memory and transparent huge pages this one does for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmmnet.errors import KernelError
from hmmnet.host.files import MemFd
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.vma import VM_HUGETLB
from hmmnet.pages import HUGE_PAGES, PAGES_MAX, Words

from .machine import Machine
from .model import FINE, PAGE, Cell, Place
from .model_files import FileModel, Mapped, ModelFile
from .player import Player, Range

FIRST = 1 << 18
PAGES = 24
"""Pages in which everything is mapped, unmapped and mapped over."""
POOL = FIRST + 4 * HUGE_PAGES
"""Where a huge page of the pool is mapped from the beginning."""
FILE_PAGES = 8
ZONES = (64, 65)
PRIVATE = frozenset((64,))
PROCESSES_MAX = 3
PLACES = (*range(FIRST, FIRST + PAGES), POOL, POOL + 300)

which = st.integers(0, PROCESSES_MAX - 1)
page = st.sampled_from(PLACES)
small = st.integers(FIRST, FIRST + PAGES - 1)
counts = st.sampled_from((1, 2, 3, 6))
ranges = st.tuples(small, counts).map(lambda place: (place[0], min(place[1], FIRST + PAGES - place[0])))
zones = st.sampled_from(ZONES)
offsets = st.integers(0, FILE_PAGES)
values = st.integers(1, 255)
operations = st.one_of(
    st.tuples(st.just("store"), which, page, st.integers(0, PAGE - 1), values),
    st.tuples(st.just("store"), which, page, st.integers(0, PAGE - 1), values),
    st.tuples(st.just("load"), which, page),
    st.tuples(st.just("map_file"), which, ranges, offsets, st.booleans(), st.sampled_from(("rw", "rw", "r", "w"))),
    st.tuples(st.just("map_file"), which, ranges, offsets, st.booleans(), st.sampled_from(("rw", "rw", "r", "w"))),
    st.tuples(st.just("map_shared"), which, ranges),
    st.tuples(st.just("map_anonymous"), which, ranges),
    st.tuples(st.just("register"), which, ranges),
    st.tuples(st.just("munmap"), which, ranges),
    st.tuples(st.just("mprotect"), which, ranges, st.sampled_from(("rw", "r", "w", "none"))),
    st.tuples(st.just("mremap"), which, small, st.integers(1, 4), small, st.booleans()),
    st.tuples(st.just("dontneed"), which, ranges),
    st.tuples(st.just("advise"), which, ranges, st.sampled_from(("PAGEOUT", "PAGEOUT", "COLD", "WILLNEED"))),
    st.tuples(st.just("remove"), which, ranges),
    st.tuples(st.just("mlock"), which, ranges),
    st.tuples(st.just("hints"), which, ranges),
    st.tuples(st.just("clear_refs"), which),
    st.tuples(st.just("write_file"), offsets, values),
    st.tuples(st.just("punch"), st.integers(0, FILE_PAGES - 1)),
    st.tuples(st.just("truncate"), offsets),
    st.tuples(st.just("todev"), which, ranges, zones),
    st.tuples(st.just("tosys"), which, ranges, zones),
    st.tuples(st.just("evict"), zones),
    st.tuples(st.just("exclusive"), which, ranges, zones),
    st.tuples(st.just("dread"), which, ranges, zones),
    st.tuples(st.just("dread"), which, st.tuples(page, st.just(1)), zones),
    st.tuples(st.just("dwrite"), which, ranges, zones, st.integers(0, PAGE - 1), values),
    st.tuples(st.just("dwrite"), which, st.tuples(page, st.just(1)), zones, st.integers(0, PAGE - 1), values),
    st.tuples(st.just("snapshot"), which, ranges, zones),
    st.tuples(st.just("attach"), which, zones, ranges),
    st.tuples(st.just("pin"), which, page, st.booleans()),
    st.tuples(st.just("unpin")),
    st.tuples(st.just("fork"), which),
    st.tuples(st.just("exit"), which),
)


class FilePlayer(Player):
    """Memory of files and shared memory, beside anonymous memory."""

    processes_max = PROCESSES_MAX
    model: FileModel

    def __init__(self) -> None:
        machine = Machine(24 * HUGE_PAGES, kinds=("private", "coherent"), device_pages=256)
        super().__init__(machine, FileModel(PRIVATE), FIRST)
        self.file = MemFd(self.machine.memory, FILE_PAGES * PAGE, 0)
        self.modelled = ModelFile(FILE_PAGES)
        self.pins: list[tuple[Space, Words, Cell | None]] = []

    async def begin(self) -> None:
        """One process in a memory cgroup, with a huge page of the pool; all devices mirror it."""
        space = self.machine.process()
        space.mm.cgroup = self.machine.memory.cgroups.create("group", None)
        self.spaces[space.number] = space
        for zone in ZONES:
            self.attach_to(space, zone, 0, PAGES_MAX)
        await space.mmap(HUGE_PAGES * PAGE, "rw", POOL * PAGE, VM_HUGETLB)
        for one in range(POOL, POOL + HUGE_PAGES):
            self.model.rights[space.number, one] = "rw"

    def watched(self) -> Iterable[Place]:
        """Everything that is mapped; of the huge page of the pool, two places."""
        return [place for place in self.model.rights if place[1] < POOL or place[1] in PLACES]

    def may_forget(self, place: Place, cell: Cell) -> bool:
        """Not of what was missing, and not of a copy of a page of a file."""
        return super().may_forget(place, cell) and place not in self.model.missing and place not in self.model.leads

    def _mapped(self, space: Space, first: int, count: int, rights: str) -> list[Place]:
        places = [(space.number, one) for one in range(first, first + count)]
        for place in places:
            self.model.unmap(place)
            self.model.rights[place] = rights
        return places

    # --- mappings -----------------------------------------------------------------------------------------------------------------

    async def map_file(self, which: int, where: Range, offset: int, shared: bool, rights: str) -> None:
        space = self.space(which)
        file = self.file.file("mmap")
        await space.mmap(where[1] * PAGE, rights, where[0] * PAGE, shared=shared, file=file, offset=offset * PAGE)
        for i, place in enumerate(self._mapped(space, *where, rights)):
            self.model.leads[place] = Mapped(self.modelled, offset + i, shared)

    async def map_shared(self, which: int, where: Range) -> None:
        space = self.space(which)
        await space.mmap(where[1] * PAGE, "rw", where[0] * PAGE, shared=True)
        file = ModelFile(where[1])
        for i, place in enumerate(self._mapped(space, *where, "rw")):
            self.model.leads[place] = Mapped(file, i, shared=True)

    async def map_anonymous(self, which: int, where: Range) -> None:
        space = self.space(which)
        await space.mmap(where[1] * PAGE, "rw", where[0] * PAGE)
        self._mapped(space, *where, "rw")

    async def register(self, which: int, where: Range) -> None:
        """Fresh memory whose pages are missing: so it is known which are."""
        await self.map_anonymous(which, where)
        space = self.space(which)
        await space.userfaultfd(where[0] * PAGE, where[1] * PAGE, sigbus=True)
        self.model.missing |= {(space.number, one) for one in range(where[0], sum(where))}

    def reprotected(self, place: Place, old: str) -> None:
        """What is locked is populated once it may be written."""
        if place in self.model.locked and self.model.writable(place) and "w" not in old:
            self._populated(self.spaces[place[0]], place[1])

    async def mremap(self, which: int, first: int, count: int, target: int, dontunmap: bool) -> None:
        space = self.space(which)
        vma = space.vma_at(first)
        overlap = first < target + count and target < first + count
        if vma is None or first + count > min(vma.end, FIRST + PAGES) or overlap or target + count > FIRST + PAGES:
            return
        await space.mremap(first * PAGE, count * PAGE, count * PAGE, target * PAGE, dontunmap=dontunmap)
        number, model = space.number, self.model
        whole = [(number, one) for one in range(vma.start, vma.end)]
        for i in range(count):
            source, place = (number, first + i), (number, target + i)
            model.unmap(place)
            model.rights[place] = model.rights[source]
            if source in model.leads:
                model.leads[place] = model.leads[source]
            if source in model.locked:
                model.locked.add(place)
            if (cell := model.cells.get(source)) is not None:
                model.put(place, cell)
            if dontunmap:
                model.drop(source)
            else:
                model.unmap(source)
        if dontunmap:
            model.locked.difference_update(whole)

    # --- advice -------------------------------------------------------------------------------------------------------------------

    def _is_locked(self, which: int, where: Range) -> bool:
        return any((self.space(which).number, one) in self.model.locked for one in range(where[0], sum(where)))

    async def dontneed(self, which: int, where: Range) -> None:
        """Not of what is locked."""
        if not self._is_locked(which, where):
            await super().dontneed(which, where)

    async def advise(self, which: int, where: Range, advice: str) -> None:
        """Advice that changes nothing."""
        if not self._is_locked(which, where):
            await self.advised(self.space(which), where, advice)

    async def remove(self, which: int, where: Range) -> None:
        """Holes in the file, where shared memory is mapped."""
        space = self.space(which)
        leads = [self.model.leads.get((space.number, one)) for one in range(where[0], sum(where))]
        if any(lead is None or not lead.shared for lead in leads) or self._is_locked(which, where):
            return
        await space.madvise(where[0] * PAGE, where[1] * PAGE, "REMOVE")
        for lead in leads:
            assert lead is not None
            self.model.punched(lead.file, lead.offset)

    async def mlock(self, which: int, where: Range) -> None:
        space = self.space(which)
        covered = next((one for one in range(where[0], sum(where)) if (space.number, one) not in self.model.rights), sum(where))
        failed = False
        try:
            await space.mlock(where[0] * PAGE, where[1] * PAGE)
        except KernelError:
            failed = True
        self.model.locked |= {(space.number, one) for one in range(where[0], covered)}
        if covered < sum(where):
            assert failed
            return
        for one in range(where[0], covered):
            if not self._populated(space, one):
                assert failed
                return
        assert not failed

    def _populated(self, space: Space, page: int) -> bool:
        """populate_vma_page_range for one page: a store where the mapping is private and writable, else a load; whether it could be had."""
        place = space.number, page
        lead = self.model.leads.get(place)
        write = self.model.writable(place) and (lead is None or not lead.shared)
        if self.model.outcome(place, write=write) != FINE:
            return False
        if write:
            self.touched(place)
        else:
            self.model.look(place)
        return True

    async def hints(self, which: int, where: Range) -> None:
        """NUMA balancing takes the entries of present pages away from all devices."""
        await self.space(which).numa_hints(where[0], sum(where))

    async def clear_refs(self, which: int) -> None:
        """No page counts as written, so none is writable at once."""
        space = self.space(which)
        await space.clear_soft_dirty()
        for process, one in list(self.model.rights):
            if process == space.number:
                self.model.forget((process, one))

    # --- the file -------------------------------------------------------------------------------------------------------------

    async def write_file(self, offset: int, value: int) -> None:
        data = bytes([value]) * PAGE
        await self.file.write(offset * PAGE, data)
        self.modelled.pages = max(self.modelled.pages, offset + 1)
        self.modelled.page(offset)[:] = data

    async def punch(self, offset: int) -> None:
        await self.file.punch(offset * PAGE, PAGE)
        self.model.punched(self.modelled, offset)

    async def truncate(self, pages: int) -> None:
        await self.file.truncate(pages * PAGE)
        self.model.truncated(self.modelled, pages)

    # --- references ---------------------------------------------------------------------------------------------------------------

    async def pin(self, which: int, page: int, write: bool) -> None:
        space = self.space(which)
        place = space.number, page
        may = self.model.writable(place) if write else "r" in self.model.rights.get(place, "")
        if page >= POOL:
            return
        if not may or self.model.outcome(place, write=write) != FINE:
            with pytest.raises(KernelError):
                await space.get_pages(page, 1, write=write, pin=True)
            return
        frames = await space.get_pages(page, 1, write=write, pin=True)
        if write:
            self.touched(place)
        else:
            self.model.look(place)
            if place in self.model.cells:
                self.model.own(place)
        cell = self.model.cells.get(place)
        if cell is not None:
            cell.held += 1
            cell.pinned += 1
        self.pins.append((space, frames, cell))

    async def unpin(self) -> None:
        for space, frames, cell in self.pins:
            space.put_pages(frames, pin=True)
            if cell is not None:
                cell.held -= 1
                cell.pinned -= 1
        self.pins.clear()

    # --- comparison ---------------------------------------------------------------------------------------------------------------

    async def compare_file(self) -> None:
        """All of the file, as pread sees it."""
        read = await self.file.read(0, (FILE_PAGES + 2) * PAGE)
        assert read == b"".join(bytes(self.modelled.data.get(i, bytes(PAGE))) for i in range(self.modelled.pages))


@pytest.mark.timeout(900)  # half a minute, on a busy machine several
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(operations, min_size=40, max_size=200))
def test_files_and_shared_memory_equal_the_reference(history: list[tuple[Any, ...]]) -> None:
    """Up to 200 operations; at the end everything exits, and no frame and no slot of swap is in use anywhere."""

    async def main() -> None:
        player = FilePlayer()
        await player.begin()
        for name, *arguments in history:
            await getattr(player, name)(*arguments)
            player.compare()
        await player.compare_file()
        await player.unpin()
        await player.end()
        await player.file.truncate(0)
        player.machine.check()
        memory = player.machine.memory
        assert (memory.nodes[0].allocator.used_count, memory.swap.used) == (0, 0)

    trio.run(main)
