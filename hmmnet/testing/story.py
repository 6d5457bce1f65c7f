"""What happened on a machine, told in a few lines: the end of the report of a failing test."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hmmnet.faults import FAULTS
from hmmnet.observe.events import DeviceChanged, Event, Invalidated, Moved, Refused
from hmmnet.pages import runs_of
from hmmnet.units import counted

LINES_KEPT = 1000
"""Lines of one test that are kept, the last ones, and as many on both sides of the first that is marked; fewer are shown."""
RUNS_SHOWN = 4
"""Page ranges of one event that are named."""


@dataclass
class Line:
    """What happened first at `at_s`, `times` times since; `text` tells the first."""

    at_s: float
    text: str
    number: int
    """Of the line, from 0 on."""
    marked: bool = False
    times: int = 1

    def __str__(self) -> str:
        again = f" (and {counted(self.times - 1, 'time')} more like it)" if self.times > 1 else ""
        mark = MARK if self.marked else ""
        return f"{1e3 * self.at_s:>11.6f} ms  {mark}{self.text}{again}"


MARK = "NOT ALLOWED: "
"""Before what must not have happened."""


@dataclass
class Story:
    """The last events, and those around the first that is marked. Equal ones in a row, of the same pages, are told once."""

    lines: deque[Line] = field(default_factory=lambda: deque(maxlen=LINES_KEPT))
    around: list[Line] = field(default_factory=list)
    """From before the first marked line on; empty while there is none."""
    count: int = 0
    """Lines so far, with those that are not kept any more."""
    _like: tuple[object, ...] = ()
    """What the last line tells: another event that is equal is told with it."""

    def hear(self, event: Event, *, marked: bool = False) -> None:
        """A host's event; one that must not be is `marked`."""
        self._add(event.at_s, told(event), _kind(event), marked=marked)

    def fault(self, at_s: float, what: str) -> None:
        """A fault was injected, in the words of the trace."""
        self._add(at_s, told_fault(what), ("fault", what))

    def note(self, at_s: float, text: str) -> None:
        """Something else happened."""
        self._add(at_s, text, ())

    def _add(self, at_s: float, text: str, like: tuple[object, ...], *, marked: bool = False) -> None:
        if like and self._like == like and self.lines[-1].marked == marked:
            self.lines[-1].times += 1
            return
        line = Line(at_s, text, self.count, marked)
        self._like = like
        if marked and not self.around:
            self.around = list(self.lines)
            self.around.append(line)
        elif self.around and len(self.around) < 2 * LINES_KEPT:
            self.around.append(line)
        self.lines.append(line)
        self.count += 1

    def shown(self, most: int, *, marked: bool = False) -> list[str]:
        """The last `most` lines, each with its time; with `marked` those around the first that is marked, and others that are. Words stand
        for what is left out. Nothing for 0.
        """
        if most <= 0:
            return []
        lines = _chosen(self.around, most) if marked and self.around else list(self.lines)[-most:]
        out: list[str] = []
        due = 0
        for line in lines:
            if line.number > due:
                out.append(_left_out(line.number - due, "between" if due else "before"))
            out.append(str(line))
            due = line.number + 1
        return [*out, _left_out(self.count - due, "after")] if due < self.count else out


def _chosen(lines: list[Line], most: int) -> list[Line]:
    """Up to `most` lines: half of them at most are marked ones, apart; the others lie around the first of those, most before it."""
    marked = [i for i, line in enumerate(lines) if line.marked]
    first, further = marked[0], marked[1 : 1 + most // 2]
    near = most - len(further)
    begin = max(0, first - (2 * near) // 3)
    return [lines[i] for i in sorted({*range(begin, min(begin + near, len(lines))), *further})]


def _left_out(events: int, where: str) -> str:
    return f"{'...':>14}  {counted(events, 'event')} {where}"


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
    if len(words) == 5 and words[1] in FAULTS and words[3] in ("control", "bulk"):  # points have such words, too
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
    """Events of one kind and of the same pages, in a row, are one line."""
    if isinstance(event, Moved):
        return ("moved", event.process, event.pages.tobytes(), event.source, event.target, event.cause)
    if isinstance(event, Invalidated):
        return ("invalidated", event.process, event.start, event.end, event.event, event.told)
    return ()
