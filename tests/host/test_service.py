"""A host and scripted devices over memory channels: who may join, and what flows.

    program ── process ── address space ── hub ──┐
                                                 host ══ session + bulk ══ gpu0, gpu1 (scripted)

The oracle is the program: a load gives the bytes last stored. What a device's death leaves behind is in `test_loss.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio

from hmmnet.errors import HmmnetError, KernelError, PeerRefused, RemoteError
from hmmnet.host.interfaces import Event
from hmmnet.pages import (
    DEVICE_ZONE_MIN,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    PAGE_SHIFT,
    PAGE_SIZE,
)
from hmmnet.wire.client import connect
from hmmnet.wire.memory_transport import MemoryChannel
from hmmnet.wire.messages import (
    PROTOCOL_VERSION,
    Call,
    CloseContext,
    CopyOut,
    DmaRead,
    DmaWrite,
    Evict,
    FreeFrames,
    Hello,
    Invalidate,
    MakeExclusive,
    Message,
    Migrate,
    OpenContext,
    RangeFault,
    Rate,
    Result,
    Unsubscribe,
)

from .fakes import words
from .scripted_device import (
    SECRET,
    check,
    one_device,
    pages_of,
    running_host,
    scripted_device,
)

pytestmark = pytest.mark.virtual_time

WRITE = HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE


# --- joining ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "name", "secret", "why"),
    [
        ("device", "gpu7", SECRET, "has no device"),
        ("client", "gpu0", SECRET, "for devices"),
        ("device", "gpu0", b"wrong", "secret"),
    ],
)
async def test_strangers_are_refused_and_leave_nothing(role: str, name: str, secret: bytes, why: str) -> None:
    """Unknown name, wrong role, wrong secret: a reason, and no zone, no channel."""
    async with running_host("gpu0") as (host, transport):
        hello = Hello(PROTOCOL_VERSION, role, name, 1, 1, secret)
        with pytest.raises(PeerRefused, match=why):
            async with connect(transport, host.control_endpoint, hello):
                raise AssertionError("it was welcomed")
        assert host.links == {}
        assert list(host.memory.zones) == [0]


async def test_a_second_channel_that_cannot_be_bound_costs_no_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is told why, and may come again; a device of that name that runs goes on."""
    async with running_host("gpu0") as (host, transport), scripted_device(host, transport, "gpu0") as device:
        closed: list[str] = []
        bind = transport.bind_channel

        def bind_one(endpoint: str, *arguments: Any, **options: Any) -> MemoryChannel:
            if endpoint.endswith("o"):
                raise HmmnetError(f"cannot listen at {endpoint}: too many open files")
            channel = bind(endpoint, *arguments, **options)
            monkeypatch.setattr(channel, "close", lambda: closed.append(endpoint))
            return channel

        with monkeypatch.context() as patch, pytest.raises(PeerRefused, match="too many open files"):
            patch.setattr(transport, "bind_channel", bind_one)
            async with connect(transport, host.control_endpoint, Hello(PROTOCOL_VERSION, "device", "gpu0", 9, 1, SECRET)):
                raise AssertionError("it was welcomed")
        assert [endpoint[-1] for endpoint in closed] == ["i"]
        assert device.session.lost is None


async def test_a_device_learns_its_zone_and_what_it_is() -> None:
    """The welcome carries spec, zones and clock; the zone is its own."""
    async with running_host("gpu0", "gpu1") as (host, transport):
        with trio.fail_after(5):
            async with scripted_device(host, transport, "gpu0") as first, scripted_device(host, transport, "gpu1") as second:
                await host.device_ready("gpu1")
                assert (first.welcome.zone, second.welcome.zone) == (DEVICE_ZONE_MIN, DEVICE_ZONE_MIN + 1)
                assert [zone.owner for zone in second.welcome.zones] == ["host", "gpu0"]
                assert msgspec.msgpack.decode(first.welcome.config)["name"] == "gpu0"
                report = await host.report()
                assert {name: device["state"] for name, device in report["devices"].items()} == {"gpu0": "ready", "gpu1": "ready"}


async def test_each_life_of_a_device_has_its_own_chances() -> None:
    """What they are drawn from is other for each machine's seed, each device and each of its lives, and the same in another launch."""
    told = []
    async with running_host("gpu0", "gpu1", seed=7) as (host, transport):
        with trio.fail_after(5):
            for name, life in (("gpu0", 1), ("gpu1", 1), ("gpu0", 2)):
                async with scripted_device(host, transport, name, life) as device:
                    told.append(msgspec.msgpack.decode(device.welcome.config)["chance"])
    assert told == ["7 gpu0 1", "7 gpu1 1", "7 gpu0 2"]


