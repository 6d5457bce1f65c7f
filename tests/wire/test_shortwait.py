"""Waits that are shorter than a turn of trio's loop hold nobody up.

`WAIT_S` is set to minutes here: a short wait that should have ended otherwise does not end at all.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing
import zmq
from trio.lowlevel import checkpoint, current_trio_token, wait_readable

from hmmnet.wire import shortwait
from hmmnet.wire.bridge import Bridge
from hmmnet.wire.shortwait import BulkStream, ShortWait, this_loop

SOON_S = 0.05
ROUND_TRIPS = 400


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@pytest.fixture
def unending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortwait, "WAIT_S", 600.0)


class Clock:
    """What short waits take for the time: it goes on when it is told to, however slow the machine is."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(shortwait, "perf_counter", clock)
    return clock


async def idle_once() -> None:
    """Return when the loop has slept: from then on it is known who can run. (A machine that stalls has it find the time over at once.)"""
    loop = this_loop()
    assert loop is not None
    turns = 0
    while turns == 0 or loop.runnable > shortwait._UNKNOWN // 2:
        await trio.sleep(0.001)
        turns += 1


@contextmanager
def overdue() -> Iterator[None]:
    """A deadline is over, and the loop has not looked since."""
    with trio.CancelScope(deadline=trio.current_time() + 0.001):
        time.sleep(0.002)
        yield


def soon(deed: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(SOON_S, deed)
    timer.start()
    return timer


async def test_trio_has_inside_what_we_know_of_it() -> None:
    """An epoll set in its I/O manager, and deadlines, by the names that we know. Fails when trio moves one: no wait is short then."""
    loop = this_loop()
    assert loop is not None
    assert this_loop() is loop
    with select.epoll.fromfd(os.dup(loop.descriptor)) as found:
        assert found.poll(0) == []
    assert not loop.due()
    with overdue():
        assert loop.due()


@pytest.mark.usefixtures("unending")
async def test_it_ends_when_the_descriptor_is_readable(pair: tuple[socket.socket, socket.socket]) -> None:
    """At once, or later."""
    await idle_once()
    short = ShortWait(pair[0].fileno())
    timer = soon(lambda: pair[1].send(b"x"))
    assert short.wait()
    assert short.wait()
    timer.join()
    short.close()


@pytest.mark.usefixtures("unending")
async def test_there_is_none_while_a_task_can_run(pair: tuple[socket.socket, socket.socket]) -> None:
    """Whether it was rescheduled before us or by us; and none before it is known who can run."""
    short = ShortWait(pair[0].fileno())
    assert not short.wait()
    turns = []

    async def busy() -> None:
        for i in range(20):
            turns.append(i)
            await checkpoint()

    await idle_once()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(busy)
        while len(turns) < 20:
            assert not short.wait()
            await checkpoint()
    short.close()


@pytest.mark.usefixtures("unending")
async def test_there_is_none_for_who_was_woken_by_a_socket_while_a_task_can_run(pair: tuple[socket.socket, socket.socket]) -> None:
    """Whom a socket wakes counts as one who can run, until it does; not as one fewer from then on."""
    await idle_once()
    loop = this_loop()
    short = ShortWait(pair[0].fileno())
    timer = soon(lambda: pair[1].send(b"x"))
    await wait_readable(pair[0])
    assert loop is not None
    assert loop.runnable == 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(checkpoint)
        assert not short.wait()
    assert short.wait()
    timer.join()
    short.close()


@pytest.mark.usefixtures("unending")
async def test_there_is_none_when_a_deadline_is_over(pair: tuple[socket.socket, socket.socket]) -> None:
    """Nor after many in a row, without a pass through the loop: it may have to do what we do not know of."""
    await idle_once()
    short = ShortWait(pair[0].fileno())
    pair[1].send(b"x")
    assert short.wait()
    with overdue():
        assert not short.wait()
    await idle_once()
    waits = [short.wait() for _ in range(shortwait.SHORT_MAX + 1)]
    assert waits == [True] * shortwait.SHORT_MAX + [False]
    await idle_once()
    assert short.wait()
    short.close()


@pytest.mark.usefixtures("unending")
async def test_other_sockets_of_the_loop_end_it(pair: tuple[socket.socket, socket.socket]) -> None:
    """What another task waits for has come: its turn."""
    await idle_once()
    silent, other = socket.socketpair()
    heard = trio.Event()

    async def other_task() -> None:
        await wait_readable(pair[0])
        heard.set()

    with silent, other:
        short = ShortWait(silent.fileno())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other_task)
            await trio.testing.wait_all_tasks_blocked()
            timer = soon(lambda: pair[1].send(b"x"))
            short.worthwhile = True
            assert not short.wait()
            assert not short.worthwhile
            assert not heard.is_set()
            await heard.wait()
            timer.join()
        short.close()


