"""What excuses an operation that was refused: only what its error names, and only what has happened.

Errors of this machine say why: which fault was injected at which point, which way has no links that work, which device was lost. So a
refusal is excused only

- by a failure that was injected at the point that the error names, on the device that it names (if the point concerns one): while the
  operation ran, for one migration brings pages for several that wait; or earlier, and then at most as often as it was injected there;
- by links that are down, where the error says so of one of their ends, and some were while the operation ran;
- by a harm to a device, while it lasts and in its aftermath, where the error names that device.

What crashed is excused by nothing, whatever else its error names: a peer's handler that ended with an exception of Python's own.

Nothing here knows what operations do; what it is told, `nemesis` says.
"""

from __future__ import annotations

import builtins
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

AFTERMATH_S = 8.0
"""Virtual seconds after a harm in which work may fail because of it: leases, patience, and repeats are over then."""
NEVER_S = float("inf")
EVERYBODY = ""
"""In place of a device's name: all of them, or none in particular."""
_POINTS = re.compile(r"a fault was injected at ((?:[\w.]+)(?: or [\w.]+)*)(?: of ([\w.-]+))?")
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
    """A device is harmed, or was; `EVERYBODY`: all of them."""

    device: str
    ended_s: float = NEVER_S


class Excuses:
    """See the module. Times are virtual seconds."""

    def __init__(self) -> None:
        self._failures: Counter[tuple[str, str]] = Counter()
        """Injected failures that nobody has been told of yet, by (point, device)."""
        self._failed_s: dict[tuple[str, str], float] = {}
        """When each of them was injected last."""
        self._outages: dict[int, Outage] = {}
        self._harms: list[Harm] = []

    # --- what happens ---------------------------------------------------------------------------------------------------------

    def failed(self, point: str, device: str, now_s: float) -> None:
        """A failure was injected at a protocol point."""
        self._failures[point, device] += 1
        self._failed_s[point, device] = now_s

    def outage_begins(self, number: int, links: str, now_s: float) -> None:
        """Fault `number` takes links down."""
        self._outages[number] = Outage(links, now_s)

    def outage_ends(self, number: int, now_s: float) -> None:
        """It has ended, if it was one."""
        if number in self._outages:
            self._outages[number].ended_s = now_s

    def harm_begins(self, device: str) -> Harm:
        """A device, or everybody, is harmed; for `harm_ends`."""
        self._harms.append(Harm(device))
        return self._harms[-1]

    def calm(self) -> None:
        """All is healed and well again: what was before excuses nothing any more."""
        self._failures.clear()
        self._failed_s.clear()
        self._outages.clear()
        self._harms.clear()

    # --- who asks -------------------------------------------------------------------------------------------------------------

    def cover(self, text: str, began_s: float, devices: Iterable[str]) -> bool:
        """Whether an error with that text, of work that began then, is excused; a failure that it names counts once.

        `devices` are the names of all.
        """
        if _crashed(text):
            return False
        named = {device for device in devices if re.search(rf"\b{re.escape(device)}\b", text)}
        return self._harmed(named, began_s) or self._unreachable(text, began_s) or self._injected(text, named, began_s)

    def _harmed(self, named: set[str], began_s: float) -> bool:
        return any((harm.device in named or harm.device == EVERYBODY) and began_s < harm.ended_s + AFTERMATH_S for harm in self._harms)

    def _unreachable(self, text: str, began_s: float) -> bool:
        way = _WAY.search(text)
        return way is not None and any(
            began_s <= outage.ended_s and any(fnmatchcase(end, outage.links) for end in way.groups()) for outage in self._outages.values()
        )

    def _injected(self, text: str, named: set[str], began_s: float) -> bool:
        for points, device in _POINTS.findall(text):
            fits = {device} if device else {EVERYBODY, *named}
            for key, left in self._failures.items():
                if key[0] in points.split(" or ") and key[1] in fits and (left or self._failed_s[key] >= began_s):
                    self._failures[key] = max(0, left - 1)
                    return True
        return False


def _crashed(text: str) -> bool:
    """Whether an error says, in the words of a session's `Failed`, that somebody's handler crashed."""
    return any(kind in _CRASHES for kind in _KIND.findall(text))
