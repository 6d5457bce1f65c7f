"""What moved in a test, and what was allowed to.

In strict mode every migration must have been declared, by `Migrations.allow` for the rest of the test or by `Migrations.allowed` for a
block; anything else fails the test when it is over, with page, direction and cause. An allowance says which addresses, where to, where
from, and why; what it leaves out is free.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

from hmmnet.errors import HmmnetError
from hmmnet.observe.events import CAUSES, Event, Moved
from hmmnet.pages import PAGES_MAX, Words, page_range, runs_of
from hmmnet.units import counted

from .story import shown_pages

SHOWN_MAX = 8
"""Unexpected migrations that the failure names one by one."""


@dataclass(frozen=True)
class Allowance:
    """Pages [start, end) may move from `source` to `to` (patterns of names) because of `cause`; `process` 0 means any."""

    start: int = 0
    end: int = PAGES_MAX
    to: str = "*"
    source: str = "*"
    cause: str = "*"
    process: int = 0

    def covers(self, event: Moved) -> npt.NDArray[np.bool_]:
        """Which pages of the event it allows to move."""
        fits = (
            self.process in (0, event.process)
            and fnmatchcase(event.target, self.to)
            and fnmatchcase(event.source, self.source)
            and fnmatchcase(event.cause, self.cause)
        )
        inside = (event.pages >= np.uint64(self.start)) & (event.pages < np.uint64(self.end))
        return inside & np.bool_(fits)


@dataclass
class Migrations:
    """The migrations of one test's machines. `strict`: what is not allowed fails the test."""

    strict: bool = False
    moved: list[Moved] = field(default_factory=list)
    """All so far, in order."""
    unexpected: list[tuple[Moved, Words]] = field(default_factory=list)
    """Those in strict mode that nothing allowed, with the pages in question."""
    _allowances: list[Allowance] = field(default_factory=list)

    def allow(
        self, address: int | None = None, length: int = 0, *, to: str = "*", source: str = "*", cause: str = "*", process: Any = None
    ) -> None:
        """From now on `length` bytes from `address` on (default: everything) may move.

        `to` and `source` are ``host``, a device's name or a pattern of names; `cause` one of `hmmnet.observe.events.CAUSES`; `process` a
        process of the machine (default: any). Raises HmmnetError.
        """
        self._allowances.append(_allowance(address, length, to, source, cause, process))

    @contextmanager
    def allowed(
        self, address: int | None = None, length: int = 0, *, to: str = "*", source: str = "*", cause: str = "*", process: Any = None
    ) -> Iterator[None]:
        """As `allow`, while the block runs."""
        allowance = _allowance(address, length, to, source, cause, process)
        self._allowances.append(allowance)
        try:
            yield
        finally:
            self._allowances.remove(allowance)

    def pages(self, *, to: str = "*", source: str = "*", cause: str = "*") -> int:
        """How many pages moved so; one that moved twice counts twice."""
        wanted = Allowance(to=to, source=source, cause=cause)
        return sum(int(wanted.covers(event).sum()) for event in self.moved)

    def hear(self, event: Event) -> None:
        """A host's event."""
        if not isinstance(event, Moved):
            return
        self.moved.append(event)
        if self.strict:
            expected = np.zeros(len(event.pages), np.bool_)
            for allowance in self._allowances:
                expected |= allowance.covers(event)
            if not expected.all():
                self.unexpected.append((event, event.pages[~expected]))

    def complaint(self) -> str:
        """What to say about unexpected migrations; empty when there are none."""
        if not self.unexpected:
            return ""
        total = sum(len(pages) for _, pages in self.unexpected)
        lines = [f"{counted(total, 'page')} moved that nothing allowed to (strict):"]
        for event, pages in self.unexpected[:SHOWN_MAX]:
            where = f"process {event.process}: {shown_pages(runs_of(pages))}: {event.source} -> {event.target}"
            lines.append(f'  {where} ({event.why}; cause "{event.cause}") at {1e3 * event.at_s:.6f} ms')
        if len(self.unexpected) > SHOWN_MAX:
            lines.append(f"  and {counted(len(self.unexpected) - SHOWN_MAX, 'migration')} more")
        lines.append("say what may move: migrations.allow(ADDRESS, LENGTH, to=...), or with migrations.allowed(...)")
        return "\n".join(lines)


def _allowance(address: int | None, length: int, to: str, source: str, cause: str, process: Any) -> Allowance:
    if cause != "*" and cause not in CAUSES:
        raise HmmnetError(f'pages never move because of "{cause}"; there are {", ".join(CAUSES)}')
    pid = 0 if process is None else int(getattr(process, "pid", process))
    if address is None:
        return Allowance(0, PAGES_MAX, to, source, cause, pid)
    if length <= 0:
        raise HmmnetError(f"an allowance of {length} bytes from 0x{address:x} on allows nothing; give its length in bytes")
    start, end = page_range(address, length)
    return Allowance(start, end, to, source, cause, pid)
