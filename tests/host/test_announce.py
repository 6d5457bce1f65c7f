"""Shared pages move for everybody: each process that maps one is told, and sees it where it has gone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import pytest
import trio

from hmmnet.errors import KernelError
from hmmnet.faults import Controls, Injector, PointFault
from hmmnet.host.announce import ROUNDS_MAX, split_large
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Event
from hmmnet.host.mm import pte
from hmmnet.host.mm.filemap import File
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.vma import VM_HUGEPAGE
from hmmnet.host.poison import break_memory
from hmmnet.pages import HUGE_PAGES, PAGE_SHIFT, PAGE_SIZE, PAGES_MAX, announced_runs

from .fakes import Bench, FakeAcknowledgement, FakeLink, words

PAGES = 3
BASE = 1 << 30
BLOCK = HUGE_PAGES * PAGE_SIZE


def waiting(space: Space, first: int) -> tuple[FakeLink, trio.Event]:
    """A device that mirrors a block of `space` and does not answer before the event is set."""
    assert isinstance(space.hub, Hub)
    space.hub.insert(first, first + HUGE_PAGES, link := FakeLink("slow", 66), space.number)
    return link, link.hold()


def mirrored(space: Space, first: int) -> FakeLink:
    """Another, which answers at once."""
    assert isinstance(space.hub, Hub)
    space.hub.insert(first, first + HUGE_PAGES, link := FakeLink("quick", 65), space.number)
    return link


async def told(link: FakeLink) -> None:
    """Return when the device has heard of something."""
    with trio.fail_after(5):
        while not link.told:
            await trio.lowlevel.checkpoint()


async def forked(bench: Bench) -> tuple[Space, Space, int]:
    """A parent with numbered pages, a child that shares them, and the address."""
    parent = bench.space(1)
    address = await parent.mmap(PAGES * PAGE_SIZE)
    await parent.store(address, np.repeat(np.arange(1, PAGES + 1, dtype=np.uint8), PAGE_SIZE))
    child = bench.spaces[2] = await parent.fork(2, Hub())
    return parent, child, address


async def test_shared_pages_go_to_the_device_for_all() -> None:
    """Both processes' entries lead to the device, and both mirrors were told before."""
    bench = Bench()
    parent, child, address = await forked(bench)
    assert isinstance(child.hub, Hub)
    mirror = child.hub.insert(0, PAGES_MAX, bench.link, 2, own=False)
    before = mirror.sequence
    assert (await bench.to_device(parent, address, PAGES)).moved == PAGES
    assert mirror.sequence > before
    for space in (parent, child):
        assert bytes(value & 0x7F for value in space.pagemap(address, PAGES)) == b"SSS"


async def test_shared_pages_come_home_for_all() -> None:
    """A fault of one brings the page home, and the other finds it there; a store then copies."""
    bench = Bench()
    parent, child, address = await forked(bench)
    await bench.to_device(parent, address, PAGES)
    assert await child.load(address + PAGE_SIZE, 1) == b"\2"
    assert [bytes(value & 0x7F for value in space.pagemap(address, PAGES)) for space in (parent, child)] == [b"SPS", b"SPS"]
    await child.store(address, b"\7")
    assert await parent.load(address, 1) == b"\1"
    assert await child.load(address, 1) == b"\7"
    outcome = await bench.homing.migrate_to_system(parent, bench.link, address >> PAGE_SHIFT, (address >> PAGE_SHIFT) + PAGES)
    assert outcome.moved == 1
    assert bench.page_map.used_pages == 0
    assert await child.load(address + 2 * PAGE_SIZE, 1) == b"\3"


async def test_a_sharer_nobody_knows_keeps_the_page() -> None:
    """A process that cannot be told makes its pages stay: partial success, and nothing is lost."""
    bench = Bench()
    parent, child, address = await forked(bench)
    del bench.spaces[2]
    assert (await bench.to_device(parent, address, PAGES)).moved == 0
    assert await child.load(address, 1) == await parent.load(address, 1) == b"\1"


