"""The books of a session: every frame once and in order, over a wire that loses, repeats and shuffles."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from hmmnet.errors import ProtocolError
from hmmnet.wire.codec import Kind
from hmmnet.wire.exchange import (
    BACKLOG_MAX,
    LEASE_S,
    REPEAT_MAX,
    RETRY_S,
    TRANSITIONS,
    WINDOW,
    Action,
    Arrival,
    Exchange,
    State,
)

README = Path(__file__).parents[2] / "hmmnet" / "README.md"


def send(exchange: Exchange, now_s: float = 0.0) -> tuple[int, bool]:
    """A new frame, which is its own number; and whether it may go."""
    exchange.sequence += 1
    sequence = exchange.sequence
    return sequence, exchange.keep(sequence.to_bytes(8, "little"), now_s)


def numbers(frames: list[bytes]) -> list[int]:
    return [int.from_bytes(frame, "little") for frame in frames]


def test_every_state_and_kind_is_decided() -> None:
    """The table is total: no frame in any state meets a hole."""
    assert set(TRANSITIONS) == set(itertools.product(State, Kind))


def test_the_table_is_drawn_as_it_is() -> None:
    """hmmnet/README.md shows the transitions; when they change, what to put there is what this test prints."""
    drawn = [f"| frame | {' | '.join(state.name for state in State)} |", "| --- |" + " --- |" * len(State)]
    for kind in Kind:
        cells = []
        for state in State:
            after, action = TRANSITIONS[state, kind]
            cells.append(action.name.lower().replace("_", " ") + ("" if after is state else f" → {after.name}"))
        drawn.append(f"| {kind.name} | {' | '.join(cells)} |")
    print("\n".join(drawn))
    assert "\n".join(drawn) in README.read_text()


def test_over_is_final() -> None:
    """Nothing leaves the last state, and all that is still answered there is a goodbye."""
    for kind in Kind:
        state, action = TRANSITIONS[State.OVER, kind]
        assert state is State.OVER
        assert action is (Action.ACKNOWLEDGE_BYE if kind is Kind.BYE else Action.NOTHING)


def test_in_order() -> None:
    """Sent, arrived, acknowledged, forgotten."""
    one, other = Exchange(0.0), Exchange(0.0)
    for i in range(1, 4):
        assert send(one) == (i, True)
        assert other.arrived(i, 0, 0.0) is Arrival.NEW
    assert other.received == other.unreported == 3
    assert one.arrived(0, other.received, 0.0) is Arrival.NEW
    assert one.unacknowledged == 0


def test_a_duplicate_has_no_effect() -> None:
    """It is known by its number, however late it comes, and its sender is to hear that it arrived."""
    exchange = Exchange(0.0)
    for i in (1, 2, 3):
        exchange.arrived(i, 0, 0.0)
    exchange.unreported = 0
    assert exchange.arrived(2, 0, 0.0) is Arrival.DUPLICATE
    assert exchange.received == 3
    assert exchange.unreported == 1


def test_a_gap_is_reported_once() -> None:
    """Frames after a lost one are not taken; the first of them reports the gap, and the next gap is reported again."""
    exchange = Exchange(0.0)
    assert [exchange.arrived(i, 0, 0.0) for i in (1, 3, 4)] == [Arrival.NEW, Arrival.EARLY, Arrival.EARLY_AGAIN]
    assert [exchange.arrived(i, 0, 0.0) for i in (2, 3, 5)] == [Arrival.NEW, Arrival.NEW, Arrival.EARLY]


def test_an_acknowledgement_of_what_was_not_sent_is_refused() -> None:
    """The peer's bug, and it changes nothing."""
    exchange = Exchange(0.0)
    send(exchange)
    with pytest.raises(ProtocolError, match="acknowledges frame 2; only 1"):
        exchange.arrived(0, 2, 5.0)
    assert exchange.unacknowledged == 1
    assert exchange.heard_s == 0.0


