"""What a device asks for over its session, beyond the ordinary: releases, late and double words, limits; and a device that tells nothing.

    gpu0 (scripted) ══ session ══ host ── process

Oracle: the answers that the messages' docstrings promise; the program's bytes.
"""

from __future__ import annotations

import logging
import os
from errno import EINVAL, ESRCH

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import KernelError, PeerRefused, RemoteError
from hmmnet.host import admission, requests
from hmmnet.host.device import Context
from hmmnet.host.interfaces import Event
from hmmnet.host.mm.zones import CpuZone
from hmmnet.host.service import Host
from hmmnet.pages import (
    DEVICE_ZONE_MIN,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    MIGRATE_PFN_MIGRATE,
    PAGE_SHIFT,
    PAGE_SIZE,
    from_wire,
    to_wire,
)
from hmmnet.wire.client import connect
from hmmnet.wire.messages import (
    PROTOCOL_VERSION,
    CopyIn,
    Done,
    Evict,
    Evicted,
    Exclusive,
    Hello,
    Inspect,
    Invalidate,
    MakeExclusive,
    Message,
    Migrate,
    Migrated,
    MigrateDone,
    RangeFault,
    Unsubscribe,
)

from .fakes import words
from .scripted_device import SECRET, one_device, pages_of, running_host, scripted_device

pytestmark = pytest.mark.virtual_time

WRITE = HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE


async def test_after_unsubscribing_nothing_is_told_and_nothing_reached() -> None:
    """Its translations are void in the host, and a munmap of the interval tells the device nothing."""
    async with one_device() as (_, device, process):
        address = await pages_of(process, 2)
        page = address >> PAGE_SHIFT
        subscription = (await device.subscribe(1)).subscription
        granted = await device.range_fault(1, subscription, page, 2, WRITE)
        await device.session.ask(Unsubscribe(1, subscription), Done)
        with pytest.raises(RemoteError, match=r"IommuFault.*no translation"):
            await device.dma_read(1, words(page, page + 1), granted)
        await process.munmap(address, PAGE_SIZE)
        assert device.of(Invalidate) == []
        with pytest.raises(RemoteError, match="has no subscription"):
            await device.session.ask(Unsubscribe(1, subscription), Done)


@pytest.mark.parametrize("closes", [False, True], ids=["unsubscribes", "closes"])
async def test_translations_are_void_before_a_subscription_is_gone(*, closes: bool) -> None:
    """A removal waits while anything of the process is being invalidated; what changes as soon as that ends the device does not hear of."""
    async with running_host("gpu0", "gpu1") as (host, transport), scripted_device(host, transport, "gpu0") as device:
        process = await host.create_process()
        handle = await process.open("gpu0")
        page = await pages_of(process, 1) >> PAGE_SHIFT
        subscription = (await device.subscribe(1, held=True)).subscription
        await device.range_fault(1, subscription, page, 1, WRITE)
        domain = device_context(host).domain
        assert domain.frame(page) is not None
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                async with process.space.hub.invalidate(Event.PROTECTION_VMA, page + 1, page + 2):
                    if closes:
                        nursery.start_soon(handle.close)
                    else:
                        nursery.start_soon(device.session.ask, Unsubscribe(1, subscription), Done)
                    await trio.sleep(0.1)
                    await wait_all_tasks_blocked()
                    assert device_context(host).domain is domain
                    assert domain.frame(page) is None


@pytest.mark.parametrize("kind", [RangeFault, MakeExclusive], ids=["range fault", "exclusive"])
async def test_who_has_given_its_subscription_up_is_granted_nothing(kind: type[RangeFault | MakeExclusive]) -> None:
    """Nothing would take it back. What it asked for while something was being invalidated is ESRCH."""
    async with one_device() as (host, device, process):
        page = await pages_of(process, 1) >> PAGE_SHIFT
        subscription = (await device.subscribe(1, held=True)).subscription
        ends: list[int] = []

        async def ask() -> None:
            try:
                if kind is RangeFault:
                    await device.range_fault(1, subscription, page, 1, WRITE)
                else:
                    await device.session.ask(MakeExclusive(1, subscription, page, 1), Exclusive)
            except KernelError as error:
                ends.append(error.code)

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                async with process.space.hub.invalidate(Event.PROTECTION_VMA, page, page + 1):
                    nursery.start_soon(ask)
                    await trio.sleep(0.1)
                    nursery.start_soon(device.session.ask, Unsubscribe(1, subscription), Done)
                    await trio.sleep(0.1)
        assert ends == [ESRCH]
        assert device_context(host).domain.frame(page) is None


