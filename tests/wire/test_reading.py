"""Who reads a transport: the reading task, or whoever waits for an answer. Nobody's frames are lost or late because of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.lowlevel import Task, current_task
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import PeerLost
from hmmnet.wire.client import connect
from hmmnet.wire.memory_transport import MemoryTransport
from hmmnet.wire.messages import CloseContext, Done, Inspect, Message, OpenContext, Report
from hmmnet.wire.reading import Reader
from hmmnet.wire.session import PendingReply
from hmmnet.wire.shortwait import this_loop
from hmmnet.wire.transport import Transport
from hmmnet.wire.zmq_transport import ZmqTransport
from tests.wire.test_server import Machine, hello, running

BOUND_S = 20
MANY = 300


class Wire:
    """A transport of the test's making: what is put into `give` is executed by whoever reads, and that task is noted."""

    def __init__(self) -> None:
        self.give, self._take = trio.open_memory_channel[Callable[[], Awaitable[None] | None]](100)
        self.readers: list[Task] = []
        self.scope = trio.CancelScope()
        self.nudged = False
        self.reader = Reader(self.step, self.nudge)

    async def step(self) -> Awaitable[None] | None:
        if self.nudged:
            self.nudged = False
            raise trio.WouldBlock
        with trio.CancelScope() as self.scope:
            deliver = await self._take.receive()
        if self.scope.cancelled_caught:
            self.nudged = False
            raise trio.WouldBlock
        self.readers.append(current_task())
        return deliver()

    def nudge(self) -> None:
        self.nudged = True
        self.scope.cancel()


@asynccontextmanager
async def reading() -> AsyncIterator[tuple[Wire, trio.Nursery]]:
    wire = Wire()
    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.reader.run)
            await wait_all_tasks_blocked()
            yield wire, nursery
            nursery.cancel_scope.cancel()


async def ask(wire: Wire, *others: Callable[[], Awaitable[None] | None]) -> Message:
    """A request whose answer comes behind `others`."""
    pending = PendingReply(wire.reader)
    for deliver in others:
        wire.give.send_nowait(deliver)
    wire.give.send_nowait(lambda: pending.resolve(Done()))
    return await pending.wait()


async def test_who_asks_again_reads_for_itself() -> None:
    """The first answer comes from the reading task; then nobody has to be woken for one, and others' frames are delivered all the same."""
    async with reading() as (wire, _):
        seen: list[int] = []
        for i in range(5):
            assert await ask(wire, lambda i=i: seen.append(i)) == Done()  # type: ignore[misc]
        me = current_task()
        assert me not in wire.readers[:2]
        assert wire.readers[2:] == [me] * 8
        assert seen == [0, 1, 2, 3, 4]


class Prompt(Wire):
    """What is there is delivered without a turn of the loop, as a bridge does."""

    async def step(self) -> Awaitable[None] | None:
        try:
            deliver = self._take.receive_nowait()
        except trio.WouldBlock:
            return await super().step()
        return deliver()


async def test_a_stand_in_excuses_the_reading_task_from_looking() -> None:
    """Told to look because one stand-in left, it does not count among those who could run while the next one stands in; then it does."""
    loop = this_loop()
    assert loop is not None
    await trio.sleep(0.001)  # from then on it is known who can run
    wire = Prompt()
    seen: list[tuple[int, int]] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.reader.run)
        await wait_all_tasks_blocked()
        for _ in range(4):
            await ask(wire, lambda: seen.append((loop.runnable, loop.excused)))
        assert seen[1:] == [(1, 1)] * 3  # the first was read by the reading task itself
        assert (loop.runnable, loop.excused) == (1, 0)
        await wait_all_tasks_blocked()
        assert (loop.runnable, loop.excused) == (0, 0)
        nursery.cancel_scope.cancel()


async def test_when_a_stand_in_leaves_the_reading_task_goes_on() -> None:
    """However it leaves: with its answer, or cancelled."""
    async with reading() as (wire, _):
        for end in ("answered", "cancelled"):
            await ask(wire)
            await ask(wire)
            assert wire.readers[-1] is current_task()
            if end == "cancelled":
                with trio.move_on_after(0.01) as scope:
                    await PendingReply(wire.reader).wait()
                assert scope.cancelled_caught
            came = trio.Event()
            wire.give.send_nowait(came.set)
            await came.wait()
            assert wire.readers[-1] is not current_task()


