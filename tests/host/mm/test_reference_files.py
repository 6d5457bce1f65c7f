"""Histories with files, shared memory, missing pages, locked and pinned memory, huge pages of the pool, a memory cgroup.

After every operation: the invariants I2 to I5 and I8 (`Machine.check`), I6 by its bytes: every one that the model (`model_files.py`) knows,
and where each such page is. What the other reference test does for anonymous memory and transparent huge pages this one does for the rest.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmmnet.errors import BusError, KernelError, SegmentationFault
from hmmnet.host.files import MemFd
from hmmnet.host.mm import pte
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.vma import VM_HUGETLB
from hmmnet.pages import HUGE_PAGES, Words

from .machine import Machine, span
from .model import PAGE, Cell
from .model_files import BUS, FINE, FileModel, Mapped, ModelFile

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
    st.tuples(st.just("pin"), which, page, st.booleans()),
    st.tuples(st.just("unpin")),
    st.tuples(st.just("fork"), which),
    st.tuples(st.just("exit"), which),
)


class Player:
    """Applies operations to a machine and to the model, and compares."""

    def __init__(self) -> None:
        self.machine = Machine(24 * HUGE_PAGES, kinds=("private", "coherent"), device_pages=256)
        self.model = FileModel(PRIVATE)
        self.spaces: dict[int, Space] = {}
        self.file = MemFd(self.machine.memory, FILE_PAGES * PAGE, 0)
        self.modelled = ModelFile(FILE_PAGES)
        self.pins: list[tuple[Space, Words, Cell | None]] = []

    async def begin(self) -> None:
        """One process in a memory cgroup, with a huge page of the pool."""
        space = self.machine.process()
        space.mm.cgroup = self.machine.memory.cgroups.create("group", None)
        self.spaces[space.number] = space
        await space.mmap(HUGE_PAGES * PAGE, "rw", POOL * PAGE, VM_HUGETLB)
        for one in range(POOL, POOL + HUGE_PAGES):
            self.model.rights[space.number, one] = "rw"

    def space(self, which: int) -> Space:
        """One of the living processes."""
        living = list(self.spaces.values())
        return living[which % len(living)]

    def _mapped(self, space: Space, first: int, count: int, rights: str) -> list[tuple[int, int]]:
        places = [(space.number, one) for one in range(first, first + count)]
        for place in places:
            self.model.unmap(place)
            self.model.rights[place] = rights
        return places

    # --- mappings -------------------------------------------------------------------------------------------------------------

    async def map_file(self, which: int, where: tuple[int, int], offset: int, shared: bool, rights: str) -> None:
        space = self.space(which)
        file = self.file.file("mmap")
        await space.mmap(where[1] * PAGE, rights, where[0] * PAGE, shared=shared, file=file, offset=offset * PAGE)
        for i, place in enumerate(self._mapped(space, *where, rights)):
            self.model.leads[place] = Mapped(self.modelled, offset + i, shared)

    async def map_shared(self, which: int, where: tuple[int, int]) -> None:
        space = self.space(which)
        await space.mmap(where[1] * PAGE, "rw", where[0] * PAGE, shared=True)
        file = ModelFile(where[1])
        for i, place in enumerate(self._mapped(space, *where, "rw")):
            self.model.leads[place] = Mapped(file, i, shared=True)

    async def map_anonymous(self, which: int, where: tuple[int, int]) -> None:
        space = self.space(which)
        await space.mmap(where[1] * PAGE, "rw", where[0] * PAGE)
        self._mapped(space, *where, "rw")

    async def register(self, which: int, where: tuple[int, int]) -> None:
        """Fresh memory whose pages are missing: so it is known which are."""
        await self.map_anonymous(which, where)
        space = self.space(which)
        await space.userfaultfd(where[0] * PAGE, where[1] * PAGE, sigbus=True)
        self.model.missing |= {(space.number, one) for one in range(where[0], sum(where))}

    async def munmap(self, which: int, where: tuple[int, int]) -> None:
        space = self.space(which)
        await space.munmap(where[0] * PAGE, where[1] * PAGE)
        for one in range(where[0], sum(where)):
            self.model.unmap((space.number, one))

    async def mprotect(self, which: int, where: tuple[int, int], rights: str) -> None:
        space = self.space(which)
        code = 0
        try:
            await space.mprotect(where[0] * PAGE, where[1] * PAGE, rights)
        except KernelError as error:
            code = error.code
        assert code == self.model.refusal(space.number, *where)
        for one in range(where[0], sum(where)):
            if (space.number, one) not in self.model.rights:
                break
            old = self.model.rights[space.number, one]
            self.model.rights[space.number, one] = rights
            if (space.number, one) in self.model.locked and "w" in rights and "w" not in old:
                self._populated(space, one)

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

    # --- accesses -------------------------------------------------------------------------------------------------------------

    async def store(self, which: int, page: int, offset: int, value: int) -> None:
        space = self.space(which)
        place = space.number, page
        ends = self.model.outcome(place, write=True)
        if ends != FINE:
            with pytest.raises(BusError if ends == BUS else SegmentationFault):
                await space.store(page * PAGE + offset, bytes([value]))
            return
        await space.store(page * PAGE + offset, bytes([value]))
        self.model.touch(place)[offset] = value
        self._placed(space, page)

    async def load(self, which: int, page: int) -> None:
        space = self.space(which)
        place = space.number, page
        ends = self.model.outcome(place, write=False)
        if ends != FINE:
            with pytest.raises(BusError if ends == BUS else SegmentationFault):
                await space.load(page * PAGE, PAGE)
            return
        loaded = await space.load(page * PAGE, PAGE)
        assert loaded == self.model.look(place)

    def _placed(self, space: Space, page: int) -> None:
        """A page that was just made may be anywhere that the CPU reaches."""
        cell = self.model.cells.get((space.number, page))
        if cell is not None:
            cell.zone = space.mm.table.get(page) >> pte.FRAME_SHIFT + 36
            assert cell.zone not in PRIVATE

    async def dontneed(self, which: int, where: tuple[int, int]) -> None:
        space = self.space(which)
        places = [(space.number, one) for one in range(where[0], sum(where))]
        if any(place in self.model.locked for place in places):
            return
        await self._advised(space, where, "DONTNEED")
        for place in places:
            self.model.drop(place)

    async def advise(self, which: int, where: tuple[int, int], advice: str) -> None:
        space = self.space(which)
        if any((space.number, one) in self.model.locked for one in range(where[0], sum(where))):
            return
        await self._advised(space, where, advice)

    async def _advised(self, space: Space, where: tuple[int, int], advice: str) -> None:
        code = 0
        try:
            await space.madvise(where[0] * PAGE, where[1] * PAGE, advice)
        except KernelError as error:
            code = error.code
        assert code == self.model.refusal(space.number, *where)

    async def remove(self, which: int, where: tuple[int, int]) -> None:
        space = self.space(which)
        places = [(space.number, one) for one in range(where[0], sum(where))]
        leads = [self.model.leads.get(place) for place in places]
        if any(lead is None or not lead.shared for lead in leads) or any(place in self.model.locked for place in places):
            return
        await space.madvise(where[0] * PAGE, where[1] * PAGE, "REMOVE")
        for lead in leads:
            assert lead is not None
            lead.file.cut(lead.offset, lead.offset + 1)

    async def mlock(self, which: int, where: tuple[int, int]) -> None:
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
            self.model.touch(place)
            self._placed(space, page)
        else:
            self.model.look(place)
        return True

    async def hints(self, which: int, where: tuple[int, int]) -> None:
        await self.space(which).numa_hints(where[0], sum(where))

    async def clear_refs(self, which: int) -> None:
        await self.space(which).clear_soft_dirty()

    # --- the file -------------------------------------------------------------------------------------------------------------

    async def write_file(self, offset: int, value: int) -> None:
        data = bytes([value]) * PAGE
        await self.file.write(offset * PAGE, data)
        self.modelled.pages = max(self.modelled.pages, offset + 1)
        self.modelled.page(offset)[:] = data

    async def punch(self, offset: int) -> None:
        await self.file.punch(offset * PAGE, PAGE)
        self.modelled.cut(offset, offset + 1)

    async def truncate(self, pages: int) -> None:
        await self.file.truncate(pages * PAGE)
        self.model.truncated(self.modelled, pages)

    # --- devices --------------------------------------------------------------------------------------------------------------

    def _migratable(self, space: Space, first: int, count: int) -> bool:
        vma = space.vma_at(first)
        return vma is not None and first + count <= vma.end and "r" in self.model.rights[space.number, first]

    async def todev(self, which: int, where: tuple[int, int], zone: int) -> None:
        space = self.space(which)
        if not self._migratable(space, *where):
            return
        kinds = space.mm.table.read(where[0], sum(where)) & np.uint64(pte.KIND)
        await self.machine.to_device(space, zone, span(*where))
        for one, kind in zip(range(where[0], sum(where)), kinds.tolist(), strict=True):
            place = space.number, one
            known = place in self.model.cells
            if kind in (pte.SWAP, pte.HINT) or (not known and (place in self.model.leads or place in self.model.missing)):
                continue
            self.model.to_device(place, zone)

    async def tosys(self, which: int, where: tuple[int, int], zone: int) -> None:
        space = self.space(which)
        if not self._migratable(space, *where):
            return
        hinted = space.mm.table.read(where[0], sum(where)) & np.uint64(pte.KIND) == pte.HINT
        await self.machine.to_system(space, zone, span(*where))
        for one, stays in zip(range(where[0], sum(where)), hinted.tolist(), strict=True):
            if not stays:
                self.model.to_system((space.number, one), zone)

    async def evict(self, zone: int) -> None:
        await self.machine.evict(zone)
        self.model.evict(zone)

    async def exclusive(self, which: int, where: tuple[int, int], zone: int) -> None:
        space = self.space(which)
        got = 0
        with contextlib.suppress(KernelError):  # the first page cannot be had; what it was a write fault to is seen below
            got = await space.make_exclusive(where[0], sum(where), zone)
        for one in range(where[0], sum(where)):
            place = space.number, one
            if not self.model.writable(place) or self.model.outcome(place, write=True) != FINE:
                break
            lead = self.model.leads.get(place)
            if lead is not None and lead.shared:
                for shared in range(one, min(sum(where), space.vma_end(one))):
                    if self.model.outcome((space.number, shared), write=True) != FINE:
                        break
                    self.model.touch((space.number, shared))
                break
            self.model.touch(place)
            cell = self.model.cells[place]
            cell.exclusive = one < where[0] + got
            cell.zone = space.mm.table.get(one) >> pte.FRAME_SHIFT + 36

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
            self.model.touch(place)
        else:
            self.model.look(place)
            if place in self.model.cells:
                self.model.own(place)
        self._placed(space, page)
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

    # --- processes ------------------------------------------------------------------------------------------------------------

    async def fork(self, which: int) -> None:
        if len(self.spaces) == PROCESSES_MAX:
            return
        parent = self.space(which)
        child = await self.machine.fork(parent)
        self.spaces[child.number] = child
        self.model.fork(parent.number, child.number)

    async def exit(self, which: int) -> None:
        if len(self.spaces) == 1:
            return
        space = self.space(which)
        del self.spaces[space.number]
        await self.machine.exit(space)
        self.model.exit(space.number)

    # --- comparison -----------------------------------------------------------------------------------------------------------

    def _bytes(self, entry: int) -> bytes:
        """What an entry leads to, in swap or in a memory."""
        if entry & pte.KIND != pte.SWAP:
            return self.machine.bytes_of(entry >> pte.FRAME_SHIFT)
        memory = self.machine.memory
        target = memory.allocate(1)
        assert target is not None
        memory.swap.load(memory, np.array([entry >> pte.FRAME_SHIFT], np.uint64), target)
        data = self.machine.bytes_of(int(target[0]))
        memory.put(target)
        return data

    def _part(self) -> None:
        """Who takes a shared page out of swap has one of his own: sharers that lead to different pages share no longer."""
        for cell in {id(cell): cell for cell in self.model.cells.values() if len(cell.places) > 1}.values():
            leads: dict[tuple[bool, int], list[tuple[int, int]]] = {}
            for process, page in sorted(cell.places):
                entry = self.spaces[process].mm.table.get(page)
                leads.setdefault((entry & pte.KIND == pte.SWAP, entry >> pte.FRAME_SHIFT), []).append((process, page))
            for places in list(leads.values())[1:]:
                part = Cell(bytearray(cell.data), cell.zone)
                for place in places:
                    self.model.put(place, part)

    def compare(self) -> None:
        """Invariants, bytes, places. Anonymous pages of zeros are forgotten: they may be any, or none."""
        self.machine.check()
        for place in [
            place
            for place, cell in self.model.cells.items()
            if not any(cell.data) and not cell.held and place not in self.model.missing and place not in self.model.leads
        ]:
            self.model.drop(place)
        self._part()
        for place in self.model.rights:
            number, page = place
            if page >= POOL and page not in PLACES:
                continue
            entry = self.spaces[number].mm.table.get(page)
            where = f"page {page - FIRST} of process {number}"
            cell, lead = self.model.cells.get(place), self.model.leads.get(place)
            if entry == 0 or entry & pte.SPECIAL:
                assert cell is None or not any(cell.data), f"{where} is lost"
            elif cell is not None:
                assert self._bytes(entry) == cell.data, f"{where} holds something else"
                if any(cell.data) and entry & pte.KIND != pte.SWAP:
                    assert entry >> pte.FRAME_SHIFT + 36 == cell.zone, f"{where} is elsewhere"
            elif lead is not None:
                assert self._bytes(entry) == bytes(lead.file.data.get(lead.offset, bytes(PAGE))), f"{where} shows another page of its file"
            else:
                assert not any(self._bytes(entry)), f"{where} is not zero"

    async def compare_file(self) -> None:
        """All of the file, as pread sees it."""
        read = await self.file.read(0, (FILE_PAGES + 2) * PAGE)
        assert read == b"".join(bytes(self.modelled.data.get(i, bytes(PAGE))) for i in range(self.modelled.pages))


@pytest.mark.timeout(600)  # half a minute, on a busy machine several
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(operations, min_size=40, max_size=200))
def test_files_and_shared_memory_equal_the_reference(history: list[tuple[Any, ...]]) -> None:
    """Up to 200 operations; at the end everything exits, and no frame and no slot of swap is in use anywhere."""

    async def main() -> None:
        player = Player()
        await player.begin()
        for name, *arguments in history:
            await getattr(player, name)(*arguments)
            player.compare()
        await player.compare_file()
        await player.unpin()
        for space in list(player.spaces.values()):
            await player.machine.exit(space)
        await player.file.truncate(0)
        player.machine.check()
        memory = player.machine.memory
        assert (memory.nodes[0].allocator.used_count, memory.swap.used) == (0, 0)
        assert [device.allocator.used_count for device in player.machine.devices.values()] == [0, 0]

    trio.run(main)
