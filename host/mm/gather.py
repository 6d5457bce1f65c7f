"""mmu_gather: frames that a change of a page table set free go back when the mirrors of that range have let go of it, not sooner.

Today mirrors let go before the page table changes, and nothing has to be gathered. Under v25 they hear of a change at its end, so that
between start and end a device may still reach, by a translation that it has not dropped yet, what was mapped there. It must find the same
frame, nobody's, and not one that is somebody else's by then.

Every change in progress has a *ticket*. What becomes free meanwhile is put in a queue with the number of the newest ticket, and leaves the
queue when no change with that ticket or an older one is in progress any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from hmmnet.pages import Words


class Gather:
    """What is free, and not yet to be used again."""

    def __init__(self) -> None:
        self._newest = 0
        self._open: dict[int, None] = {}
        """Tickets of changes in progress, oldest first."""
        self._held: deque[tuple[int, Callable[[], None]]] = deque()

    @property
    def holds(self) -> bool:
        """Whether what becomes free now has to wait."""
        return bool(self._open)

    @property
    def waiting(self) -> int:
        """Releases that wait."""
        return len(self._held)

    def begin(self) -> int:
        """A change begins; its ticket."""
        self._newest += 1
        self._open[self._newest] = None
        return self._newest

    def end(self, ticket: int) -> None:
        """That change is over and nobody reaches what it dropped: release what waited for it."""
        del self._open[ticket]
        oldest = next(iter(self._open), self._newest + 1)
        while self._held and self._held[0][0] < oldest:
            self._held.popleft()[1]()

    def hold(self, release: Callable[[], None]) -> None:
        """Call `release` when all changes that are in progress now are over."""
        self._held.append((self._newest, release))

    def late(self, free: Callable[[Words], None]) -> Callable[[Words], None]:
        """`free`, called when it may be."""

        def freed(frames: Words) -> None:
            if self._open:
                self.hold(lambda: free(frames))
            else:
                free(frames)

        return freed
