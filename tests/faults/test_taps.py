"""A host's wires with a network in them: what passes when nothing is wrong, and what comes of each fault, both ways.

That nothing else comes is shown by a last word, sent when the faults are over.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from hmmnet.faults.messages import MessageFault, Way
from hmmnet.faults.network import Network
from hmmnet.faults.taps import Taken, TappedChannel, TappedListener
from hmmnet.wire.transport import Channel
from hmmnet.wire.zmq_transport import ZmqTransport

CHUNK = (b"header", b"payload" * 100)
LAST = b"that was all"
BOUND_S = 20.0


@dataclass
class Wires:
    """The two kinds of wires of a device: the host's ends are tapped."""

    network: Network
    listener: TappedListener
    control: Channel
    address: bytes
    bulk: TappedChannel
    far: Channel

    async def opened(self) -> None:
        """Both ends know each other."""
        await self.control.send(b"hello")
        await self.listener.receive()
        await self.far.send(b"hello")
        await self.bulk.receive()

    async def heard(self) -> list[bytes]:
        """What came to the host on the control wire before the last word."""
        found: list[bytes] = []
        await self.control.send(LAST)
        while not found or found[-1] != LAST:
            found.append((await self.listener.receive())[1])
        return found[:-1]

    async def told(self) -> list[bytes]:
        """What came to the device before the last word."""
        found: list[bytes] = []
        await self.listener.send(self.address, LAST)
        while not found or found[-1] != LAST:
            found.append((await self.control.receive())[0])
        return found[:-1]


@pytest.fixture
def wires() -> Iterator[Wires]:
    network = Network(Random(1))
    with tempfile.TemporaryDirectory(prefix="hn-") as folder, ZmqTransport() as transport:
        control_at, bulk_at = (f"ipc://{Path(folder) / name}" for name in "cb")
        listener = TappedListener(transport.listen(control_at), network)
        address, key = transport.fresh_identity("gpu0"), transport.fresh_identity("bulk")
        control = transport.connect(control_at, address)
        bulk = TappedChannel(transport.bind_channel(bulk_at, key=key), "gpu0", network)
        yield Wires(network, listener, control, address, bulk, transport.connect_channel(bulk_at, key=key))


async def test_without_faults_all_passes(wires: Wires) -> None:
    """Whole and in order, each kind of call."""
    with trio.fail_after(BOUND_S):
        await wires.opened()
        await wires.control.send(b"one")
        assert await wires.listener.receive() == (wires.address, b"one")
        await wires.listener.send(wires.address, b"three")
        wires.listener.send_nowait(wires.address, b"four")
        assert [(await wires.control.receive())[0] for _ in range(2)] == [b"three", b"four"]
        await wires.far.send(*CHUNK)
        header, payload = await wires.bulk.receive()
        assert payload is not None
        assert (header, payload.take()) == CHUNK
        await wires.bulk.send(b"credit")
        wires.bulk.send_nowait(*CHUNK)
        assert await wires.far.receive() == (b"credit", None)
        header, payload = await wires.far.receive()
        assert payload is not None
        assert (header, payload.take()) == CHUNK
        assert wires.bulk.refused == 0
        with pytest.raises(trio.WouldBlock):
            wires.listener.receive_nowait()
        with pytest.raises(trio.WouldBlock):
            wires.bulk.receive_nowait()
        await wires.listener.aclose()
        await wires.bulk.aclose()


