"""The bridge under stress: nothing is lost, nothing hangs, nothing happens when a call is cancelled.

Two sockets, mostly with room for two messages, so that every send and receive has to wait again and again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

import pytest
import trio
import trio.testing
import zmq

from hmmnet.wire.bridge import IMMEDIATE_MAX, Bridge
from hmmnet.wire.transport import Buffer

MESSAGES = 6_000
BOUND_S = 60


def number(message: list[bytes]) -> int:
    return int.from_bytes(message[0], "little")


def numbered(value: int) -> list[bytes]:
    return [value.to_bytes(4, "little")]


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = zmq.Context(2)
    yield context
    context.destroy(0)  # whatever a failed test has left open


def sockets(context: zmq.Context[zmq.Socket[bytes]], place: str, queue_max: int) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    one, other = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    for socket in (one, other):
        socket.setsockopt(zmq.SNDHWM, queue_max)
        socket.setsockopt(zmq.RCVHWM, queue_max)
    one.bind(f"ipc://{place}/socket")
    other.connect(f"ipc://{place}/socket")
    return one, other


@pytest.fixture
async def narrow(context: zmq.Context[zmq.Socket[bytes]], place: str) -> AsyncIterator[tuple[Bridge, Bridge]]:
    """Two bridges with a queue of two messages."""
    one, other = (Bridge(socket) for socket in sockets(context, place, 2))
    yield one, other
    one.close()
    other.close()


@pytest.fixture
async def wide(context: zmq.Context[zmq.Socket[bytes]], place: str) -> AsyncIterator[tuple[Bridge, Bridge]]:
    """Two bridges with unbounded queues."""
    one, other = (Bridge(socket) for socket in sockets(context, place, 0))
    yield one, other
    one.close()
    other.close()


async def pour(bridge: Bridge, count: int = MESSAGES) -> None:
    for i in range(count):
        await bridge.send(numbered(i))


async def drain(bridge: Bridge, into: list[int], count: int = MESSAGES) -> None:
    while len(into) < count:
        into.append(number(await bridge.recv()))


async def drain_impatiently(bridge: Bridge, into: list[int], count: int = MESSAGES) -> None:
    """Receive with deadlines so short that many receives are cancelled while they wait."""
    waits = 0
    while len(into) < count:
        waits += 1
        with trio.move_on_after(0 if waits % 3 == 0 else 0.0002):
            into.append(number(await bridge.recv()))


async def test_simplex(narrow: tuple[Bridge, Bridge]) -> None:
    """One direction: all messages, in order."""
    got: list[int] = []
    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour, narrow[0])
            nursery.start_soon(drain, narrow[1], got)
    assert got == list(range(MESSAGES))


async def test_duplex(narrow: tuple[Bridge, Bridge]) -> None:
    """Both directions at once on both sockets: a sender and a receiver share each descriptor."""
    got: tuple[list[int], list[int]] = ([], [])
    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:
            for side in (0, 1):
                nursery.start_soon(pour, narrow[side])
                nursery.start_soon(drain, narrow[side], got[side])
    assert got == (list(range(MESSAGES)), list(range(MESSAGES)))


async def test_nudged_receives_lose_nothing(narrow: tuple[Bridge, Bridge]) -> None:
    """A receive that is interrupted again and again, while a sender shares its descriptor: every message comes, once, in order."""
    got: list[int] = []
    nudges = 0

    async def receive() -> None:
        nonlocal nudges
        while len(got) < MESSAGES:
            try:
                got.append(number(await narrow[1].recv()))
            except trio.WouldBlock:
                nudges += 1

    async def nudge() -> None:
        while True:
            narrow[1].nudge()
            await trio.sleep(0 if nudges % 2 else 0.001)

    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as bystanders:
            bystanders.start_soon(nudge)
            bystanders.start_soon(pour, narrow[1])
            bystanders.start_soon(drain, narrow[0], [])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pour, narrow[0])
                nursery.start_soon(receive)
            bystanders.cancel_scope.cancel()
    assert got == list(range(MESSAGES))
    assert nudges > 10


async def test_a_sender_does_not_mind_a_nudge(narrow: tuple[Bridge, Bridge], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is for receivers: one who waits for room waits on, and tries again only when there may be some."""
    near, tries, send = narrow[0], 0, Bridge._send

    def counted(self: Bridge, parts: Sequence[Buffer], copy: bool) -> None:
        nonlocal tries
        tries += 1
        send(self, parts, copy)

    with pytest.raises(trio.WouldBlock):
        while True:
            near.send_nowait([b"x"])
    near.nudge()
    monkeypatch.setattr(Bridge, "_send", counted)
    with trio.move_on_after(0.3):
        await near.send([b"y"])
    assert tries < 20


