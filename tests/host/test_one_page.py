"""One page that faults home takes a way of its own: it must end as the general way does, also when it is disturbed."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
import trio.testing

from hmmnet.errors import BusError, KernelError, PeerLost
from hmmnet.host.announce import MappedAnew
from hmmnet.host.mm import few, pte
from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.zones import LOCKED
from hmmnet.host.poison import break_memory, memory_failure
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE

from .fakes import ZONE, Bench


async def one_away() -> tuple[Bench, Space, int]:
    """A page of a process that is on the device, and begins with an x; its address."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    await space.store(address, b"x")
    await bench.to_device(space, address, 1)
    return bench, space, address


def state_of(memory: PhysicalMemory) -> dict[str, Any]:
    """All that struct pages say, of frames that are in use, by zone."""
    found: dict[str, Any] = {}
    for zone in memory.zones.values():
        used = zone.refcount[:64].nonzero()[0]
        fields = ("refcount", "mapcount", "flags", "mapping", "index")
        found[zone.owner] = sorted(tuple(int(getattr(zone, name)[at]) for name in fields) for at in used)
    return found


async def fault_home(*, general: bool, monkeypatch: pytest.MonkeyPatch, protection: str = "rw") -> tuple[dict[str, Any], int, int]:
    """Two pages go to the device, one comes home; struct pages, the entry's bits and the resident set afterwards."""
    if general:
        monkeypatch.setattr(few, "take", lambda *_: None)
    bench = Bench()
    space = bench.space()
    address = await space.mmap(2 * PAGE_SIZE)
    await space.store(address, b"one" + bytes(PAGE_SIZE) + b"two")
    if protection != "rw":
        await space.mprotect(address, 2 * PAGE_SIZE, protection)
    await bench.to_device(space, address, 2)
    assert await space.load(address, 3) == b"one"
    return state_of(bench.memory), space.mm.table.get(address >> PAGE_SHIFT) & pte.BITS, space.mm.rss