def test_repeats_go_on_until_there_is_progress() -> None:
    """After each RETRY_S without any, ten times in the five seconds that an invalidation has; an acknowledgement is progress."""
    exchange = Exchange(0.0)
    send(exchange, 0.0)
    send(exchange, 0.0)
    now_s = 0.0
    for _ in range(10):
        assert exchange.overdue(now_s + RETRY_S - 0.01) == []
        now_s += RETRY_S
        assert numbers(exchange.overdue(now_s)) == [1, 2]
    assert now_s <= 5
    exchange.arrived(0, 1, now_s)
    assert exchange.overdue(now_s + RETRY_S - 0.01) == []
    assert numbers(exchange.overdue(now_s + RETRY_S)) == [2]


def test_nothing_to_repeat_when_all_arrived() -> None:
    """However long the silence."""
    exchange = Exchange(0.0)
    send(exchange)
    exchange.arrived(0, 1, 0.0)
    assert exchange.overdue(1e6) == []


def test_the_window_bounds_what_is_under_way() -> None:
    """Frames beyond it wait, in order, and go when acknowledgements make room; repeats cover only what has gone."""
    exchange = Exchange(0.0)
    assert all(send(exchange)[1] for _ in range(WINDOW))
    assert [send(exchange)[1] for _ in range(10)] == [False] * 10
    assert exchange.ready() == []
    assert numbers(exchange.repeat(0.0)) == list(range(1, REPEAT_MAX + 1))
    exchange.arrived(0, 4, 0.0)
    assert numbers(exchange.ready()) == [WINDOW + i for i in (1, 2, 3, 4)]
    assert send(exchange)[1] is False
    exchange.arrived(0, WINDOW, 0.0)
    assert numbers(exchange.ready()) == [WINDOW + i for i in range(5, 12)]
    assert exchange.ready() == []
    assert send(exchange)[1] is True


def test_a_peer_that_does_not_keep_up_is_seen() -> None:
    """Memory has an end."""
    exchange = Exchange(0.0)
    for _ in range(WINDOW + BACKLOG_MAX):
        send(exchange)
    assert not exchange.overrun
    send(exchange)
    assert exchange.overrun


def test_silence() -> None:
    """Longer than the lease is silent; any frame ends it."""
    exchange = Exchange(10.0)
    assert not exchange.silent(10.0 + LEASE_S)
    assert exchange.silent(10.1 + LEASE_S)
    exchange.arrived(0, 0, 10.1 + LEASE_S)
    assert not exchange.silent(10.2 + LEASE_S)


@pytest.mark.parametrize("seed", range(20))
def test_every_frame_once_and_in_order(seed: int) -> None:
    """A wire that loses a third, doubles some and shuffles a little; still both sides take every frame once, in order."""
    chance = random.Random(seed)
    sides = (Exchange(0.0), Exchange(0.0))
    taken: tuple[list[int], list[int]] = ([], [])
    wires: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    count, now_s = 200, 0.0

    def transmit(side: int, sequence: int) -> None:
        for _ in range(chance.choice((0, 1, 1, 1, 2))):
            wire = wires[1 - side]
            wire.insert(len(wire) - min(len(wire), chance.choice((0, 0, 0, 1, 2))), (sequence, sides[side].received))

    for step in range(5_000):
        now_s += 0.05
        for side in (0, 1):
            if sides[side].sequence < count and step % 2:
                transmit(side, send(sides[side], now_s)[0])
            for again in numbers(sides[side].overdue(now_s)):
                transmit(side, again)
            if step % 5 == 0:
                transmit(side, 0)
            for _ in range(min(len(wires[side]), chance.randrange(30))):
                sequence, acknowledged = wires[side].pop(0)
                arrival = sides[side].arrived(sequence, acknowledged, now_s)
                if arrival is Arrival.NEW and sequence:
                    taken[side].append(sequence)
        if all(exchange.unacknowledged == 0 and exchange.sequence == count for exchange in sides):
            break
    assert taken == (list(range(1, count + 1)), list(range(1, count + 1)))
    assert step < 4_999