async def test_a_nudge_waits_for_who_comes_next(narrow: tuple[Bridge, Bridge]) -> None:
    """One that finds nobody is not lost; what there is to receive comes first."""
    narrow[0].nudge()
    with trio.fail_after(BOUND_S):
        with pytest.raises(trio.WouldBlock):
            await narrow[0].recv()
        await narrow[1].send(numbered(7))
        await narrow[1].send(numbered(8))
        assert number(await narrow[0].recv()) == 7
        while not narrow[0].getsockopt(zmq.EVENTS) & zmq.POLLIN:
            await trio.sleep(0.001)
        narrow[0].nudge()
        assert number(await narrow[0].recv()) == 8
        with pytest.raises(trio.WouldBlock):
            await narrow[0].recv()


async def test_duplex_with_cancelled_receives(narrow: tuple[Bridge, Bridge]) -> None:
    """A receive that is cancelled has taken nothing."""
    got: tuple[list[int], list[int]] = ([], [])
    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:
            for side in (0, 1):
                nursery.start_soon(pour, narrow[side])
                nursery.start_soon(drain_impatiently, narrow[side], got[side])
    assert got == (list(range(MESSAGES)), list(range(MESSAGES)))


async def test_foreign_reads_of_events(narrow: tuple[Bridge, Bridge]) -> None:
    """Reading `EVENTS` eats the edge that others wait for; through the bridge it wakes them."""
    got: tuple[list[int], list[int]] = ([], [])

    async def meddle() -> None:
        while True:
            for bridge in narrow:
                bridge.getsockopt(zmq.EVENTS)
            await trio.lowlevel.checkpoint()

    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as meddling:
            meddling.start_soon(meddle)
            async with trio.open_nursery() as nursery:
                for side in (0, 1):
                    nursery.start_soon(pour, narrow[side])
                    nursery.start_soon(drain, narrow[side], got[side])
            meddling.cancel_scope.cancel()
    assert got == (list(range(MESSAGES)), list(range(MESSAGES)))


async def test_many_tasks_on_one_socket(narrow: tuple[Bridge, Bridge]) -> None:
    """Senders and receivers in numbers, some of them cancelled at any time: each message arrives once."""
    got: list[int] = []
    senders, each = 10, 300

    async def send_share(share: int) -> None:
        for i in range(each):
            message = numbered(share * each + i)
            sent = False
            while not sent:
                with trio.move_on_after(0.001):
                    await narrow[0].send(message)
                    sent = True

    async def take(count: int) -> None:
        for _ in range(count):
            message = await narrow[1].recv()
            got.append(number(message))

    async def come_and_go() -> None:
        while True:
            with trio.move_on_after(0.0005):
                got.append(number(await narrow[1].recv()))
            await trio.lowlevel.checkpoint()

    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:
            for share in range(senders):
                nursery.start_soon(send_share, share)
            for _ in range(4):
                nursery.start_soon(come_and_go)
            while len(got) < senders * each:
                with trio.move_on_after(0.01):
                    await take(10)
            nursery.cancel_scope.cancel()
    assert sorted(got) == list(range(senders * each))


async def test_a_cancelled_call_has_no_effect(wide: tuple[Bridge, Bridge]) -> None:
    """Cancelled before it begins, a send sends nothing and a receive takes nothing."""
    one, other = wide
    await one.send([b"first"])
    with trio.CancelScope() as before_send:
        before_send.cancel()
        await one.send([b"never"])
    while not other.getsockopt(zmq.EVENTS) & zmq.POLLIN:
        await trio.sleep(0.001)
    with trio.CancelScope() as before_receive:
        before_receive.cancel()
        await other.recv()
    assert before_send.cancelled_caught
    assert before_receive.cancelled_caught
    assert await other.recv() == [b"first"]
    await one.send([b"last"])
    assert await other.recv() == [b"last"]


