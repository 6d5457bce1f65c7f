"""What excuses an operation that was refused: only what its error names, and only what has happened.

Errors of this machine say why: which fault was injected, where, and which time that place was reached; which way has no links that work;
which device was lost. So a refusal is excused only

- by the very failure that its error names: that point, that device, that occurrence, injected while the operation ran, in no stranger's
  process; where the refused access has an address, it is one of those that the failure was about, if it was about any;
- by links that are down, where the error says so of one of their ends, and some were while the operation ran;
- by what was done to a device that the error names, or by the loss of it, if one of the two was not over when the operation began.

A device is lost until the host has it again as a new incarnation. It may be lost only by a harm to it, or soon after: then the host may
still be waiting for something that the device has not said (`LOST_WITHIN_S`). A device that is lost unharmed is a violation by itself.

What crashed is excused by nothing, whatever else its error names: a peer's handler that ended with an exception of Python's own.

Nothing here knows what operations do; what it is told, `nemesis` and `crew` say.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from hmmnet.faults.points import Where
from hmmnet.wire.exchange import HEARTBEAT_S, LEASE_S

INVALIDATION_S = 5.0
STALLED_S = 0.25
"""What the host gives a device to let go of what is invalidated, and then itself to read of it (its names for them; `host/link.py`)."""
LOST_WITHIN_S = INVALIDATION_S + STALLED_S
"""Virtual seconds after a harm within which the host may give the device up for something that began while it lasted. Silence (a lease),
and a table that is not up to date (2 s), are found out sooner.
"""
AFTERMATH_S = LOST_WITHIN_S + LEASE_S + HEARTBEAT_S
"""After a harm until everybody knows what came of it: given up, and then waited for until its lease is over."""
NEVER_S = float("inf")
_INJECTED = re.compile(r"a fault was injected at ([\w.]+)(?: of ([\w.-]+))? \(occurrence (\d+)\)")
_CRASHES = frozenset(
    name
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, OSError)
)
"""What an exception of Python's own is called; not what an operating system answers."""
_KIND = re.compile(r"(?:^|(?<=: ))\w+(?=: )")
_WAY = re.compile(r'no link that works leads from "([^"]*)" to "([^"]*)"')


@dataclass(eq=False)
class Outage:
    """Links whose name matches `links` are, or were, down."""

    links: str
    began_s: float
    ended_s: float = NEVER_S


@dataclass(eq=False)
class Harm:
    """Something is done to a device, or was; or it is lost."""

    device: str
    ended_s: float = NEVER_S


class Excuses:
    """See the module. Times are virtual seconds. `strangers` are pids of processes in which nothing that fails concerns who asks."""

    def __init__(self, strangers: Collection[int] = ()) -> None:
        self._strangers = strangers
        self._failures: dict[tuple[str, int], tuple[Where, float]] = {}
        """Injected failures by (point, occurrence): where exactly, and when."""
        self._outages: dict[int, Outage] = {}
        self._harms: list[Harm] = []
        self._losses: list[Harm] = []

    # --- what happens ---------------------------------------------------------------------------------------------------------

    def failed(self, where: Where, now_s: float) -> None:
        """A failure was injected at a protocol point."""
        self._failures[where.point, where.occurrence] = where, now_s

    def outage_begins(self, number: int, links: str, now_s: float) -> None:
        """Fault `number` takes links down."""
        self._outages[number] = Outage(links, now_s)

    def outage_ends(self, number: int, now_s: float) -> None:
        """It has ended, if it was one."""
        if number in self._outages:
            self._outages[number].ended_s = now_s

    def harm_begins(self, device: str) -> Harm:
        """A device is harmed; for `harm_ends`."""
        self._harms.append(Harm(device))
        return self._harms[-1]

    def lost(self, device: str, now_s: float) -> bool:
        """The host has lost a device. Whether something was done to it that explains that."""
        self._losses.append(Harm(device))
        return any(harm.device == device and now_s <= harm.ended_s + LOST_WITHIN_S for harm in self._harms)

    def ready(self, device: str, now_s: float) -> None:
        """The host has a device again."""
        for loss in self._losses:
            if loss.device == device:
                loss.ended_s = min(loss.ended_s, now_s)

    def was_lost(self, device: str) -> bool:
        """Whether the host has ever lost it."""
        return any(loss.device == device for loss in self._losses)

    def calm(self) -> None:
        """All is healed and well again: what was before excuses nothing any more, but for pages that are known to be lost."""
        self._failures.clear()
        self._outages.clear()
        self._harms.clear()
        for loss in self._losses:
            loss.ended_s = min(loss.ended_s, -1.0)

    # --- who asks -------------------------------------------------------------------------------------------------------------

    def cover(self, text: str, began_s: float, devices: Iterable[str], address: int | None = None) -> bool:
        """Whether an error with that text, of work that began then, is excused. `address` is what could not be accessed, if it says so.

        `devices` are the names of all.
        """
        if _crashed(text):
            return False
        named = named_in(text, devices)
        return self._harmed(named, began_s) or self._unreachable(text, began_s) or self._injected(text, began_s, address)

    def _harmed(self, named: Collection[str], began_s: float) -> bool:
        return any(harm.device in named and began_s <= harm.ended_s for harm in (*self._harms, *self._losses))

    def _unreachable(self, text: str, began_s: float) -> bool:
        way = _WAY.search(text)
        return way is not None and any(
            began_s <= outage.ended_s and any(fnmatchcase(end, outage.links) for end in way.groups()) for outage in self._outages.values()
        )

    def _injected(self, text: str, began_s: float, address: int | None) -> bool:
        return any(self._is_that(point, device, int(occurrence), began_s, address) for point, device, occurrence in _INJECTED.findall(text))

    def _is_that(self, point: str, device: str, occurrence: int, began_s: float, address: int | None) -> bool:
        """Whether the failure that an error names was injected, and could hit who asks."""
        where, at_s = self._failures.get((point, occurrence), (None, 0.0))
        if where is None or where.device != device or at_s < began_s or where.process in self._strangers:
            return False
        return address is None or not (where.process and where.pages) or where.address <= address < where.address_end


def named_in(text: str, devices: Iterable[str]) -> set[str]:
    """Those of `devices` that a text names."""
    return {device for device in devices if re.search(rf"\b{re.escape(device)}\b", text)}


def _crashed(text: str) -> bool:
    """Whether an error says, in the words of a session's `Failed`, that somebody's handler crashed."""
    return any(kind in _CRASHES for kind in _KIND.findall(text))
