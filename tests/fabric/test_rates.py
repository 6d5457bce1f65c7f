"""A stream takes what its links give at the rate of each stretch, whichever end the arbiter is at."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import trio
import trio.testing

from hmmnet.errors import Unreachable
from hmmnet.fabric.arbiter import LinkChange
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import BulkReceiver, BulkSender, BytesSink, BytesSource, Pace
from hmmnet.fabric.pace import Schedule
from hmmnet.fabric.sender import DOWN_S
from hmmnet.host.watchdog import WATCHDOG_S, Watchdog
from hmmnet.pages import from_wire, to_wire
from hmmnet.wire.messages import ShowStreams, StreamsShown
from hmmnet.wire.session import PendingReply, Session
from tests.fabric.faulty import faulty_pair
from tests.fabric.test_arbiter import switch
from tests.fabric.test_dma import MIB, pattern
from tests.fabric.test_singles import KB, machine
from tests.fabric.test_turns import OWN, UPLINK, changed


class _Asked:
    """The session of a device that says how its streams go on."""

    def __init__(self, sender: BulkSender) -> None:
        self._sender = sender

    def begin(self, question: ShowStreams) -> PendingReply:
        begun, holds = zip(*map(self._sender.account, from_wire(question.streams).tolist()), strict=True)
        pending = PendingReply()
        pending.resolve(StreamsShown(to_wire(np.array(begun, np.uint64)), to_wire(np.array(holds, np.uint64))))
        return pending


def _taken_s(changes: list[tuple[float, float]], nbytes: int, *, near: bool, loses: bool = False) -> tuple[float, int]:
    """How long `nbytes` take, for the end that hears of it last, whose links have that rate after so many seconds; and how many messages
    came back unasked.

    The arbiter is at the sender's end (`near`), or at the receiver's. It `loses` what the receiver says while the rate changes.
    """

    async def main() -> tuple[float, int]:
        there, here = faulty_pair(1)
        clock = EmulatedClock(1.0, trio.current_time)
        sender, receiver = BulkSender(there, clock), BulkReceiver(here, clock)
        flow = Schedule(0.0, changes[0][1], 0.25)
        pacer = flow if near else Pace(0.0, changes[0][1], 0.25)
        lost: list[str] = []
        dog = Watchdog(cast(Session, _Asked(sender)), receiver, lost.append, clock)
        async with trio.open_nursery() as nursery:

            async def change() -> None:
                for at_s, rate in changes:
                    await trio.sleep_until(at_s)
                    here.loss = float(loses)
                    flow.change_rate(rate, clock.now())
                    here.loss = 0.0

            async def beat() -> None:
                while not arrival.done:
                    await trio.sleep(0.25)
                    dog.look(clock.now(), False)

            nursery.start_soon(sender.run)
            nursery.start_soon(receiver.run)
            nursery.start_soon(change)
            arrival = receiver.expect(2, BytesSink(np.zeros(nbytes, dtype=np.uint8)), None if near else flow)
            if not near:
                dog.watched[arrival] = None
                nursery.start_soon(beat)
            report = await sender.send(2, BytesSource(pattern(nbytes)), pacer)
            sent_s = clock.now()
            await arrival.wait()
            if near:
                assert report.emulated_s == pytest.approx(clock.now(), abs=2e-3)
                assert clock.now() == sent_s, "all is there when its sender says so"
            nursery.cancel_scope.cancel()
        assert not lost
        return clock.now(), here.sent - (there.sent - -(-nbytes // MIB))

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize(
    ("changes", "takes_s"),
    [
        ([(0.0, 100.0), (1.0, 100e6)], 1.0 + (5 * MIB - 100) / 100e6),
        ([(0.0, 1e6), (1.0, 10.0), (21.0, 1e6)], 20.0 + 5 * MIB / 1e6 - 200e-6),
        ([(0.0, 1e6), (1.3, 100e6), (1.31, 1e6)], 1.31 + (5 * MIB - 2.3e6) / 1e6),
        ([(0.0, 1e6), (0.5, 0.5e6), (1.5, 0.25e6)], 1.5 + (5 * MIB - 1e6) / 0.25e6),
    ],
    ids=["very slow first", "very slow between", "fast for a moment", "ever slower"],
)
def test_a_stream_takes_what_its_links_give_at_the_rate_of_each_stretch(
    changes: list[tuple[float, float]], takes_s: float, near: bool
) -> None:
    """A chunk that waits for its moment, and one that has left, by then."""
    taken_s, _ = _taken_s(changes, 5 * MIB, near=near)
    assert taken_s == pytest.approx(takes_s + 0.25, abs=2e-3)


def test_a_single_chunk_is_there_when_its_links_have_carried_it() -> None:
    """It has left long ago, at either end."""
    for near in (True, False):
        assert _taken_s([(0.0, 100.0), (1.0, 100e6)], MIB, near=near)[0] == pytest.approx(1.25 + MIB / 100e6, abs=2e-3)


def test_a_sender_is_told_again_how_fast_it_may_send() -> None:
    """What it was told was lost: the watchdog sees that it waits for its moment, after 10 s and two heartbeats."""
    taken_s, _ = _taken_s([(0.0, 100.0), (1.0, 100e6)], 5 * MIB, near=False, loses=True)
    assert taken_s == pytest.approx(WATCHDOG_S + 0.5 + 4 * MIB / 100e6 + 0.25, abs=0.26)


def test_a_sender_whose_data_have_landed_asks_how_fast_they_travel() -> None:
    """What it was told was lost, and the receiver has everything: nobody waits for it there."""
    taken_s, _ = _taken_s([(0.0, 100.0), (1.1, 100e6)], MIB, near=False, loses=True)
    assert taken_s == pytest.approx(1.25 + MIB / 100e6 + 0.25, abs=2e-2)


def test_rates_that_matter_little_ride_on_credits_only() -> None:
    """Chunks that follow each other soon are credited soon; one message more for those that do not, when the rate rises."""
    assert _taken_s([(0.0, 100e6), (0.001, 200e6), (0.002, 400e6)], 8 * MIB, near=False)[1] == 2
    assert _taken_s([(0.0, 1e6), (0.5, 0.5e6), (1.0, 0.4e6)], 8 * MIB, near=False)[1] == 2
    assert _taken_s([(0.0, 1e6), (0.5, 2e6)], 8 * MIB, near=False)[1] == 3


def _there_s(up_s: float) -> float:
    """When a receiver that came by all data at once has them by the model: 3.3 s a chunk, and the link is down from 0.5 s on."""

    async def main() -> float:
        there, here = faulty_pair(1)
        clock = EmulatedClock(1.0, trio.current_time)
        sender, receiver = BulkSender(there, clock), BulkReceiver(here, clock)
        arbiter = switch()
        flow = arbiter.open_flow("gpu0", "node0", 0.0)
        arbiter.change(1, LinkChange(frozenset({("uplink", False)}), factor=1e-5), 0.0)
        async with trio.open_nursery() as nursery:

            async def change() -> None:
                await trio.sleep_until(0.5)
                arbiter.change(2, LinkChange(frozenset({("uplink", False)}), down=True), clock.now())
                await trio.sleep_until(up_s)
                arbiter.change(2, None, clock.now())

            nursery.start_soon(sender.run)
            nursery.start_soon(receiver.run)
            nursery.start_soon(change)
            arrival = receiver.expect(2, BytesSink(bytearray(4 * MIB)), flow)
            nursery.start_soon(sender.send, 2, BytesSource(pattern(4 * MIB)), Pace(0.0, 1e12, 0.0))
            try:
                await arrival.wait()
            finally:
                nursery.cancel_scope.cancel()
        return clock.now()

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_nothing_is_there_over_links_that_are_down() -> None:
    """What came before its moment waits for the link, and then for the rest of its way."""
    assert _there_s(60.0) == pytest.approx(59.5 + 4 * MIB / 31.5e4, abs=2e-3)


def test_what_waits_for_a_link_for_too_long_is_not_there() -> None:
    """Whoever waits for it is told after `DOWN_S`."""
    assert _there_s(0.5 + DOWN_S - 0.1) > DOWN_S
    with pytest.raises(BaseExceptionGroup) as caught:
        _there_s(0.5 + DOWN_S + 0.1)
    assert caught.group_contains(Unreachable, match="links are down for 60 s")


STARTS: dict[str, tuple[dict[int, float], list[tuple[float, int, float]], float]] = {
    "the queue is soon over": ({OWN: 1e-4, UPLINK: 1e-3}, [(1.0, UPLINK, 1.0)], 1.099 + 2.0),
    "the queue is as long as ever": ({OWN: 1e-4, UPLINK: 1e-3}, [(1.0, OWN, 1.0)], 100 + 0.4),
    "the queue is soon over, and then it is not": ({OWN: 1e-4, UPLINK: 1e-3}, [(1.0, UPLINK, 1.0), (1.05, UPLINK, 1e-3)], 50.05 + 2.0),
    "it is slow in the end": ({OWN: 1e-4}, [(0.05, UPLINK, 1e-3)], 0.05 + 50 + 2.0),
    "all is as it was when it was granted": ({OWN: 1e-4}, [(0.05, UPLINK, 1e-3), (0.05, UPLINK, 1.0)], 0.1 + 2.0),
}
"""What is slow at first, and then; and when 4 kB of gpu0 have passed, behind a hundred pages of gpu1 on the uplink."""


def _passed_s(before: dict[int, float], changes: list[tuple[float, int, float]], *, loses: bool = False) -> tuple[float, float]:
    """When a device that sends behind them is done, and when the host is, less the latency. It `loses` what is said during the changes."""

    async def main() -> tuple[float, float]:
        there, here = faulty_pair(1)
        clock = EmulatedClock(1.0, trio.current_time)
        sender, receiver = BulkSender(there, clock), BulkReceiver(here, clock)
        arbiter, _, other = machine()
        for link, factor in before.items():
            changed(arbiter, link, factor, 0.0)
        for _ in range(100):
            other.turn(10 * KB, 0.0)
        flow = arbiter.open_flow("gpu0", "node0", 0.0)
        sent: list[float] = []
        dog = Watchdog(cast(Session, _Asked(sender)), receiver, pytest.fail, clock)

        async def send() -> None:
            await sender.send(2, BytesSource(pattern(4 * KB)), Pace(flow.start_s, flow.bytes_per_s, flow.latency_s))
            sent.append(clock.now())

        async def beat() -> None:
            while not arrival.done:
                await trio.sleep(0.25)
                dog.look(clock.now(), False)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.run)
            nursery.start_soon(receiver.run)
            arrival = receiver.expect(2, BytesSink(bytearray(4 * KB)), flow)
            dog.watched[arrival] = None
            nursery.start_soon(beat)
            async with trio.open_nursery() as work:
                work.start_soon(send)
                work.start_soon(arrival.wait)
                for at_s, link, factor in changes:
                    await trio.sleep_until(at_s)
                    here.loss = float(loses)
                    changed(arbiter, link, factor, clock.now())
                    here.loss = 0.0
            nursery.cancel_scope.cancel()
        return sent[0] - flow.latency_s, clock.now() - flow.latency_s

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("story", STARTS)
def test_both_ends_know_when_the_queue_before_a_stream_is_over(story: str) -> None:
    """Whatever its rate does: a device that sends learns the moment at which it begins, as it changes."""
    before, changes, passed_s = STARTS[story]
    assert _passed_s(before, changes) == pytest.approx((passed_s, passed_s), abs=2e-3)


def test_a_sender_is_told_again_when_it_begins() -> None:
    """What it was told was lost: it would wait for 100 s. It begins when it hears of it, and takes 2 s."""
    before, changes, _ = STARTS["the queue is soon over"]
    assert _passed_s(before, changes, loses=True) == pytest.approx((WATCHDOG_S + 0.5 + 2.0,) * 2, abs=0.26)