async def test_a_page_that_came_to_be_taken_was_not_announced() -> None:
    """Mirrors are told of pages 1 and 2. Meanwhile page 0 comes home, and a mirror may have it again: it stays.

    That its process was told of others is not enough: the mirror would go on reading the frame that page 0 has left, whoever has it then.
    """
    bench = Bench()
    parent, child, address = await forked(bench)
    first = address >> PAGE_SHIFT
    await bench.to_device(parent, address, 1)
    quick, slow = FakeLink("quick", 65), FakeLink("slow", 66)
    bench.hub(child).insert(first, first + 1, quick, 2)
    bench.hub(child).insert(first + 1, first + PAGES, slow, 2)
    gate = slow.hold()
    moved: list[int] = []

    async def migrate() -> None:
        moved.append((await bench.to_device(parent, address, PAGES)).moved)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(migrate)
        while not slow.told:
            await trio.lowlevel.checkpoint()
        assert await parent.load(address, 1) == b"\1"
        told = len(quick.told)
        gate.set()
    assert (moved, len(quick.told) - told) == ([2], 0)
    for space in (parent, child):
        assert bytes(value & 0x7F for value in space.pagemap(address, PAGES)) == b"PSS"


def test_runs_are_exact_until_there_are_too_many() -> None:
    """Few runs are announced one by one, many as the range that spans them."""
    assert announced_runs(words(9, 3, 4, 5)) == [(3, 6), (9, 10)]
    assert announced_runs(words(*range(0, 400, 2))) == [(0, 399)]


async def two_with_a_large_folio() -> tuple[Bench, Space, Space, File]:
    """Two processes that have mapped a file of one large folio at BASE, and the file."""
    bench = Bench()
    one, two = bench.space(1), bench.space(2)
    file = File(bench.memory, BLOCK)
    for space in (one, two):
        await space.mmap(BLOCK, "rw", BASE, file=file, shared=True)
    await one.store(BASE, np.ones(BLOCK, np.uint8))
    await one.madvise(BASE, BLOCK, "COLLAPSE")
    await one.load(BASE, 1)
    return bench, one, two, file


async def test_who_maps_a_file_again_while_its_folio_is_to_be_split_is_told() -> None:
    """One process migrates a page of it; another, which has been told where it had it, maps it elsewhere, and a device mirrors that.

    The split unmaps it there, too: without being told the device would go on using a page that is nobody's.
    """
    bench, one, two, file = await two_with_a_large_folio()
    slow, gate = waiting(two, BASE >> PAGE_SHIFT)
    quick = mirrored(two, 2 * BASE >> PAGE_SHIFT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.to_device, one, BASE, 1)
        await told(slow)
        await two.mmap(BLOCK, "rw", 2 * BASE, file=file, shared=True)
        await two.load(2 * BASE, 1)
        assert two.mm.table.pmd(2 * BASE >> PAGE_SHIFT)
        gate.set()
    assert not two.mm.table.get(2 * BASE >> PAGE_SHIFT)
    assert [heard[1:4] for heard in quick.told] == [(2 * BASE >> PAGE_SHIFT, (2 * BASE >> PAGE_SHIFT) + HUGE_PAGES, Event.CLEAR)]
    assert await two.load(2 * BASE, BLOCK) == b"\1" * BLOCK


async def test_who_is_forked_while_a_folio_is_to_be_split_is_told() -> None:
    """A child of the other process maps it by then; its pages of zeros become the zero page, and the frames are somebody else's."""
    bench = Bench()
    parent = bench.space(1)
    await parent.mmap(BLOCK, "rw", BASE, VM_HUGEPAGE)
    await parent.store(BASE, b"first page")
    child = bench.spaces[2] = await parent.fork(2, Hub())
    slow, gate = waiting(parent, BASE >> PAGE_SHIFT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.to_device, parent, BASE, 1)
        await told(slow)
        grandchild = bench.spaces[3] = await child.fork(3, Hub())
        assert grandchild.mm.table.pmd(BASE >> PAGE_SHIFT)
        quick = mirrored(grandchild, BASE >> PAGE_SHIFT)
        gate.set()
    assert (BASE >> PAGE_SHIFT, (BASE >> PAGE_SHIFT) + HUGE_PAGES, Event.CLEAR) in [heard[1:4] for heard in quick.told]
    assert bytes(value & 0x7F for value in grandchild.pagemap(BASE, 2)) == b"SP"
    assert await grandchild.load(BASE, BLOCK) == b"first page".ljust(BLOCK, b"\0")