@pytest.mark.parametrize("protection", ["rw", "r"])
async def test_it_ends_as_the_general_way_does(protection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames, counts, flags, rights and the resident set."""
    short = await fault_home(general=False, monkeypatch=monkeypatch, protection=protection)
    assert short == await fault_home(general=True, monkeypatch=monkeypatch, protection=protection)


@pytest.mark.parametrize("general", [False, True])
async def test_a_page_that_is_unmapped_on_its_way_leaves_nothing(general: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """MADV_DONTNEED while it travels: both frames are free, the access that waited finds zeros."""
    if general:
        monkeypatch.setattr(few, "take", lambda *_: None)
    bench, space, address = await one_away()

    async def forget() -> None:
        await space.madvise(address, PAGE_SIZE, "DONTNEED")

    bench.link.during_copy = forget
    assert await space.load(address, 1) == b"\0"
    assert bench.page_map.used_pages == 0
    assert bench.host_pages_used() == 0


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("unmapped", [False, True])
async def test_a_page_that_cannot_come_home_stays_or_is_free(general: bool, unmapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is lost on the way: the entry is device-private again, or nothing when it was unmapped meanwhile; nothing leaks."""
    if general:
        monkeypatch.setattr(few, "take", lambda *_: None)
    bench, space, address = await one_away()

    async def die() -> None:
        if unmapped:
            await space.madvise(address, PAGE_SIZE, "DONTNEED")
        raise PeerLost("gpu0 was killed")

    bench.link.during_copy = die
    with pytest.raises(BusError, match="killed"):
        await space.load(address, 1)
    assert bench.host_pages_used() == 0
    assert bench.page_map.used_pages == (0 if unmapped else 1)
    assert space.pagemap(address, 1) == (b"-" if unmapped else b"S")
    bench.link.during_copy = trio.lowlevel.checkpoint
    assert await space.load(address, 1) == (b"\0" if unmapped else b"x")


@pytest.mark.parametrize("given_up", [False, True])
@pytest.mark.parametrize("general", [False, True])
async def test_a_page_that_is_breaking_does_not_come_home(general: bool, given_up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who breaks it holds it while mirrors are told, however long: the CPUs that touch it meanwhile look once, and sleep; they hear of it,
    or have their page when the break is given up.
    """
    if general:
        monkeypatch.setattr(few, "take", lambda *_: None)
    bench, space, address = await one_away()
    page = address >> PAGE_SHIFT
    told = trio.Event()
    looks = 0
    look = few.take

    async def touch() -> None:
        if given_up:
            assert await space.load(address, 1) == b"x"
        else:
            with pytest.raises(BusError, match="poisoned"):
                await space.load(address, 1)

    async def clear_wherever(*where: object) -> None:
        nursery.start_soon(touch)
        nursery.start_soon(touch)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert space.mm.table.get(page) & pte.KIND == pte.DEVICE
        assert looks <= 2
        told.set()
        await trio.lowlevel.checkpoint()
        if given_up:
            raise MappedAnew(errno.EBUSY, "try_to_migrate", "as somebody did")

    def counted(*arguments: Any) -> Any:
        nonlocal looks
        looks += not told.is_set()
        return look(*arguments)

    monkeypatch.setattr(few, "take", counted)
    monkeypatch.setattr("hmmnet.host.poison.clear_wherever", clear_wherever)
    async with trio.open_nursery() as nursery:
        if given_up:
            with pytest.raises(MappedAnew):
                await break_memory(bench.memory, bench.spaces, space, page, page + 1)
        else:
            assert await break_memory(bench.memory, bench.spaces, space, page, page + 1) == 1
    assert bench.host_pages_used() == given_up
    assert bench.memory.poisoned == (not given_up)


async def test_a_page_breaks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two madvise(MADV_HWPOISON) at a time: the second finds poison (EFAULT), as the kernel's get_user_pages does."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    await space.store(address, b"x")
    page = address >> PAGE_SHIFT

    async def clear_wherever(*where: object) -> None:
        monkeypatch.undo()
        nursery.start_soon(second)
        await trio.testing.wait_all_tasks_blocked(0.01)

    async def second() -> None:
        with pytest.raises(KernelError, match="EFAULT"):
            await memory_failure(bench.memory, bench.spaces, space, page, page + 1)

    monkeypatch.setattr("hmmnet.host.poison.clear_wherever", clear_wherever)
    async with trio.open_nursery() as nursery:
        await memory_failure(bench.memory, bench.spaces, space, page, page + 1)
    assert bench.memory.poisoned == 1


async def test_a_cancelled_load_leaves_the_page_on_the_device() -> None:
    """Nobody waits for it for ever, and the next load gets it."""
    bench, space, address = await one_away()
    bench.link.during_copy = trio.sleep_forever
    with trio.move_on_after(0.01):
        await space.load(address, 1)
    assert not space.mmap_lock.held
    bench.link.during_copy = trio.lowlevel.checkpoint
    assert await space.load(address, 1) == b"x"


async def test_what_is_not_the_plain_case_is_left_alone() -> None:
    """Another device's page, one that is locked, one that is held more than a device's page may be: None; no entry changed."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    await space.store(address, b"one")
    await bench.to_device(space, address, 1)
    page = address >> PAGE_SHIFT
    entry = space.mm.table.get(page)
    at = (entry >> pte.FRAME_SHIFT) - bench.page_map.zone.base
    zone = bench.page_map.zone
    assert space.take_one(page, ZONE + 1) is None
    for field, value in (("flags", LOCKED), ("pincount", 1), ("refcount", 2), ("mapcount", 1)):
        array = getattr(zone, field)
        array[at] += value
        assert space.take_one(page, ZONE) is None, field
        array[at] -= value
    assert space.mm.table.get(page) == entry
    frame = space.take_one(page, ZONE)
    assert frame == entry >> pte.FRAME_SHIFT
    assert space.take_one(page, ZONE) is None, "it is on its way"
    space.put_back_one(page, frame)
    assert space.mm.table.get(page) == entry
