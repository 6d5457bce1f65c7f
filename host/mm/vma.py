"""Virtual memory areas and the tree that holds them (mm/vma.c, mm/mmap.c).

A VMA is a range of pages with one set of rights. Changing the rights of a part splits it; neighbours that have become equal merge. Which
VMAs exist shows: mremap wants its range in one, test_hmm migrates one at a time. So the merge rules are the kernel's: equal
flags, consecutive `pgoff`, the same file, and *compatible anon_vma*: two areas that were each touched before they met stay apart.

The tree is two parallel sorted lists, looked up by bisection: with the numbers of VMAs that programs have, no tree in Python beats it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hmmnet.errors import KernelError
from hmmnet.pages import ADDRESS_BITS, HUGE_PAGES, PAGE_SHIFT

if TYPE_CHECKING:
    from .filemap import File
    from .userfault import UserFault

VM_READ = 1
VM_WRITE = 2
VM_EXEC = 4
VM_ACCESS = VM_READ | VM_WRITE | VM_EXEC
VM_SHARED = 8
VM_LOCKED = 1 << 4
VM_DONTCOPY = 1 << 5
VM_WIPEONFORK = 1 << 6
VM_HUGEPAGE = 1 << 7
VM_NOHUGEPAGE = 1 << 8
VM_HUGETLB = 1 << 9
VM_MIXEDMAP = 1 << 10
VM_PFNMAP = 1 << 11
VM_UFFD_MISSING = 1 << 12
VM_DAX = 1 << 13
VM_RAND_READ = 1 << 14
VM_SEQ_READ = 1 << 15
VM_MERGEABLE = 1 << 16
VM_SOFTDIRTY = 1 << 17
"""Mapped since soft-dirty was last cleared: all of it counts as written."""
VM_MAYBE_GUARD = 1 << 18
"""There may be guard pages (`guard.py`), which a child of fork has, too."""
VM_SPECIAL = VM_MIXEDMAP | VM_PFNMAP

EINVAL = 22
PROTECTIONS_TEXT = "use letters of 'rwx', or 'none'"
PAGES_TOP = (1 << (ADDRESS_BITS - PAGE_SHIFT)) - 1
"""One guard page below the end of user addresses (TASK_SIZE)."""
PAGES_BOTTOM = 16
"""vm.mmap_min_addr: 64 KiB."""


def protection_flags(protection: str, call: str = "mmap") -> int:
    """VM_* rights of ``rw r rx w none`` and the like. Raises KernelError(EINVAL), in the name of `call`."""
    if not isinstance(protection, str):
        raise KernelError(EINVAL, call, f"protection is {protection!r}; {PROTECTIONS_TEXT}")
    if protection == "none":
        return 0
    flags = 0
    for letter in protection:
        flags |= {"r": VM_READ, "w": VM_WRITE, "x": VM_EXEC}.get(letter, 1 << 30)
    if not flags or flags >> 30:
        raise KernelError(EINVAL, call, f"unknown protection {protection!r}; {PROTECTIONS_TEXT}")
    return flags


@dataclass(eq=False, slots=True)
class Vma:
    """Pages [start, end) with `flags`. `pgoff` is the page offset in the file, or for anonymous memory the page where it was first mapped.

    `anon` is the anon_vma: 0 until the first anonymous page is made here. `chain` are the anon_vmas of the VMAs that it descends from by
    fork: pages of those may be mapped here too, and a VMA that has some takes in no neighbour without an anon_vma (its anon_vma_chain is
    not singular). `file` is None for anonymous private memory.
    """

    start: int
    end: int
    flags: int
    pgoff: int
    anon: int = 0
    chain: tuple[int, ...] = ()
    file: File | None = None
    userfault: UserFault | None = None
    """Who hears of missing pages (VM_UFFD_MISSING)."""

    @property
    def is_anonymous(self) -> bool:
        """vma_is_anonymous: private memory without a file behind it."""
        return self.file is None

    @property
    def may_read(self) -> bool:
        """Whether the CPU may load: on x86 a right to write or execute includes it."""
        return self.flags & VM_ACCESS != 0

    def part(self, start: int, end: int) -> Vma:
        """A VMA like this one of pages [start, end), which lie in it: `dataclasses.replace` takes five times as long."""
        pgoff = self.pgoff + start - self.start
        return Vma(start, end, self.flags, pgoff, self.anon, self.chain, self.file, self.userfault)

    def merges_with(self, behind: Vma) -> bool:
        """Whether `behind`, which begins where this ends, can be one VMA with it."""
        return (
            self.end == behind.start
            and not (self.flags ^ behind.flags) & ~(VM_SOFTDIRTY | VM_MAYBE_GUARD)
            and self.file is behind.file
            and self.userfault is behind.userfault
            and self.pgoff + self.end - self.start == behind.pgoff
            and (self.anon == behind.anon or (not (self.anon and behind.anon) and not (self.chain or behind.chain)))
        )


class VmaTree:
    """The VMAs of one process, disjoint and in order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._vmas: list[Vma] = []
        self._last: Vma | None = None

    def __len__(self) -> int:
        return len(self._vmas)

    def all(self) -> list[Vma]:
        """Every VMA, in order."""
        return list(self._vmas)

    def each(self) -> Iterable[Vma]:
        """Every VMA, in order, for who changes none meanwhile."""
        return self._vmas

    def find(self, page: int) -> Vma | None:
        """The VMA that holds `page`."""
        last = self._last
        if last is not None and last.start <= page < last.end:
            return last
        i = bisect_right(self._starts, page) - 1
        if i >= 0 and page < self._vmas[i].end:
            self._last = self._vmas[i]
            return self._last
        return None

    def overlapping(self, start: int, end: int) -> list[Vma]:
        """The VMAs that touch [start, end), in order."""
        low, high = self._span(start, end)
        return self._vmas[low:high]

    def _span(self, start: int, end: int) -> tuple[int, int]:
        if start >= end:
            return 0, 0  # nothing overlaps an empty range, also inside a VMA
        low = bisect_right(self._starts, start) - 1
        if low < 0 or self._vmas[low].end <= start:
            low += 1
        return low, bisect_left(self._starts, end, lo=low)

    def covered_until(self, start: int, end: int) -> int:
        """The first page of [start, end) that no VMA holds, or `end`."""
        for vma in self.overlapping(start, end):
            if vma.start > start:
                return start
            start = vma.end
        return min(start, end)

    def add(self, vma: Vma) -> None:
        """Insert into free space, merging with neighbours."""
        i = bisect_left(self._starts, vma.start)
        self._splice(i, i, [vma])

    def remove(self, start: int, end: int) -> list[Vma]:
        """Take [start, end) out, splitting at its ends; the pieces that went."""
        return self._replace(start, end, lambda _: None)

    def update(self, start: int, end: int, change: Callable[[Vma], Vma]) -> None:
        """Replace each piece of a VMA in [start, end) by ``change(piece)``, then merge what has become equal."""
        self._replace(start, end, change)

    def _replace(self, start: int, end: int, change: Callable[[Vma], Vma | None]) -> list[Vma]:
        low, high = self._span(start, end)
        pieces: list[Vma] = []
        results: list[Vma] = []
        for vma in self._vmas[low:high]:
            before, piece, behind = split(vma, start, end)
            pieces.append(piece)
            results += [part for part in (before, change(piece), behind) if part is not None]
        self._splice(low, high, results)
        return pieces

    def _splice(self, low: int, high: int, vmas: list[Vma]) -> None:
        """Put `vmas` in the place of those at [low, high), merging along the seams."""
        self._last = None
        below, above = max(0, low - 1), min(len(self._vmas), high + 1)
        merged: list[Vma] = []
        for vma in self._vmas[below:low] + vmas + self._vmas[high:above]:
            if merged and merged[-1].merges_with(vma):
                first = merged[-1]
                merged[-1] = joined = first.part(first.start, first.end)
                joined.end, joined.flags, joined.anon = vma.end, first.flags | vma.flags, first.anon or vma.anon
            else:
                merged.append(vma)
        self._vmas[below:above] = merged
        self._starts[below:above] = [vma.start for vma in merged]

    def neighbour_anon(self, vma: Vma) -> int:
        """find_mergeable_anon_vma: the anon_vma of a neighbour that differs in access rights at most, else 0."""
        i = bisect_left(self._starts, vma.start)
        if i + 1 < len(self._vmas):
            behind = self._vmas[i + 1]
            if behind.anon and not behind.chain and _alike(vma, behind):
                return behind.anon
        if i > 0:
            before = self._vmas[i - 1]
            if before.anon and not before.chain and _alike(before, vma):
                return before.anon
        return 0

    def find_gap(self, count: int) -> int | None:
        """Where `count` pages fit, as high as can be (get_unmapped_area); whole huge pages are aligned to one."""
        align = HUGE_PAGES if count % HUGE_PAGES == 0 else 1
        top = PAGES_TOP
        for vma in reversed(self._vmas):
            start = (top - count) // align * align
            if start >= vma.end:
                return start
            top = vma.start
        start = (top - count) // align * align
        return start if start >= PAGES_BOTTOM else None


def _alike(left: Vma, right: Vma) -> bool:
    """anon_vma_compatible: whether the two would merge but for their access rights."""
    return replace(left, flags=left.flags | VM_ACCESS, anon=0).merges_with(replace(right, flags=right.flags | VM_ACCESS, anon=0))


def split(vma: Vma, start: int, end: int) -> tuple[Vma | None, Vma, Vma | None]:
    """`vma` in up to three: what lies before `start`, what lies in [start, end), what lies behind. The middle must not be empty."""
    low, high = max(start, vma.start), min(end, vma.end)
    before = vma.part(vma.start, low) if low > vma.start else None
    behind = vma.part(high, vma.end) if high < vma.end else None
    return before, vma.part(low, high), behind
