"""One contract for every transport; then what only sockets can get wrong: garbage, oversize, paths, addresses, keys."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
import zmq

from hmmnet.errors import HmmnetError
from hmmnet.wire import zmq_transport
from hmmnet.wire.bridge import BULK_BYTES
from hmmnet.wire.memory_transport import IMMEDIATE_MAX, TELEMETRY_MESSAGES_MAX, MemoryTransport, Pipe
from hmmnet.wire.transport import FRAME_BYTES_MAX, Channel, Transport
from hmmnet.wire.zmq_transport import CurveKeys, ZmqTransport

BOUND_S = 20
SOON_S = 0.3
LARGE = bytes(range(256)) * 4096

Endpoint = Callable[[str], str]


@pytest.fixture(params=["ipc", "tcp", "memory"])
def wire(request: pytest.FixtureRequest, place: str) -> Iterator[tuple[Transport, Endpoint]]:
    """A transport, and how it names endpoints."""
    if request.param == "memory":
        with MemoryTransport() as memory:
            yield memory, lambda name: f"mem://{name}"
    else:
        with ZmqTransport() as sockets:
            yield sockets, lambda name: f"ipc://{place}/{name}" if request.param == "ipc" else "tcp://127.0.0.1:*"


def pair(wire: tuple[Transport, Endpoint], name: str = "bulk", key: bytes = b"key") -> tuple[Channel, Channel]:
    transport, endpoint = wire
    bound = transport.bind_channel(endpoint(name), key=key)
    return bound, transport.connect_channel(bound.endpoint, key=key)


@pytest.mark.parametrize("key", [b"", b"key"])
async def test_a_channel_carries_both_ways(wire: tuple[Transport, Endpoint], key: bytes) -> None:
    """Headers alone, and headers with payloads small and large, in order, in both directions."""
    with trio.fail_after(BOUND_S):
        for source, target in (pair(wire, "out", key), pair(wire, "home", key)[::-1]):
            for payload in (None, b"", b"small", LARGE, memoryview(LARGE)[: BULK_BYTES + 1]):
                await source.send(b"header", payload)
            for expected in (None, b"", b"small", LARGE, LARGE[: BULK_BYTES + 1]):
                header, waiting = await target.receive()
                assert header == b"header"
                assert (waiting.take() if waiting is not None else None) == expected
            await source.aclose()
            await target.aclose()


async def test_a_payload_lands(wire: tuple[Transport, Endpoint]) -> None:
    """In the memory it is meant for; its full length is told even when it does not fit."""
    source, target = pair(wire)
    landing = bytearray(len(LARGE))
    with trio.fail_after(BOUND_S):
        for _ in range(2):
            await source.send(b"h", LARGE)
        _, payload = await target.receive()
        assert payload is not None
        assert payload.into(memoryview(landing)) == len(LARGE)
        assert landing == LARGE
        _, payload = await target.receive()
        assert payload is not None
        assert payload.into(memoryview(landing)[:100]) == len(LARGE)


async def test_a_payload_that_is_not_taken_is_dropped(wire: tuple[Transport, Endpoint]) -> None:
    """The next receive gives the next message."""
    source, target = pair(wire)
    with trio.fail_after(BOUND_S):
        await source.send(b"one", b"payload")
        await source.send(b"two")
        assert (await target.receive())[0] == b"one"
        assert await target.receive() == (b"two", None)
    assert target.refused == 0


async def test_without_waiting(wire: tuple[Transport, Endpoint]) -> None:
    """WouldBlock when there is nothing."""
    target, source = pair(wire)
    with pytest.raises(trio.WouldBlock):
        target.receive_nowait()
    with trio.fail_after(BOUND_S):
        source.send_nowait(b"now")
        while True:
            try:
                assert target.receive_nowait() == (b"now", None)
                break
            except trio.WouldBlock:
                await trio.sleep(0.001)


async def test_a_closed_channel_says_so(wire: tuple[Transport, Endpoint]) -> None:
    """To the task that waits, and to later callers."""
    source, _ = pair(wire)
    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await source.receive()

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await source.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await source.send(b"x")
        with pytest.raises(trio.ClosedResourceError):
            source.receive_nowait()


async def test_a_listener_tells_peers_apart(wire: tuple[Transport, Endpoint]) -> None:
    """By their identities; each gets its own answers, in order."""
    transport, endpoint = wire
    listener = transport.listen(endpoint("control"))
    peers = {name: transport.connect(listener.endpoint, name) for name in (b"one", b"two", transport.fresh_identity("three"))}
    assert len(peers) == 3
    with trio.fail_after(BOUND_S):
        for name, peer in peers.items():
            for i in range(3):
                await peer.send(name + bytes([i]))
        for _ in range(9):
            address, frame = await listener.receive()
            assert frame[: len(address)] == address
            await listener.send(address, b"to " + frame)
        for name, peer in peers.items():
            assert [(await peer.receive())[0] for _ in range(3)] == [b"to " + name + bytes([i]) for i in range(3)]
    with pytest.raises(trio.WouldBlock):
        listener.receive_nowait()


async def test_a_listener_gives_odd_messages_as_empty_frames(wire: tuple[Transport, Endpoint]) -> None:
    """A message of two parts is no frame; what follows it is not mistaken for an address."""
    transport, endpoint = wire
    listener = transport.listen(endpoint("control"))
    peer = transport.connect(listener.endpoint, b"peer")
    with trio.fail_after(BOUND_S):
        await peer.send(b"other", b"forged")
        await peer.send(b"good")
        assert await listener.receive() == (b"peer", b"")
        assert await listener.receive() == (b"peer", b"good")


async def test_an_unknown_peer_blocks(wire: tuple[Transport, Endpoint]) -> None:
    """It may connect later: WouldBlock now."""
    transport, endpoint = wire
    listener = transport.listen(endpoint("control"))
    with pytest.raises(trio.WouldBlock):
        listener.send_nowait(b"nobody", b"frame")


@pytest.mark.parametrize("wire", ["memory", "ipc"], indirect=True)  # a tcp port chosen at bind cannot be connected to before
async def test_who_comes_first_does_not_matter(wire: tuple[Transport, Endpoint]) -> None:
    """What is sent before the other end listens arrives when it does."""
    transport, endpoint = wire
    name = endpoint("late")
    peer = transport.connect(name, b"early")
    await peer.send(b"hello")
    listener = transport.listen(name)
    with trio.fail_after(BOUND_S):
        assert await listener.receive() == (b"early", b"hello")


async def test_telemetry_loses_rather_than_waits(wire: tuple[Transport, Endpoint]) -> None:
    """Many samples to a reader that does not read: the sender goes on, some arrive, in order."""
    transport, endpoint = wire
    reader = transport.bind_telemetry(endpoint("telemetry"))
    sender = transport.connect_telemetry(reader.endpoint)
    with trio.fail_after(BOUND_S):
        seen: list[int] = []
        while not seen:  # a subscription takes a moment
            await sender.send((0).to_bytes(4, "big"))
            await trio.sleep(0.005)
            with contextlib.suppress(trio.WouldBlock):
                seen.append(int.from_bytes(reader.receive_nowait()[0], "big"))
        for i in range(1, 20 * TELEMETRY_MESSAGES_MAX):
            await sender.send(i.to_bytes(4, "big"))
        await trio.sleep(0.05)
        with trio.move_on_after(0.5):
            while True:
                seen.append(int.from_bytes((await reader.receive())[0], "big"))
    assert len(seen) > 1
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    "endpoint", ["", "control", "http://127.0.0.1:80", "ipc://", "mem://", "udp://127.0.0.1:1", "tcp://127.0.0.1", "tcp://127.0.0.1:x"]
)
async def test_an_endpoint_that_makes_no_sense_is_refused(wire: tuple[Transport, Endpoint], endpoint: str) -> None:
    """With its text, at once, by every factory."""
    transport, _ = wire
    for make in (
        transport.listen,
        transport.bind_channel,
        transport.connect_channel,
        transport.bind_telemetry,
        transport.connect_telemetry,
        lambda place: transport.connect(place, b"me"),
    ):
        with pytest.raises(HmmnetError, match=endpoint or "no endpoint"):
            make(endpoint)


# --- sockets only -------------------------------------------------------------------------------------------------------------------


async def test_a_path_that_is_too_long_is_refused() -> None:
    """Before libzmq cuts it off; the mend is named."""
    with ZmqTransport() as transport, pytest.raises(HmmnetError, match=r"107 bytes, this one 200"):
        transport.listen("ipc://" + "x" * 200)


async def test_a_folder_that_is_not_there_is_named(place: str) -> None:
    """With libzmq's reason."""
    with ZmqTransport() as transport, pytest.raises(HmmnetError, match=f"cannot listen at ipc://{place}/no/such: No such file"):
        transport.listen(f"ipc://{place}/no/such")


