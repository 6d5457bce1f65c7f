"""The fault buffer of one context: what missed, in the order it missed, handed to the driver in batches.

Real GPUs write fault records into a ring in memory and raise an interrupt; the driver fetches up to 256 (nvidia-uvm's default), sorts them,
coalesces duplicates, services each group and then *replays*: the stalled accesses are tried again, and may fault again. Here an access that
misses enters one `Ticket` with all its pages. A batch takes pages from the oldest tickets; a ticket whose pages were all serviced
is *replayable*, and its access is tried again.

A full buffer is no error on hardware (the access stalls and faults later), nor here: what does not fit stays with its ticket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hmmnet.errors import HmmnetError
from hmmnet.pages import Words, is_ascending

BATCH_PAGES = 256
"""nvidia-uvm's uvm_perf_fault_batch_count."""


@dataclass(eq=False)
class Ticket:
    """The misses of one access: ascending `pages`, each once; `placement` names the policy that may move them."""

    pages: Words
    write: bool
    placement: str
    replay: Callable[[], None]
    """Called once, when every page was serviced or one turned out fatal."""
    fatal: dict[int, HmmnetError] = field(default_factory=dict)
    """Pages that cannot be had, and why."""
    fetched: int = 0
    serviced: int = 0
    group_count: int = 0
    group_s: float = 0.0
    fault_count: int = 0


@dataclass(frozen=True)
class Batch:
    """One service pass: ascending `pages`, each once, `write` for each, and the tickets they came from."""

    placement: str
    pages: Words
    write: npt.NDArray[np.bool_]
    parts: Sequence[tuple[Ticket, Words]]
    duplicates: int

    @property
    def leader(self) -> Ticket:
        """The oldest ticket, whose job the pass is counted for."""
        return self.parts[0][0]


class FaultBuffer:
    """Tickets in order of arrival."""

    def __init__(self) -> None:
        self.entries = BATCH_PAGES
        """Faults that fit: what does not stays with its ticket."""
        self._tickets: deque[Ticket] = deque()
        self._under_way: list[Ticket] = []

    def __len__(self) -> int:
        return len(self._tickets)

    def push(self, ticket: Ticket) -> None:
        """An access missed."""
        assert len(ticket.pages), "a ticket without a page would never be replayed"
        self._tickets.append(ticket)

    def withdraw(self, ticket: Ticket) -> None:
        """The access is given up (its job ended)."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)

    def fetch(self, limit: int = BATCH_PAGES) -> Batch | None:
        """The next batch: up to `limit` faults of the oldest tickets that share the oldest one's placement."""
        if not self._tickets:
            return None
        placement = self._tickets[0].placement
        parts: list[tuple[Ticket, Words]] = []
        room = limit
        for ticket in list(self._tickets):
            if ticket.placement != placement or room == 0:
                continue
            pages = ticket.pages[ticket.fetched : ticket.fetched + room]
            ticket.fetched += len(pages)
            room -= len(pages)
            parts.append((ticket, pages))
            if ticket.fetched == len(ticket.pages):
                self._tickets.remove(ticket)
        if len(parts) == 1 and is_ascending(parts[0][1]):
            (ticket, pages) = parts[0]
            return Batch(placement, pages, np.full(len(pages), ticket.write), parts, 0)
        pages = np.concatenate([part for _, part in parts])
        write = np.concatenate([np.full(len(part), ticket.write) for ticket, part in parts])
        distinct, places = np.unique(pages, return_inverse=True)
        wanted = np.zeros(len(distinct), dtype=np.bool_)
        wanted[places[write]] = True
        return Batch(placement, distinct, wanted, parts, len(pages) - len(distinct))

    def again(self, batch: Batch) -> None:
        """The replay of `batch` was lost: its accesses stall until they fault anew."""
        for ticket, pages in reversed(batch.parts):
            ticket.fetched -= len(pages)  # batches are served one after the other: it was the last to take from its tickets
            if ticket not in self._tickets:
                self._tickets.appendleft(ticket)

    def finish(self, batch: Batch, fatal: dict[int, HmmnetError]) -> None:
        """The pass over `batch` is over; `fatal` pages could not be had. Replays what is complete.

        A page that was asked for writing, because another ticket wanted that, may still be had for reading: its reader asks again.
        """
        written = set(batch.pages[batch.write].tolist()) if fatal else set()
        for ticket, pages in batch.parts:
            ticket.serviced += len(pages)
            if fatal:
                concerned = [page for page in pages.tolist() if page in fatal and (ticket.write or page not in written)]
                ticket.fatal.update({page: fatal[page] for page in concerned})
            if ticket.fatal or ticket.serviced == len(ticket.pages):
                self.withdraw(ticket)
                ticket.replay()
