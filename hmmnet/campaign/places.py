"""Where something can be broken, and by what: every protocol point with what can be done there, every message with what can happen to it.

What does not apply, for a reason of principle, is named here with the reason; a sweep tries everything else, and the table in COVERAGE.md
has a cell for each. A message's place is its type, a session's frame that carries none (`BEAT`, `BYE` ...), or one way of the bulk channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from hmmnet.faults import Controls, MessageFault, Plan, Way
from hmmnet.faults.network import BULK_WAYS
from hmmnet.faults.points import POINTS
from hmmnet.wire.exchange import LEASE_S

from .program import Harm, Hit, Program
from .words import DEATH, FREEZE, places

SECONDS = {"delay": 0.005, "pause": 0.2, FREEZE: LEASE_S + 1.0}
LATE_S = 0.01
DOWN_S = 0.001
NOT_APPLICABLE: dict[tuple[str, str], str] = {
    ("*", "call"): "no fault, but a function of a test",
    ("Rate", "*"): "tells a device how fast emulated time runs beside the wall's: in virtual time there is no wall",
    ("Inject", "*"): "tells a device's process of faults: in virtual time one injector serves host and devices",
    ("Call", "*"): "is between a program and the host, and no device: programs are inside a simulated host",
    ("Recall", "*"): "as Call",
    ("Result", "*"): "as Call",
    ("ShowMirror", "*"): "asks a device's process for its mirror, to check it: whoever checks a simulated machine looks at it",
    ("MirrorShown", "*"): "as ShowMirror",
    ("Unsubscribe", "*"): "is for drivers that give up one range and go on: those here end whole contexts (CloseContext)",
}
"""(place, fault) to the reason; a ``*`` is any."""


@dataclass(frozen=True)
class Pair:
    """A place and a fault. `kind` is ``point`` or ``message``."""

    kind: str
    place: str
    fault: str

    @property
    def action(self) -> str:
        """What happens at a point, in the words of points: a freeze is a hang."""
        return "hang" if self.fault == FREEZE else self.fault

    def program(self, base: Program, nth: int) -> Program:
        """`base` with the fault at the `nth` time."""
        if self.kind == "point":
            hit = Hit(self.place, self.action, nth=nth, seconds=SECONDS.get(self.fault, 0.0))
            return msgspec.structs.replace(base, hits=(*base.hits, hit))
        if self.fault == DEATH:
            return msgspec.structs.replace(base, harms=(*base.harms, Harm(nth, "message", seconds=DOWN_S, message=self.place)))
        return msgspec.structs.replace(base, faults=(*base.faults, Plan([self._message_fault(nth)]).as_toml()))

    def _message_fault(self, nth: int) -> MessageFault:
        latency_s = LATE_S if self.fault in {"delay", "reorder"} else 0.0
        if self.place in BULK_WAYS:
            inwards = self.place == BULK_WAYS[True]
            return MessageFault(self.fault, Way("*", inwards, not inwards, "bulk"), Controls(nth=nth), latency_s)
        return MessageFault(self.fault, Way(channel="control"), Controls(nth=nth), latency_s, message=self.place)


def reason(place: str, fault: str) -> str:
    """Why that does not apply there; empty when it does."""
    return next((NOT_APPLICABLE[key] for key in ((place, fault), (place, "*"), ("*", fault)) if key in NOT_APPLICABLE), "")


def pairs() -> list[Pair]:
    """Every pair that there can be."""
    return [
        Pair("point" if place in POINTS else "message", place, fault)
        for place, faults in places().items()
        for fault in faults
        if not reason(place, fault)
    ]
