"""Long-term pins of coherent memory, and pins that are overtaken by a migration.

Oracle: mm/gup.c (check_and_migrate_movable_pages, migrate_longterm_unpinnable_folios); recording c04.
"""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import KernelError
from hmmnet.host.hub import Hub
from hmmnet.host.mm import gup, pte
from hmmnet.pages import zone_of
from tests.host.fakes import FakeLink

from .files import BASE, PAGE, symbols, written
from .machine import Machine, page_bytes, span

FIRST = BASE // PAGE


async def test_a_longterm_pin_takes_coherent_pages_home_device_by_device() -> None:
    """Pages of two devices and the host between each other: all come to the host, with their bytes; a short pin leaves them there."""
    machine = Machine(kinds=("coherent", "coherent"))
    space = await written(machine, 6)
    await machine.to_device(space, 64, span(FIRST, 2))
    await machine.to_device(space, 65, span(FIRST + 2, 1))
    await machine.to_device(space, 64, span(FIRST + 4, 1))
    short = await space.get_pages(FIRST, 6, pin=True)
    assert [zone_of(frame) for frame in short.tolist()] == [64, 64, 65, 0, 64, 0]
    space.put_pages(short, pin=True)
    pinned = await space.get_pages(FIRST, 6, pin=True, longterm=True, write=True)
    assert [zone_of(frame) for frame in pinned.tolist()] == [0] * 6
    assert [machine.bytes_of(frame)[:1] for frame in pinned.tolist()] == [bytes([i + 1]) for i in range(6)]
    assert machine.devices[64].allocator.used_count == machine.devices[65].allocator.used_count == 0
    moved = await machine.to_device(space, 64, span(FIRST, 6))
    assert not (moved & 2).any(), "what is pinned does not migrate"
    space.put_pages(pinned, pin=True)
    machine.check()


async def test_a_longterm_pin_of_a_page_that_is_held_on_its_device_is_ebusy() -> None:
    """After some tries; nobody holds anything more than before, and what could go home is there."""
    machine = Machine(kind="coherent")
    space = await written(machine, 2)
    await machine.to_device(space, 64, span(FIRST, 2))
    held = await space.get_pages(FIRST + 1, 1)
    with pytest.raises(KernelError, match="is held on its device and cannot come home") as caught:
        await space.get_pages(FIRST, 2, pin=True, longterm=True)
    assert caught.value.code == errno.EBUSY
    assert len(machine.homed) == gup.UNPIN_ROUNDS_MAX + 1  # both in the first round, then the one that stays
    assert [zone_of(int(entry) >> pte.FRAME_SHIFT) for entry in space.mm.table.read(FIRST, FIRST + 2)] == [0, 64]
    space.put_pages(held)
    assert not machine.memory.zones[0].pincount.any()
    machine.check()


async def test_a_page_that_leaves_while_another_is_unshared_is_faulted_again() -> None:
    """A read-only pin of a page that a child shares, and of one of its own; the second goes to a device while mirrors are told of it.

    The pin has both in the end, the second brought home, and none of them goes anywhere while it is pinned.
    """
    machine = Machine()
    space = await written(machine, 2)
    child = await machine.fork(space)
    await space.store(BASE + PAGE, page_bytes(2))
    link = FakeLink("gpu0", 64)
    assert isinstance(space.hub, Hub)
    space.hub.insert(FIRST, FIRST + 1, link, 1)
    told = link.hold()
    pinned: list[int] = []

    async def pin() -> None:
        pinned.extend((await space.get_pages(FIRST, 2, pin=True)).tolist())

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pin)
            await wait_all_tasks_blocked()
            await machine.to_device(space, 64, span(FIRST + 1, 1))
            assert symbols(space, BASE, 2) == "PS"
            told.set()
    assert machine.homed == [FIRST + 1]
    assert [machine.bytes_of(frame)[:1] for frame in pinned] == [b"\1", b"\2"]
    assert (await machine.to_device(space, 64, span(FIRST, 2)) & 2).tolist() == [0, 0]
    await machine.exit(child)
    space.put_pages(span(pinned[0], 1), pin=True)
    space.put_pages(span(pinned[1], 1), pin=True)
    machine.check()
