"""The watchdog alone: a device that is played says how its streams go on, heartbeat by heartbeat."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from hmmnet.errors import HmmnetError, RemoteError
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import Arrival, BulkReceiver
from hmmnet.fabric.sender import DOWN_S
from hmmnet.fabric.stream import Holds
from hmmnet.host.watchdog import ANSWER_S, ASKED_MAX, HUNG_S, WATCHDOG_S, Watchdog
from hmmnet.pages import from_wire, to_wire
from hmmnet.wire.messages import Done, Message, ShowStreams, StreamsShown
from hmmnet.wire.session import PendingReply, Session
from hmmnet.wire.transport import AWAY_S

BEAT_S = 0.25


def words(*numbers: int) -> bytes:
    return to_wire(np.array(numbers, np.uint64))


class _State:
    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.came = 0


class _Stream:
    """What a watchdog sees of an `Arrival`."""

    def __init__(self, stream: int) -> None:
        self.state = _State(stream)
        self.flow = SimpleNamespace(stalled=False)
        self.done = False


class _Played:
    """Session and receiver of a device that sends two streams, in one. `say` gives its answer to a question; None: it gives none."""

    def __init__(self, say: Callable[[list[int]], Message | HmmnetError | None]) -> None:
        self.now_s = 0.0
        self.questions: list[float] = []
        self.lost: list[str] = []
        self.ended: list[int] = []
        self.away = False
        self.told: list[int] = []
        self._say = say
        self.streams = [_Stream(2), _Stream(4)]
        self.dog = Watchdog(cast(Session, self), cast(BulkReceiver, self), self.lost.append, EmulatedClock())
        for stream in self.streams:
            self.dog.watched[cast(Arrival, stream)] = None

    def begin(self, question: ShowStreams) -> PendingReply:
        self.questions.append(self.now_s)
        pending = PendingReply()
        answer = self._say(from_wire(question.streams).tolist())
        if isinstance(answer, HmmnetError):
            pending.resolve(None, answer)
        elif answer is not None:
            pending.resolve(answer)
        return pending

    def missing(self) -> bool:
        return self.away

    def give_up(self, arrival: _Stream, reason: str) -> None:
        down = "links are down for 60 s" if arrival.flow.stalled else "knows nothing"
        assert ("has had no connection for 5 s" if self.away else down) in reason
        self.ended.append(arrival.state.stream)
        arrival.done = True
        del self.dog.watched[cast(Arrival, arrival)]

    def tell_rate(self, arrival: _Stream) -> None:
        self.told.append(arrival.state.stream)

    def lives(self, seconds: float, act: Callable[[], None] = lambda: None) -> None:
        """Heartbeats for so long, unless it is lost; `act` before each."""
        for _ in range(round(seconds / BEAT_S)):
            if not self.lost:
                self.now_s += BEAT_S
                act()
                self.dog.look(self.now_s, False)


async def test_what_has_no_link_for_a_minute_is_over() -> None:
    """Whatever its sender waits for; one whose link is up again in time, or goes down again, has a whole minute."""
    device = _Played(lambda asked: StreamsShown(words(*[1] * len(asked)), words(*[Holds.PACE] * len(asked))))
    first, second = device.streams
    first.flow.stalled = second.flow.stalled = True
    device.lives(DOWN_S - 2 * BEAT_S)
    second.flow.stalled = False
    device.lives(BEAT_S)
    second.flow.stalled = True
    assert device.ended == []
    device.lives(3 * BEAT_S)
    assert (device.ended, device.lost) == ([2], [])
    device.lives(DOWN_S)
    assert (device.ended, device.lost) == ([2, 4], [])


@pytest.mark.parametrize("holds", [Holds.PACE, Holds.CREDIT, Holds.WAY])
async def test_what_is_held_is_waited_for(holds: Holds) -> None:
    """However long it does not move."""
    device = _Played(lambda asked: StreamsShown(words(*[1] * len(asked)), words(*[holds] * len(asked))))
    device.lives(300)
    assert (device.lost, device.ended) == ([], [])
    assert len(device.questions) > 20
    assert device.told == ([2, 4] * len(device.questions) if holds == Holds.PACE else []), "the rate, of which it may not have heard"


async def test_a_stream_that_waits_for_nothing_costs_the_device_its_life() -> None:
    """Once it has said so twice; the other goes on meanwhile, and is not asked about."""
    asked_about = []

    def say(asked: list[int]) -> Message:
        asked_about.append(asked)
        return StreamsShown(words(7), words(Holds.NOTHING))

    device = _Played(say)

    def moves() -> None:
        device.streams[0].state.came += 1

    device.lives(60, moves)
    (why,) = device.lost
    assert why == "its copy engine has hung: stream 4 has not moved for 10 s and waits for nothing"
    assert asked_about == [[4], [4]]
    assert HUNG_S <= device.now_s <= HUNG_S + 4 * BEAT_S


@pytest.mark.parametrize("moves", ["there", "here", "held between"])
async def test_what_moves_between_two_answers_is_waited_for(moves: str) -> None:
    """By the device's account, by chunks that come, or by what held it at one of the two."""
    said = iter(range(1000))

    def say(asked: list[int]) -> Message:
        number = next(said)
        holds = Holds.CREDIT if moves == "held between" and number % 2 else Holds.NOTHING
        return StreamsShown(words(*[number if moves == "there" else 0] * len(asked)), words(*[holds] * len(asked)))

    device = _Played(say)

    def act() -> None:
        if moves == "here" and device.now_s % 15 == 0:
            for stream in device.streams:
                stream.state.came += 1

    device.lives(300, act)
    assert (device.lost, device.ended) == ([], [])
    assert len(device.questions) >= 19


