"""Long-term pins of coherent memory, and pins that are overtaken by a migration.

Oracle: mm/gup.c (check_and_migrate_movable_pages, migrate_longterm_unpinnable_folios); recording c04.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import KernelError
from hmmnet.host.hub import Hub
from hmmnet.host.mm import gup, pte
from hmmnet.host.mm.space import Space
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


async def _guarded(space: Space) -> None:
    await space.madvise(BASE + 2 * PAGE, PAGE, "GUARD_INSTALL")


async def _missing(space: Space) -> None:
    await space.madvise(BASE + 2 * PAGE, PAGE, "DONTNEED")
    await space.userfaultfd(BASE, 4 * PAGE, sigbus=True)


IN_THE_WAY = pytest.mark.parametrize("spoil", [_guarded, _missing])


@IN_THE_WAY
async def test_pages_before_one_that_cannot_be_faulted_in_are_had(spoil: Callable[[Space], Awaitable[None]]) -> None:
    """__get_user_pages answers how many it has; EFAULT only where that is none."""
    machine = Machine()
    space = await written(machine)
    await spoil(space)
    for pin in (False, True):
        frames = await space.get_pages(FIRST, 4, write=True, pin=pin)
        assert [machine.bytes_of(frame)[:1] for frame in frames.tolist()] == [b"\1", b"\2"]
        space.put_pages(frames, pin=pin)
        with pytest.raises(KernelError) as caught:
            await space.get_pages(FIRST + 2, 2, write=True, pin=pin)
        assert caught.value.code == errno.EFAULT
    machine.check()


@IN_THE_WAY
@pytest.mark.parametrize("folios", [False, True])
async def test_pages_before_one_that_cannot_be_faulted_in_are_exclusive(spoil: Callable[[Space], Awaitable[None]], folios: bool) -> None:
    """make_device_exclusive goes page by page, make_device_exclusive_range takes what get_user_pages has (as h06 shows of a hole)."""
    machine = Machine()
    space = await written(machine)
    await spoil(space)
    if folios:
        assert [bool(word) for word in await space.make_exclusive_folios(FIRST, FIRST + 4, 64)] == [True, True]
    else:
        assert await space.make_exclusive(FIRST, FIRST + 4, 64) == 2
    assert symbols(space, BASE, 4) == "SS-P"
    with pytest.raises(KernelError) as caught:
        await (space.make_exclusive_folios if folios else space.make_exclusive)(FIRST + 2, FIRST + 4, 64)
    assert caught.value.code == errno.EFAULT
    assert await space.load(BASE, 2 * PAGE) == page_bytes(1) + page_bytes(2)
    machine.check()
