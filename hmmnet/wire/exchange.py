"""A session's books, without I/O: what was sent and not acknowledged, what arrived, who was heard when, and what a frame means.

ZeroMQ keeps the order of messages and drops those in flight when a connection breaks, so TCP's promises are not ours. The books
make them again, frame by frame, as TCP does byte by byte:

- Frames that must arrive are numbered in each direction. The *sender* keeps them until they are acknowledged and repeats the oldest when
  nothing was acknowledged for `RETRY_S`, again and again, or at once when the receiver reports a gap.
- The *receiver* takes the next number only. What comes again is a duplicate and has no effect; what comes early is dropped, and reported as
  a gap. So every frame takes effect exactly once, in order: an answer never overtakes an invalidation that was sent before it.
- Acknowledgements ride on every frame of the other direction; a heartbeat carries them when there is none.

A request that runs for minutes holds nothing up: its frame is acknowledged when it arrives, and its reply is a frame of its own. (Books
of answers by request id were tried: either they grow while one request runs, or they forget what a repeat will ask for.)

What an arriving frame means for the session is the table `TRANSITIONS`: (state, kind) -> (state, action); every pair is in it.
"""

from __future__ import annotations

from collections import deque
from enum import Enum, auto

from hmmnet.errors import ProtocolError

from .codec import Kind

HEARTBEAT_S = 0.25
LEASE_S = 2.0
"""Silence after which the peer counts as gone, and after which a device stops using its mirror: eight heartbeats."""
RETRY_S = 0.5
"""Two heartbeats: an acknowledgement that rides on one is never late. Short against the lease.

Repeats do not slow down, as TCP's do: a peer that is silent is given up after its lease, so there is no crowd of them to spare; and one
that lives has only so long to answer (an invalidation: 5 s), within which a frame must arrive, also over a wire that loses much.
"""
BYE_S = 1.0
"""How long a BYE waits for its acknowledgement."""
WINDOW = 4096
"""Frames that may be under way without acknowledgement; a quarter of what a control socket queues, so repeats fit too."""
BACKLOG_MAX = 65_536
"""Frames that may wait for the window. A peer that lets so many pile up is given up: it does not keep up, and memory is not endless."""
REPEAT_MAX = 64
"""Frames repeated in one go: enough to refill a pipe, not enough to flood a peer that is merely slow."""
ACKNOWLEDGE_EVERY = 256
"""Frames received without one going back after which a heartbeat goes at once: the sender's memory and window stay small."""


class State(Enum):
    """Where a session is. It begins LIVE, after the hello."""

    LIVE = auto()
    CLOSING = auto()
    """We said BYE, and wait for its acknowledgement."""
    OVER = auto()


class Action(Enum):
    """What the session has to do about a frame."""

    SERVE = auto()
    """Hand the message to its handler."""
    WELCOME = auto()
    """The hello once more: its answer was lost, so send it again."""
    RESOLVE = auto()
    """Hand the message to the request that it answers."""
    REPEAT = auto()
    """Send again what is not acknowledged."""
    ACKNOWLEDGE_BYE = auto()
    """Confirm the peer's goodbye; the session is over."""
    END = auto()
    """Our goodbye is confirmed, or there is nobody to say it to; the session is over."""
    RESET = auto()
    """The peer knows no session: it is another incarnation, or has given us up."""
    NOTHING = auto()
    REFUSE = auto()
    """The protocol does not allow this here: a fault of the peer."""


TRANSITIONS: dict[tuple[State, Kind], tuple[State, Action]] = {
    (State.LIVE, Kind.HELLO): (State.LIVE, Action.WELCOME),
    (State.LIVE, Kind.WELCOME): (State.LIVE, Action.NOTHING),  # the hello was repeated, and so is its answer
    (State.LIVE, Kind.REQUEST): (State.LIVE, Action.SERVE),
    (State.LIVE, Kind.REPLY): (State.LIVE, Action.RESOLVE),
    (State.LIVE, Kind.NOTE): (State.LIVE, Action.SERVE),
    (State.LIVE, Kind.BEAT): (State.LIVE, Action.NOTHING),
    (State.LIVE, Kind.GAP): (State.LIVE, Action.REPEAT),
    (State.LIVE, Kind.BYE): (State.OVER, Action.ACKNOWLEDGE_BYE),
    (State.LIVE, Kind.BYE_ACK): (State.LIVE, Action.REFUSE),
    (State.LIVE, Kind.RESET): (State.OVER, Action.RESET),
    (State.CLOSING, Kind.HELLO): (State.CLOSING, Action.NOTHING),
    (State.CLOSING, Kind.WELCOME): (State.CLOSING, Action.NOTHING),
    (State.CLOSING, Kind.REQUEST): (State.CLOSING, Action.NOTHING),  # it crossed our BYE; its sender learns from that
    (State.CLOSING, Kind.REPLY): (State.CLOSING, Action.RESOLVE),
    (State.CLOSING, Kind.NOTE): (State.CLOSING, Action.SERVE),
    (State.CLOSING, Kind.BEAT): (State.CLOSING, Action.NOTHING),
    (State.CLOSING, Kind.GAP): (State.CLOSING, Action.REPEAT),
    (State.CLOSING, Kind.BYE): (State.OVER, Action.ACKNOWLEDGE_BYE),
    (State.CLOSING, Kind.BYE_ACK): (State.OVER, Action.END),
    (State.CLOSING, Kind.RESET): (State.OVER, Action.END),
    (State.OVER, Kind.HELLO): (State.OVER, Action.NOTHING),
    (State.OVER, Kind.WELCOME): (State.OVER, Action.NOTHING),
    (State.OVER, Kind.REQUEST): (State.OVER, Action.NOTHING),
    (State.OVER, Kind.REPLY): (State.OVER, Action.NOTHING),
    (State.OVER, Kind.NOTE): (State.OVER, Action.NOTHING),
    (State.OVER, Kind.BEAT): (State.OVER, Action.NOTHING),
    (State.OVER, Kind.GAP): (State.OVER, Action.NOTHING),
    (State.OVER, Kind.BYE): (State.OVER, Action.ACKNOWLEDGE_BYE),
    (State.OVER, Kind.BYE_ACK): (State.OVER, Action.NOTHING),
    (State.OVER, Kind.RESET): (State.OVER, Action.NOTHING),
}