@pytest.mark.parametrize(
    ("kind", "comes"),
    [("loss", []), ("partition", []), ("duplicate", [b"1", b"1", b"2", b"2"]), ("delay", [b"1", b"2"]), ("reorder", [b"1", b"2"])],
)
async def test_control_both_ways(kind: str, comes: list[bytes], wires: Wires) -> None:
    """Each frame has its fate, on the way in and on the way out; another device's frames have none."""
    with trio.fail_after(BOUND_S):
        await wires.opened()
        wires.network.add(MessageFault(kind, Way("gpu1")))
        number = wires.network.add(MessageFault(kind, Way("gpu0"), latency_s=0.05 if kind == "delay" else 0.0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wires.network.run)
            began_s = trio.current_time()
            await wires.control.send(b"1")
            await wires.control.send(b"2")
            await wires.listener.send(wires.address, b"1")
            wires.listener.send_nowait(wires.address, b"2")
            heard = [(await wires.listener.receive())[1] for _ in comes]
            told = [(await wires.control.receive())[0] for _ in comes]
            if not comes:
                while wires.network.count(number) < 4:
                    with pytest.raises(trio.TooSlowError), trio.fail_after(0.02):
                        await wires.listener.receive()
            if kind == "delay":
                assert trio.current_time() - began_s >= 0.05
            wires.network.heal()
            assert heard + await wires.heard() == told + await wires.told() == comes
            nursery.cancel_scope.cancel()


async def test_chunks_both_ways(wires: Wires) -> None:
    """A chunk is damaged in its longest part and comes twice; the sender's own bytes are left as they are."""
    with trio.fail_after(BOUND_S):
        await wires.opened()
        wires.network.add(MessageFault("corrupt", Way("gpu0", channel="bulk")))
        wires.network.add(MessageFault("duplicate", Way("gpu0", channel="bulk")))
        await wires.far.send(*CHUNK)
        mine = bytearray(CHUNK[1])
        await wires.bulk.send(CHUNK[0], mine)
        for channel in (wires.bulk, wires.far):
            for _ in range(2):
                header, payload = await channel.receive()
                assert payload is not None
                data = payload.take()
                assert header == CHUNK[0]
                assert len(data) == len(CHUNK[1])
                assert data != CHUNK[1]
        assert mine == CHUNK[1]


async def test_who_waits_hears_of_what_is_late(wires: Wires) -> None:
    """It waits in the transport, where nothing comes, and is nudged when a message of before does."""
    with trio.fail_after(BOUND_S):
        await wires.opened()
        wires.network.add(MessageFault("delay", Way("gpu0"), latency_s=0.05))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wires.network.run)
            for _ in range(3):
                await wires.far.send(b"late")
                assert await wires.bulk.receive() == (b"late", None)
            nursery.cancel_scope.cancel()


async def test_what_is_held_comes_in_its_order(wires: Wires) -> None:
    """And what is late when the wire is closed is lost without a word."""
    with trio.fail_after(BOUND_S):
        await wires.opened()
        number = wires.network.add(MessageFault("hold", Way("gpu0")))
        for frame in (b"1", b"2", b"3"):
            await wires.control.send(frame)
        while wires.network.count(number) < 3:
            with pytest.raises(trio.TooSlowError), trio.fail_after(0.02):
                await wires.listener.receive()
        wires.network.remove(number)
        assert await wires.heard() == [b"1", b"2", b"3"]
        wires.network.add(MessageFault("delay", Way("gpu0"), latency_s=0.02))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wires.network.run)
            wires.bulk.send_nowait(b"late")
            wires.bulk.close()
            wires.network.heal()
            while not wires.network.idle:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()


def test_data_that_land_in_too_small_a_place() -> None:
    """As the transport's own: the length tells."""
    place = bytearray(4)
    assert Taken(b"123456").into(memoryview(place)) == 6
    assert place == b"1234"
    assert Taken(b"ab").into(memoryview(place)) == 2
    assert place == b"ab34"
    assert Taken(b"abcd").into(memoryview(place)) == 4
    assert place == b"abcd"
    assert Taken(b"ab").take() == b"ab"


async def test_a_network_is_idle_when_nothing_is_left(autojump_clock: trio.testing.MockClock) -> None:
    """No fault, nobody held, and nothing late: each alone keeps it from that, and the last to go makes it so before what waited arrives."""
    network = Network(Random(1))
    idle = [network.idle]
    arrived: list[bool] = []

    def send() -> None:
        network.sent("gpu0", "control", (b"x",), lambda _: arrived.append(network.idle), to_device=True)
        idle.append(network.idle)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(network.run)
        network.hold("gpu0")
        number = network.add(MessageFault("delay", Way("gpu0"), latency_s=1.0))
        network.release("gpu0")
        send()
        network.remove(number)
        idle.append(network.idle)
        await trio.sleep(2)
        idle.append(network.idle)
        network.hold("gpu0")
        send()
        network.release("gpu0")
        idle.append(network.idle)
        number = network.add(MessageFault("loss", Way("gpu0")))
        send()
        network.discard(number)
        idle.append(network.idle)
        nursery.cancel_scope.cancel()
    assert idle == [True, False, False, True, False, True, False, True]
    assert arrived == [True, True]