async def test_opening_a_device_that_is_not_there() -> None:
    """ENODEV until it has started, ENOENT for a name that the topology does not have."""
    async with running_host("gpu0") as (host, _):
        process = await host.create_process()
        with pytest.raises(KernelError, match=r"ENODEV.*not started"):
            await process.open("gpu0")
        with pytest.raises(KernelError, match=r"ENOENT.*no device"):
            await process.open("gpu9")


async def test_programs_join_at_the_client_endpoint() -> None:
    """Their calls are served; when they go, their processes end."""
    async with running_host("gpu0") as (host, transport):
        hello = Hello(PROTOCOL_VERSION, "client", "program", 1, 1, SECRET)
        async with connect(transport, host.client_endpoint, hello) as (session, _):
            made = await session.ask(Call("create_process", b"\x80"), Result)
            assert msgspec.msgpack.decode(made.value) in host.spaces
            with pytest.raises(RemoteError, match="unknown operation"):
                await session.ask(Call("frobnicate", b"\x80"), Result)
        with trio.fail_after(5):
            while host.spaces:
                await trio.sleep(0.01)


async def test_a_new_rate_reaches_everybody() -> None:
    """The note has the same epoch as the host's clock."""
    async with one_device() as (host, device, _):
        host.set_rate(0.5)
        with trio.fail_after(5):
            while not device.of(Rate):
                await trio.sleep(0.01)
        note = device.of(Rate)[0]
        assert isinstance(note, Rate)
        assert (note.rate, note.epoch_emulated_s) == (0.5, host.clock.epoch_emulated_s)


# --- handles and commands ----------------------------------------------------------------------------------------------------------------


async def test_handles_share_a_context_that_the_last_one_closes() -> None:
    """One OpenContext, one CloseContext; a closed handle is EBADF."""
    async with one_device() as (_, device, process):
        second = await process.open("gpu0")
        assert len(device.of(OpenContext)) == 1
        await second.close()
        assert device.of(CloseContext) == []
        with pytest.raises(KernelError, match="EBADF"):
            await second.ioctl("echo", 0, 1)
        with pytest.raises(KernelError, match="EBADF"):
            await second.close()
        await process.exit()
        assert len(device.of(CloseContext)) == 1