async def test_parts_stay_together(wide: tuple[Bridge, Bridge]) -> None:
    """A message of several parts arrives as one; the rest can be taken part by part, or landed."""
    one, other = wide
    await one.send([b"a", b"", b"c"])
    await one.send([b"head", bytes(range(100))])
    assert await other.recv() == [b"a", b"", b"c"]
    landing = bytearray(100)
    assert await other.recv_first() == b"head"
    assert other.take_into(memoryview(landing)) == 100
    assert landing == bytes(range(100))
    assert not other.more
    await one.send([b"head", bytes(range(100)), b"", b"last"])
    assert await other.recv_first() == b"head"
    more = [other.more]
    assert other.take_into(memoryview(landing)) == 100
    more.append(other.more)
    assert other.take() == b""
    more.append(other.more)
    assert other.take_rest() == [b"last"]
    more.append(other.more)
    assert more == [True, True, True, False]
    await one.send([b"head", bytes(range(100))])
    await one.send([b"tail"])
    short = bytearray(10)
    assert await other.recv_first() == b"head"
    assert other.take_into(memoryview(short)) == 100, "the full length is told, so that the loss can be seen"
    assert await other.recv() == [b"tail"]


async def test_nowait(narrow: tuple[Bridge, Bridge]) -> None:
    """WouldBlock when there is nothing to take, or no room; what was refused was not sent."""
    one, other = narrow
    with pytest.raises(trio.WouldBlock):
        other.recv_nowait()
    sent = 0
    full = False
    while not full:
        try:
            one.send_nowait(numbered(sent))
            sent += 1
        except trio.WouldBlock:
            full = True
    got: list[int] = []
    with trio.fail_after(BOUND_S):
        await drain(other, got, sent)
    assert got == list(range(sent))


@pytest.mark.parametrize("receiver_leads", [True, False])
async def test_the_leader_shares_what_it_reads(context: zmq.Context[zmq.Socket[bytes]], place: str, receiver_leads: bool) -> None:
    """A sender and a receiver wait for a peer. Its arrival wakes whoever is at the descriptor; the other's message must not wait on."""
    socket, peer = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    socket.bind(f"ipc://{place}/socket")
    one, other, got = Bridge(socket), Bridge(peer), []

    async def receive() -> None:
        got.append(await one.recv())

    async def send() -> None:
        await one.send([b"to the peer"])

    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:
            for task in (receive, send) if receiver_leads else (send, receive):
                nursery.start_soon(task)
                await trio.testing.wait_all_tasks_blocked()
            peer.connect(f"ipc://{place}/socket")
            assert await other.recv() == [b"to the peer"]
            await other.send([b"back"])
    assert got == [[b"back"]]
    one.close()
    other.close()


async def test_close_wakes_everybody(narrow: tuple[Bridge, Bridge]) -> None:
    """Leader and parked tasks, receivers and senders: all get ClosedResourceError, and so do later calls."""
    one, _ = narrow
    closed = []

    async def receive() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await one.recv()
        closed.append("receiver")

    async def send() -> None:
        try:
            while True:
                await one.send([bytes(1000)])
        except trio.ClosedResourceError:
            closed.append("sender")

    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:
            for task in (receive, receive, send, send):
                nursery.start_soon(task)
            await trio.sleep(0.05)
            one.close()
    assert sorted(closed) == ["receiver", "receiver", "sender", "sender"]
    for call in (one.recv_nowait, lambda: one.send_nowait([b"x"]), lambda: one.getsockopt(zmq.EVENTS)):
        with pytest.raises(trio.ClosedResourceError):
            call()
    one.close()


async def test_a_busy_receiver_yields(wide: tuple[Bridge, Bridge]) -> None:
    """Messages that are there at once do not keep other tasks from running."""
    one, other = wide
    for i in range(10 * IMMEDIATE_MAX):
        await one.send(numbered(i))
    await trio.sleep(0.1)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await trio.lowlevel.checkpoint()
        before = turns
        for _ in range(10 * IMMEDIATE_MAX):
            await other.recv()
        assert turns - before >= 9
        nursery.cancel_scope.cancel()


async def test_a_router_that_knows_no_such_peer_says_so(context: zmq.Context[zmq.Socket[bytes]], place: str) -> None:
    """Instead of waiting for a peer that may never come."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.bind(f"ipc://{place}/router")
    router = Bridge(socket)
    with pytest.raises(trio.BrokenResourceError):
        await router.send([b"nobody", b"hello"])
    router.close()


async def test_options_go_through(wide: tuple[Bridge, Bridge]) -> None:
    """Options can be read and set without the raw socket."""
    wide[0].setsockopt(zmq.LINGER, 7)
    assert wide[0].getsockopt(zmq.LINGER) == 7
