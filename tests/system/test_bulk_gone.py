"""Page data lose their connection, or nothing comes over it any more, while control goes on: over tcp the two are different connections.

    host ══ control ═══════════════ gpu0, gpu1, unit0
         ══ page data ══ relay ════

Sockets and devices are real, and share the test's process; the relays fail. The oracle is the program: no CPU waits for ever, and what
it loads is what was last stored.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from hmmnet.devices.service import serve
from hmmnet.errors import HmmnetError, PeerError
from hmmnet.fabric.chunk import CHUNK_BYTES
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.sender import DOWN_S
from hmmnet.host import watchdog
from hmmnet.host.process import Process
from hmmnet.host.service import Host
from hmmnet.topology.load import parse
from hmmnet.wire import zmq_transport
from hmmnet.wire.exchange import LEASE_S
from hmmnet.wire.secrets import new_secret
from hmmnet.wire.transport import ANSWER_BYTES_MAX, AWAY_S, CHANNEL_BYTES_MAX, MUTE_S, PING_S
from hmmnet.wire.zmq_transport import ZmqChannel, ZmqTransport

from .relay import Relay

PAGE = 4096
PAGES = 2048
"""Eight chunks."""
GIVEN = 5 << 20
"""Bytes of them, with the headers."""
DATA = bytes(range(1, 251)) * (PAGES * PAGE // 250 + 1)
BOUND_S = 60.0
SHORT_S = 1.0
"""Instead of `AWAY_S`, where nobody comes again."""
SOONER_S = DOWN_S / 2
"""Than all repeats take, whatever else the computer does: what it is about takes three to seven seconds."""
GONE = r"nobody has been at the other end of the bulk channel|its sender has had no connection"


class Relayed(ZmqTransport):
    """A device's transport, whose bulk channels pass relays."""

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__()
        self._nursery = nursery
        self.relays: list[Relay] = []

    def connect_channel(self, endpoint: str, max_bytes: int = CHANNEL_BYTES_MAX, key: bytes = b"") -> ZmqChannel:
        """See `Transport.connect_channel`."""
        self.relays.append(Relay(self._nursery, int(endpoint.rpartition(":")[2])))
        return super().connect_channel(self.relays[-1].endpoint, max_bytes, key)

    def cut(self) -> None:
        """Nothing connects any more."""
        for relay in self.relays:
            relay.cut()

    def swallow(self, *, new: bool = False) -> None:
        """Connections that are there, and maybe `new` ones, stay open, and nothing comes over them."""
        for relay in self.relays:
            relay.swallow(new=new)

    def pause(self) -> None:
        """Relays take nothing."""
        for relay in self.relays:
            relay.pause()

    def go_on(self) -> None:
        """They do again."""
        for relay in self.relays:
            relay.go_on()

    async def fail_in_the_middle(self, after_s: float | None, fail: Callable[[], None]) -> None:
        """Of a copy that begins now: after so long; None: as soon as the device has given `GIVEN` bytes of it."""
        if after_s is None:
            for relay in self.relays:
                relay.left, relay.then = GIVEN, fail
            while all(relay.left for relay in self.relays):
                await trio.sleep(0.01)
        else:
            await trio.sleep(after_s)
            fail()

    @property
    def connections(self) -> int:
        """Made so far."""
        return sum(relay.connections for relay in self.relays)

    def mend(self) -> None:
        """It does again."""
        for relay in self.relays:
            relay.open()


@asynccontextmanager
async def machine(bytes_per_s: float) -> AsyncIterator[tuple[Host, dict[str, Relayed]]]:
    """A host with two gpus and a dmirror at links so slow, and the wires of each."""
    links = "".join(
        f'[[link]]\na = "{a}"\nb = "{b}"\nbandwidth = "{bytes_per_s * 1e-6:g} MB/s"\nlatency = "1 us"\n'
        for a, b in (("node0", "gpu0"), ("node0", "gpu1"), ("node0", "unit0"), ("gpu0", "gpu1"))
    )
    topology = parse(f"""
[[memory]]
name = "node0"
size = "64 MiB"
[[device]]
name = "gpu[0-1]"
memory = "16 MiB"
[[device]]
name = "unit0"
model = "dmirror"
memory = "16 MiB"
{links}
""")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hm-")))
        transport, secret = stack.enter_context(ZmqTransport()), new_secret()
        host = Host(topology, transport, directory, secret, EmulatedClock(), "gone", scheme="tcp")
        async with trio.open_nursery() as nursery:
            wires = {name: stack.enter_context(Relayed(nursery)) for name in topology.device_names}
            async with host.running():
                for device, wire in wires.items():
                    nursery.start_soon(serve, wire, host.control_endpoint, device, secret, time.time_ns())
                with trio.fail_after(BOUND_S):
                    for device in wires:
                        await host.device_ready(device)
                    yield host, wires
            nursery.cancel_scope.cancel()


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (zmq_transport, watchdog):
        monkeypatch.setattr(module, "AWAY_S", SHORT_S)


