"""What happens inside the machine, each event with the event that caused it.

A GPU profiler shows that a page moved; the question is why. So every event may name its cause, and `Bus.chain` walks back: this copy,
because of that migration, because of that batch of faults, because of that access.

Emitting is cheap where nobody listens: the emitter asks ``if bus.active:`` (one attribute) before it builds anything. As soon as anybody
listens to anything, every event is built and remembered for a while, whatever it is about: else chains would have holes. A cause is
a number; 0 is "none, or nobody listened then". Inside ``with bus.because(number):`` it need not be passed on by hand, also across awaits.

The bus belongs to one thread. Callbacks are plain functions, called at once and in order; what they emit themselves is delivered
after them. A callback that raises is a bug of the observer, not of the machine: it is logged and unsubscribed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, Generic, Self, TypeVar

HISTORY_MAX = 8192
"""Events remembered for chains: a fault's chain is at most some dozens of events old, even with 64 devices that fault at once."""

log = logging.getLogger("hmmnet.observe")


class Event:
    """Root of what can happen. Ranges are page numbers ``[start, end)``; places are names of devices or memory nodes."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class CpuFault(Event):
    """A program's load or store found no usable entry."""

    process: int
    page: int
    write: bool


@dataclass(frozen=True, slots=True)
class DeviceFault(Event):
    """A job's access missed in the device's mirror."""

    device: str
    process: int
    page: int
    write: bool


@dataclass(frozen=True, slots=True)
class FaultBatch(Event):
    """A device fetched its fault buffer: so many faults, on so many different pages."""

    device: str
    faults: int
    pages: int


@dataclass(frozen=True, slots=True)
class Prefetch(Event):
    """A policy asked for pages that nobody touched yet."""

    device: str
    process: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class RangeFault(Event):
    """hmm_range_fault was run for a device; so many tries until its sequence held."""

    device: str
    process: int
    start: int
    end: int
    tries: int


@dataclass(frozen=True, slots=True)
class Invalidation(Event):
    """The hub told `devices` subscribers to drop a range. `reason` is the notifier's event."""

    process: int
    start: int
    end: int
    reason: str
    devices: int


@dataclass(frozen=True, slots=True)
class Migration(Event):
    """migrate_vma ended: of `asked` pages, `moved` went from `source` to `target`."""

    process: int
    start: int
    end: int
    source: str
    target: str
    asked: int
    moved: int


@dataclass(frozen=True, slots=True)
class Copy(Event):
    """A DMA transfer landed, after so many emulated seconds."""

    source: str
    target: str
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Eviction(Event):
    """Pages had to leave a device."""

    device: str
    pages: int
    why: str


@dataclass(frozen=True, slots=True)
class IommuRefusal(Event):
    """A device accessed a frame that it holds no translation for."""

    device: str
    frame: int
    write: bool


@dataclass(frozen=True, slots=True)
class DeviceLost(Event):
    """A device is gone, and so many pages with it."""

    device: str
    why: str
    pages: int


E = TypeVar("E", bound=Event)


@dataclass(frozen=True, slots=True)
class Record(Generic[E]):
    """An event as it was emitted: its number, when (emulated), and the number of its cause."""

    number: int
    at_s: float
    cause: int
    event: E

    def as_json(self) -> dict[str, Any]:
        """Plain data: what it was, then its fields."""
        fields = asdict(self.event)  # type: ignore[call-overload]
        return {"number": self.number, "at_s": self.at_s, "cause": self.cause, "event": type(self.event).__name__, **fields}


Callback = Callable[[Record[Any]], None]

_current_cause: ContextVar[int] = ContextVar("hmmnet_cause", default=0)


class Subscription:
    """Ends when closed, or at the end of its ``with`` block."""

    def __init__(self, bus: Bus, callback: Callback, kinds: tuple[type[Event], ...]) -> None:
        self._bus = bus
        self.callback = callback
        self.kinds = kinds

    def close(self) -> None:
        """Stop listening; again does nothing."""
        self._bus._drop(self)  # noqa: SLF001 - one module

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


class Bus:
    """Hands events to whoever subscribed. `now` gives emulated seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.active = False
        """Whether anybody listens; emitters look here first."""
        self._now = now
        self._subscriptions: list[Subscription] = []
        self._history: list[Record[Any] | None] = []
        self._last = 0
        self._waiting: deque[Record[Any]] = deque()
        self._delivering = False

    def subscribe(self, callback: Callable[[Record[E]], None], *kinds: type[E]) -> Subscription:
        """Call `callback` with the record of every event that is one of `kinds` (none: of all)."""
        subscription = Subscription(self, callback, kinds)
        self._subscriptions = [*self._subscriptions, subscription]
        if not self.active:
            self._history = [None] * HISTORY_MAX
            self.active = True
        return subscription

    def _drop(self, subscription: Subscription) -> None:
        self._subscriptions = [other for other in self._subscriptions if other is not subscription]
        self.active = bool(self._subscriptions)
        if not self.active:
            self._history = []

    def emit(self, event: Event, cause: int | None = None) -> int:
        """Tell that `event` happened, because of `cause` (None: the one of `because`); its number, 0 when nobody listens."""
        if not self.active:
            return 0
        self._last += 1
        record = Record(self._last, self._now(), _current_cause.get() if cause is None else cause, event)
        self._history[record.number % HISTORY_MAX] = record
        self._waiting.append(record)
        if not self._delivering:
            self._deliver()
        return record.number

    def _deliver(self) -> None:
        self._delivering = True
        try:
            while self._waiting:
                record = self._waiting.popleft()
                for subscription in self._subscriptions:
                    if not subscription.kinds or isinstance(record.event, subscription.kinds):
                        self._call(subscription, record)
        finally:
            self._delivering = False

    def _call(self, subscription: Subscription, record: Record[Any]) -> None:
        try:
            subscription.callback(record)
        except Exception:
            log.exception("an observer failed at event %d and was unsubscribed", record.number)
            self._drop(subscription)

    @contextmanager
    def because(self, cause: int) -> Iterator[None]:
        """What is emitted inside without a cause of its own has this one; also in tasks started inside."""
        token = _current_cause.set(cause)
        try:
            yield
        finally:
            _current_cause.reset(token)

    def chain(self, number: int) -> list[Record[Any]]:
        """The event `number` and what led to it, the root first. Shorter than it was when its beginning is forgotten."""
        found: list[Record[Any]] = []
        while (record := self._recall(number)) is not None:
            found.append(record)
            number = record.cause
        return found[::-1]

    def _recall(self, number: int) -> Record[Any] | None:
        if not self._history or number <= 0:
            return None
        record = self._history[number % HISTORY_MAX]
        return record if record is not None and record.number == number else None