async def test_a_subscription_stays_until_dma_by_it_is_over() -> None:
    """Whoever changes the page meanwhile waits for the DMA: a context's last accesses end before it does."""
    async with one_device() as (host, device, process):
        page = await pages_of(process, 1) >> PAGE_SHIFT
        subscription = (await device.subscribe(1, held=True)).subscription
        await device.range_fault(1, subscription, page, 1, WRITE)
        context = device_context(host)
        access, over = context.domain.begin(words(page), write=True), trio.Event()

        async def unsubscribe() -> None:
            await device.session.ask(Unsubscribe(1, subscription), Done)
            over.set()

        async def change() -> None:
            async with process.space.hub.invalidate(Event.CLEAR, page, page + 1):
                assert not context.domain.busy(page, page + 1)

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(unsubscribe)
                await trio.sleep(0.1)
                nursery.start_soon(change)
                await trio.sleep(0.1)
                assert not over.is_set()
                context.domain.end(access)
                context.life.link.dma_ended.unpark_all()


def device_context(host: Host) -> Context:
    """Context 1 of gpu0, which is still there."""
    life = host.devices["gpu0"].life
    assert life is not None
    return life.contexts[1]


async def test_subscriptions_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused, and those that there are go on."""
    monkeypatch.setattr(requests, "SUBSCRIPTIONS_MAX", 2)
    async with one_device() as (_, device, process):
        address = await pages_of(process, 1)
        first = await device.subscribe(1, 0, 1 << 20)
        await device.subscribe(1, 1 << 30, 1 << 35)
        with pytest.raises(RemoteError, match="context 1 has 2 subscriptions"):
            await device.subscribe(1)
        await device.session.ask(Unsubscribe(1, first.subscription), Done)
        again = await device.subscribe(1)
        got = await device.range_fault(1, again.subscription, address >> PAGE_SHIFT, 1, WRITE)
        assert int(got[0]) & HMM_PFN_VALID


async def test_a_driver_sends_pages_home_by_their_addresses() -> None:
    """Migrate towards ``system``: how many moved; what is at the host already, and a hole, are counted as what they are."""
    async with one_device() as (host, device, process):
        address = await pages_of(process)
        page = address >> PAGE_SHIFT
        await device.migrate(1, page, 4)
        reply = await device.session.ask(Migrate(1, page, 8, "system", 2), Migrated)
        assert (reply.moved, reply.errno, reply.migration) == (4, 0, 0)
        assert [int(word) & MIGRATE_PFN_MIGRATE for word in from_wire(reply.words)] == [MIGRATE_PFN_MIGRATE] * 4 + [0] * 4
        assert process.space.residency(address, 8).owners == ("host",)
        assert host.devices["gpu0"].life is not None
        assert host.devices["gpu0"].life.page_map.used_pages == 0
        await process.munmap(address + 6 * PAGE_SIZE, 2 * PAGE_SIZE)
        reply = await device.session.ask(Migrate(1, page, 8, "system", 2), Migrated)
        assert (reply.moved, KernelError(reply.errno, "", "").name) == (0, "EINVAL")


async def test_a_driver_hears_how_far_its_migration_went() -> None:
    """The pages before the mapping that does not take part have been looked at, moved or not."""
    async with one_device() as (_, device, process):
        page = await pages_of(process) >> PAGE_SHIFT
        await process.munmap((page + 5) * PAGE_SIZE, PAGE_SIZE)
        zone = device.welcome.zone << 36
        for first, tried, moved in ((0, 5, 5), (0, 5, 0), (5, 0, 0), (6, 0, 2)):
            grant = np.arange(zone + 8 * device.frame_next, zone + 8 * device.frame_next + 8 - first, dtype=np.uint64)
            device.frame_next += 1
            reply = await device.session.ask(Migrate(1, page + first, 8 - first, "device", 1, to_wire(grant)), Migrated)
            if reply.migration:
                device.session.note(MigrateDone(reply.migration))
            assert (reply.errno, reply.tried, reply.moved) == (0 if first == 6 else EINVAL, tried, moved)


async def test_words_that_come_late_or_twice_change_nothing() -> None:
    """MigrateDone of a migration that is over, or never was; the pages are where the first one put them."""
    async with one_device() as (_, device, process):
        address = await pages_of(process, 2)
        await device.migrate(1, address >> PAGE_SHIFT, 2)
        for number in (1, 1, 77):
            device.session.note(MigrateDone(number))
        assert await device.session.ask(Evict(b""), Evicted) == Evicted(0)
        assert process.space.residency(address, 2).pages.tolist() == [0, 0]
        assert process.space.residency(address, 2).owners == ("gpu0",)
        assert await process.read(address + PAGE_SIZE, 1) == b"\2"


async def test_a_device_evicts_by_frame() -> None:
    """What is in use goes home, idle frames are no error; one named twice is a driver's bug."""
    async with one_device() as (_, device, process):
        address = await pages_of(process, 2)
        await device.migrate(1, address >> PAGE_SHIFT, 2)
        first = device.welcome.zone << 36
        assert await device.session.ask(Evict(to_wire(words(first, first + 1, first + 9))), Evicted) == Evicted(2)
        with pytest.raises(RemoteError, match="or one twice"):
            await device.session.ask(Evict(to_wire(words(first, first))), Evicted)
        assert await process.read(address, 1) == b"\1"