async def test_what_the_device_knows_nothing_of_ends_alone() -> None:
    """Twice, too: the other waits on."""
    device = _Played(lambda asked: StreamsShown(words(*[0] * len(asked)), words(*[Holds.GONE if s == 2 else Holds.PACE for s in asked])))
    device.lives(60)
    assert (device.lost, device.ended) == ([], [2])


async def test_after_a_stall_of_the_host_all_streams_have_their_time_again() -> None:
    """Chunks may lie unread."""
    device = _Played(lambda asked: StreamsShown(words(*[0] * len(asked)), words(*[Holds.NOTHING] * len(asked))))
    for _ in range(10):
        device.lives(HUNG_S - 1)
        device.dog.look(device.now_s, True)
    assert (device.lost, device.ended) == ([], [])


ANSWERS: dict[str, Message | HmmnetError | None] = {
    "none": None,
    "another message": Done(),
    "too few": StreamsShown(words(1), words(0)),
    "too many": StreamsShown(words(1, 1, 1), words(0, 0, 0)),
    "no words": StreamsShown(b"x" * 15, b"x" * 16),
    "what is not known": StreamsShown(words(1, 1), words(0, 5)),
    "a refusal": RemoteError("ShowStreams: not a message that this end handles"),
}


@pytest.mark.parametrize("answer", ANSWERS)
async def test_who_does_not_say_how_its_streams_go_on_is_lost(answer: str) -> None:
    """An answer is not believed because it came; one question may be damaged on its way, and so it is asked again."""
    device = _Played(lambda _: ANSWERS[answer])
    device.lives(60)
    (why,) = device.lost
    assert why.startswith("its copy engine did not answer within 5 s" if answer == "none" else "it did not say how its copies go on (")
    assert len(device.questions) == (1 if answer == "none" else ASKED_MAX)
    assert device.now_s <= (WATCHDOG_S + ANSWER_S if answer == "none" else ASKED_MAX * (WATCHDOG_S + 2 * BEAT_S)) + 4 * BEAT_S
    assert device.now_s > (WATCHDOG_S if answer == "none" else ASKED_MAX * WATCHDOG_S)


async def test_a_question_that_is_damaged_on_its_way_is_asked_again() -> None:
    """Each time anew: what has said something since is forgotten."""
    said = iter(range(1000))
    good = StreamsShown(words(1, 1), words(Holds.PACE, Holds.PACE))
    device = _Played(lambda _: RemoteError("decode: message cannot be decoded") if next(said) % ASKED_MAX else good)
    device.lives(300)
    assert device.lost == []
    assert len(device.questions) > 3 * ASKED_MAX


@pytest.mark.parametrize("then", ["they are over", "they go on", "the device is lost"])
async def test_a_question_that_nobody_needs_any_more_is_forgotten(then: str) -> None:
    """Nobody waits: that no answer comes costs the device nothing, and nothing of it is left."""
    device = _Played(lambda _: None)
    device.lives(WATCHDOG_S + 1)
    assert len(device.questions) == len(device.dog.owed) == 1
    if then == "they are over":
        device.dog.watched.clear()
    elif then == "they go on":
        for stream in device.streams:
            stream.state.came += 1
    if then == "the device is lost":
        device.dog.forget()
    else:
        device.lives(WATCHDOG_S - 1)
    assert not device.dog.owed
    assert not device.lost


