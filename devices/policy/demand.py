"""Migrate on demand: a fault first grows to its aligned 64 KiB group, and the whole group moves.

nvidia-uvm does the same before it looks at density (its "64 K growth"): a group is what the device's page table maps in one large entry,
and one migration of sixteen pages costs little more than one of a single page. Neighbouring groups make one range, so a scan that
misses on a megabyte becomes one migration.

Refusals are not planned for here: pages that did not move are mapped where they are, as everywhere.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmmnet.pages import HUGE_PAGES, PAGE_SIZE, Words, distinct, runs_of

GROUP_PAGES = 16
"""64 KiB."""


class Demand:
    """Grow to 64 KiB, migrate."""

    def __init__(self, group_pages: int = GROUP_PAGES) -> None:
        self._group_pages = group_pages

    def ranges(self, pages: Words, write: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:  # noqa: ARG002 - a policy may tell reads from writes
        """See `Policy.ranges`."""
        size = self._group_pages
        return [(first * size, end * size) for first, end in runs_of(distinct(pages // np.uint64(size)))]


class DemandHuge(Demand):
    """Grow to 2 MiB: amdkfd's granularity unless a program asks for another, and the largest entry of most devices' page tables.

    Huge pages migrate whole then, as one entry.
    """

    page_bytes = HUGE_PAGES * PAGE_SIZE

    def __init__(self) -> None:
        super().__init__(HUGE_PAGES)
