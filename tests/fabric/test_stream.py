"""The states of a stream, stepped by hand: windows, credits, gaps, repeats, and what a peer may not do."""

from __future__ import annotations

import random
from typing import TypeVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hmmnet.errors import PeerError, ProtocolError
from hmmnet.fabric.chunk import Chunk, Credit
from hmmnet.fabric.stream import CREDIT_EVERY, REPEATS_MAX, TRIES_MAX, WINDOW, ReceiveState, SendState

STRIDE = 10
Message = TypeVar("Message", Chunk, Credit)


def chunk(sequence: int, total: int, stride: int = STRIDE, probe: bool = False) -> Chunk:
    """A chunk of stream 2."""
    return Chunk(2, total, sequence, stride, None, probe)


def all_next(state: SendState) -> list[int]:
    """Whatever may be sent now."""
    return list(iter(state.next, None))


def test_a_window_is_out_and_no_more() -> None:
    """Credits open the window; everything is sent once."""
    state = SendState(2, 100 * STRIDE, STRIDE)
    assert all_next(state) == list(range(WINDOW))
    state.credit(Credit(2, 4, (), 0.0))
    assert all_next(state) == list(range(WINDOW, WINDOW + 4))
    state.credit(Credit(2, WINDOW + 4, (), 0.0))
    assert not state.done
    assert len(all_next(state)) == WINDOW


def test_one_chunk_is_one_message_each_way() -> None:
    """What a one-page fault costs."""
    sender, receiver = SendState(2, 7), ReceiveState(2, 7)
    assert all_next(sender) == [0]
    assert receiver.wants(chunk(0, 7, 7))
    credit = receiver.take(chunk(0, 7, 7), intact=True)
    assert credit == Credit(2, 1, (), 0.0)
    assert receiver.done
    sender.credit(credit)
    assert sender.done
    assert sender.next() is None


def test_credits_come_every_quarter_of_a_window() -> None:
    """And with the last chunk."""
    total = (2 * CREDIT_EVERY + 1) * STRIDE
    receiver = ReceiveState(2, total, STRIDE)
    answers = [receiver.take(chunk(n, total), intact=True) for n in range(2 * CREDIT_EVERY + 1)]
    assert [n for n, answer in enumerate(answers) if answer] == [CREDIT_EVERY - 1, 2 * CREDIT_EVERY - 1, 2 * CREDIT_EVERY]


def test_a_gap_is_asked_for_once() -> None:
    """At once when it shows, not again with each later chunk; after a probe, again."""
    receiver = ReceiveState(2, 100, STRIDE)
    assert receiver.take(chunk(0, 100), intact=True) is None
    assert receiver.take(chunk(2, 100), intact=True) == Credit(2, 1, (1,), 0.0)
    assert receiver.take(chunk(3, 100), intact=True) is None
    assert receiver.again() == Credit(2, 1, (1,), 0.0)
    assert receiver.take(chunk(4, 100, probe=True), intact=True) == Credit(2, 1, (1,), 0.0)
    receiver.take(chunk(1, 100), intact=True)
    assert receiver.landed == 5


def test_a_damaged_chunk_is_asked_for_again() -> None:
    """At once, and its repeat counts."""
    receiver = ReceiveState(2, 100, STRIDE)
    assert receiver.take(chunk(0, 100), intact=False) == Credit(2, 0, (0,), 0.0)
    assert receiver.wants(chunk(0, 100))
    receiver.take(chunk(0, 100), intact=True)
    assert (receiver.landed, receiver.corrupted) == (1, 1)


def test_what_never_fits_its_checksum_ends() -> None:
    """A peer with another checksum is not noise."""
    receiver = ReceiveState(2, 100, STRIDE)
    for _ in range(TRIES_MAX - 1):
        receiver.take(chunk(0, 100), intact=False)
    with pytest.raises(ProtocolError, match="checksum 32 times"):
        receiver.take(chunk(0, 100), intact=False)


def test_repeats_are_not_taken() -> None:
    """Neither what has landed nor what waits beyond a gap."""
    receiver = ReceiveState(2, 100, STRIDE)
    for sequence in (0, 2):
        receiver.take(chunk(sequence, 100), intact=True)
        assert not receiver.wants(chunk(sequence, 100))
    assert receiver.duplicates == 2