async def test_data_of_commands_travel_as_streams() -> None:
    """Two megabytes in, the answer's own bytes out."""
    async with one_device() as (_, _device, process):
        handle = await process.open("gpu0")
        data = bytes(range(256)) * (8 * PAGE_SIZE // 256)
        assert (await handle.ioctl("echo", 0, 8, data)).data == data[:16]


async def test_malloc_is_aligned_and_grows() -> None:
    """Cache lines, one mapping for many, a mapping of its own for a large one."""
    async with running_host("gpu0") as (host, _):
        process = await host.create_process()
        addresses = [await process.malloc(size) for size in (1, 100, 3 << 20, 8)]
        assert all(address % 64 == 0 for address in addresses)
        assert addresses[1] - addresses[0] == 64
        for address in addresses:
            await process.store(address, address)
        assert [await process.load(address) for address in addresses] == addresses


# --- migration over the wire -----------------------------------------------------------------------------------------------------


async def test_pages_travel_out_and_home() -> None:
    """Streams for many pages, the answer for few; the freed frames are told."""
    async with one_device() as (host, device, process):
        address = await pages_of(process)
        assert await process.migrate(address, 8 * PAGE_SIZE, "gpu0") == 8 * PAGE_SIZE
        assert bytes(device.arena.pages[:8, 5]) == bytes(range(1, 9))
        await check(process, address, 1)
        assert [message.stream for message in device.of(CopyOut) if isinstance(message, CopyOut)] == [0]
        assert await process.migrate(address, 8 * PAGE_SIZE, "host") == 7 * PAGE_SIZE
        await check(process, address)
        with trio.fail_after(5):
            while sum(len(message.frames) for message in device.of(FreeFrames) if isinstance(message, FreeFrames)) < 64:
                await trio.sleep(0.01)
        report = await host.report()
        moved = {row["kind"]: row["total_bytes"] for row in report["profile"]}
        assert moved == {"host_to_device": 8 * PAGE_SIZE, "device_to_host": 8 * PAGE_SIZE, "cpu_fault": PAGE_SIZE}
        assert {link["bytes_moved"] for link in report["links"] if "gpu0" in (link["source"], link["target"])} == {8 * PAGE_SIZE}


async def test_exit_tells_mirrors_once_and_frees_device_pages() -> None:
    """RELEASE over everything, then FreeFrames, then the context is closed."""
    async with one_device() as (host, device, process):
        await device.subscribe(1)
        address = await pages_of(process, 4)
        await process.migrate(address, 4 * PAGE_SIZE, "gpu0")
        await process.exit()
        events = [message.event for message in device.of(Invalidate) if isinstance(message, Invalidate)]
        assert events == ["release"]
        kinds = [type(message) for message in device.heard]
        assert kinds.index(Invalidate) < kinds.index(FreeFrames) < kinds.index(CloseContext)
        assert host.spaces == {}


# --- mirror and DMA --------------------------------------------------------------------------------------------------------------


async def test_dma_goes_only_where_the_device_was_told() -> None:
    """Granted by a range fault; refused and counted once the page was invalidated."""
    async with one_device() as (host, device, process):
        address = await pages_of(process, 2)
        page = address >> PAGE_SHIFT
        subscription = await device.subscribe(1)
        granted = await device.range_fault(1, subscription.subscription, page, 2, WRITE)
        where = words(page, page + 1)
        assert await device.dma_read(1, where, granted) == b"\1" * 8 + b"\2" * 8
        await device.dma_write(1, where, granted, b"A" * 8 + b"B" * 8)
        with trio.fail_after(5):
            while await process.read(address + PAGE_SIZE, 8) != b"B" * 8:
                await trio.sleep(0.01)
        await process.munmap(address, PAGE_SIZE)
        with pytest.raises(RemoteError, match=r"IommuFault.*no translation"):
            await device.dma_read(1, where, granted)
        assert (await host.report())["devices"]["gpu0"]["iommu_refused"] == 1
        assert await device.dma_read(1, where[1:], granted[1:]) == b"B" * 8


async def test_who_subscribes_in_the_middle_of_an_invalidation_hears_when_it_is_over() -> None:
    """Of that one it is never told: until then nothing may be mapped, whoever brings it."""
    async with one_device() as (host, device, process):
        hub = host.hubs[process.pid]
        before = await device.subscribe(1)
        later: list[int] = []

        async def subscribe() -> None:
            later.append((await device.subscribe(1)).subscription)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                async with hub.invalidate(Event.CLEAR, 10, 20):
                    nursery.start_soon(subscribe)
                    await trio.sleep(0.05)
                    assert later == []
                    assert len(device.of(Invalidate)) == 1
            assert later == [before.subscription + 1]
            async with hub.invalidate(Event.CLEAR, 10, 20):
                assert len(device.of(Invalidate)) == 3


async def test_requests_that_no_driver_sends_are_refused() -> None:
    """Wrong contexts, ranges, frames and sizes: an answer, and the session goes on."""
    async with one_device() as (_, device, process):
        subscription = (await device.subscribe(1, 0, 100)).subscription
        bad: list[Message] = [
            RangeFault(1, subscription, 90, 20, 0, 0),
            RangeFault(1, subscription + 5, 0, 1, 0, 0),
            RangeFault(1, subscription, 0, 2, 0, 0, b"12345678"),
            RangeFault(1, subscription, 0, 1, 0, 0, b"123"),
            Migrate(1, 0, 0, "device", 1),
            Migrate(1, 0, 1, "sideways", 1),
            Migrate(1, 0, 2, "device", 1, bytes(8)),
            Evict(b"\1" * 8),
            Evict(b"\1" * 7),
            Unsubscribe(1, 99),
            MakeExclusive(1, subscription, 90, 20),
            MakeExclusive(1, subscription + 5, 0, 1),
            DmaRead(1, 1, b"", b"", 8),
            DmaRead(1, 1, b"123", b"123", 8),
            DmaRead(1, 1, bytes(8), bytes(16), 8),
            DmaRead(1, 1, bytes(8), bytes(8), 3),
            DmaWrite(1, 1, bytes(8), b"\1" + bytes(7), 8),
            DmaRead(1, 1, b"\xff" * 7 + b"\0", bytes(8), 8),
            DmaRead(1, 2, bytes(8), bytes(8), 8),
        ]
        for message in bad:
            with pytest.raises(RemoteError, match="ProtocolError"):
                await device.session.request(message)
        with pytest.raises(KernelError, match="ESRCH"):
            await device.subscribe(42)
        await check(process, await pages_of(process))