async def test_an_ipc_socket_is_its_owners(place: str) -> None:
    """Nobody else may connect; and no file is left when it is closed."""
    with ZmqTransport() as transport:
        transport.listen(f"ipc://{place}/control")
        assert Path(place, "control").stat().st_mode & 0o777 == 0o600
    assert not Path(place, "control").exists()


@pytest.mark.parametrize(
    "endpoint", ["tcp://0.0.0.0:*", "tcp://192.0.2.1:5000", "tcp://*:5000", "tcp://example.test:5000", "tcp://[::]:5000"]
)
async def test_tcp_beyond_loopback_needs_keys(endpoint: str) -> None:
    """Neither bound nor connected without."""
    with ZmqTransport() as transport:
        for make in (transport.listen, transport.connect_channel):
            with pytest.raises(HmmnetError, match=r"CURVE keys|no endpoint of this transport"):
                make(endpoint)


async def test_curve_encrypts_and_refuses_strangers() -> None:
    """With the host's public key a peer gets through; with another key, or with none, nothing arrives."""
    host_public, host_secret = zmq.curve_keypair()
    peer_public, peer_secret = zmq.curve_keypair()
    wrong_public, _ = zmq.curve_keypair()
    with trio.fail_after(BOUND_S), ZmqTransport(curve=CurveKeys(host_public, host_secret)) as host:
        listener = host.listen("tcp://127.0.0.1:*")
        with (
            ZmqTransport(curve=CurveKeys(wrong_public, b"", peer_public, peer_secret)) as wrong,
            ZmqTransport() as plain,
            ZmqTransport(curve=CurveKeys(host_public, b"", peer_public, peer_secret)) as right,
        ):
            async with trio.open_nursery() as nursery:
                for transport, name in ((wrong, b"wrong"), (plain, b"plain")):
                    # waits for ever when the host has refused the connection before: ZeroMQ does not try that one again
                    nursery.start_soon(transport.connect(listener.endpoint, name).send, b"hello")
                await right.connect(listener.endpoint, b"right").send(b"hello")
                assert await listener.receive() == (b"right", b"hello")
                with trio.move_on_after(0.2):
                    raise AssertionError(await listener.receive())
                nursery.cancel_scope.cancel()


