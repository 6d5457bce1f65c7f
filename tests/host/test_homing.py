"""The ways home: CPU faults, explicit migration, eviction by frame; and what is lost when a device dies (semantics A5)."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import BusError, KernelError, PeerError, PeerLost
from hmmnet.faults.injector import Injector, PointFault
from hmmnet.host.homing import COPIES_MAX
from hmmnet.host.hub import Invalidation
from hmmnet.host.interfaces import Event
from hmmnet.host.mm import pte
from hmmnet.host.mm.invariants import check
from hmmnet.host.mm.space import Space
from hmmnet.observe.counters import CPU_FAULT
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE

from .fakes import FIRST_FRAME, ZONE, Bench, FakeLink, words


async def on_device(bench: Bench, pages: int = 4, number: int = 1) -> tuple[Space, int]:
    """A process with `pages` numbered pages on the device."""
    space = bench.space(number)
    address = await space.mmap(pages * PAGE_SIZE)
    await space.store(address, np.repeat(np.arange(1, pages + 1, dtype=np.uint8), PAGE_SIZE))
    assert (await bench.to_device(space, address, pages)).moved == pages
    return space, address


async def test_a_cpu_load_brings_back_exactly_one_page() -> None:
    """h08: the page comes home writable, its neighbours stay, the device hears of the freed frame."""
    bench = Bench()
    space, address = await on_device(bench)
    assert await space.load(address + PAGE_SIZE, 1) == b"\x02"
    assert bytes(value & 0x7F for value in space.pagemap(address, 4)) == b"SPSS"
    assert bench.link.freed == [FIRST_FRAME + 1]
    assert bench.link.dropped == [(1, [(address >> PAGE_SHIFT) + 1])]
    await space.store(address + PAGE_SIZE, b"z")
    assert bench.profile.counter(CPU_FAULT).count == 1


async def test_a_cpu_store_brings_the_page_home_first() -> None:
    """The rest of the page is what the device had."""
    bench = Bench()
    space, address = await on_device(bench, 1)
    await space.store(address + 8, b"new")
    assert await space.load(address, 12) == b"\1" * 8 + b"new" + b"\1"


async def test_a_long_load_brings_its_pages_in_one_go() -> None:
    """One copy for all pages of one range, counted as so many faults."""
    bench = Bench()
    space, address = await on_device(bench, 8)
    assert (await space.load(address, 8 * PAGE_SIZE))[::PAGE_SIZE] == bytes(range(1, 9))
    assert len(bench.link.dropped) == 1
    assert bench.profile.counter(CPU_FAULT).count == 8


async def test_two_cpus_at_once_copy_once() -> None:
    """The loser of the page lock waits and looks again."""
    bench = Bench()
    space, address = await on_device(bench, 1)
    copying, go = trio.Event(), trio.Event()

    async def slow() -> None:
        copying.set()
        await go.wait()

    bench.link.during_copy = slow
    got: list[bytes] = []

    async def load() -> None:
        got.append(await space.load(address, 1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(load)
        await copying.wait()
        nursery.start_soon(load)
        await wait_all_tasks_blocked()
        go.set()
    assert got == [b"\1", b"\1"]
    assert len(bench.link.dropped) == 1


async def test_other_mirrors_are_told_and_the_owner_is_not() -> None:
    """A page that comes home from gpu0 is announced with gpu0 as owner."""
    bench = Bench()
    space, address = await on_device(bench, 1)
    other = FakeLink("gpu1", 65)
    bench.hub(space).insert(0, 1 << 35, other, 1)
    bench.hub(space).insert(0, 1 << 35, bench.link, 1)
    await space.load(address, 1)
    assert [told[3:5] for told in other.told] == [(Event.MIGRATE, 64)]
    assert bench.link.told == []


async def test_no_host_memory_is_enomem_and_the_page_stays() -> None:
    """VM_FAULT_OOM: a later access, with memory, succeeds."""
    bench = Bench(host_pages=3)
    space, address = await on_device(bench, 2)
    await space.store(await space.mmap(2 * PAGE_SIZE), bytes(2 * PAGE_SIZE))
    with pytest.raises(KernelError) as caught:
        await space.load(address, 1)
    assert caught.value.code == errno.ENOMEM
    assert space.pagemap(address, 2) == b"SS"


# --- a device that dies --------------------------------------------------------------------------------------------------------------


async def test_a_page_whose_only_copy_was_lost_is_a_bus_error_that_says_so() -> None:
    """It names the page, the device and the cause; the next access says the same."""
    bench = Bench()
    space, address = await on_device(bench, 1)
    bench.lose("it was killed by signal 9")
    for _ in range(2):
        with pytest.raises(BusError) as caught:
            await space.load(address, 1)
        text = str(caught.value)
        assert caught.value.address == address
        assert f"page 0x{address >> PAGE_SHIFT:x}" in text
        assert '"gpu0"' in text
        assert "killed by signal 9" in text


async def test_device_lost_while_a_page_comes_home() -> None:
    """The access ends in SIGBUS, no host frame leaks, and nobody waits for the page for ever."""
    bench = Bench()
    space, address = await on_device(bench, 1)

    async def die() -> None:
        bench.lose("it fell silent")
        raise PeerLost("gpu0 fell silent")

    bench.link.during_copy = die
    with pytest.raises(BusError, match="fell silent"):
        await space.load(address, 1)
    assert bench.host_pages_used() == 0
    with pytest.raises(BusError):
        await space.store(address, b"x")
    await space.munmap(address, PAGE_SIZE)
    assert bench.page_map.used_pages == 0


def breaking(bench: Bench, times: int) -> None:
    """The next `times` copies of the device fail."""
    left = times

    async def break_down() -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise PeerError("stream 2 was given up by its sender")

    bench.link.during_copy = break_down


@pytest.mark.parametrize("pages", [1, 4])
async def test_a_copy_that_fails_is_tried_again(pages: int) -> None:
    """The device lives and has the pages: the access ends well, and the page is home once."""
    bench = Bench()
    space, address = await on_device(bench, pages)
    breaking(bench, COPIES_MAX - 1)
    assert await space.load(address, pages * PAGE_SIZE) == bytes(np.repeat(np.arange(1, pages + 1, dtype=np.uint8), PAGE_SIZE))
    assert bench.host_pages_used() == pages
    assert bench.page_map.used_pages == 0


@pytest.mark.parametrize("pages", [1, 4])
async def test_copies_that_go_on_failing_are_a_bus_error_and_the_page_can_come_home_later(pages: int) -> None:
    """It says that the page is intact, and where; nothing is lost: the next access has it."""
    bench = Bench()
    space, address = await on_device(bench, pages)
    breaking(bench, COPIES_MAX)
    with pytest.raises(
        BusError, match=rf'is intact on device "gpu0" and could not be copied home in {COPIES_MAX} tries: .*given up'
    ) as caught:
        await space.load(address, pages * PAGE_SIZE)
    assert "only copy" not in str(caught.value)
    assert bench.host_pages_used() == 0
    assert await space.load(address, 1) == b"\1"


async def test_pages_elsewhere_survive_the_device() -> None:
    """Only what was there is lost."""
    bench = Bench()
    space, address = await on_device(bench, 2)
    await space.load(address, 1)
    bench.lose("gone")
    assert await space.load(address, 1) == b"\1"
    with pytest.raises(BusError):
        await space.load(address + PAGE_SIZE, 1)


# --- explicit ------------------------------------------------------------------------------------------------------------------------


async def test_explicit_migration_counts_what_really_moved() -> None:
    """System pages and empty entries count 0 (recordings, 3)."""
    bench = Bench()
    space, address = await on_device(bench, 4)
    await space.load(address, 1)
    start = address >> PAGE_SHIFT
    done = await bench.homing.migrate_to_system(space, bench.link, start, start + 4)
    assert (done.moved, done.errno) == (3, 0)
    assert (await bench.homing.migrate_to_system(space, bench.link, start, start + 4)).moved == 0
    assert bytes(value & 0x7F for value in space.pagemap(address, 4)) == b"PPPP"


async def test_explicit_migration_stops_at_a_hole_with_einval() -> None:
    """What lies before is home."""
    bench = Bench()
    space, address = await on_device(bench, 4)
    await space.munmap(address + 2 * PAGE_SIZE, PAGE_SIZE)
    start = address >> PAGE_SHIFT
    done = await bench.homing.migrate_to_system(space, bench.link, start, start + 4)
    assert (done.moved, done.errno) == (2, errno.EINVAL)
    assert bytes(value & 0x7F for value in space.pagemap(address, 4)) == b"PP-S"


# --- eviction ------------------------------------------------------------------------------------------------------------------------


async def test_eviction_takes_frames_from_every_process() -> None:
    """By frame number, without an address; each process's mirrors are told, the owner's too (CLEAR has no owner)."""
    bench = Bench()
    first, first_at = await on_device(bench, 2, 1)
    second, second_at = await on_device(bench, 2, 2)
    bench.hub(first).insert(0, 1 << 35, bench.link, 1)
    moved = await bench.homing.evict(bench.link, bench.page_map.used_frames())
    assert moved == 4
    assert (await first.load(first_at, 1), await second.load(second_at + PAGE_SIZE, 1)) == (b"\1", b"\2")
    assert [told[3] for told in bench.link.told] == [Event.CLEAR]
    assert bench.page_map.used_pages == 0
    assert sorted(bench.link.freed) == [FIRST_FRAME + i for i in range(4)]


class Interrupted(Exception):
    """Whatever ends a wait."""


WAYS: dict[str, Callable[[Bench, Space, int], Awaitable[object]]] = {
    "a page": lambda bench, space, address: space.load(address, 1),
    "several pages": lambda bench, space, address: space.load(address, 4 * PAGE_SIZE),
    "a range": lambda bench, space, address: bench.homing.migrate_to_system(
        space, bench.link, address >> PAGE_SHIFT, (address >> PAGE_SHIFT) + 4
    ),
    "frames": lambda bench, space, address: bench.homing.evict(bench.link, bench.page_map.used_frames()),
}


@pytest.mark.parametrize("way", WAYS)
async def test_an_interruption_where_an_announcement_ends_leaves_the_pages_on_the_device(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are behind migration entries by then, and none of those stays behind: the next one brings them home."""
    bench = Bench()
    space, address = await on_device(bench)
    bench.hub(space).insert(0, 1 << 35, FakeLink("gpu1", 65), 1)  # somebody has to be told
    with monkeypatch.context() as patch:
        ends = Invalidation.__aexit__

        async def interrupted(self: Invalidation, *how: Any) -> None:
            await ends(self, *how)
            assert space.mm.table.get(address >> PAGE_SHIFT) & pte.KIND == pte.MIGRATION
            raise Interrupted

        patch.setattr(Invalidation, "__aexit__", interrupted)
        with pytest.raises(Interrupted):
            await WAYS[way](bench, space, address)
    check(bench.memory, [space.mm])
    assert bytes(value & 0x7F for value in space.pagemap(address, 4)) == b"SSSS"
    await WAYS[way](bench, space, address)
    assert await space.load(address, 4 * PAGE_SIZE) == np.repeat(np.arange(1, 5, dtype=np.uint8), PAGE_SIZE).tobytes()
    assert bench.page_map.used_pages == 0
    check(bench.memory, [space.mm])