async def test_a_folio_that_has_gone_meanwhile_is_not_split() -> None:
    """Its memory may be somebody else's by then, page by page: those stay as they are, zeros or not."""
    bench = Bench()
    space, other = bench.space(1), bench.space(2)
    await space.mmap(BLOCK, "rw", BASE, VM_HUGEPAGE)
    await space.store(BASE, b"first page")
    (found,) = space.large(np.array([BASE >> PAGE_SHIFT], np.uint64))
    await space.madvise(BASE, BLOCK, "DONTNEED")
    await other.mmap(BLOCK, "rw", BASE)
    await other.store(BASE, bytes(BLOCK))
    assert found.where() == []
    assert not found.split()
    assert other.mm.rss == HUGE_PAGES


async def test_what_a_folio_has_let_go_of_is_not_split_with_it() -> None:
    """Two of its pages have gone, and are another process's now: zeros, pinned, and no reason not to split the others."""
    bench = Bench(host_pages=2 * HUGE_PAGES)
    space, other = bench.space(1), bench.space(2)
    await space.mmap(BLOCK, "rw", BASE, VM_HUGEPAGE)
    await space.store(BASE, np.ones(3 * PAGE_SIZE, np.uint8))
    await space.madvise(BASE, 2 * PAGE_SIZE, "DONTNEED")
    await other.mmap(BLOCK + PAGE_SIZE, "rw", BASE)
    await other.store(BASE, bytes(BLOCK + PAGE_SIZE))  # frame 0 is the zero page, 511 lie below the folio
    assert bench.memory.is_used_up
    held = await other.get_pages(BASE >> PAGE_SHIFT, HUGE_PAGES + 1, pin=True)
    (found,) = space.large(np.array([(BASE >> PAGE_SHIFT) + 2], np.uint64))
    assert [mm.number for mm, _ in found.where()] == [1]
    assert found.split()
    assert (space.mm.rss, other.mm.rss) == (1, HUGE_PAGES + 1)
    other.put_pages(held, pin=True)


async def test_who_is_forked_while_memory_breaks_is_told() -> None:
    """Its mirrors must not go on using a page that is poisoned for everybody."""
    bench = Bench()
    parent = bench.space(1)
    await parent.mmap(BLOCK, "rw", BASE)
    await parent.store(BASE, np.ones(BLOCK, np.uint8))
    child = bench.spaces[2] = await parent.fork(2, Hub())
    first = BASE >> PAGE_SHIFT
    slow, gate = waiting(parent, first)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(break_memory, bench.memory, bench.spaces, parent, first, first + 1)
        await told(slow)
        grandchild = bench.spaces[3] = await child.fork(3, Hub())
        quick = mirrored(grandchild, first)
        gate.set()
    assert [heard[1:4] for heard in quick.told] == [(first, first + 1, Event.CLEAR)]
    assert bytes(value & 0x7F for value in grandchild.pagemap(BASE, 2)) == b"-P"


async def test_what_is_unmapped_while_others_are_told_needs_no_split() -> None:
    """Two huge pages are to be split, where faults are injected; the second goes while the mirror of the first is waited for."""
    bench = Bench(host_pages=8 * HUGE_PAGES)
    space = bench.space(1)
    await space.mmap(2 * BLOCK, "rw", BASE, VM_HUGEPAGE)
    await space.store(BASE, b"a")
    await space.store(BASE + BLOCK, b"b")
    first = BASE >> PAGE_SHIFT
    slow, gate = waiting(space, first)
    bench.memory.points = (injector := Injector()).points_of("host")
    injector.add(PointFault("migrate.split", "fail", controls=Controls(nth=1000)))

    async def split() -> None:
        async with space.mmap_lock.read():
            await split_large(space, bench.spaces, words(first, first + HUGE_PAGES), 64, compound=False)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(split)
        await told(slow)
        await space.madvise(BASE + BLOCK, BLOCK, "DONTNEED")
        gate.set()
    assert not space.mm.table.pmd(first)
    assert await space.load(BASE, 1) + await space.load(BASE + BLOCK, 1) == b"a\0"


ANEW_MAX = 5 * ROUNDS_MAX
"""After so many rounds the tests' processes tire."""


class LateAcknowledgement(FakeAcknowledgement):
    """Before it comes, somebody else does something."""

    async def finish(self) -> None:
        link = self.link
        assert isinstance(link, Anew)
        if link.meanwhile is not None and link.rests and link.rounds < link.tires:
            link.rests = False  # it is told of what that changes, too
            link.rounds += 1
            await link.meanwhile(link.rounds)
            link.rests = True


