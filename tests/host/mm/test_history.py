"""Histories of one process and two devices: the address space equals a model made of dictionaries.

The model keeps, for each page, its rights, its bytes, and where they are. It is slow and says each rule once, in the plainest way:

    page    never touched -> zero page (load) -> host (store) -> device (migrate) -> host (any CPU access)
    WRITE   given by a store; taken by mprotect; given back by mprotect for host pages only; carried by migrations
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from hmmnet.errors import KernelError, SegmentationFault
from hmmnet.host.mm.space import Space
from hmmnet.pages import HMM_PFN_ERROR, HMM_PFN_VALID, HMM_PFN_WRITE, MIGRATE_PFN_MIGRATE, PAGE_SIZE

from .machine import Machine, span

BASE = 0x10000
PAGES = 24
OWNERS = {0: "node0", 64: "gpu0", 65: "gpu1"}
RIGHTS = ("rw", "r", "w", "rx", "none")


@dataclass
class Cell:
    """What is at a page: bytes (None: never touched, or the zero page), the zone they are in, whether the entry allows a store."""

    data: bytearray | None = None
    zone: int = 0
    zero: bool = False
    writable: bool = False


@dataclass
class Model:
    """Rights and cells by page."""

    rights: dict[int, str] = field(default_factory=dict)
    cells: dict[int, Cell] = field(default_factory=dict)

    def drop(self, page: int) -> None:
        """The page is as never touched."""
        self.cells.pop(page, None)

    def access(self, page: int, *, write: bool) -> Cell | None:
        """A CPU access; None is SIGSEGV."""
        rights = self.rights.get(page, "none")
        if rights == "none" or (write and "w" not in rights):
            return None
        cell = self.cells.setdefault(page, Cell(zero=True))
        cell.zone = 0
        if write:
            if cell.data is None:
                cell.data = bytearray(PAGE_SIZE)
            cell.zero = False
            cell.writable = True
        return cell

    def snapshot(self, page: int, owner: int) -> int:
        """The flags that a walk shows to `owner`."""
        if "r" not in self.rights.get(page, "none"):
            return HMM_PFN_ERROR
        cell = self.cells.get(page)
        if cell is None or cell.zone not in (0, owner):
            return 0
        return HMM_PFN_VALID | (HMM_PFN_WRITE if cell.writable else 0)


page_numbers = st.integers(0, PAGES - 1)
ranges = st.tuples(page_numbers, st.integers(1, 8))
operations = st.one_of(
    st.tuples(st.just("mmap"), ranges, st.sampled_from(RIGHTS)),
    st.tuples(st.just("munmap"), ranges),
    st.tuples(st.just("mprotect"), ranges, st.sampled_from(RIGHTS)),
    st.tuples(st.just("dontneed"), ranges),
    st.tuples(st.just("load"), page_numbers, st.integers(0, 3 * PAGE_SIZE), st.integers(1, 2 * PAGE_SIZE)),
    st.tuples(st.just("store"), page_numbers, st.integers(0, 3 * PAGE_SIZE), st.integers(1, 2 * PAGE_SIZE), st.integers(0, 255)),
    st.tuples(st.just("todev"), ranges, st.sampled_from((64, 65))),
    st.tuples(st.just("tosys"), ranges, st.sampled_from((64, 65))),
)


class Player:
    """Applies operations to a machine and to the model, and compares."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.space: Space = self.machine.process()
        self.model = Model()

    async def play(self, operation: tuple[object, ...]) -> None:
        """One operation, and the comparison of everything."""
        name, *arguments = operation
        await getattr(self, str(name))(*arguments)
        await self.compare()

    async def mmap(self, pages: tuple[int, int], rights: str) -> None:
        first, count = pages
        address = await self.space.mmap(count * PAGE_SIZE, rights, (BASE + first) * PAGE_SIZE)
        assert address == (BASE + first) * PAGE_SIZE
        for page in range(BASE + first, BASE + first + count):
            self.model.drop(page)
            self.model.rights[page] = rights

    async def munmap(self, pages: tuple[int, int]) -> None:
        first, count = pages
        await self.space.munmap((BASE + first) * PAGE_SIZE, count * PAGE_SIZE)
        for page in range(BASE + first, BASE + first + count):
            self.model.drop(page)
            self.model.rights.pop(page, None)

    async def mprotect(self, pages: tuple[int, int], rights: str) -> None:
        first, count = pages
        held = None
        try:
            await self.space.mprotect((BASE + first) * PAGE_SIZE, count * PAGE_SIZE, rights)
        except KernelError as error:
            held = error.code
        expected = None
        for page in range(BASE + first, BASE + first + count):
            if page not in self.model.rights:
                expected = errno.ENOMEM
                break
            changed = self.model.rights[page] != rights
            self.model.rights[page] = rights
            cell = self.model.cells.get(page)
            if cell is not None and "w" not in rights:
                cell.writable = False
            elif changed and cell is not None and cell.zone == 0 and not cell.zero:
                cell.writable = True
        assert held == expected

    async def dontneed(self, pages: tuple[int, int]) -> None:
        first, count = pages
        held = None
        try:
            await self.space.madvise((BASE + first) * PAGE_SIZE, count * PAGE_SIZE, "DONTNEED")
        except KernelError as error:
            held = error.code
        inside = range(BASE + first, BASE + first + count)
        for page in inside:
            self.model.drop(page)
        assert held == (None if all(page in self.model.rights for page in inside) else errno.ENOMEM)

    async def load(self, page: int, offset: int, length: int) -> None:
        address = (BASE + page) * PAGE_SIZE + offset
        expected = bytearray()
        for here in range(address // PAGE_SIZE, (address + length - 1) // PAGE_SIZE + 1):
            cell = self.model.access(here, write=False)
            if cell is None:
                break
            low, high = max(address, here * PAGE_SIZE), min(address + length, (here + 1) * PAGE_SIZE)
            expected += (cell.data or bytes(PAGE_SIZE))[low - here * PAGE_SIZE : high - here * PAGE_SIZE]
        if len(expected) == length:
            assert await self.space.load(address, length) == expected
            return
        with pytest.raises(SegmentationFault) as held:
            await self.space.load(address, length)
        assert held.value.address // PAGE_SIZE == (address + len(expected)) // PAGE_SIZE

    async def store(self, page: int, offset: int, length: int, value: int) -> None:
        address = (BASE + page) * PAGE_SIZE + offset
        data = bytes((value + i) & 255 for i in range(length))
        done = 0
        for here in range(address // PAGE_SIZE, (address + length - 1) // PAGE_SIZE + 1):
            cell = self.model.access(here, write=True)
            if cell is None:
                break
            assert cell.data is not None
            low, high = max(address, here * PAGE_SIZE), min(address + length, (here + 1) * PAGE_SIZE)
            cell.data[low - here * PAGE_SIZE : high - here * PAGE_SIZE] = data[low - address : high - address]
            done = high - address
        if done == length:
            await self.space.store(address, data)
            return
        with pytest.raises(SegmentationFault) as held:
            await self.space.store(address, data)
        assert held.value.address // PAGE_SIZE == (address + done) // PAGE_SIZE

    async def todev(self, pages: tuple[int, int], zone: int) -> None:
        first, count = BASE + pages[0], pages[1]
        if not await self._one_vma(first, count):
            return
        source = await self.machine.to_device(self.space, zone, span(first, count))
        for i, page in enumerate(range(first, first + count)):
            cell = self.model.cells.get(page)
            moves = cell is None or cell.zone == 0
            assert bool(int(source[i]) & MIGRATE_PFN_MIGRATE) == moves
            if not moves:
                continue
            if cell is None or cell.zero:
                cell = self.model.cells[page] = Cell(bytearray(PAGE_SIZE), writable="w" in self.model.rights[page])
            cell.zone = zone

    async def tosys(self, pages: tuple[int, int], zone: int) -> None:
        first, count = BASE + pages[0], pages[1]
        if not await self._one_vma(first, count):
            return
        moved = await self.machine.to_system(self.space, zone, span(first, count))
        mine = [cell for page, cell in self.model.cells.items() if first <= page < first + count and cell.zone == zone]
        assert moved == len(mine)
        for cell in mine:
            cell.zone = 0

    async def _one_vma(self, first: int, count: int) -> bool:
        """Whether the range may migrate: if not, check_migratable says so."""
        vma = self.space.vma_at(first)
        good = vma is not None and first + count <= vma.end and "r" in self.model.rights[first]
        if good:
            self.space.check_migratable(first, first + count)
        else:
            with pytest.raises(KernelError, match="EINVAL"):
                self.space.check_migratable(first, first + count)
        return good

    async def compare(self) -> None:
        """Pagemap, both devices' snapshots, and where everything lives."""
        pagemap = self.space.pagemap(BASE * PAGE_SIZE, PAGES)
        residency = self.space.residency(BASE * PAGE_SIZE, PAGES)
        async with self.space.mmap_lock.read():
            walks = {zone: self.space.walk(BASE, BASE + PAGES, None, 0, 0, zone) for zone in (64, 65)}
        for i in range(PAGES):
            cell = self.model.cells.get(BASE + i)
            letter = 0x2D if cell is None else 0x53 if cell.zone else 0x50 | (0 if cell.zero else 0x80)
            assert pagemap[i] == letter
            place = int(residency.pages[i])
            owner = residency.owners[place] if place >= 0 else ""
            assert owner == ("" if cell is None or cell.zero else OWNERS[cell.zone])
            for zone, walk in walks.items():
                assert int(walk.words[i]) >> 61 << 61 == self.model.snapshot(BASE + i, zone)
        self.machine.check()


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(operations, max_size=40))
def test_history_equals_the_model(history: list[tuple[object, ...]]) -> None:
    """After every operation of a random history the address space and the model agree on everything that can be seen."""

    async def main() -> None:
        player = Player()
        await player.play(("mmap", (0, PAGES), "rw"))
        for operation in history:
            await player.play(operation)
        await player.space.exit()
        player.machine.check()
        assert player.machine.memory.nodes[0].allocator.used_count == 0

    trio.run(main)