@pytest.mark.parametrize("folios", [False, True])
async def test_exclusive_access_is_granted_as_far_as_it_goes(*, folios: bool) -> None:
    """Three writable pages and a read-only one: words of three, and the IOMMU lets the device write there until a CPU touches one."""
    async with one_device() as (_, device, process):
        address = await pages_of(process, 4)
        page = address >> PAGE_SHIFT
        await process.mprotect(address + 3 * PAGE_SIZE, PAGE_SIZE, "r")
        subscription = (await device.subscribe(1)).subscription
        reply = await device.session.ask(MakeExclusive(1, subscription, page, 4, folios), Exclusive)
        granted = from_wire(reply.words)
        assert len(granted) == 3
        await device.dma_write(1, words(page, page + 1, page + 2), granted, b"A" * 24)
        with trio.fail_after(5):
            while await process.read(address + PAGE_SIZE, 1) != b"A":
                await trio.sleep(0.01)
        with pytest.raises(RemoteError, match="IommuFault"):
            await device.dma_write(1, words(page + 1), granted[1:2], b"B" * 8)


async def test_exclusive_access_waits_for_the_end_of_what_is_being_invalidated() -> None:
    """The answer has a sequence that is good: it comes when the invalidation of its interval is over, not before."""
    async with one_device() as (_, device, process):
        address = await pages_of(process, 1)
        page = address >> PAGE_SHIFT
        subscription = (await device.subscribe(1)).subscription
        got: list[Exclusive] = []

        async def ask() -> None:
            got.append(await device.session.ask(MakeExclusive(1, subscription, page, 1), Exclusive))

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                async with process.space.hub.invalidate(Event.PROTECTION_VMA, page, page + 1):
                    nursery.start_soon(ask)
                    await trio.sleep(0.1)
                    await wait_all_tasks_blocked()
                    assert got == []
        assert len(from_wire(got[0].words)) == 1
        assert got[0].sequence % 2 == 0 or got[0].sequence > 0


async def test_a_device_that_does_not_tell_its_figures_serves(caplog: pytest.LogCaptureFixture) -> None:
    """Inspect is refused: it is ready all the same, and the log says why there are no figures."""
    async with running_host("gpu0") as (host, transport):
        with caplog.at_level(logging.INFO, "hmmnet.host"):
            async with scripted_device(host, transport, "gpu0") as device:

                def refuse(_: Inspect) -> Message:
                    raise KernelError(5, "inspect", "no figures today")

                device.session.on(Inspect, refuse)
                with trio.fail_after(5):
                    await host.device_ready("gpu0")
                process = await host.create_process()
                address = await pages_of(process, 1)
                await process.open("gpu0")
                assert (await device.migrate(1, address >> PAGE_SHIFT, 1)).tolist()[0] & MIGRATE_PFN_MIGRATE
    assert "device gpu0 does not tell its figures: inspect: EIO: no figures today" in caplog.text


async def test_roles_that_have_nothing_to_do_at_the_client_endpoint_are_refused() -> None:
    """A device that comes in by the wrong door is told which one it is."""
    async with running_host("gpu0") as (host, transport):
        with pytest.raises(PeerRefused, match="this endpoint is for programs, not for a device"):
            async with connect(transport, host.client_endpoint, Hello(PROTOCOL_VERSION, "device", "gpu0", 1, 1, SECRET)):
                raise AssertionError("it was welcomed")
        assert host.links == {}


async def test_zones_can_be_used_up() -> None:
    """After the last zone number a device is told to wait for a new machine, and the next that comes is told the same."""
    async with running_host("gpu0") as (host, transport):
        for _ in range(2):
            host.memory.zones[DEVICE_ZONE_MIN] = host.memory.zones[0]
            with pytest.raises(PeerRefused, match="start the machine anew"):
                async with connect(transport, host.control_endpoint, Hello(PROTOCOL_VERSION, "device", "gpu0", 1, 1, SECRET)):
                    raise AssertionError("it was welcomed")
        del host.memory.zones[DEVICE_ZONE_MIN]
        async with scripted_device(host, transport, "gpu0") as device:
            assert device.welcome.zone == DEVICE_ZONE_MIN