@pytest.fixture
def _soon_mute(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MUTE_S", "PING_S"):
        monkeypatch.setattr(zmq_transport, name, SHORT_S)
    monkeypatch.setattr(zmq_transport, "mute_s", lambda max_bytes: (1 if max_bytes <= ANSWER_BYTES_MAX else 3) * SHORT_S)


async def placed(process: Process, owner: str) -> int:
    """Where `DATA` lie, in the memory of `owner`."""
    address = await process.mmap(PAGES * PAGE)
    await process.write(address, DATA[: PAGES * PAGE])
    if owner != "host":
        await process.migrate(address, PAGES * PAGE, owner)
    return address


WAYS = {
    "there": ("host", "gpu0", "gpu0", 0.2),
    "home": ("gpu0", "host", "gpu0", 0.2),
    "across, from the source": ("gpu0", "gpu1", "gpu0", None),
    "across, to the target": ("gpu0", "gpu1", "gpu1", 0.2),
}
"""From where, to where, who is cut off, and when: see `cut_in_the_middle`. A copy takes a second;
no link paces what a source gives a host."""


async def migrated(process: Process, address: int, target: str, failures: list[HmmnetError]) -> None:
    """All pages move to `target`, or it is noted why not."""
    try:
        await process.migrate(address, PAGES * PAGE, target)
    except HmmnetError as error:
        failures.append(error)


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("way", WAYS)
async def test_who_waits_for_page_data_without_a_connection_does_not_wait_for_ever(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """The copy fails, the pages are where they were, a CPU that waited for one goes on; later it all works again."""
    source, target, cut, after_s = WAYS[way]
    async with machine(8e6) as (host, wires):
        process = await host.create_process()
        address = await placed(process, source)
        failures: list[HmmnetError] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(migrated, process, address, target, failures)
            await wires[cut].fail_in_the_middle(after_s, wires[cut].cut)
            assert failures == []
            if target != "gpu1":
                page = address + 1500 * PAGE
                assert await process.read(page, PAGE) == DATA[1500 * PAGE : 1501 * PAGE], "comes home by itself, over control"
        if way == "across, from the source":
            assert failures == [], "pages that cannot leave stay, and that is no failure"
            assert re.search(rf"pages of gpu0 stay there: .*({GONE})", caplog.text)
        else:
            assert [isinstance(error, PeerError) for error in failures] == [True]
            assert re.search(GONE, str(failures[0]))
        assert set((await process.residency(address, PAGES)).owners) <= {source.replace("host", "node0"), "node0"}
        assert all(device.life is not None and device.lives == 1 for device in host.devices.values())
        wires[cut].mend()
        if target != "host":
            await process.migrate(address, 64 * PAGE, target)
            assert (await process.residency(address, 64)).owners == (target,)
        assert await process.read(address, PAGES * PAGE) == DATA[: PAGES * PAGE]
        await process.exit()


@pytest.mark.parametrize("way", WAYS)
async def test_a_connection_that_comes_again_in_time_costs_nothing(way: str) -> None:
    """What was on its way is sent again."""
    source, target, cut, after_s = WAYS[way]
    async with machine(8e6) as (host, wires):
        process = await host.create_process()
        address = await placed(process, source)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.migrate, address, PAGES * PAGE, target)
            await wires[cut].fail_in_the_middle(after_s, wires[cut].cut)
            await trio.sleep(AWAY_S / 4)
            wires[cut].mend()
        assert (await process.residency(address, PAGES)).owners == (target.replace("host", "node0"),)
        assert await process.read(address, PAGES * PAGE) == DATA[: PAGES * PAGE]
        assert all(device.life is not None and device.lives == 1 for device in host.devices.values())
        await process.exit()


@pytest.mark.usefixtures("_soon", "_soon_mute")
@pytest.mark.parametrize(
    ("way", "relay"),
    [
        ("there", "swallows"),
        ("there", "stands still"),
        ("home", "swallows"),
        ("home", "stands still"),
        ("across, from the source", "swallows"),
    ],
)
async def test_a_connection_over_which_nothing_comes_is_given_up(way: str, relay: str) -> None:
    """Both ends see it open, and new ones are as it is. The copy ends as where there is none, and later it all works again."""
    source, target, cut, after_s = WAYS[way]
    async with machine(8e6) as (host, wires):
        process = await host.create_process()
        address = await placed(process, source)
        fail = wires[cut].pause if relay == "stands still" else lambda: wires[cut].swallow(new=True)
        async with trio.open_nursery() as nursery:
            failures: list[HmmnetError] = []
            nursery.start_soon(migrated, process, address, target, failures)
            await wires[cut].fail_in_the_middle(after_s, fail)
            nursery.cancel_scope.deadline = trio.current_time() + SOONER_S
        assert not nursery.cancel_scope.cancelled_caught, "it took as long as its repeats"
        assert all(re.search(GONE, str(error)) for error in failures), failures
        assert set((await process.residency(address, PAGES)).owners) <= {source.replace("host", "node0"), "node0"}
        assert all(device.life is not None and device.lives == 1 for device in host.devices.values())
        wires[cut].cut()
        await trio.sleep(0.1)
        wires[cut].mend()
        if target != "host":
            await process.migrate(address, 64 * PAGE, target)
            assert (await process.residency(address, 64)).owners == (target,)
        assert await process.read(address, PAGES * PAGE) == DATA[: PAGES * PAGE]
        await process.exit()


async def test_what_a_half_dead_connection_swallows_is_sent_over_a_new_one() -> None:
    """A relay has forgotten the connections, and serves new ones: pages are home a few seconds later."""
    async with machine(8e6) as (host, wires):
        process = await host.create_process()
        address = await placed(process, "gpu0")
        made = wires["gpu0"].connections
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.migrate, address, PAGES * PAGE, "host")
            await wires["gpu0"].fail_in_the_middle(None, wires["gpu0"].swallow)
            began_s = trio.current_time()
        assert trio.current_time() - began_s < SOONER_S
        assert wires["gpu0"].connections > made, "nobody has connected anew"
        assert (await process.residency(address, PAGES)).owners == ("node0",)
        assert await process.read(address, PAGES * PAGE) == DATA[: PAGES * PAGE]
        await process.exit()