async def test_idle_frames_are_no_error() -> None:
    """Nothing to evict: 0."""
    bench = Bench()
    assert await bench.homing.evict(bench.link, words(FIRST_FRAME, FIRST_FRAME + 7)) == 0


async def test_frames_on_their_way_stay_and_go_the_next_time() -> None:
    """Trylock: the driver asks again."""
    bench = Bench()
    space, address = await on_device(bench, 1)
    copying, go = trio.Event(), trio.Event()

    async def slow() -> None:
        copying.set()
        await go.wait()

    bench.link.during_copy = slow
    async with trio.open_nursery() as nursery:
        nursery.start_soon(space.load, address, 1)
        await copying.wait()
        assert await bench.homing.evict(bench.link, words(FIRST_FRAME)) == 0
        go.set()
    assert bench.page_map.used_pages == 0


async def test_device_lost_during_eviction() -> None:
    """The pages stay on the dead device; the hubs and frames are left whole."""
    bench = Bench()
    space, address = await on_device(bench, 2)
    bench.link.during_copy = lambda: _raise(PeerLost("gone"))
    with pytest.raises(PeerLost):
        await bench.homing.evict(bench.link, bench.page_map.used_frames())
    assert space.pagemap(address, 2) == b"SS"
    assert bench.host_pages_used() == 0