async def test_coherent_memory_that_cannot_be_had_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is there and cannot be mapped: an error, and the descriptor is closed, once."""
    closed: list[int] = []
    real = os.close

    def close(descriptor: int) -> None:
        closed.append(descriptor)
        real(descriptor)

    def arena(*_: object) -> CpuZone:
        raise OSError(12, "no room")

    monkeypatch.setattr(os, "close", close)
    monkeypatch.setattr(admission, "Arena", arena)
    with pytest.raises(OSError, match="no room"):
        admission.SharedMemory("gpu0", 64, 16)
    assert len(closed) == 1


async def test_shared_memory_is_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice closed is closed once: the number may be somebody else's file by then. What is mapped stays mapped."""
    shared = admission.SharedMemory("gpu0", 64, 16)
    shared.arena.pages[3] = 7
    closed: list[int] = []
    real = os.close

    def close(descriptor: int) -> None:
        closed.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "close", close)
    shared.close()
    shared.close()
    assert len(closed) == 1
    assert (shared.arena.pages[3] == 7).all()


async def test_fetch_add_is_one_step() -> None:
    """Two hundred additions of eight tasks to a word on a device that a CPU has to bring home: none is lost; wrong addresses are EINVAL."""
    async with one_device() as (_, device, process):
        address = await process.mmap(PAGE_SIZE)
        await process.store(address + 8, (1 << 64) - 1)
        await device.migrate(1, address >> PAGE_SHIFT, 1)
        before: list[int] = []

        async def add() -> None:
            before.extend([await process.fetch_add(address + 8, 1) for _ in range(25)])

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(add)
        assert sorted(before) == [*range(199), (1 << 64) - 1]
        assert await process.load(address + 8) == 199
        with pytest.raises(KernelError, match=r"EINVAL.*not aligned to 8 bytes"):
            await process.fetch_add(address + 4, 1)
        assert np.frombuffer(await process.read(address, 16), np.uint64).tolist() == [0, 199]


# --- what a device holds ------------------------------------------------------------------------------------------------------------


async def test_a_device_hears_of_pages_that_it_was_given_and_of_no_others() -> None:
    """By a range fault or exclusively; of a page that it has let go of nothing more."""
    async with one_device() as (_, device, process):
        page = await pages_of(process, 8) >> PAGE_SHIFT
        subscription = (await device.subscribe(1, held=True)).subscription

        async def told_of(start: int, pages: int = 1) -> bool:
            before = len(device.of(Invalidate))
            async with process.space.hub.invalidate(Event.PROTECTION_VMA, page + start, page + start + pages):
                return len(device.of(Invalidate)) > before

        assert not await told_of(0, 8)
        await device.range_fault(1, subscription, page, 2, WRITE)
        assert not await told_of(2, 6)
        assert await told_of(1)
        assert not await told_of(1)
        assert await told_of(0, 8)
        assert not await told_of(0, 8)
        await device.session.ask(MakeExclusive(1, subscription, page + 5, 1), Exclusive)
        assert not await told_of(0, 5)
        assert await told_of(5)


async def test_a_device_hears_of_pages_that_come_to_it() -> None:
    """From the moment at which it asks for them: what takes one away in the middle it must not miss. Afterwards they are held, too."""
    async with one_device() as (_, device, process):
        page = await pages_of(process, 8) >> PAGE_SHIFT
        await device.subscribe(1, held=True)
        hub, heard = process.space.hub, list[int]()

        async def take(page: int) -> None:
            async with hub.invalidate(Event.CLEAR, page, page + 1):
                heard.append(len(device.of(Invalidate)))

        def in_the_middle(message: Message) -> None:
            if isinstance(message, CopyIn):
                device.nursery.start_soon(take, page + 1)

        device.on_message = in_the_middle
        with trio.fail_after(10):
            await device.migrate(1, page, 2)
            while not heard:
                await trio.sleep(0.01)
            await take(page)
            await take(page)
        assert heard == [1, 2, 2]


async def test_a_migration_begins_when_nothing_of_it_is_being_invalidated() -> None:
    """The device was not told of that, because it held nothing; it is told of what comes next."""
    async with one_device() as (_, device, process):
        page = await pages_of(process, 2) >> PAGE_SHIFT
        await device.subscribe(1, held=True)
        hub = process.space.hub
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                async with hub.invalidate(Event.PROTECTION_VMA, page, page + 1):
                    nursery.start_soon(device.migrate, 1, page, 2)
                    await trio.sleep(0.1)
                    await wait_all_tasks_blocked()
                    assert not device.of(CopyIn)
            assert device.of(CopyIn)
            assert not device.of(Invalidate)
            async with hub.invalidate(Event.PROTECTION_VMA, page, page + 1):
                assert len(device.of(Invalidate)) == 1