async def test_a_slow_connection_is_none_over_which_nothing_comes() -> None:
    """A chunk takes longer than a connection may be mute, in either direction; so it is with one that stands still for most of a lease."""
    async with machine(1e9) as (host, wires):
        process = await host.create_process()
        there, home, paused = [await placed(process, owner) for owner in ("host", "gpu1", "host")]
        made = {name: wires[name].connections for name in wires}
        for name in ("gpu0", "gpu1"):
            for relay in wires[name].relays:
                relay.bytes_per_s = CHUNK_BYTES / (MUTE_S + 2 * PING_S)
        wires["unit0"].pause()
        pages = CHUNK_BYTES // PAGE
        async with trio.open_nursery() as nursery:
            began_s = trio.current_time()
            nursery.start_soon(process.migrate, there, CHUNK_BYTES, "gpu0")
            nursery.start_soon(process.migrate, home, CHUNK_BYTES, "host")
            nursery.start_soon(process.migrate, paused, CHUNK_BYTES, "unit0")
            await trio.sleep(0.9 * LEASE_S)
            wires["unit0"].go_on()
        assert trio.current_time() - began_s > MUTE_S + PING_S
        owners = [(await process.residency(address, pages)).owners for address in (there, home, paused)]
        assert owners == [("gpu0",), ("node0",), ("unit0",)]
        assert {name: wires[name].connections for name in wires} == made, "nobody has connected anew"
        for name in ("gpu0", "gpu1"):
            for relay in wires[name].relays:
                relay.bytes_per_s = math.inf
        await process.exit()


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("command", ["write", "read"])
async def test_a_command_without_its_data_ends(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way they were to go; the device hears of it when it is connected again, and its file closes."""
    monkeypatch.setattr("hmmnet.host.handles.ANSWER_S", SHORT_S)
    async with machine(1e9) as (host, wires):
        process = await host.create_process()
        address = await process.mmap(64 * PAGE)
        handle = await process.open("unit0")
        data = DATA[: 64 * PAGE]
        ask: Callable[[], Awaitable[object]] = (
            (lambda: handle.ioctl("write", address, 64, data)) if command == "write" else lambda: handle.ioctl("read", address, 64)
        )
        await ask()
        wires["unit0"].cut()
        await trio.sleep(0.1)
        with pytest.raises(PeerError, match=GONE):
            await ask()
        wires["unit0"].mend()
        await ask()
        await handle.close()
        await process.exit()
