"""migrate_vma towards a device, step by step, and what is left when a step fails (semantics A4)."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import IommuFault, KernelError, PeerLost, ProtocolError
from hmmnet.host.interfaces import Event
from hmmnet.host.migrate import Outcome
from hmmnet.pages import (
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    PAGE_SHIFT,
    PAGE_SIZE,
)

from .fakes import FIRST_FRAME, Bench, FakeLink, words

MOVED = MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE


def flags(outcome: Outcome) -> list[int]:
    """The words without their frames."""
    return [word & 0x3F for word in outcome.words.tolist()]


async def test_written_pages_move_with_their_bytes() -> None:
    """The driver hears MIGRATE and WRITE, the frames hold the data, the CPU's entries say device."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(4 * PAGE_SIZE)
    await space.store(address, np.arange(4 * PAGE_SIZE // 8, dtype="<u8"))
    outcome = await bench.to_device(space, address, 4)
    assert flags(outcome) == [MOVED | MIGRATE_PFN_WRITE] * 4
    assert outcome.moved == 4
    assert bench.link.held[FIRST_FRAME + 1] == np.arange(512, 1024, dtype="<u8").tobytes()
    assert space.pagemap(address, 4) == b"SSSS"
    assert bench.host_pages_used() == 0


async def test_never_touched_pages_become_zeroed_device_pages() -> None:
    """MIGRATE without VALID: nothing is copied, and the driver is told that it may write."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(2 * PAGE_SIZE)
    outcome = await bench.to_device(space, address, 2)
    assert flags(outcome) == [MIGRATE_PFN_MIGRATE | MIGRATE_PFN_WRITE] * 2
    assert bench.link.held[FIRST_FRAME] == bytes(PAGE_SIZE)
    assert await space.load(address, 8) == bytes(8)


async def test_read_only_memory_moves_without_the_right_to_write() -> None:
    """The device page is readable only, as the page was."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    await space.store(address, b"x")
    await space.mprotect(address, PAGE_SIZE, "r")
    assert flags(await bench.to_device(space, address, 1)) == [MOVED]


async def test_a_page_without_a_grant_stays() -> None:
    """Destination 0 leaves the page where it is; the others go (partial success)."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(3 * PAGE_SIZE)
    await space.store(address, bytes(3 * PAGE_SIZE))
    outcome = await bench.to_device(space, address, 3, bench.grant(3, words(FIRST_FRAME + 5, 0, FIRST_FRAME + 6)))
    assert [word & MIGRATE_PFN_MIGRATE for word in outcome.words.tolist()] == [2, 0, 2]
    assert bytes(value & 0x7F for value in space.pagemap(address, 3)) == b"SPS"


async def test_a_bad_vma_ends_the_range_and_leaves_the_earlier_part_migrated() -> None:
    """As test_hmm's loop over VMAs: EINVAL at the hole, what lies before has moved (h04)."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(6 * PAGE_SIZE)
    await space.store(address, bytes(6 * PAGE_SIZE))
    await space.munmap(address + 2 * PAGE_SIZE, PAGE_SIZE)
    outcome = await bench.to_device(space, address, 6)
    assert outcome.errno == errno.EINVAL
    assert outcome.moved == 2
    assert outcome.words[2:].tolist() == [0, 0, 0, 0]
    assert bytes(value & 0x7F for value in space.pagemap(address, 6)) == b"SS-PPP"


async def test_a_range_over_two_vmas_moves_as_one() -> None:
    """Different rights make two VMAs; both go, in one stream."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(4 * PAGE_SIZE)
    await space.store(address, bytes(4 * PAGE_SIZE))
    await space.mprotect(address + 2 * PAGE_SIZE, 2 * PAGE_SIZE, "r")
    outcome = await bench.to_device(space, address, 4)
    assert flags(outcome) == [MOVED | MIGRATE_PFN_WRITE] * 2 + [MOVED] * 2


async def test_everybody_but_the_owner_is_told_before_pages_are_collected() -> None:
    """Other devices' mirrors let go first; the owner's own subscription is not told."""
    bench = Bench()
    space = bench.space()
    other = FakeLink("gpu1", 65)
    hub = bench.hub(space)
    address = await space.mmap(PAGE_SIZE)
    await space.store(address, b"x")
    hub.insert(0, 1 << 35, bench.link, 1)
    hub.insert(0, 1 << 35, other, 1)
    gate = other.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.to_device, space, address, 1)
        await wait_all_tasks_blocked()
        assert space.pagemap(address, 1)[0] & 0x7F == ord("P")
        gate.set()
    page = address >> PAGE_SHIFT
    assert [(told[1], told[2], told[3], told[4]) for told in other.told] == [(page, page + 1, Event.MIGRATE, 64)]
    assert bench.link.told == []
    assert space.pagemap(address, 1) == b"S"


async def test_a_cpu_access_waits_while_the_page_is_on_its_way() -> None:
    """The migration entry is the page's lock: the load sleeps, then brings the page home."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    await space.store(address, b"data")
    arrived, go = trio.Event(), trio.Event()

    async def slow() -> None:
        arrived.set()
        await go.wait()

    bench.link.during_copy = slow
    got: list[bytes] = []

    async def load() -> None:
        got.append(await space.load(address, 4))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.to_device, space, address, 1)
        await arrived.wait()
        nursery.start_soon(load)
        await wait_all_tasks_blocked()
        assert got == []
        go.set()
    assert got == [b"data"]


async def test_finalize_happens_the_moment_the_driver_says_so() -> None:
    """Whoever asked the driver for the migration finds no migration entry once it was told of its end."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    await space.store(address, b"x")
    seen: list[bytes] = []

    async def look(_: Outcome) -> None:
        seen.append(space.residency(address, 1).pages.tobytes())

    await bench.to_device(space, address, 1, announce=look)
    assert np.frombuffer(seen[0], np.int16)[0] == -2
    assert space.residency(address, 1).pages[0] == 0


# --- what goes wrong ---------------------------------------------------------------------------------------------------------------


async def fails_with(error: BaseException) -> None:
    raise error


async def test_device_lost_during_the_copy_leaves_every_page_where_it_was() -> None:
    """Data, rights and frames are as before; nothing leaks; the grant is free again."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(3 * PAGE_SIZE)
    await space.store(address, b"a" * PAGE_SIZE + b"b" * PAGE_SIZE)
    used = bench.host_pages_used()
    bench.link.during_copy = lambda: fails_with(PeerLost("gpu0 was killed"))
    with pytest.raises(PeerLost):
        await bench.to_device(space, address, 3)
    assert bytes(value & 0x7F for value in space.pagemap(address, 3)) == b"PP-"
    assert await space.load(address, 2 * PAGE_SIZE) == b"a" * PAGE_SIZE + b"b" * PAGE_SIZE
    await space.store(address, b"still writable")
    assert bench.host_pages_used() == used
    assert bench.page_map.used_pages == 0
    assert not bench.page_map.zone.flags[:8].any()


async def test_device_lost_after_pages_changed_over_restores_them_too() -> None:
    """Between migrate_vma_pages and finalize the source is still intact; a page that was never touched is empty again."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(2 * PAGE_SIZE)
    await space.store(address, b"keep me")

    async def die(_: Outcome) -> None:
        raise PeerLost("gpu0 was killed")

    with pytest.raises(PeerLost):
        await bench.to_device(space, address, 2, announce=die)
    bench.lose("it was killed")
    assert bytes(value & 0x7F for value in space.pagemap(address, 2)) == b"P-"
    assert await space.load(address, 7) == b"keep me"
    assert await space.load(address + PAGE_SIZE, 1) == b"\0"
    assert bench.page_map.used_pages == 0


async def test_cancelling_a_migration_puts_the_pages_back() -> None:
    """Cancellation at the slowest point is like a lost device: nothing has moved, nobody waits for ever."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    await space.store(address, b"x")
    bench.link.during_copy = trio.sleep_forever
    with trio.move_on_after(0.01):
        await bench.to_device(space, address, 1)
    assert space.pagemap(address, 1)[0] & 0x7F == ord("P")
    assert not space.mmap_lock.held


@pytest.mark.parametrize(
    "frames", [[FIRST_FRAME - 1], [FIRST_FRAME + 1024], [5], [FIRST_FRAME, FIRST_FRAME]], ids=["below", "above", "host", "twice"]
)
async def test_a_grant_of_frames_that_are_not_idle_and_own_is_refused(frames: list[int]) -> None:
    """The driver is told what it did, before anything is collected."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(2 * PAGE_SIZE)
    with pytest.raises(ProtocolError, match="offers frames"):
        await bench.to_device(space, address, len(frames), bench.grant(0, words(*frames)))


async def test_frames_in_use_or_on_offer_cannot_be_granted_again() -> None:
    """Neither those that hold a page nor those of a migration under way."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(2 * PAGE_SIZE)
    await bench.to_device(space, address, 1, bench.grant(1, words(FIRST_FRAME)))
    with pytest.raises(ProtocolError, match="in use"):
        await bench.to_device(space, address + PAGE_SIZE, 1, bench.grant(1, words(FIRST_FRAME)))
    held = bench.grant(1, words(FIRST_FRAME + 1))
    held.take()
    with pytest.raises(ProtocolError, match="another migration"):
        await bench.to_device(space, address + PAGE_SIZE, 1, bench.grant(1, words(FIRST_FRAME + 1)))
    held.release()
    await bench.to_device(space, address + PAGE_SIZE, 1, bench.grant(1, words(FIRST_FRAME + 1)))


# --- the device's own translations ---------------------------------------------------------------------------------------------------


async def test_own_translations_are_suspended_on_the_way_and_void_afterwards() -> None:
    """EAGAIN in between; once moved, an access by the old translation is a driver bug."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    await space.store(address, b"x")
    page = address >> PAGE_SHIFT
    frame = int(space.mm.table.get(page)) >> PAGE_SHIFT
    bench.domain.grant(page, words(HMM_PFN_VALID | HMM_PFN_WRITE | frame))

    async def look() -> None:
        with pytest.raises(KernelError, match="EAGAIN"):
            bench.domain.check(words(page), words(frame << PAGE_SHIFT), write=True)

    bench.link.during_copy = look
    await bench.to_device(space, address, 1)
    with pytest.raises(IommuFault):
        bench.domain.check(words(page), words(frame << PAGE_SHIFT), write=False)


async def test_own_translations_of_pages_that_stayed_are_good_again() -> None:
    """A page without a destination keeps its translation."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    await space.store(address, b"x")
    page = address >> PAGE_SHIFT
    frame = int(space.mm.table.get(page)) >> PAGE_SHIFT
    bench.domain.grant(page, words(HMM_PFN_VALID | frame))
    bench.link.during_copy = lambda: fails_with(PeerLost("gone"))
    with pytest.raises(PeerLost):
        await bench.to_device(space, address, 1)
    bench.domain.check(words(page), words(frame << PAGE_SHIFT), write=False)