def test_silence_repeats_the_oldest() -> None:
    """One chunk, as a probe, not the window; and not for ever."""
    sender = SendState(2, 100 * STRIDE, STRIDE)
    all_next(sender)
    sender.credit(Credit(2, 3, (), 0.0))
    all_next(sender)
    for _ in range(REPEATS_MAX):
        sender.timeout()
        assert all_next(sender) == [3]
        assert [sender.chunk(n, None).probe for n in (2, 3, 3)] == [False, True, False]
    with pytest.raises(PeerError, match="nobody answered"):
        sender.timeout()
    sender.credit(Credit(2, 3, (), 0.0))
    sender.timeout()


@pytest.mark.parametrize("bad", [Credit(2, WINDOW + 1, (), 0.0), Credit(2, 0, (WINDOW,), 0.0), Credit(2, 0, (3, 99), 0.0)])
def test_credit_for_what_was_not_sent(bad: Credit) -> None:
    """The peer's mistake, named; the state is as before."""
    sender = SendState(2, 100 * STRIDE, STRIDE)
    all_next(sender)
    with pytest.raises(ProtocolError, match="were sent"):
        sender.credit(bad)
    assert sender.landed == 0
    assert sender.next() is None


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (chunk(0, 99), "were expected"),
        (chunk(0, 1000, stride=5), "cut into"),
        (chunk(WINDOW, 1000), "beyond the window"),
    ],
)
def test_chunks_of_another_stream_are_refused(bad: Chunk, why: str) -> None:
    """Another length, another cut, or more at once than was credited."""
    with pytest.raises(ProtocolError, match=why):
        ReceiveState(2, 1000, STRIDE).wants(bad)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32 - 1), st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0, 0.4))
@example(54, 0, 0.0, 0.390625, 0.25)
def test_any_channel_that_lets_something_through(chunks: int, seed: int, loss: float, damage: float, repeat: float) -> None:
    """With lost, damaged, repeated and reordered messages between the ends: all lands, each chunk once, never beyond a window.

    And with few messages more than the channel's faults make needed: repeats do not breed repeats (the example once did).
    """
    world = World(random.Random(seed), chunks, loss, damage, repeat)
    world.play(messages_max=1000 + 100 * chunks)
    assert world.receiver.done
    assert sorted(world.landed) == list(range(chunks))


class World:
    """Both ends of a stream, and a bad channel between them."""

    def __init__(self, dice: random.Random, chunks: int, loss: float, damage: float, repeat: float) -> None:
        total = chunks * STRIDE - 3
        self.sender, self.receiver = SendState(2, total, STRIDE), ReceiveState(2, total, STRIDE)
        self.landed: list[int] = []
        self._dice = dice
        self._loss, self._damage, self._repeat = loss, damage, repeat
        self._forward: list[Chunk] = []
        self._back: list[Credit] = []

    def _put(self, queue: list[Message], message: Message) -> None:
        for _ in range(1 + (self._dice.random() < self._repeat)):
            if self._dice.random() >= self._loss:
                queue.insert(max(len(queue) - (self._dice.random() < 0.2), 0), message)

    def _land(self, arrived: Chunk) -> Credit | None:
        if not self.receiver.wants(arrived):
            return self.receiver.again() if arrived.probe else None
        intact = self._dice.random() >= self._damage
        if intact:
            self.landed.append(arrived.sequence)
        return self.receiver.take(arrived, intact)

    def play(self, messages_max: int) -> None:
        """Let both ends run until the sender knows that all has landed."""
        for _ in range(messages_max):
            if self.sender.done:
                return
            for sequence in all_next(self.sender):
                assert sequence < self.sender.landed + WINDOW
                self._put(self._forward, self.sender.chunk(sequence, None))
            if self._forward:
                credit = self._land(self._forward.pop(0))
                if credit is not None:
                    self._put(self._back, credit)
            elif self._back:
                self.sender.credit(self._back.pop(0))
            else:
                self.sender.timeout()
        raise AssertionError("it does not end")