async def test_nothing_is_asked_about_what_is_over() -> None:
    """A stream that is all there may wait for its emulated time."""
    device = _Played(lambda _: None)
    for stream in device.streams:
        stream.done = True
    device.lives(60)
    assert (device.questions, device.lost) == ([], [])


SAYS_CREDIT = StreamsShown(words(1, 1), words(Holds.CREDIT, Holds.CREDIT))


async def test_streams_whose_sender_has_no_connection_end_and_nothing_else() -> None:
    """Without a question; what has moved since waits for longer."""
    device = _Played(lambda _: SAYS_CREDIT)
    device.lives(1)
    device.away = True
    device.lives(AWAY_S - 2 * BEAT_S)
    assert device.ended == []
    device.streams[1].state.came += 1
    device.lives(1)
    assert (device.ended, device.lost, device.questions) == ([2], [], [])
    device.lives(AWAY_S)
    assert (device.ended, device.lost) == ([2, 4], [])


async def test_what_a_sender_without_a_connection_says_of_its_streams_does_not_keep_them() -> None:
    """It goes on repeating, and knows nothing of that. Who was mute at first is asked, and goes away just before it answers."""
    device = _Played(lambda asked: StreamsShown(words(*[len(device.questions)] * len(asked)), words(*[Holds.CREDIT] * len(asked))))
    device.lives(WATCHDOG_S - 1)
    device.away = True
    device.lives(AWAY_S + BEAT_S)
    assert len(device.questions) == 1
    assert (device.ended, device.lost) == ([2, 4], [])


@pytest.mark.parametrize("between", ["it is there", "a stall", "nothing is sent", "all is there"])
async def test_only_a_sender_that_is_away_all_the_while_ends_its_streams(between: str) -> None:
    """It may come again at any moment, and whoever begins later waits as long."""
    device = _Played(lambda _: SAYS_CREDIT)
    device.away = True
    for _ in range(10):
        device.lives(AWAY_S - 2 * BEAT_S)
        if between == "it is there":
            device.away = False
            device.lives(BEAT_S)
            device.away = True
        elif between == "a stall":
            device.dog.look(device.now_s, True)
        elif between == "nothing is sent":
            device.dog.watched.clear()
            device.lives(AWAY_S)
            device.dog.watched.update({cast(Arrival, stream): None for stream in device.streams})
        else:
            for stream in device.streams:
                stream.done = True
    assert (device.ended, device.lost) == ([], [])


async def test_what_the_device_has_not_begun_yet_may_come_late() -> None:
    """Until then it knows nothing of it, however long; once it has begun it has to go on."""
    holds = [Holds.GONE]
    device = _Played(lambda asked: StreamsShown(words(*[0] * len(asked)), words(*holds * len(asked))))
    device.dog.watched.pop(cast(Arrival, device.streams[1]))
    device.dog.late.add(cast(Arrival, device.streams[0]))
    device.lives(300)
    assert (device.lost, device.ended) == ([], [])
    assert 20 < len(device.questions) <= 30, "10 s apart"
    holds[0] = Holds.NOTHING
    device.lives(3 * WATCHDOG_S)
    (why,) = device.lost
    assert why == "its copy engine has hung: stream 2 has not moved for 10 s and waits for nothing"


@pytest.mark.parametrize("how", ["a chunk came", "the device knew of it"])
async def test_what_the_device_has_begun_does_not_come_late(how: str) -> None:
    """If it knows nothing of it then, it has given it up, and nobody waits on."""
    holds = [Holds.GONE]
    device = _Played(lambda asked: StreamsShown(words(*[0] * len(asked)), words(*holds * len(asked))))
    device.dog.watched.pop(cast(Arrival, device.streams[1]))
    device.dog.late.add(cast(Arrival, device.streams[0]))
    device.lives(60)
    assert device.ended == []
    if how == "a chunk came":
        device.streams[0].state.came = 1
    else:
        holds[0] = Holds.CREDIT
        device.lives(WATCHDOG_S + BEAT_S)
        holds[0] = Holds.GONE
    device.lives(HUNG_S + WATCHDOG_S)
    assert (device.lost, device.ended) == ([], [2])
