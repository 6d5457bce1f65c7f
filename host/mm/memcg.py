"""Memory cgroups (mm/memcontrol.c): how many pages groups of processes may have, wherever those pages live.

A page is *charged* to the group of the process that had it first, and stays charged there until it is freed: who else maps it (fork, a
shared file) pays nothing, and a page that migrates takes its charge along, to a device and home (mem_cgroup_migrate). So a group's usage
does not change when its pages move. The charge of a page is the number of its group in the upper half of the frame's `flags`, which go
where the page goes; a device's page that a migration makes out of nothing is charged as one of the host is. A slot of swap remembers the
group, which is charged again when the page is read back, by whomever (`swap.py`).

What a group's limit refuses is ENOMEM, as memory of the host that is used up is. The kernel would reclaim before, and end a process of
the group after; there is no reclaim here (a group is as with memory.swap.max of 0), and who gets ENOMEM decides: it may have the kernel
choose and end one (`oom.py`, `Machine.oom_kill`). Pages of hugetlb, and those that a driver inserts, are charged to nobody.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hmmnet.errors import HmmnetError
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE

CHARGE_SHIFT = 16
CHARGE_MASK = 0xFFFF << CHARGE_SHIFT
"""Where `flags` of a frame say to which group it is charged."""
GROUPS_MAX = 1024
NAME_LENGTH_MAX = 64


class MemoryCgroup:
    """One group; `limit_pages` is memory.max (None: no limit)."""

    def __init__(self, number: int, name: str, limit_pages: int | None) -> None:
        self.name = name
        self.limit_pages = limit_pages
        self.usage_pages = 0
        """memory.current."""
        self.peak_pages = 0
        """memory.peak."""
        self.refused = 0
        """Charges that did not fit (memory.events, max)."""
        self.charge_bits = number << CHARGE_SHIFT
        """What the `flags` of a frame carry that is charged here."""

    def try_charge(self, pages: int) -> bool:
        """Charge `pages` more, all or none."""
        if self.shortage(pages):
            self.refused += 1
            return False
        self.usage_pages += pages
        self.peak_pages = max(self.peak_pages, self.usage_pages)
        return True

    def shortage(self, pages: int) -> str:
        """Why `pages` more cannot be charged; empty when they can."""
        if self.limit_pages is None or self.usage_pages + pages <= self.limit_pages:
            return ""
        return f'memory cgroup "{self.name}" has {self.usage_pages} of the {self.limit_pages} that it may have'

    def charge_some(self, pages: int) -> int:
        """Charge as many of `pages` as fit; how many that is."""
        if self.limit_pages is not None and self.shortage(pages):
            self.refused += 1
            pages = max(0, self.limit_pages - self.usage_pages)
        self.try_charge(pages)
        return pages

    def uncharge(self, pages: int) -> None:
        """`pages` of the group are free."""
        self.usage_pages -= pages
        assert self.usage_pages >= 0, f"memory cgroup {self.name} gives back more pages than it has"

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "current_bytes": self.usage_pages << PAGE_SHIFT,
            "max_bytes": None if self.limit_pages is None else self.limit_pages << PAGE_SHIFT,
            "peak_bytes": self.peak_pages << PAGE_SHIFT,
            "refused": self.refused,
        }


class MemoryCgroups:
    """The groups of a machine."""

    def __init__(self) -> None:
        self._groups: list[MemoryCgroup] = []

    def create(self, name: str, limit_bytes: int | None) -> MemoryCgroup:
        """A new group; its limit is rounded down to whole pages. Raises HmmnetError for a name that is taken, or none, or a bad limit."""
        if not name or len(name) > NAME_LENGTH_MAX:
            raise HmmnetError(f"a memory cgroup needs a name of 1 to {NAME_LENGTH_MAX} characters, not {len(name)}")
        if any(group.name == name for group in self._groups):
            raise HmmnetError(f'there is a memory cgroup "{name}" already; take another name')
        if limit_bytes is not None and limit_bytes < 0:
            raise HmmnetError(f'the limit of memory cgroup "{name}" is {limit_bytes} bytes; it cannot be negative')
        if len(self._groups) == GROUPS_MAX:
            raise HmmnetError(f"a machine may have {GROUPS_MAX} memory cgroups")
        group = MemoryCgroup(len(self._groups) + 1, name, None if limit_bytes is None else limit_bytes // PAGE_SIZE)
        self._groups.append(group)
        return group

    def named(self, name: str) -> MemoryCgroup:
        """The group `name`. Raises HmmnetError."""
        for group in self._groups:
            if group.name == name:
                return group
        there = ", ".join(group.name for group in self._groups) or "none"
        raise HmmnetError(f'no memory cgroup is called "{name}"; there are: {there}')

    def charged_by(self, flags: int) -> MemoryCgroup | None:
        """The group that a frame with these `flags` is charged to."""
        number = flags >> CHARGE_SHIFT
        return self._groups[number - 1] if number else None

    def uncharge(self, flags: npt.NDArray[np.uint32] | np.uint32, each: int = 1) -> None:
        """Frames with these `flags` are freed; each stands for `each` pages."""
        if not self._groups:
            return
        numbers = np.atleast_1d(flags) >> np.uint32(CHARGE_SHIFT)
        for number, pages in enumerate(np.bincount(numbers).tolist()):
            if number and pages:
                self._groups[number - 1].uncharge(pages * each)

    @property
    def any(self) -> bool:
        """Whether there are groups."""
        return bool(self._groups)

    def charged(self) -> dict[int, int]:
        """Pages of each group that has any, by number."""
        return {number: group.usage_pages for number, group in enumerate(self._groups, 1) if group.usage_pages}

    def as_json(self) -> dict[str, Any]:
        """Plain data, by name."""
        return {group.name: group.as_json() for group in self._groups}