@dataclass
class Anew(FakeLink):
    """A device that mirrors a process and does `meanwhile`, up to `tires` times, before it acknowledges."""

    rounds: int = 0
    tires: int = ANEW_MAX
    rests: bool = True
    meanwhile: Callable[[int], Awaitable[None]] | None = None

    def invalidate_start(
        self, context: int, subscription: int, start: int, end: int, event: Event, owner: int, sequence: int
    ) -> LateAcknowledgement:
        self.told.append((subscription, start, end, event, owner, sequence))
        return LateAcknowledgement(self)

    def mirror(self, space: Space) -> None:
        assert isinstance(space.hub, Hub)
        space.hub.insert(0, PAGES_MAX, self, space.number)


async def a_family(bench: Bench, length: int = BLOCK) -> tuple[Space, Anew]:
    """A process that shares memory with its child; whenever the child's device is told, the family's youngest forks, and is mirrored."""
    parent = bench.space(1)
    await parent.mmap(length, "rw", BASE, VM_HUGEPAGE)
    await parent.store(BASE, np.ones(length, np.uint8))
    bench.spaces[2] = await parent.fork(2, Hub())
    link = Anew("slow", 66)
    link.mirror(bench.spaces[2])

    async def fork(_: int) -> None:
        youngest = max(bench.spaces)
        child = bench.spaces[youngest + 1] = await bench.spaces[youngest].fork(youngest + 1, Hub())
        link.mirror(child)

    link.meanwhile = fork
    return parent, link


@pytest.mark.parametrize("tires", [ROUNDS_MAX - 1, ANEW_MAX])
async def test_a_folio_that_is_shared_anew_again_and_again_stays_whole(tires: int, caplog: pytest.LogCaptureFixture) -> None:
    """A family that forks while its mirrors are told is told, round after round; one that never stops keeps its folio, and this is said."""
    bench = Bench()
    parent, link = await a_family(bench)
    link.tires = tires
    outcome = await bench.to_device(parent, BASE, 1)
    whole = tires > ROUNDS_MAX
    assert link.rounds == (ROUNDS_MAX if whole else tires)
    assert (outcome.moved, parent.mm.table.pmd(BASE >> PAGE_SHIFT) != 0) == ((0, True) if whole else (1, False))
    assert [await space.load(BASE, BLOCK) for space in bench.spaces.values()] == [b"\1" * BLOCK] * (link.rounds + 2)
    assert ("process 12 has come to map it" in caplog.text) == whole


async def test_memory_that_is_shared_anew_again_and_again_does_not_break() -> None:
    """EBUSY, and nobody's page is poisoned or held; when the family has come to rest it breaks for all of them."""
    bench = Bench()
    parent, link = await a_family(bench, PAGE_SIZE)
    first = BASE >> PAGE_SHIFT
    with pytest.raises(KernelError, match=r"EBUSY.*has come to map it at page 0x40000 while others were told, as somebody did 10 times"):
        await break_memory(bench.memory, bench.spaces, parent, first, first + 1)
    assert (link.rounds, len(bench.spaces)) == (ROUNDS_MAX, ROUNDS_MAX + 2)
    assert {await space.load(BASE, 1) for space in bench.spaces.values()} == {b"\1"}
    assert bench.memory.field(pte.frames_of(parent.entries(words(first))), "refcount").tolist() == [len(bench.spaces)]
    link.tires = 0
    assert await break_memory(bench.memory, bench.spaces, parent, first, first + 1) == 1
    assert {bytes(space.pagemap(BASE, 1)) for space in bench.spaces.values()} == {b"-"}


async def test_a_file_that_is_mapped_anew_again_and_again_is_not_split() -> None:
    """Two processes: one migrates a page of it; the other maps it once more whenever its mirror is told."""
    bench, one, two, file = await two_with_a_large_folio()

    async def map_it(number: int) -> None:
        await two.mmap(BLOCK, "rw", (1 + number) * BASE, file=file, shared=True)

    link = Anew("slow", 66, meanwhile=map_it)
    link.mirror(two)
    assert (await bench.to_device(one, BASE, 1)).moved == 0
    assert link.rounds == ROUNDS_MAX
    assert one.mm.table.pmd(BASE >> PAGE_SHIFT)
    assert await two.load((1 + ROUNDS_MAX) * BASE, BLOCK) == b"\1" * BLOCK