async def test_a_bulk_channel_has_one_peer(wire: tuple[Transport, Endpoint]) -> None:
    """Who connects without the key, or with another, is neither heard nor sent anything; who has it may come late, and again."""
    transport, endpoint = wire
    with trio.fail_after(BOUND_S):
        bound = transport.bind_channel(endpoint("bulk"), key=b"key")
        strangers = [transport.connect_channel(bound.endpoint, key=key) for key in (b"", b"other")]
        for stranger in strangers:
            await stranger.send(b"forged", LARGE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bound.send, b"private", LARGE)
            await trio.sleep(0.05)
            peer = transport.connect_channel(bound.endpoint, key=b"key")
            header, payload = await peer.receive()
            assert header == b"private"
            assert payload is not None
            assert payload.take() == LARGE
        await peer.send(b"mine")
        assert (await bound.receive())[0] == b"mine"
        for stranger in strangers:
            with pytest.raises(trio.WouldBlock):
                stranger.receive_nowait()


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
async def test_the_peer_of_a_bulk_channel_may_come_again(place: str, kind: str) -> None:
    """Over a new connection, with the same key."""
    with trio.fail_after(BOUND_S), ZmqTransport() as transport:
        bound = transport.bind_channel(f"ipc://{place}/bulk" if kind == "ipc" else "tcp://127.0.0.1:*", key=b"key")
        for _ in range(2):
            peer = transport.connect_channel(bound.endpoint, key=b"key")
            await peer.send(b"here")
            assert (await bound.receive())[0] == b"here"
            await bound.send(b"there", LARGE)
            assert (await peer.receive())[0] == b"there"
            await peer.aclose()


