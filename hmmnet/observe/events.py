"""What happens on a machine, one event after the other, each with its cause; for whoever listens.

The host says what it did to pages and what became of devices. With nobody listening that costs a look at an empty list: arrays are only
made for listeners (`Events.heard`). Listeners are called at the moment of the event, inside the host's own step, and must not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from hmmnet.pages import Words

HOST = "host"

CAUSES = {
    "cpu fault": "an access of the CPU",
    "fault": "a fault of {device}",
    "prefetch": "asked for by a program",
    "user": "asked for by a program",
    "release": "{device} gave its memory up",
}
"""Why pages migrate, in words. The causes of devices are those of `hmmnet.wire.messages.Migrate`."""


@dataclass(frozen=True, eq=False)
class Moved:
    """`pages` (ascending, not empty) of a process moved; one end is the host, the other a device. Times are emulated."""

    at_s: float
    process: int
    pages: Words
    source: str
    target: str
    cause: str

    @property
    def device(self) -> str:
        """The device at one end."""
        return self.source if self.target == HOST else self.target

    @property
    def why(self) -> str:
        """The cause in words; one that is not in `CAUSES`, a device's own, as it is."""
        return CAUSES.get(self.cause, self.cause).format(device=self.device)


@dataclass(frozen=True)
class Invalidated:
    """Mirrors had to drop pages [start, end) of a process: `told` of them were told, because of `event` (an mmu_notifier_event)."""

    at_s: float
    process: int
    start: int
    end: int
    event: str
    told: int


@dataclass(frozen=True)
class DeviceChanged:
    """A device is ``ready``, or ``lost``; `how` it was lost."""

    at_s: float
    device: str
    state: str
    how: str = ""


@dataclass(frozen=True)
class Refused:
    """The IOMMU refused a device an access: its driver used what it had been told to drop."""

    at_s: float
    device: str
    why: str


Event: TypeAlias = Moved | Invalidated | DeviceChanged | Refused
Listener: TypeAlias = Callable[[Event], None]


class Events:
    """Where the host tells; `now` is its clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._listeners: list[Listener] = []
        self.heard = False
        """Whether anybody listens."""

    @contextmanager
    def told_to(self, listener: Listener) -> Iterator[None]:
        """`listener` hears every event while the block runs."""
        self._listeners.append(listener)
        self.heard = True
        try:
            yield
        finally:
            self._listeners.remove(listener)
            self.heard = bool(self._listeners)

    def moved(self, process: int, pages: Words, source: str, target: str, cause: str) -> None:
        """Pages moved; does nothing for none."""
        if self._listeners and len(pages):
            self._tell(Moved(self._now(), process, pages, source, target, cause))

    def invalidated(self, process: int, start: int, end: int, event: str, told: int) -> None:
        """Mirrors were told to drop a range."""
        if self._listeners:
            self._tell(Invalidated(self._now(), process, start, end, event, told))

    def device(self, name: str, state: str, how: str = "") -> None:
        """A device came or went."""
        if self._listeners:
            self._tell(DeviceChanged(self._now(), name, state, how))

    def refused(self, device: str, why: str) -> None:
        """The IOMMU refused an access."""
        if self._listeners:
            self._tell(Refused(self._now(), device, why))

    def _tell(self, event: Event) -> None:
        for listener in list(self._listeners):
            listener(event)
