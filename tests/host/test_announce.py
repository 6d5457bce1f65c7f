"""Shared pages move for everybody: each process that maps one is told, and sees it where it has gone."""

from __future__ import annotations

import numpy as np
import trio

from hmmnet.host.hub import Hub
from hmmnet.host.mm.space import Space
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_MAX, announced_runs

from .fakes import Bench, FakeLink, words

PAGES = 3


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