_LIVE = State.LIVE
AT_ONCE: tuple[Action | None, ...] = (
    None,
    *(action if state is _LIVE else None for state, action in (TRANSITIONS[_LIVE, kind] for kind in sorted(Kind))),
)
"""By the kind's number: what a session that lives, and goes on, has to do about a frame; None where it does not. See `Exchange.means`."""
_WHILE_LIVE = (None, *(TRANSITIONS[_LIVE, kind] for kind in sorted(Kind)))
"""The part of the table that nearly every frame needs, by the kind's number: an enum hashes itself in Python."""


class Arrival(Enum):
    """What the numbers of an arriving frame say."""

    NEW = auto()
    DUPLICATE = auto()
    """It had its effect before; its sender wants to hear that it arrived."""
    EARLY = auto()
    """Something before it is missing, and that is to be reported now."""
    EARLY_AGAIN = auto()
    """Something before it is missing, and that was reported."""


class Exchange:
    """Numbers and unacknowledged frames of one session, both directions. Times are seconds of one clock, handed in."""

    def __init__(self, now_s: float, lease_s: float = LEASE_S, retry_s: float = RETRY_S) -> None:
        self.state = State.LIVE
        self.lease_s = lease_s
        self.retry_s = retry_s
        self.heard_s = now_s
        self.sequence = 0
        """The last that was given to a frame. Who makes a frame counts it up, and hands the frame to `keep`."""
        self.received = 0
        """The last that arrived with all before it: what our frames acknowledge."""
        self.unreported = 0
        """Frames received since we last acknowledged."""
        self.waiting_for_room = False
        """Whether frames wait for the window."""
        self._kept: deque[bytes] = deque()
        self._acknowledged = 0
        self._released = 0
        self._progress_s = now_s
        self._gap_at = 0

    # --- what we send

    def keep(self, frame: bytes, now_s: float) -> bool:
        """Remember the frame with the number just given until it is acknowledged. Whether it may go now; else `ready` gives it later."""
        kept = self._kept
        if not kept:
            self._progress_s = now_s
        kept.append(frame)
        self.unreported = 0
        if self._released == self.sequence - 1 and self.sequence - self._acknowledged <= WINDOW:
            self._released += 1
            return True
        self.waiting_for_room = True
        return False

    @property
    def overrun(self) -> bool:
        """Whether the peer has let more pile up than is kept for anybody."""
        return len(self._kept) > WINDOW + BACKLOG_MAX

    @property
    def unacknowledged(self) -> int:
        """Frames kept for the peer."""
        return len(self._kept)

    def ready(self) -> list[bytes]:
        """Frames that waited for the window and may go now."""
        room = min(self.sequence, self._acknowledged + WINDOW) - self._released
        if room <= 0:
            return []
        begin = self._released - self._acknowledged
        self._released += room
        self.waiting_for_room = self._released < self.sequence
        return [self._kept[i] for i in range(begin, begin + room)]

    def overdue(self, now_s: float) -> list[bytes]:
        """Frames to repeat because nothing was acknowledged for too long."""
        return self.repeat(now_s) if self._kept and now_s - self._progress_s >= self.retry_s else []

    def repeat(self, now_s: float) -> list[bytes]:
        """The oldest frames under way that are not acknowledged."""
        self._progress_s = now_s
        under_way = self._released - self._acknowledged
        return [self._kept[i] for i in range(min(under_way, REPEAT_MAX))]

    # --- what we receive

    def arrived(self, sequence: int, acknowledged: int, now_s: float) -> Arrival:
        """Enter a well-formed frame from the peer. Raises ProtocolError for an acknowledgement of what was never sent."""
        if acknowledged > self._released:
            raise ProtocolError(f"the peer acknowledges frame {acknowledged}; only {self._released} were sent")
        self.heard_s = now_s
        if acknowledged > self._acknowledged:
            kept = self._kept
            for _ in range(acknowledged - self._acknowledged):
                kept.popleft()
            self._acknowledged = acknowledged
            self._progress_s = now_s
        if sequence == self.received + 1:
            self.received = sequence
            self.unreported += 1
            return Arrival.NEW
        if sequence == 0:
            return Arrival.NEW
        if sequence <= self.received:
            self.unreported += 1
            return Arrival.DUPLICATE
        if self._gap_at == self.received + 1:
            return Arrival.EARLY_AGAIN
        self._gap_at = self.received + 1
        return Arrival.EARLY

    def means(self, kind: Kind) -> Action:
        """Take the table's step for a frame that is new."""
        self.state, action = (self.state is _LIVE and _WHILE_LIVE[kind]) or TRANSITIONS[self.state, kind]
        return action

    def silent(self, now_s: float) -> bool:
        """Whether the peer was not heard for longer than the lease."""
        return now_s - self.heard_s > self.lease_s
