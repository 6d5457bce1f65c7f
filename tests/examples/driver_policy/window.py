"""A driver's policy: read ahead of a job that goes through memory in order, never beyond the 2 MiB block it is in.

`FirstWindow` is how it was written first. It has a bug that its author's tests did not find; README.md tells how seeds found it.
"""

from __future__ import annotations

from typing import Any

GROUP_PAGES = 16
"""64 KiB: what the device maps in one entry."""
BLOCK_PAGES = 512
"""2 MiB: what lies behind its end belongs to somebody else."""
WINDOW_PAGES_MAX = 256
"""1 MiB is read ahead at most."""


class Window:
    """Faults grow to whole groups; where one follows where the last ended, twice as much as last time is read ahead, up to 1 MiB."""

    def __init__(self) -> None:
        self._expected = -1
        """Where the next fault of the same stream would be."""
        self._window_pages = 0

    def ranges(self, pages: Any, write: Any) -> list[tuple[int, int]]:
        """See `hmmnet.devices.policy.Policy.ranges`."""
        start = int(pages[0]) // GROUP_PAGES * GROUP_PAGES
        end = (int(pages[-1]) // GROUP_PAGES + 1) * GROUP_PAGES
        if start == self._expected:
            self._window_pages = min(max(GROUP_PAGES, 2 * self._window_pages), WINDOW_PAGES_MAX)
        else:
            self._window_pages = 0
        self._expected = min(end + self._window_pages, self.block_end(end))
        return [(start, self._expected)]

    def block_end(self, end: int) -> int:
        """The end of the block that the pages before `end` lie in."""
        return ((end - 1) // BLOCK_PAGES + 1) * BLOCK_PAGES


class FirstWindow(Window):
    """The first version."""

    def block_end(self, end: int) -> int:
        """The end of the block that `end` lies in. That is the *next* one for faults that reach exactly up to a block's end."""
        return (end // BLOCK_PAGES + 1) * BLOCK_PAGES