@pytest.mark.usefixtures("unending")
async def test_a_word_from_another_thread_ends_it(pair: tuple[socket.socket, socket.socket]) -> None:
    """As do signals that trio has a handler for."""
    await idle_once()
    short = ShortWait(pair[0].fileno())
    said = trio.Event()
    token = current_trio_token()
    timer = soon(lambda: token.run_sync_soon(said.set))
    assert not short.wait()
    await said.wait()
    timer.join()
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        await idle_once()
        timer = soon(lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert not short.wait()
        assert await anext(signals) == signal.SIGUSR1
        timer.join()
    short.close()


@pytest.mark.usefixtures("clock")
async def test_who_waited_in_vain_does_not_try_again(pair: tuple[socket.socket, socket.socket]) -> None:
    """Until a message has come soon after it was waited for."""
    await idle_once()
    short = ShortWait(pair[0].fileno())
    short.worthwhile = True
    assert not short.wait()
    assert not short.worthwhile
    short.close()


@pytest.mark.usefixtures("unending")
async def test_a_wait_with_others_at_work_was_none_for_a_short_one(pair: tuple[socket.socket, socket.socket]) -> None:
    """However soon the message came: what the others do would have ended a short wait. Alone, it would have been one."""
    await idle_once()
    short = ShortWait(pair[0].fileno())
    for others in (0, 5, 0):
        short.begin_long()
        for _ in range(others):
            await checkpoint()
        timer = soon(lambda: pair[1].send(b"x"))
        await wait_readable(pair[0])
        short.end_long()
        assert short.worthwhile == (others == 0)
        timer.join()
        pair[0].recv(1)
    short.close()


@pytest.mark.usefixtures("unending", "clock")
async def test_beside_bulk_data_only_those_who_wait_for_it_wait_shortly(pair: tuple[socket.socket, socket.socket]) -> None:
    """However long it takes them: they are the ones who would disturb others."""
    await idle_once()
    short, bulk = ShortWait(pair[0].fileno()), ShortWait(pair[0].fileno(), bulk=True)
    pair[1].send(b"x")
    short.worthwhile = True
    assert short.wait()
    bulk.begin_long()
    await wait_readable(pair[0])
    bulk.end_long()
    assert bulk.worthwhile
    assert not short.wait()
    assert not short.worthwhile
    short.begin_long()
    await wait_readable(pair[0])
    short.end_long()
    assert not short.worthwhile
    assert bulk.wait()
    short.close()
    bulk.close()


@pytest.mark.usefixtures("clock")
async def test_who_waits_for_bulk_data_in_vain_tries_again(pair: tuple[socket.socket, socket.socket]) -> None:
    """Nothing came, for nobody: a stream that stalls goes on. A word for somebody else ends that."""
    await idle_once()
    bulk = ShortWait(pair[0].fileno(), bulk=True)
    bulk.worthwhile = True
    for word in (False, True):
        said = trio.Event()
        if word:
            current_trio_token().run_sync_soon(said.set)
        assert not bulk.wait()
        assert bulk.worthwhile is not word
    await said.wait()
    bulk.close()


async def test_there_is_none_while_bulk_data_move(pair: tuple[socket.socket, socket.socket], clock: Clock) -> None:
    """Whoever sends or receives it, and for a while after: each credit would end one."""
    await idle_once()
    short, bulk, large = ShortWait(pair[0].fileno()), ShortWait(pair[1].fileno(), bulk=True), ShortWait(pair[0].fileno())
    pair[1].send(b"x")
    await idle_once()
    assert short.wait()
    bulk.moved()
    assert not short.wait()
    clock.now_s += shortwait.BULK_S * 1.5
    await idle_once()
    assert short.wait()
    bulk.begin_long()
    assert not short.wait()
    clock.now_s += shortwait.BULK_S * 1.5
    await idle_once()
    short.moved()
    assert short.wait()
    large.moved(large=True)
    assert not short.wait()
    assert large.wait(), "it is its own"
    short.close()
    bulk.close()
    large.close()


async def test_bulk_is_over_with_the_last_stream(pair: tuple[socket.socket, socket.socket], clock: Clock) -> None:
    """At once, whoever goes on waiting for more; and begins anew with the next stream. A large message counts, stream or not."""
    await idle_once()
    short, bulk = ShortWait(pair[0].fileno()), ShortWait(pair[0].fileno(), bulk=True)
    pair[1].send(b"x")
    await idle_once()
    streams = [BulkStream(), BulkStream()]
    bulk.moved()
    assert not short.wait()
    streams[0].end()
    streams[0].end()
    assert not short.wait(), "the other goes on"
    assert bulk.wait()
    streams[1].end()
    assert short.wait()
    bulk.moved()
    bulk.begin_long()
    bulk.worthwhile = True
    assert not bulk.wait(), "there is nothing to wait for"
    assert not bulk.worthwhile
    assert short.wait(), "a last credit is no stream"
    bulk.moved(large=True)
    assert not short.wait()
    clock.now_s += shortwait.BULK_S * 1.5
    await idle_once()
    assert short.wait()
    again = BulkStream()
    bulk.begin_long()
    assert not short.wait()
    again.end()
    short.close()
    bulk.close()


async def test_a_stream_from_before_anybody_waited_shortly_is_not_missed_at_its_end() -> None:
    """It was not counted, so its end counts for nobody else's."""
    early = BulkStream()
    loop = this_loop()
    assert loop is not None
    counted = BulkStream()
    early.end()
    assert loop.bulk_expected
    counted.end()
    assert not loop.bulk_expected


# --- yields that nobody needs -----------------------------------------------------------------------------------------------------


async def test_a_turn_is_needed_when_somebody_could_run(pair: tuple[socket.socket, socket.socket]) -> None:
    """A task that is runnable, one whose socket is readable, one whose time has come; and as long as nothing is known."""
    short = ShortWait(pair[0].fileno())
    assert not short.undisturbed(), "nothing is known of this run"
    await idle_once()
    assert short.undisturbed()
    heard = trio.Event()

    async def other_task() -> None:
        await wait_readable(pair[0])
        heard.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other_task)
        assert not short.undisturbed(), "it can run"
        await trio.testing.wait_all_tasks_blocked()
        assert short.undisturbed()
        pair[1].send(b"x")
        assert not short.undisturbed(), "its socket is readable"
        await heard.wait()
    with overdue():
        assert not short.undisturbed(), "a deadline is over"


