"""The state of one address space, without anything that waits: what mm_struct is in the kernel.

`Mm` holds the VMAs, the page table and the counters; `fault.py`, `walk.py`, `collect.py` and `rmap.py` work on it, `space.py` adds locks
and notifications around them. A *family* is a process with everything it forked: those can share anonymous pages.
"""

from __future__ import annotations

from collections.abc import Callable

from hmmnet.errors import KernelError, OutOfMemory, SegmentationFault
from hmmnet.pages import PAGE_SHIFT, Words
from hmmnet.pagetable import PageTable

from . import pte
from .frames import PhysicalMemory
from .memcg import MemoryCgroup
from .vma import VM_PFNMAP, VM_READ, VM_WRITE, Vma, VmaTree

MARKED = {
    pte.MARKER_UFFD_WP: "is write-protected by a userfaultfd",
    pte.MARKER_POISON: "is poisoned",
    pte.MARKER_GUARD: "is a guard page",
}

ENOMEM = 12


def _nobody_waits() -> None:
    """Nobody waits for migration entries yet."""


def in_words(pages: Words) -> str:
    """`pages` (ascending) in a message."""
    return f"page 0x{int(pages[0]):x}" if len(pages) == 1 else f"{len(pages)} pages from 0x{int(pages[0]):x} to 0x{int(pages[-1]):x}"


class Mm:
    """Process `number`'s memory. `family` is the number of the process that it descends from by fork (its own when none)."""

    def __init__(self, number: int, memory: PhysicalMemory, family: int = 0) -> None:
        self.number = number
        self.memory = memory
        self.family = family or number
        self.node = 0
        """The host memory that new pages come from while it has room (numactl --preferred); a child inherits it."""
        self.cgroup: MemoryCgroup | None = None
        """To which memory cgroup its new pages are charged; a child inherits it."""
        self.vmas = VmaTree()
        self.table = PageTable(pte.FRAME_SHIFT, pte.SPECIAL, self._unfolded)
        """The page table: virtual page -> entry (`pte`); one for a block that is mapped as one (`huge.py`)."""
        self.small_blocks: set[int] = set()
        """Aligned blocks in mappings for huge pages that have a page table of their own: no huge page comes there any more."""
        self.rss = 0
        """Pages mapped, wherever they live; those on a device count too, the zero page does not."""
        self.oom_score_adj = 0
        """How much more, or less, it is worth killing than it has memory (`oom.py`); a child inherits it."""
        self.unstable = False
        """MMF_UNSTABLE: the OOM reaper has been here, so what is missing must not be made anew."""
        self.migration_ended: Callable[[], None] = _nobody_waits
        """Called whenever migration entries of this process have been replaced: who waits on one looks again."""
        memory.families.setdefault(self.family, []).append(self)

    def _unfolded(self, entry: int) -> None:
        """A huge page has 512 entries now instead of `entry`: so have its frames states of their own."""
        if not entry & pte.SPECIAL:
            self.memory.unfold(entry >> pte.FRAME_SHIFT)

    def close(self) -> None:
        """The process is gone: the reverse map forgets it."""
        members = self.memory.families[self.family]
        members.remove(self)
        if not members:
            self.memory.forget_family(self.family)

    def out_of_memory(self, call: str, pages: Words) -> KernelError:
        """What a call fails with that wanted memory for `pages`: OutOfMemory from the host, or what its group's limit says."""
        wants = f"process {self.number} wants {in_words(pages)} and"
        why = "" if self.cgroup is None else self.cgroup.shortage(len(pages))
        if why:
            return KernelError(ENOMEM, call, f"{wants} {why}")
        return OutOfMemory(ENOMEM, call, f"{wants} the host's memory is used up", len(pages))

    def anon_prepare(self, vma: Vma) -> None:
        """anon_vma_prepare: the VMA gets its anon_vma, a neighbour's if that will do."""
        if not vma.anon:
            vma.anon = self.vmas.neighbour_anon(vma)
            if not vma.anon:
                vma.anon = self.memory.new_anon_vma(self.family)

    def anon_index(self, vma: Vma, pages: Words) -> Words:
        """Under which index anonymous pages of `vma` are known to the reverse map; prepares its anon_vma."""
        self.anon_prepare(vma)
        return pages if vma.pgoff == vma.start else pages - vma.start + vma.pgoff

    def check_access(self, page: int, write: bool) -> Vma:
        """The VMA of `page` if the CPU may load (or store) there. Raises SegmentationFault."""
        vma = self.vmas.find(page)
        if vma is None or not vma.may_read or (write and not vma.flags & VM_WRITE):
            raise SegmentationFault(page << PAGE_SHIFT, self.refusal(page, write=write))
        return vma

    def refusal(self, page: int, *, write: bool) -> str:
        """Why nobody, CPU or device, gets at `page` (for a `write`): what its VMA or its entry has against it."""
        return f"page 0x{page:x} of process {self.number} {self._against(page, write=write)}"

    def _against(self, page: int, *, write: bool) -> str:
        vma = self.vmas.find(page)
        if vma is None:
            return "is not mapped"
        if not vma.may_read:
            return "is mapped with PROT_NONE"
        if write and not vma.flags & VM_WRITE:
            return "is mapped without the right to write"
        if vma.flags & VM_PFNMAP:
            return "is a driver's, without a struct page (VM_PFNMAP)"
        entry = self.table.get(page)
        if entry & pte.KIND == pte.MARKER:
            return MARKED[entry >> pte.FRAME_SHIFT]
        if not vma.flags & VM_READ:
            return "is mapped without the right to read"
        return "cannot be had"
