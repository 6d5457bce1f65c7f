"""Page data lose their connection while control goes on: over tcp the two are different connections.

    host ══ control ═══════════════ gpu0, gpu1, unit0
         ══ page data ══ relay ════

Sockets and devices are real, and share the test's process; the relays are cut. The oracle is the program: no CPU waits for ever, and what
it loads is what was last stored.
"""

from __future__ import annotations

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
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.host import watchdog
from hmmnet.host.process import Process
from hmmnet.host.service import Host
from hmmnet.topology.load import parse
from hmmnet.wire import zmq_transport
from hmmnet.wire.secrets import new_secret
from hmmnet.wire.transport import AWAY_S, CHANNEL_BYTES_MAX
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

    async def cut_in_the_middle(self, after_s: float | None) -> None:
        """Of a copy that begins now: after so long; None: as soon as the device has given `GIVEN` bytes of it."""
        if after_s is None:
            for relay in self.relays:
                relay.left = GIVEN
            while all(relay.left for relay in self.relays):
                await trio.sleep(0.01)
        else:
            await trio.sleep(after_s)
        self.cut()

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


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("way", WAYS)
async def test_who_waits_for_page_data_without_a_connection_does_not_wait_for_ever(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """The copy fails, the pages are where they were, a CPU that waited for one goes on; later it all works again."""
    source, target, cut, after_s = WAYS[way]
    async with machine(8e6) as (host, wires):
        process = await host.create_process()
        address = await placed(process, source)
        failures: list[HmmnetError] = []

        async def migrate() -> None:
            try:
                await process.migrate(address, PAGES * PAGE, target)
            except HmmnetError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(migrate)
            await wires[cut].cut_in_the_middle(after_s)
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
            await wires[cut].cut_in_the_middle(after_s)
            await trio.sleep(AWAY_S / 4)
            wires[cut].mend()
        assert (await process.residency(address, PAGES)).owners == (target.replace("host", "node0"),)
        assert await process.read(address, PAGES * PAGE) == DATA[: PAGES * PAGE]
        assert all(device.life is not None and device.lives == 1 for device in host.devices.values())
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