def test_a_guest_of_another_loop_has_none() -> None:
    """Who waits there keeps the other loop from running."""
    found = []
    over = threading.Event()
    calls: list[Callable[[], object]] = []
    ready = threading.Condition()

    def later(call: Callable[[], object]) -> None:
        with ready:
            calls.append(call)
            ready.notify()

    async def main() -> None:
        found.append(this_loop())

    trio.lowlevel.start_guest_run(main, run_sync_soon_threadsafe=later, done_callback=lambda _: over.set())
    while not over.is_set():
        with ready:
            assert ready.wait_for(lambda: calls, 20)
            call = calls.pop(0)
        call()
    assert found == [None]


@pytest.mark.parametrize("bulk", [False, True])
async def test_deadlines_are_met_beside_a_peer_that_never_pauses(bulk: bool, place: str) -> None:
    """A message every quarter of a millisecond: each could be waited for shortly, and the loop would never be passed."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.bind(f"ipc://{place}/socket")
    bridge = Bridge(socket, bulk=bulk)
    over = threading.Event()

    def talk() -> None:
        with context.socket(zmq.PAIR) as far:
            far.connect(f"ipc://{place}/socket")
            while not over.wait(0.00025):
                far.send(b"x")

    peer = threading.Thread(target=talk)
    peer.start()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await trio.sleep(0.005)
            ticks += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        while ticks < 3:
            await bridge.recv_first()
        ticks, heard = 0, 0
        while heard < 2000:
            await bridge.recv_first()
            heard += 1
        nursery.cancel_scope.cancel()
    over.set()
    await trio.to_thread.run_sync(peer.join)
    bridge.close()
    context.destroy(0)
    assert ticks >= 20, "half a second or more, in which a hundred are due"


# --- in a bridge ------------------------------------------------------------------------------------------------------------------


def echo(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
    with context.socket(zmq.DEALER) as far:
        far.connect(endpoint)
        while message := far.recv():
            far.send(message)


async def test_a_round_trip_waits_shortly(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer comes, in order; most are waited for outside the loop; and a scope that is over ends the wait for one that does not."""
    waits = []
    wait = ShortWait.wait

    def counted(short: ShortWait) -> bool:
        waits.append(wait(short))
        return waits[-1]

    monkeypatch.setattr(ShortWait, "wait", counted)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.bind(f"ipc://{place}/socket")
    bridge = Bridge(socket)
    peer = threading.Thread(target=echo, args=(context, f"ipc://{place}/socket"))
    peer.start()
    with trio.fail_after(60):
        for i in range(ROUND_TRIPS):
            await bridge.send((b"%d" % i,))
            assert await bridge.recv_first() == b"%d" % i
    assert True in waits
    with trio.move_on_after(SOON_S) as scope:
        await bridge.recv_first()
    assert scope.cancelled_caught
    await bridge.send((b"",))
    await trio.to_thread.run_sync(peer.join)
    bridge.close()
    context.destroy(0)