async def test_while_several_wait_the_reading_task_serves_them() -> None:
    """It hands out many answers in one go; every one arrives."""
    async with reading() as (wire, _):
        done: list[int] = []

        async def work(number: int) -> None:
            for _ in range(MANY // 10):
                await ask(wire)
            done.append(number)

        async with trio.open_nursery() as workers:
            for number in range(10):
                workers.start_soon(work, number)
        assert sorted(done) == list(range(10))


async def test_what_has_to_be_awaited_is_the_reading_tasks() -> None:
    """An inline handler runs outside the stand-in's cancel scope, and nothing is read until it is over."""
    async with reading() as (wire, _):
        await ask(wire)
        over = trio.Event()
        where: list[Task] = []

        async def handler() -> None:
            where.append(current_task())
            await over.wait()
            where.append(current_task())

        with trio.move_on_after(0.01):
            await ask(wire, handler)
        assert len(where) == 1, "nothing behind it was read"
        assert where[0] is not current_task()
        over.set()
        assert await ask(wire) == Done()
        assert len(where) == 2


async def test_a_transport_that_fails_is_not_the_stand_ins_business() -> None:
    """The reading task raises what it raised; whoever waits goes on waiting, for what the end of the session brings."""
    wire = Wire()
    with trio.fail_after(BOUND_S), pytest.RaisesGroup(trio.EndOfChannel):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.reader.run)
            await wait_all_tasks_blocked()
            await ask(wire)
            await wire.give.aclose()
            await PendingReply(wire.reader).wait()


async def test_an_answer_from_elsewhere_wakes_a_stand_in() -> None:
    """Not only frames answer: the end of a session does."""
    async with reading() as (wire, nursery):
        await ask(wire)
        pending = PendingReply(wire.reader)

        async def later() -> None:
            await wait_all_tasks_blocked()
            pending.resolve(None, PeerLost("gone"))
            wire.reader.interrupt()

        nursery.start_soon(later)
        with pytest.raises(PeerLost, match="gone"):
            await pending.wait()
        assert await ask(wire) == Done()


# --- sessions over real transports --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["ipc", "tcp", "memory"])
def machine(request: pytest.FixtureRequest, place: str) -> Iterator[Callable[..., Machine]]:
    """Makes a machine over one of the transports."""
    endpoint = {"ipc": f"ipc://{place}/control", "tcp": "tcp://127.0.0.1:*", "memory": "mem://control"}[request.param]
    transport: Transport = MemoryTransport() if request.param == "memory" else ZmqTransport()
    yield lambda **times: Machine(transport, endpoint, **times)
    transport.close()


@pytest.mark.parametrize("side", ["host", "device"])
async def test_a_session_that_ends_wakes_who_reads_for_it(machine: Callable[..., Machine], side: str) -> None:
    """At both ends: at the device its one reader, at the host the one who reads for all peers; the others' sessions go on."""
    async with running(machine()) as host, connect(host.transport, host.endpoint, hello("gpu1")) as (other, _):
        async with connect(host.transport, host.endpoint, hello()) as (session, _):
            session.on(CloseContext, lambda _: None)
            [at_host] = [found for found in host.server.sessions if found.peer_name == "gpu0"]
            asker, asked = (at_host, session) if side == "host" else (session, at_host)

            async def never(_: OpenContext) -> None:
                await trio.sleep_forever()

            asked.on(OpenContext, never)
            for _ in range(2):
                await asker.request(CloseContext(1) if side == "host" else Inspect())

            async def end() -> None:
                await trio.sleep(0.01)
                asker.end(PeerLost("given up"))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(end)
                with trio.fail_after(1), pytest.raises(PeerLost, match="given up"):
                    await asker.request(OpenContext(1, 1))
            assert await other.request(Inspect()) == Report(b"gpu1")


async def test_both_ends_ask_and_give_up_and_nothing_is_lost(machine: Callable[..., Machine]) -> None:
    """Many requests in both directions, some given up in the middle: every one is served once, in order, and every wait ends."""
    async with running(machine()) as host, connect(host.transport, host.endpoint, hello()) as (session, _):
        served: list[int] = []

        def serve(message: CloseContext) -> None:
            served.append(message.context)

        session.on(CloseContext, serve)
        [peer] = host.server.sessions

        async def from_the_host() -> None:
            for number in range(MANY):
                with trio.move_on_after(0.0 if number % 7 == 0 else 5.0):
                    await peer.request(CloseContext(number))

        async def from_the_device() -> None:
            for number in range(MANY):
                with trio.move_on_after(0.001 if number % 5 == 0 else 5.0) as scope:
                    assert await session.request(Inspect()) == Report(b"gpu0")
                assert number % 5 == 0 or not scope.cancelled_caught

        async with trio.open_nursery() as nursery:
            nursery.start_soon(from_the_host)
            nursery.start_soon(from_the_device)
        assert await peer.request(CloseContext(MANY)) == Done()
        assert served == list(range(MANY + 1))