@pytest.mark.parametrize("where", ["before", "told"])
@pytest.mark.parametrize("lost", [False, True])
async def test_memory_that_goes_away_while_its_eviction_waits(where: str, lost: bool) -> None:
    """Removed, with everything home, nothing is left to go; lost and buried it is PeerLost. Nobody is left waiting for an entry."""
    bench = Bench()
    space, address = await on_device(bench, 2)
    bench.hub(space).insert(0, 1 << 35, mirror := FakeLink("gpu1", 65), 1)
    bench.memory.points = (injector := Injector()).points_of("host")
    pause = injector.add(PointFault("home.evict" if where == "before" else "evict.collected", "pause"))
    gate = mirror.hold()
    done: list[int | str] = []

    async def evict() -> None:
        try:
            done.append(await bench.homing.evict(bench.link, bench.page_map.used_frames()))
        except PeerLost as error:
            done.append(str(error))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(evict)
            await wait_all_tasks_blocked()
            mirror.hold().set()  # what is announced from now on is answered at once
            if lost:
                bench.lose("it was killed")
            await space.munmap(address, 2 * PAGE_SIZE)
            if lost:
                assert bench.page_map.bury()
            else:
                bench.page_map.remove()
            assert ZONE not in bench.memory.zones
            injector.remove(pause)
            gate.set()
    assert done == ['device "gpu0" was lost while its memory was being evicted' if lost else 0]


async def _raise(error: Exception) -> None:
    raise error


async def test_who_asks_for_a_page_of_a_device_that_is_gone_is_told_so() -> None:
    """No link leads to the zone, and nobody has marked it lost yet: SIGBUS that names page and device, and the entry stays."""
    bench = Bench()
    space, address = await on_device(bench, 1)
    link = bench.links.pop(ZONE)
    with pytest.raises(BusError, match='has its only copy on device "gpu0" and cannot come home: the device is gone'):
        await space.load(address, 1)
    bench.links[ZONE] = link
    assert await space.load(address, 1) == b"\1"
