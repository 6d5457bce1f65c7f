"""A host over memory channels whose device dies, falls silent, leaves or comes back: what is lost, and what is not.

The oracle is the program: whatever happens to a device, a load gives the bytes last stored, or a BusError that names page, device, cause.
"""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import BusError, PeerLost
from hmmnet.host.service import Host
from hmmnet.pages import (
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    MIGRATE_PFN_MIGRATE,
    PAGE_SHIFT,
    PAGE_SIZE,
)
from hmmnet.wire.memory_transport import MemoryTransport
from hmmnet.wire.messages import (
    CopyIn,
    CopyOut,
    DmaGrant,
    DmaWrite,
    Invalidate,
    Message,
    Migrate,
    Migrated,
)

from .fakes import words
from .scripted_device import (
    KILLED,
    LEASE_S,
    check,
    lost,
    one_device,
    pages_of,
    physical,
    running_host,
    scripted_device,
)

pytestmark = pytest.mark.virtual_time


@pytest.mark.parametrize("step", [Migrate, CopyIn, Migrated])
async def test_killed_at_each_step_of_a_migration(step: type[Message]) -> None:
    """Before the copy, in it, and before the table update: every page is back on the host, untouched, and can migrate elsewhere."""
    async with one_device() as (host, device, process):
        address = await pages_of(process)
        page = address >> PAGE_SHIFT

        def die(message: Message) -> None:
            if isinstance(message, step):
                device.vanish()
                host.device_exited("gpu0", KILLED)

        device.on_message = die
        with trio.fail_after(10):
            if step is Migrated:
                await device.migrate(1, page, 8, done=False)
                assert process.space.residency(address, 8).pages.tolist() == [-2] * 8
                device.vanish()
                host.device_exited("gpu0", KILLED)
            elif step is CopyIn:
                with pytest.raises(PeerLost):
                    await device.migrate(1, page, 8)
            else:
                device.vanish()
                host.device_exited("gpu0", KILLED)
            await check(process, address)
        await lost(host)
        await process.write(address, b"\1")
        assert process.space.residency(address, 8).owners == ("host",)


async def test_pages_that_were_on_the_device_are_bus_errors() -> None:
    """The others live on; the error names page, device and cause."""
    async with one_device() as (host, device, process):
        address = await pages_of(process)
        await process.migrate(address, 4 * PAGE_SIZE, "gpu0")
        await check(process, address, 1)
        device.vanish()
        host.device_exited("gpu0", KILLED)
        await check(process, address, 1)
        with pytest.raises(BusError) as caught:
            await process.read(address + PAGE_SIZE, 1)
        assert f"0x{(address >> PAGE_SHIFT) + 1:x}" in str(caught.value)
        assert '"gpu0"' in str(caught.value)
        assert KILLED in str(caught.value)
        for i in range(4, 8):
            assert await process.read(address + i * PAGE_SIZE, 1) == bytes([i + 1])
        await lost(host)
        figures = (await host.report())["devices"]["gpu0"]
        assert figures["state"] == "lost"
        assert KILLED in figures["last_loss"]


async def test_killed_while_pages_come_home() -> None:
    """The load ends in SIGBUS at once, not after a lease."""
    async with one_device() as (host, device, process):
        address = await pages_of(process)
        await process.migrate(address, 8 * PAGE_SIZE, "gpu0")

        def die(message: Message) -> None:
            if isinstance(message, CopyOut):
                device.vanish()
                host.device_exited("gpu0", KILLED)

        device.on_message = die
        with trio.fail_after(LEASE_S), pytest.raises(BusError, match="signal 9"):
            await process.read(address, 8 * PAGE_SIZE)


async def test_an_invalidation_does_not_wait_for_a_dead_device() -> None:
    """munmap goes on as soon as the launcher says that the process has ended."""
    async with one_device() as (host, device, process):
        await device.subscribe(1)
        address = await pages_of(process)

        def die(message: Message) -> None:
            if isinstance(message, Invalidate):
                device.vanish()
                host.device_exited("gpu0", KILLED)

        device.on_message = die
        with trio.fail_after(LEASE_S):
            await process.munmap(address, PAGE_SIZE)