@pytest.mark.parametrize("data", [None, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("before", ["never there", "there before"])
@pytest.mark.parametrize("kind", ["ipc", "tcp"])
async def test_who_sends_to_a_peer_that_does_not_come_is_told(
    place: str, kind: str, before: str, data: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a time that is enough to connect anew, and not before; libzmq says nothing of it to who waits for room."""
    monkeypatch.setattr(zmq_transport, "AWAY_S", SOON_S)
    monkeypatch.setattr(zmq_transport, "AWAY_LOOKS", 10)
    with trio.fail_after(BOUND_S), ZmqTransport() as transport:
        bound = transport.bind_channel(f"ipc://{place}/bulk" if kind == "ipc" else "tcp://127.0.0.1:*", key=b"key")
        if before == "there before":
            peer = transport.connect_channel(bound.endpoint, key=b"key")
            await peer.send(b"here")
            await bound.receive()
            assert not bound.missing()
            await peer.aclose()
            while not bound.missing():
                await trio.sleep(0.01)
        assert bound.missing()
        began_s = trio.current_time()
        with pytest.raises(trio.BrokenResourceError, match=r"nobody has been at the other end of the bulk channel .* for 0\.3 s"):
            await bound.send(b"header", data)
        assert trio.current_time() - began_s >= SOON_S
        peer = transport.connect_channel(bound.endpoint, key=b"key")
        await bound.send(b"later", data)
        assert (await peer.receive())[0] == b"later", "nothing else: who asks whether it is there is not heard"
        assert not bound.missing()
        await bound.send(b"last")
        assert (await peer.receive())[0] == b"last"
        assert not peer.missing()
        await bound.aclose()
        assert bound.missing(), "a heartbeat may ask at any moment"


async def test_oversized_messages_end_the_connection(place: str) -> None:
    """The part is never allocated; other peers are not disturbed."""
    with trio.fail_after(BOUND_S), ZmqTransport() as transport:
        bulk = transport.bind_channel(f"ipc://{place}/bulk", max_bytes=1000)
        listener = transport.listen(f"ipc://{place}/control")
        context = zmq.Context()
        strangers = [context.socket(zmq.DEALER) for _ in range(2)]
        for stranger, endpoint, length in zip(strangers, (bulk.endpoint, listener.endpoint), (1001, FRAME_BYTES_MAX + 1), strict=True):
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.setsockopt(zmq.RECONNECT_IVL, -1)
            stranger.connect(endpoint)
            stranger.send(bytes(length))
        with trio.move_on_after(0.2):
            raise AssertionError(await bulk.receive())
        with trio.move_on_after(0.2):
            raise AssertionError(await listener.receive())
        peer = transport.connect(listener.endpoint, b"peer")
        await peer.send(bytes(1000))
        assert await listener.receive() == (b"peer", bytes(1000))
        context.destroy(0)


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\xff" * 1000, b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL" + b"\xff" * 100],
    ids=range(4),
)
@pytest.mark.parametrize("kind", ["ipc", "tcp"])
async def test_garbage_on_the_plain_socket(place: str, garbage: bytes, kind: str) -> None:
    """Something that is no ZeroMQ peer connects and talks: nothing arrives, and real peers are served."""
    with trio.fail_after(BOUND_S), ZmqTransport() as transport:
        listener = transport.listen(f"ipc://{place}/control" if kind == "ipc" else "tcp://127.0.0.1:*")
        with socket.socket(socket.AF_UNIX if kind == "ipc" else socket.AF_INET) as plain:
            where: object = f"{place}/control" if kind == "ipc" else ("127.0.0.1", int(listener.endpoint.rsplit(":", 1)[1]))
            plain.connect(where)  # type: ignore[arg-type]
            plain.sendall(garbage)
            peer = transport.connect(listener.endpoint, b"peer")
            await peer.send(b"hello")
            assert await listener.receive() == (b"peer", b"hello")


async def test_three_parts_on_a_channel_are_refused(place: str) -> None:
    """Counted, and what follows arrives."""
    with trio.fail_after(BOUND_S), ZmqTransport() as transport:
        bulk = transport.bind_channel(f"ipc://{place}/bulk")
        context = zmq.Context()
        stranger = context.socket(zmq.DEALER)
        stranger.connect(bulk.endpoint)
        stranger.send_multipart([b"a", b"b", b"c"])
        stranger.send_multipart([b"good", b"payload"])
        assert (await bulk.receive())[0] == b"a"
        header, payload = await bulk.receive()
        assert header == b"good"
        assert payload is not None
        assert payload.take() == b"payload"
        assert bulk.refused == 1
        context.destroy(0)


async def test_a_memory_message_above_the_limit_is_lost() -> None:
    """As over a socket, where it ends the connection."""
    with MemoryTransport() as transport:
        bound, other = transport.bind_channel("mem://bulk", 10), transport.connect_channel("mem://bulk", 10)
        await other.send(b"h", bytes(11))
        await other.send(b"good", bytes(10))
        assert (await bound.receive())[0] == b"good"


async def test_a_memory_endpoint_can_be_used_again() -> None:
    """After both ends, or a listener, were closed: nothing of the old is seen."""
    with MemoryTransport() as transport:
        bound, other = transport.bind_channel("mem://bulk"), transport.connect_channel("mem://bulk")
        await other.send(b"old")
        await bound.aclose()
        await other.send(b"into the void")
        bound, other = transport.bind_channel("mem://bulk"), transport.connect_channel("mem://bulk")
        await other.send(b"new")
        assert await bound.receive() == (b"new", None)
        listener = transport.listen("mem://control")
        await listener.aclose()
        listener = transport.listen("mem://control")
        await transport.connect("mem://control", b"peer").send(b"hello")
        assert await listener.receive() == (b"peer", b"hello")


def test_a_socket_that_nobody_has_closed_holds_nothing_up(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Ctrl-C can come between a socket and what closes it."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    transport = ZmqTransport()
    monkeypatch.setattr(transport, "_bridge", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:  # its traceback holds the socket
        transport.bind_channel(f"ipc://{place}/x")
    transport.close()
    assert caught.value.args == ()


async def test_a_memory_channel_lets_others_run() -> None:
    """Who never has to wait gives way every so many messages; who has waited has given way."""
    transport = MemoryTransport()
    far, near = transport.bind_channel("mem://turns"), transport.connect_channel("mem://turns")
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        for number in range(3 * IMMEDIATE_MAX):
            near.send_nowait(bytes((number,)))
        nursery.start_soon(others)
        for number in range(3 * IMMEDIATE_MAX):
            assert (await far.receive())[0] == bytes((number,))
        assert 1 <= turns <= 4, "three checkpoints"
        with trio.move_on_after(0) as scope:
            near.send_nowait(b"late")
            await far.receive()
        assert scope.cancelled_caught
        assert far.receive_nowait()[0] == b"late", "what was not taken is there still"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("gone", [0, 1, 2])
async def test_of_those_who_wait_for_a_pipe_any_may_leave(gone: int) -> None:
    """The others get what comes, in their order."""
    pipe = Pipe(8, 100)
    got: list[tuple[int, bytes]] = []
    scopes = [trio.CancelScope() for _ in range(3)]

    async def take(number: int) -> None:
        with scopes[number]:
            got.append((number, (await pipe.get())[0]))

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(take, number)
            await trio.testing.wait_all_tasks_blocked()
        scopes[gone].cancel()
        await trio.testing.wait_all_tasks_blocked()
        pipe.put_nowait((b"first",))
        await trio.testing.wait_all_tasks_blocked()
        pipe.put_nowait((b"second",))
    stayed = [number for number in range(3) if number != gone]
    assert got == list(zip(stayed, (b"first", b"second"), strict=True))
