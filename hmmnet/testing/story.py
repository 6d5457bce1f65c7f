"""What happened on a machine, told in a few lines: the end of the report of a failing test."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hmmnet.faults import FAULTS
from hmmnet.observe.events import DeviceChanged, Event, Invalidated, Moved, Refused
from hmmnet.pages import runs_of
from hmmnet.units import counted

LINES_KEPT = 1000
"""Lines of one test that are kept; fewer are shown."""
RUNS_SHOWN = 4
"""Page ranges of one event that are named."""


@dataclass
class Line:
    """What happened first at `at_s`, `times` times since; `text` tells the first."""

    at_s: float
    text: str
    like: tuple[object, ...] = ()
    times: int = 1


@dataclass
class Story:
    """The last events. Equal ones in a row are told once."""

    lines: deque[Line] = field(default_factory=lambda: deque(maxlen=LINES_KEPT))
    count: int = 0
    """Lines so far, with those that are not kept any more."""

    def hear(self, event: Event) -> None:
        """A host's event."""
        self._add(event.at_s, told(event), _kind(event))

    def fault(self, at_s: float, what: str) -> None:
        """A fault was injected, in the words of the trace."""
        self._add(at_s, told_fault(what), ("fault", what))

    def note(self, at_s: float, text: str) -> None:
        """Something else happened."""
        self._add(at_s, text, ())

    def _add(self, at_s: float, text: str, like: tuple[object, ...]) -> None:
        last = self.lines[-1] if self.lines else None
        if last is not None and like and last.like == like:
            last.times += 1
            return
        self.lines.append(Line(at_s, text, like))
        self.count += 1

    def shown(self, most: int) -> list[str]:
        """The last `most` lines, each with its time, behind a word about those before; nothing for 0."""
        if most <= 0:
            return []
        lines = list(self.lines)[-most:]
        before = self.count - len(lines)
        out = [f"{'...':>14}  {counted(before, 'event')} before"] if before else []
        for line in lines:
            again = f" (and {counted(line.times - 1, 'time')} more like it)" if line.times > 1 else ""
            out.append(f"{1e3 * line.at_s:>11.6f} ms  {line.text}{again}")
        return out


def told(event: Event) -> str:
    """An event in words."""
    if isinstance(event, Moved):
        return f"process {event.process}: {shown_pages(runs_of(event.pages))}: {event.source} -> {event.target} ({event.why})"
    if isinstance(event, Invalidated):
        mirrors = counted(event.told, "mirror")
        return f"process {event.process}: {shown_pages([(event.start, event.end)])}: {mirrors} told to drop it ({event.event})"
    if isinstance(event, DeviceChanged):
        return f"{event.device} is {event.state}" + (f": {event.how}" if event.how else "")
    assert isinstance(event, Refused)
    return f"{event.device} was refused an access: {event.why}"


def told_fault(what: str) -> str:
    """A fault of the trace in words: ``fault loss gpu0 control in``, or whatever stands behind ``fault``."""
    words = what.split()
    if len(words) == 5 and words[1] in FAULTS:
        _, kind, device, channel, way = words
        return f"fault: a {channel} message {'to' if way == 'in' else 'from'} {device}: {FAULTS[kind]} ({kind})"
    return f"fault: {' '.join(words[1:])}"


def shown_pages(runs: list[tuple[int, int]]) -> str:
    """Page ranges by number, and how many pages that is."""
    named = ", ".join(f"0x{start:x}" if end - start == 1 else f"0x{start:x}-0x{end - 1:x}" for start, end in runs[:RUNS_SHOWN])
    more = f" and {counted(len(runs) - RUNS_SHOWN, 'range')} more" if len(runs) > RUNS_SHOWN else ""
    count = sum(end - start for start, end in runs)
    return f"page {named}" if count == 1 else f"pages {named}{more} ({count})"


def _kind(event: Event) -> tuple[object, ...]:
    """Events of one kind in a row are one line."""
    if isinstance(event, Moved):
        return ("moved", event.process, event.source, event.target, event.cause)
    if isinstance(event, Invalidated):
        return ("invalidated", event.process, event.event, event.told)
    return ()