async def test_a_dma_write_that_never_comes_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has acknowledged, so it has given up what it began, and the word of it was lost: the CPU waits for a bounded time."""
    monkeypatch.setattr("hmmnet.host.link.INVALIDATION_S", 0.2)
    async with one_device() as (host, device, process):
        address = await pages_of(process)
        page = address >> PAGE_SHIFT
        subscription = (await device.subscribe(1)).subscription
        granted = await device.range_fault(1, subscription, page, 1, HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)
        message = DmaWrite(1, 1, words(page).tobytes(), physical(granted).tobytes(), 8)
        await device.session.ask(message, DmaGrant)
        with trio.fail_after(10):
            await process.mprotect(address, PAGE_SIZE, "r")
        await check(process, address)
        assert host.devices["gpu0"].life is not None, "it is well"
        again = await device.range_fault(1, subscription, page, 1, HMM_PFN_REQ_FAULT)
        assert await device.dma_read(1, words(page), again) == b"\1" * 8


async def test_a_migration_waits_for_what_its_device_was_told_before() -> None:
    """gpu0 has let go of a page, gpu1 not yet: until it has, MADV_DONTNEED could still take the page from where gpu0 would have it go."""
    async with running_host("gpu0", "gpu1") as (host, transport), scripted_device(host, transport, "gpu0") as quick:
        async with scripted_device(host, transport, "gpu1") as slow, trio.open_nursery() as nursery:
            process = await host.create_process()
            address = await pages_of(process)
            for device in (quick, slow):
                await process.open(device.name)
            for number, device in enumerate((quick, slow), 1):
                await device.subscribe(number)
            lets_go = trio.Event()

            async def late(message: Message) -> None:
                slow.heard.append(message)
                if len(slow.of(Invalidate)) == 1:
                    await lets_go.wait()

            slow.session.on(Invalidate, late)
            nursery.start_soon(process.madvise, address, PAGE_SIZE, "DONTNEED")
            with trio.fail_after(10):
                while not (slow.of(Invalidate) and quick.of(Invalidate)):
                    await trio.sleep(0.001)
                words = []

                async def migrate() -> None:
                    words.extend((await quick.migrate(1, address >> PAGE_SHIFT, 2)).tolist())

                nursery.start_soon(migrate)
                await trio.sleep(0.05)
                assert not quick.of(CopyIn), "it has begun"
                assert process.space.residency(address, 2).owners == ("host",)
                lets_go.set()
                while not words:
                    await trio.sleep(0.001)
            assert [word & int(MIGRATE_PFN_MIGRATE) for word in words] == [int(MIGRATE_PFN_MIGRATE)] * 2
            assert await process.read(address, 1) == b"\0", "it was dropped before it went"
            assert await process.read(address + PAGE_SIZE, 1) == b"\2"


async def test_a_silent_device_is_fenced_after_its_lease() -> None:
    """It may be alive and cut off: the page is reused only when it must have stopped by itself, two leases after its last word at most."""
    async with one_device() as (host, device, process):
        await device.subscribe(1)
        address = await pages_of(process)
        device.on_message = lambda message: device.vanish() if isinstance(message, Invalidate) else None
        began_s = trio.current_time()
        with trio.fail_after(10):
            await process.munmap(address, PAGE_SIZE)
        took_s = trio.current_time() - began_s
        assert took_s >= 2 * LEASE_S * 0.9
        assert "silent" in host.devices["gpu0"].last_loss


async def test_a_goodbye_needs_no_lease() -> None:
    """A device that says BYE is gone: what it had is lost, nothing waits."""
    async with running_host("gpu0") as (host, transport):
        process = await host.create_process()
        async with scripted_device(host, transport, "gpu0") as device:
            await process.open("gpu0")
            await device.subscribe(1)
            address = await pages_of(process)
            await process.migrate(address, PAGE_SIZE, "gpu0")
        with trio.fail_after(LEASE_S):
            await process.munmap(address + PAGE_SIZE, PAGE_SIZE)
            with pytest.raises(BusError, match="goodbye"):
                await process.read(address, 1)


async def test_a_restarted_device_is_a_new_life() -> None:
    """Another zone, empty memory; old pages stay lost, new work goes on."""
    async with running_host("gpu0") as (host, transport):
        process = await host.create_process()
        async with scripted_device(host, transport, "gpu0") as first:
            await process.open("gpu0")
            address = await pages_of(process)
            await process.migrate(address, PAGE_SIZE, "gpu0")
            first.vanish()
            host.device_exited("gpu0", KILLED)
        async with scripted_device(host, transport, "gpu0", incarnation=2) as second:
            await host.device_ready("gpu0")
            assert second.welcome.zone == first.welcome.zone + 1
            with pytest.raises(BusError):
                await process.read(address, 1)
            assert await process.migrate(address + PAGE_SIZE, PAGE_SIZE, "gpu0") == PAGE_SIZE
            assert await process.read(address + PAGE_SIZE, 1) == b"\2"
            assert (await host.report())["devices"]["gpu0"]["lives"] == 2


async def test_a_device_that_never_updates_its_table_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives and sends heartbeats, but breaks the protocol: its migration is undone, nobody waits on the migration entries for ever."""
    monkeypatch.setattr("hmmnet.host.requests.TABLE_UPDATE_S", 0.1)
    async with one_device() as (host, device, process):
        address = await pages_of(process)
        await device.migrate(1, address >> PAGE_SHIFT, 8, done=False)
        with trio.fail_after(10):
            await check(process, address)
        assert "table" in host.devices["gpu0"].last_loss


async def test_two_processes_one_device_lost() -> None:
    """Each loses its own pages there, and only those."""
    async with one_device() as (host, device, first):
        second = await host.create_process()
        addresses = {process: await pages_of(process, 2) for process in (first, second)}
        for process, address in addresses.items():
            await process.migrate(address, PAGE_SIZE, "gpu0")
        device.vanish()
        host.device_exited("gpu0", KILLED)
        for process, address in addresses.items():
            with pytest.raises(BusError):
                await process.read(address, 1)
            assert await process.read(address + PAGE_SIZE, 1) == b"\2"
            await process.exit()
        await lost(host)
        with trio.fail_after(10):
            while len(host.memory.zones) > 1:
                await trio.sleep(0.01)


async def test_the_host_says_goodbye_at_its_end() -> None:
    """Devices hear it at once; the host leaves nothing behind."""
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            ended = trio.Event()

            async def device(host: Host, transport: MemoryTransport) -> None:
                async with scripted_device(host, transport, "gpu0") as made:
                    while made.session.lost is None:
                        await trio.sleep(0.01)
                ended.set()

            async with running_host("gpu0") as (host, transport):
                nursery.start_soon(device, host, transport)
                await host.device_ready("gpu0")
                await wait_all_tasks_blocked()
            await ended.wait()
