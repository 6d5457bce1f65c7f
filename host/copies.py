"""Whether the copies to and from a device go on.

A device whose copy engine hangs is alive otherwise: its heart beats, it acknowledges invalidations. Whoever waits for a page that it is to
bring, a CPU as well, would wait for ever. So who owns the link looks at every heartbeat which copies have moved; a driver resets such a
device (a GPU's timeout detection and recovery).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

COPY_S = 5.0
"""Seconds in which a copy that is under way has to go on, beside what a chunk takes on its links: real ones, and emulated ones."""
NEW = -1.0


@dataclass(slots=True)
class _Copy:
    """One that comes in chunks."""

    moved: Callable[[], int | None]
    """How much of it there is; None: nothing is waited for, or links are down."""
    chunk_s: Callable[[], float]
    """Emulated seconds that a chunk takes."""
    last: int | None = None
    since_s: float = 0.0


class Copies:
    """Those of one device."""

    def __init__(self) -> None:
        self.answers: dict[Hashable, float] = {}
        """What comes with an answer, or waits for one: since when somebody has seen it wait (`NEW`: nobody has yet)."""
        self._streams: dict[int, _Copy] = {}

    @contextmanager
    def asked(self, answer: Hashable) -> Iterator[None]:
        """An answer is waited for, while the block runs."""
        self.answers[answer] = NEW
        try:
            yield
        finally:
            del self.answers[answer]

    @contextmanager
    def under_way(self, stream: int, moved: Callable[[], int | None], chunk_s: Callable[[], float]) -> Iterator[None]:
        """A stream, while the block runs. `chunk_s`: emulated seconds that a chunk takes on its links now."""
        self._streams[stream] = _Copy(moved, chunk_s)
        try:
            yield
        finally:
            del self._streams[stream]

    def hang(self, now_s: float, emulated: Callable[[float], float], limit_s: float, *, stalled: bool) -> bool:
        """Whether one has not moved for `limit_s`. `emulated`: what emulated seconds are here; `stalled`: we have not looked in time."""
        hangs = False
        for answer, since_s in self.answers.items():
            if since_s == NEW or stalled:
                self.answers[answer] = now_s
            else:
                hangs = hangs or now_s - since_s > limit_s
        for copy in self._streams.values():
            moved = copy.moved()
            if stalled or moved is None or moved != copy.last:
                copy.last, copy.since_s = moved, now_s
            else:
                hangs = hangs or now_s - copy.since_s > limit_s + 2 * emulated(copy.chunk_s())
        return hangs
