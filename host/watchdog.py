"""Whether a device's copy engine answers and goes on: a watchdog, as a GPU driver has one for each ring (drm_sched's `timedout_job`).

A copy engine may hang while the device lives: its heart beats, it acknowledges invalidations. Whoever waits for pages of it, a CPU as
well, would wait for ever. What it has to do at once it has to answer in time. Of a stream that it sends it proves nothing, seen from here,
that no chunk comes: its clock may run slow, a link be repaired, a chunk be lost on a wire that takes a minute for it. So the watchdog does
as a driver's does and looks at the ring's own counters: it asks the device, over the control session, how far each stream is and what it
waits for. An engine that says twice, a limit apart, that it is where it was and waits for nothing has hung, and the device is lost; so it
is if it does not answer. A stream that the device knows nothing of ends, and nothing else: the device has given it up, and each message
that said so was lost.

Whether anybody can send is seen here at once: who receives is a router, and knows whom it is connected to. A stream whose sender has had no
connection for `AWAY_S` ends, as one to a device does then (`ZmqChannel.send`); the device lives, and keeps what it was to send.

What a device says is believed: this is for engines that hang, not for devices that lie. One whose chunk waits for its moment is told its
rate again: that its links are faster may have been lost on the way (see `receiver`). Streams *to* a device are the host's own (`sender`
repeats for a minute, and waits as long for links; and `AWAY_S` for a connection); what else may hold one here has `HUNG_S`, and costs that
copy and no device. What a command (`Ioctl`) gives comes *late*: it takes its time before it gives anything, and as long a device knows no
such stream. Once something has come, the device has said anything else of it, or the command was answered, it has to go on, as others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from hmmnet.errors import HmmnetError, ProtocolError
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import Arrival, BulkReceiver
from hmmnet.fabric.sender import DOWN_S
from hmmnet.fabric.stream import Holds
from hmmnet.pages import from_wire, to_wire
from hmmnet.wire.messages import STREAMS_SHOWN_MAX, Message, ShowStreams, StreamsShown
from hmmnet.wire.session import PendingReply, Session
from hmmnet.wire.transport import AWAY_S

WATCHDOG_S = 10.0
"""Real seconds without a chunk after which a device is asked, and asked again. As long as amdgpu gives a ring, that of a copy engine too,
before it resets the GPU (`lockup_timeout`): an interruption of some seconds is waited for."""
HUNG_S = 2 * WATCHDOG_S
"""From the last chunk to the second answer."""
ANSWER_S = 5.0
"""Real seconds for an answer that waits for nothing, heartbeats or not."""
ASKED_MAX = 3
"""Questions in a row, `WATCHDOG_S` apart, that are answered with nothing that says anything: one may be damaged on its way."""
NEW = -1.0
"""Of an answer that is waited for: no heartbeat has come since it was asked for."""


@dataclass(slots=True)
class _Seen:
    """What is known of a stream: chunks that had come, since when it is so, and what the device has said of it since."""

    came: int
    since_s: float
    said: tuple[int, int] | None = None
    down_s: float | None = None
    """Since when no link leads here."""
    away_s: float | None = None
    """Since when nobody is there to send."""


class Watchdog:
    """Watches one device, on behalf of who waits for it. `condemn` is told why it is lost."""

    def __init__(
        self,
        session: Session,
        receiver: BulkReceiver,
        condemn: Callable[[str], None],
        clock: EmulatedClock,
    ) -> None:
        self.owed: dict[PendingReply, float] = {}
        """Answers of its copy engine: since when a heartbeat has seen each wait; `NEW`, if none has."""
        self.watched: dict[Arrival, _Seen | None] = {}
        """Streams that come; None: no heartbeat has seen it yet."""
        self.late: set[Arrival] = set()
        """Those of them that the device begins with when it has something to give, and has not begun with yet."""
        self._session = session
        self._receiver = receiver
        self._condemn = condemn
        self._clock = clock
        self._asked: tuple[PendingReply, list[Arrival]] | None = None
        self._in_vain = 0
        """Questions in a row, and what came says nothing."""

    @contextmanager
    def asked(self, pending: PendingReply) -> Iterator[None]:
        """The device is to answer what it has to do at once, for who waits has no other end of that."""
        self.owed[pending] = NEW
        try:
            yield
        finally:
            del self.owed[pending]

    def look(self, now_s: float, stalled: bool) -> None:
        """A heartbeat, at `now_s`. After a stall of our own whatever came may lie unread: everything has its time again."""
        if self.watched or self._asked is not None:
            self._look_at_streams(now_s, stalled=stalled)
        if self.owed:
            self._look_at_owed(now_s, stalled=stalled)

    def _look_at_owed(self, now_s: float, *, stalled: bool) -> None:
        limit_s = self._clock.real(ANSWER_S)
        for pending, since_s in self.owed.items():
            if since_s == NEW or stalled:
                self.owed[pending] = now_s
            elif now_s - since_s > limit_s:
                self._condemn(f"its copy engine did not answer within {ANSWER_S:g} s")
                return

    def _look_at_streams(self, now_s: float, *, stalled: bool) -> None:
        due = [arrival for arrival in self.watched if self._is_due(arrival, now_s, stalled=stalled)]
        if self.watched:
            self._look_for_sender(now_s, stalled=stalled)
            self._look_for_links(now_s, stalled=stalled)
        if self._asked is not None and self._asked[0].answered:
            pending, asked = self._asked
            self._asked = None
            del self.owed[pending]
            try:
                self._take(pending.result(), asked, now_s)
            except HmmnetError as error:
                self._in_vain += 1
                for seen in filter(None, map(self.watched.get, asked)):
                    seen.since_s = now_s
                if self._in_vain == ASKED_MAX:
                    self._condemn(f"it did not say how its copies go on ({error})")
            else:
                self._in_vain = 0
        elif self._asked is None:
            if due:
                self._ask(due[:STREAMS_SHOWN_MAX])
        elif not any(arrival in due for arrival in self._asked[1]):
            self.forget()

    def _look_for_sender(self, now_s: float, *, stalled: bool) -> None:
        """What has waited for nobody all the while is over, whatever its sender, who does not know, says of it meanwhile."""
        missing = not stalled and self._receiver.missing()
        for arrival, seen in list(self.watched.items()):
            if seen is None or arrival.done:
                continue
            if not missing:
                seen.away_s = None
            elif seen.away_s is None:
                seen.away_s = now_s
            elif now_s - seen.away_s >= self._clock.real(AWAY_S):
                self._receiver.give_up(arrival, f"its sender has had no connection for {AWAY_S:g} s")

    def _look_for_links(self, now_s: float, *, stalled: bool) -> None:
        """What has had no link for as long as senders wait for one is over, though its sender may wait for a moment that is far away."""
        for arrival, seen in list(self.watched.items()):
            if seen is None or arrival.done:
                continue
            if stalled or arrival.flow is None or not arrival.flow.stalled:
                seen.down_s = None
            elif seen.down_s is None:
                seen.down_s = now_s
            elif now_s - seen.down_s >= self._clock.real(DOWN_S):
                self._receiver.give_up(arrival, f"links are down for {DOWN_S:g} s")

    def forget(self) -> None:
        """Nobody waits for what was asked any more: the streams are over or go on, or the device is lost."""
        if self._asked is not None:
            del self.owed[self._asked[0]]
            self._asked = None

    def _is_due(self, arrival: Arrival, now_s: float, *, stalled: bool) -> bool:
        """Whether nothing has come of it for too long."""
        seen, came = self.watched[arrival], arrival.state.came
        if came:
            self.late.discard(arrival)
        if seen is None or seen.came != came or stalled:
            self.watched[arrival] = _Seen(came, now_s)
            return False
        return not arrival.done and now_s - seen.since_s >= self._clock.real(WATCHDOG_S)

    def _ask(self, arrivals: list[Arrival]) -> None:
        streams = np.array([arrival.state.stream for arrival in arrivals], np.uint64)
        pending = self._session.begin(ShowStreams(to_wire(streams)))
        self.owed[pending] = NEW
        self._asked = pending, arrivals

    def _take(self, answer: Message, asked: list[Arrival], now_s: float) -> None:
        """What a device says of its streams, which is true or not. Raises ProtocolError for what says nothing."""
        if not isinstance(answer, StreamsShown) or not len(answer.begun) == len(answer.holds) == 8 * len(asked):
            raise ProtocolError(f"it answered a ShowStreams of {len(asked)} streams with {type(answer).__name__}, or with others")
        told = list(zip(asked, from_wire(answer.begun).tolist(), from_wire(answer.holds).tolist(), strict=True))
        if any(holds > Holds.GONE for *_, holds in told):
            raise ProtocolError("a stream of it waits for what is not known")
        for arrival, begun, holds in told:
            self._judge(arrival, (begun, holds), now_s)

    def _judge(self, arrival: Arrival, said: tuple[int, int], now_s: float) -> None:
        seen, holds, stream = self.watched.get(arrival), said[1], arrival.state.stream
        if holds != Holds.GONE:
            self.late.discard(arrival)
        if seen is None or arrival.done or now_s - seen.since_s < self._clock.real(WATCHDOG_S):
            return  # it is over, or has moved meanwhile
        if holds not in (Holds.NOTHING, Holds.GONE) or said != seen.said or (holds == Holds.GONE and arrival in self.late):
            seen.since_s, seen.said = now_s, said
            if holds == Holds.PACE:
                self._receiver.tell_rate(arrival)
        elif holds == Holds.GONE:
            self._receiver.give_up(arrival, "its sender knows nothing of it any more")
        else:
            self._condemn(f"its copy engine has hung: stream {stream} has not moved for {WATCHDOG_S:g} s and waits for nothing")
