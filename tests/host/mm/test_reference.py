"""Histories of processes, private and coherent devices, small and huge pages: memory equals the reference model (`model.py`) throughout.

After every operation: the invariants I2 to I5 and I8 (`Machine.check`), I6 by its bytes: every one that the model knows, where each such
page is, and that what it does not know is zero. Hypothesis shrinks what fails to the shortest history; `derandomize` makes every run the
same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmmnet.errors import KernelError, SegmentationFault
from hmmnet.host.mm import pte
from hmmnet.host.mm.space import Space
from hmmnet.pages import HUGE_PAGES, Words

from .machine import Machine, span
from .model import PAGE, Cell, Model

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
    st.tuples(st.just("exclusive"), which, pages, st.integers(1, 3), zones),
    st.tuples(st.just("hold"), which, st.sampled_from(INTERESTING[:SMALL])),
    st.tuples(st.just("release")),
    st.tuples(st.just("mremap"), which, st.sampled_from(INTERESTING[:SMALL]), st.integers(1, 4)),
)


class Player:
    """Applies operations to a machine and to the model, and compares."""

    def __init__(self) -> None:
        self.machine = Machine(16 * HUGE_PAGES, kinds=("private", "private", "coherent"), device_pages=16 * HUGE_PAGES)
        self.model = Model(PRIVATE)
        self.spaces: dict[int, Space] = {}
        self.holds: list[tuple[Space, Words, Any]] = []

    async def begin(self) -> None:
        """One process: small pages, then a block that asks for huge ones, and a few pages more."""
        space = self.machine.process()
        self.spaces[space.number] = space
        space.mm.cgroup = self.machine.memory.cgroups.create("all", None)  # children are members, too: the machine's check counts (I4)
        await self._map(space, FIRST, END - FIRST)
        await space.madvise(BLOCK * PAGE, HUGE_PAGES * PAGE, "HUGEPAGE")

    async def _map(self, space: Space, first: int, count: int) -> None:
        await space.mmap(count * PAGE, "rw", first * PAGE)
        for page in range(first, first + count):
            self.model.unmap((space.number, page))
            self.model.rights[space.number, page] = "rw"

    def space(self, which: int) -> Space:
        """One of the living processes."""
        living = list(self.spaces.values())
        return living[which % len(living)]

    # --- operations -----------------------------------------------------------------------------------------------------------

    async def store(self, which: int, page: int, offset: int, value: int) -> None:
        space = self.space(which)
        place = space.number, page
        if not self.model.writable(place):
            with pytest.raises(SegmentationFault):
                await space.store(page * PAGE + offset, bytes([value]))
            return
        known = place in self.model.cells
        await space.store(page * PAGE + offset, bytes([value]))
        cell = self.model.own(place)
        cell.data[offset] = value
        if not known:  # a page of zeros may have been anywhere that the CPU reaches
            cell.zone = space.mm.table.get(page) >> pte.FRAME_SHIFT + 36
            assert cell.zone not in PRIVATE

    async def load(self, which: int, page: int) -> None:
        space = self.space(which)
        if not self.model.readable((space.number, page)):
            with pytest.raises(SegmentationFault):
                await space.load(page * PAGE, PAGE)
            return
        loaded = await space.load(page * PAGE, PAGE)
        assert loaded == self._load((space.number, page))

    def _load(self, place: tuple[int, int]) -> bytes:
        """A load in the model; it takes all of a huge page of a device home."""
        process, page = place
        entry = self.spaces[process].mm.table.get(page)
        self._home_block(place)
        assert entry & pte.KIND != pte.DEVICE
        return self.model.load(place)

    def _home_block(self, place: tuple[int, int]) -> None:
        """Pages that came home along with this one: the machine says which, the model checks that they may."""
        process, page = place
        cell = self.model.cells.get(place)
        if cell is None or cell.zone not in PRIVATE or not BLOCK <= page < BLOCK + HUGE_PAGES:
            return
        for other in range(BLOCK, BLOCK + HUGE_PAGES):
            entry = self.spaces[process].mm.table.get(other)
            if entry & pte.KIND != pte.DEVICE:
                self.model.load((process, other))

    async def todev(self, which: int, place: tuple[int, int], zone: int, compound: bool) -> None:
        space = self.space(which)
        first, count = place
        if not self._one_vma(space, first, count):
            return
        stays = self._swapped(space, first, count)
        await self.machine.to_device(space, zone, span(first, count), compound=compound)
        for page in range(first, first + count):
            if page not in stays:
                self.model.to_device((space.number, page), zone)

    def _swapped(self, space: Space, first: int, count: int) -> set[int]:
        entries = space.mm.table.read(first, first + count)
        return set((np.flatnonzero(entries & np.uint64(pte.KIND) == pte.SWAP) + first).tolist())

    async def tosys(self, which: int, place: tuple[int, int], zone: int) -> None:
        space = self.space(which)
        first, count = place
        if not self._one_vma(space, first, count):
            return
        await self.machine.to_system(space, zone, span(first, count))
        for page in range(first, first + count):
            self.model.to_system((space.number, page), zone)

    def _one_vma(self, space: Space, first: int, count: int) -> bool:
        vma = space.vma_at(first)
        return vma is not None and first + count <= vma.end

    async def evict(self, zone: int) -> None:
        await self.machine.evict(zone)
        self.model.evict(zone)

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

    async def mprotect(self, which: int, place: tuple[int, int], rights: str) -> None:
        space = self.space(which)
        first, count = place
        code = 0
        try:
            await space.mprotect(first * PAGE, count * PAGE, rights)
        except KernelError as error:
            code = error.code
        assert code == self.model.refusal(space.number, first, count)
        for page in range(first, first + count):
            if (space.number, page) not in self.model.rights:
                break
            self.model.rights[space.number, page] = rights

    async def munmap(self, which: int, place: tuple[int, int]) -> None:
        space = self.space(which)
        first, count = place
        await space.munmap(first * PAGE, count * PAGE)
        for page in range(first, first + count):
            self.model.unmap((space.number, page))

    async def mmap(self, which: int, place: tuple[int, int]) -> None:
        await self._map(self.space(which), *place)

    async def dontneed(self, which: int, place: tuple[int, int]) -> None:
        await self._advised(which, place, "DONTNEED")
        for page in range(place[0], place[0] + place[1]):
            self.model.drop((self.space(which).number, page))

    async def advise(self, which: int, place: tuple[int, int], advice: str) -> None:
        space = self.space(which)
        gone = self._swapped(space, *place) if advice == "FREE" else ()
        await self._advised(which, place, advice)
        for page in gone:
            self.model.drop((space.number, page))

    async def _advised(self, which: int, place: tuple[int, int], advice: str) -> None:
        space = self.space(which)
        code = 0
        try:
            await space.madvise(place[0] * PAGE, place[1] * PAGE, advice)
        except KernelError as error:
            code = error.code
        assert code == self.model.refusal(space.number, *place)

    async def collapse(self, which: int) -> None:
        space = self.space(which)
        try:
            await space.madvise(BLOCK * PAGE, HUGE_PAGES * PAGE, "COLLAPSE")
        except KernelError:
            pass  # what it has brought home by then is home
        else:
            for page in range(BLOCK, BLOCK + HUGE_PAGES):
                cell = self.model.cells.get((space.number, page))
                if cell is not None and len(cell.places) > 1 and not self._is_mapped_by_all(cell, space):
                    self.model.own((space.number, page))
        for page in range(BLOCK, BLOCK + HUGE_PAGES):
            if space.mm.table.get(page) & pte.KIND == pte.PRESENT:
                self.model.load((space.number, page))

    def _is_mapped_by_all(self, cell: Any, space: Space) -> bool:
        """Whether the sharers still map one frame: a block that was huge already was not copied."""
        frames = {self.spaces[process].mm.table.get(page) >> pte.FRAME_SHIFT for process, page in cell.places if process in self.spaces}
        assert space.number in {process for process, _ in cell.places}
        return len(frames) == 1

    async def exclusive(self, which: int, page: int, count: int, zone: int) -> None:
        space = self.space(which)
        got = 0
        try:
            got = await space.make_exclusive(page, page + count, zone)
        except KernelError:
            assert not self.model.writable((space.number, page))
        for here in range(page, page + count):
            place = space.number, here
            if not self.model.writable(place):
                break
            self._home_block(place)
            self.model.own(place).exclusive = here < page + got
        assert got <= count

    async def hold(self, which: int, page: int) -> None:
        space = self.space(which)
        place = space.number, page
        if not self.model.readable(place):
            return
        frames = await space.get_pages(page, 1)
        self.model.load(place)
        cell = self.model.cells.get(place)
        if cell is not None:
            cell.held += 1
        self.holds.append((space, frames, cell))

    async def release(self) -> None:
        for space, frames, cell in self.holds:
            space.put_pages(frames)
            if cell is not None:
                cell.held -= 1
        self.holds.clear()

    async def mremap(self, which: int, page: int, count: int) -> None:
        space = self.space(which)
        target = END + 8
        if not self._one_vma(space, page, count):
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

    # --- comparison -----------------------------------------------------------------------------------------------------------

    def _in_swap(self, slot: int) -> bytes:
        target = self.machine.memory.allocate(1)
        assert target is not None
        self.machine.memory.swap.load(self.machine.memory, np.array([slot], np.uint64), target)
        data = self.machine.bytes_of(int(target[0]))
        self.machine.memory.put(target)
        return data

    def _part(self) -> None:
        """Whoever takes a shared page out of swap has one of his own: sharers that lead to different pages now share no longer."""
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
        """Invariants, bytes, places. Pages of zeros are forgotten: they may be the zero page, or any other, wherever it is."""
        self.machine.check()
        for place in [place for place, cell in self.model.cells.items() if not any(cell.data) and not cell.held]:
            self.model.drop(place)
        self._part()
        for number, space in self.spaces.items():
            mapped = space.mm.table.occupied(0, 1 << 35)
            entries = dict(zip(mapped.tolist(), space.mm.table.gather(mapped).tolist(), strict=True))
            for (process, page), cell in self.model.cells.items():
                if process != number:
                    continue
                entry = entries.get(page, 0)
                frame = entry >> pte.FRAME_SHIFT
                zero = not any(cell.data)
                if entry & pte.KIND == pte.SWAP:
                    assert self._in_swap(frame) == cell.data, f"page {page - FIRST} of process {number} was swapped with something else"
                    continue
                if entry == 0 or entry & pte.SPECIAL:
                    assert zero, f"page {page - FIRST} of process {number} is lost"
                    continue
                assert self.machine.bytes_of(frame) == cell.data, f"page {page - FIRST} of process {number} holds something else"
                if not zero:
                    assert frame >> 36 == cell.zone, f"page {page - FIRST} of process {number} is in zone {frame >> 36}, not {cell.zone}"
            for page in INTERESTING:
                entry = entries.get(page, 0)
                if entry & pte.KIND == pte.SWAP:
                    assert (number, page) in self.model.cells or not any(self._in_swap(entry >> pte.FRAME_SHIFT))
                elif (number, page) not in self.model.cells and entry and not entry & pte.SPECIAL:
                    assert not any(self.machine.bytes_of(entry >> pte.FRAME_SHIFT)), f"page {page - FIRST} of process {number} is not zero"


@pytest.mark.timeout(600)  # half a minute, on a busy machine several
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(operations, min_size=40, max_size=200))
def test_memory_equals_the_reference(history: list[tuple[Any, ...]]) -> None:
    """Up to 200 operations; at the end everything exits and no frame is in use anywhere."""

    async def main() -> None:
        player = Player()
        await player.begin()
        for name, *arguments in history:
            await getattr(player, name)(*arguments)
            player.compare()
        await player.release()
        for space in list(player.spaces.values()):
            await player.machine.exit(space)
        player.machine.check()
        assert player.machine.memory.nodes[0].allocator.used_count == 0
        assert [device.allocator.used_count for device in player.machine.devices.values()] == [0, 0, 0]

    trio.run(main)


def test_a_machine_that_forgets_is_found_out() -> None:
    """One byte, changed behind everybody's back."""

    async def main() -> None:
        player = Player()
        await player.begin()
        await player.store(0, FIRST, 3, 9)
        player.compare()
        space = player.space(0)
        space.memory.write_small(space.mm.table.get(FIRST) >> pte.FRAME_SHIFT, 3, b"\0")
        with pytest.raises(AssertionError, match="holds something else"):
            player.compare()

    trio.run(main)
