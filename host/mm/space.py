"""A process's address space: CPU loads and stores (`access.py`), system calls (`syscalls.py`), and here what HMM asks of it.

The work is done by synchronous code on `Mm` (`fault.py`, `walk.py`, `collect.py`); these three files decide what has to be held and who has
to be told around it, in the order that `locks.py` lays down. HMM's methods are synchronous, so each is atomic.
"""

from __future__ import annotations

import errno

import numpy as np
import numpy.typing as npt
import trio

from hmmnet.errors import KernelError
from hmmnet.host.interfaces import NOBODY, Event, Migration, Select, Told, Walk
from hmmnet.pages import HUGE_PAGES, HUGE_SHIFT, MIGRATE_PFN_SHIFT, PAGE_SHIFT, ZONE_SHIFT, Words, any_of, zone_of
from hmmnet.program import Mapping, Residency

from . import collect as migration_steps
from . import few, pmd, pte, views
from .advice import Advice
from .compound import split_under_way
from .fault import hint, restore_exclusive
from .faulting import Notifier
from .finalize import finalize
from .fork import copy_entries, inherit, needs_copy
from .huge import Large, large
from .mm import Mm
from .vma import VM_ACCESS, VM_DAX, VM_HUGETLB, VM_READ, VM_SPECIAL, Vma
from .walk import walk
from .zones import ANON, LOCKED


class Space(Advice):
    """The whole address space of a process (implements `interfaces.AddressSpace`)."""

    # --- fork ---------------------------------------------------------------------------------------------------------------------

    async def fork(self, number: int, hub: Notifier) -> Space:
        """dup_mmap: a child, `number`, with its own `hub`, that shares every page with this process until one of them stores.

        Exclusive access of devices ends first (h26). Raises KernelError(ENOMEM); then there is no child.
        """
        child = Space(number, self.memory, hub, self.home, self.mm.family)
        child.mm.node, child.mm.cgroup, child.mm.oom_score_adj = self.mm.node, self.mm.cgroup, self.mm.oom_score_adj
        child.mm.small_blocks = set(self.mm.small_blocks)
        async with self.mmap_lock.write():
            try:
                for vma in self.mm.vmas.all():
                    if vma.file is None:
                        inherited = inherit(child.mm, vma)
                    else:
                        async with vma.file.mapping.read():
                            inherited = inherit(child.mm, vma)
                            if inherited is not None:
                                vma.file.mapped_by(child)
                    if inherited is not None and needs_copy(vma):
                        async with self.at_rest(Event.PROTECTION_PAGE, vma.start, vma.end):
                            restore_exclusive(self.mm, self.mm.table.ptes.occupied(vma.start, vma.end))
                            copy_entries(self.mm, child.mm, vma)
            except BaseException:  # cancelled, too: half a child would hold on to pages for ever
                with trio.CancelScope(shield=True):
                    await child.exit()
                raise
        return child

    # --- NUMA balancing -----------------------------------------------------------------------------------------------------------

    async def numa_hints(self, start: int, end: int) -> int:
        """task_numa_work on pages [start, end): the next access to each present one faults, so that it is known; how many those are.

        Pages of devices take no part, nor do huge ones and mappings without access.
        """
        hinted = 0
        async with self.mmap_lock.read():
            for vma in self.mm.vmas.overlapping(start, end):
                if not vma.flags & VM_ACCESS or vma.flags & (VM_SPECIAL | VM_HUGETLB):
                    continue
                low, high = max(start, vma.start), min(end, vma.end)
                async with self.hub.invalidate(Event.PROTECTION_VMA, low, high):
                    hinted += hint(self.mm, low, high)
        return hinted

    # --- HMM ----------------------------------------------------------------------------------------------------------------------

    def vma_at(self, page: int) -> Vma | None:
        """The VMA of `page`."""
        return self.mm.vmas.find(page)

    def vma_end(self, page: int) -> int:
        """The end of the VMA that holds `page`; `page` itself when none does."""
        vma = self.mm.vmas.find(page)
        return page if vma is None else vma.end

    @property
    def node(self) -> int:
        """See `Mm.node`."""
        return self.mm.node

    def zone_at(self, page: int) -> int:
        """The zone that the entry of `page` leads to (0 for an empty one, too)."""
        return self.mm.table.get(page) >> pte.FRAME_SHIFT + ZONE_SHIFT

    def vmas(self, start: int, end: int) -> list[Vma]:
        """The VMAs that touch [start, end), in order."""
        return self.mm.vmas.overlapping(start, end)

    def walk(self, start: int, end: int, inputs: Words | None, default_flags: int, flags_mask: int, owner: int) -> Walk:
        """Table A3 for [start, end): no faulting, no waiting. Needs the mmap lock for reading."""
        assert self.mmap_lock.held, "walk without the mmap lock"
        return walk(self.mm, start, end, inputs, default_flags, flags_mask, owner)

    def entry(self, page: int) -> int:
        """The entry of one page."""
        return self.mm.table.get(page)

    def entries(self, pages: Words) -> Words:
        """The entries of `pages`."""
        return self.mm.table.gather(pages)

    def check_migratable(self, start: int, end: int, fault_frame: int | None = None) -> None:
        """The argument checks of migrate_vma_setup; [start, end) must lie in one suitable VMA. Raises KernelError(EINVAL).

        `fault_frame`: the page that a CPU fault has locked, if this is for one; it must be device-private, and locked.
        That the driver also refuses a VMA without read right is test_hmm's own check, made here because every driver does it.
        """
        why = self.unmigratable(start, end)
        if not why and fault_frame is not None:
            zone = self.memory.zones.get(zone_of(fault_frame))
            frame = np.array([fault_frame], np.uint64)
            if zone is None or zone.kind != "private" or not self.memory.bits_in_any(frame, "flags") & LOCKED:
                why = f"the faulting page, frame 0x{fault_frame:x}, is not memory of a device that the CPU cannot reach, or not locked"
        if why:
            raise KernelError(errno.EINVAL, "migrate_vma_setup", f"pages [0x{start:x}, 0x{end:x}) of process {self.number}: {why}")

    def unmigratable(self, start: int, end: int) -> str:
        """Why [start, end) is no range that migrate_vma_setup takes, with the mapping that is in the way; empty if it is one."""
        vma = self.mm.vmas.find(start)
        if end <= start:
            return "is empty"
        if vma is None:
            return "is not mapped"
        there = f"[0x{vma.start << PAGE_SHIFT:x}, 0x{vma.end << PAGE_SHIFT:x})"
        if end > vma.end:
            return f"leaves the mapping {there}"
        if not vma.flags & VM_READ:
            return f"lies in the mapping {there}, which is not readable"
        if vma.flags & (VM_SPECIAL | VM_HUGETLB | VM_DAX):
            return f"lies in the mapping {there}, which is of a kind that does not migrate"
        return ""

    def large(self, pages: Words, *, compound: bool = False, parts_stay: bool = False) -> list[Large]:
        """See `huge.large`."""
        return large(self.mm, pages, compound=compound, parts_stay=parts_stay)

    def collect(self, pages: Words, select: Select, owner: int, fault_frame: int | None = None, told: Told = NOBODY) -> Migration:
        """migrate_vma_collect and migrate_vma_unmap (A4): `pages` ascend, in VMAs that `check_migratable` passed.

        The mirrors of this process have been told, and further ones of what `told` says (see `sharers`).
        """
        assert self.mmap_lock.held, "collect without the mmap lock"
        return migration_steps.collect(self.mm, pages, select, owner, fault_frame, told)

    def sharers(self, pages: Words, select: Select, owner: int) -> list[tuple[Mm, Words]]:
        """What else has to be told before `collect` of the same arguments: (process, pages), this process included; mostly nothing.

        For pages that several processes share, CLEAR is announced page by page wherever they may be mapped; `collect` is then `told`
        which pages those were.
        """
        return migration_steps.sharers(self.mm, pages, select, owner)

    def takeable(self, start: int, end: int, select: Select, owner: int) -> Words:
        """See `pmd.takeable`."""
        return pmd.takeable(self.mm, start, end, select, owner)

    def collect_large(self, blocks: Words, select: Select, owner: int) -> tuple[Migration, Words]:
        """See `pmd.collect`."""
        assert self.mmap_lock.held, "collect without the mmap lock"
        return pmd.collect(self.mm, blocks, select, owner)

    def tear(self, migration: Migration, rows: npt.NDArray[np.bool_], *, small: bool = False) -> Migration:
        """See `pmd.tear`."""
        torn = pmd.tear(self.mm, migration, rows)
        if small:
            pmd.split_torn(self.mm, torn)
        return torn

    def split_going(self, migration: Migration, row: int) -> None:
        """See `compound.split_under_way`."""
        head = int(migration.source[row]) >> MIGRATE_PFN_SHIFT + HUGE_SHIFT
        split_under_way(self.memory, self.mm, migration, np.arange(row, row + HUGE_PAGES), head)

    def migrate_pages(self, migration: Migration) -> None:
        """migrate_vma_pages: each page's identity goes to its target. Where `inserts(migration)`, announce a MIGRATE around this."""
        if migration.large:
            pmd.move(self.mm, migration)
        else:
            migration_steps.move(self.memory, self.mm, migration)

    def migrate_restore(self, migration: Migration) -> None:
        """The targets' device died after `migrate_pages`: nothing has moved. `migrate_finalize` must follow."""
        if migration.large:
            pmd.restore(self.mm, migration)
        else:
            migration_steps.restore(self.memory, self.mm, migration)

    def migrate_finalize(self, migration: Migration) -> None:
        """migrate_vma_finalize: entries become the target or the untouched source, leftovers are freed, waiters wake."""
        if migration.large:
            pmd.finalize(self.mm, migration)
        else:
            finalize(self.memory, self.mm, migration)

    def take_one(self, page: int, zone: int) -> int | None:
        """See `few.take`."""
        return few.take(self.mm, page, zone)

    def bring_one(self, page: int, frame: int, target: int) -> bool:
        """See `few.bring`."""
        return few.bring(self.mm, page, frame, target)

    def put_back_one(self, page: int, frame: int) -> None:
        """See `few.put_back`."""
        few.put_back(self.mm, page, frame)

    # --- views --------------------------------------------------------------------------------------------------------------------

    def pagemap_words(self, start: int, end: int) -> Words:
        """See `views.pagemap`."""
        return views.pagemap(self.mm, start, end)

    def smaps(self) -> list[Mapping]:
        """See `views.smaps`."""
        return views.smaps(self.mm)

    def pagemap(self, address: int, pages: int) -> bytes:
        """/proc/PID/pagemap, a byte a page: ``-`` none, ``P`` present (``p``: a page of a file), ``S`` special; + 0x80 when mapped once."""
        start = address >> PAGE_SHIFT
        entries = self.mm.table.read(start, start + pages)
        kinds = entries & pte.KIND
        out = np.full(pages, ord("S"), np.uint8)
        out[(kinds == pte.NONE) | (kinds == pte.MARKER)] = ord("-")
        present = pte.is_present(entries)
        out[present] = ord("P")
        once = np.flatnonzero(present & (entries & pte.SPECIAL == 0))
        if len(once):
            out[once[self.memory.field(pte.frames_of(entries[once]), "flags") & ANON == 0]] = ord("p")
            out[once[self.memory.field(pte.frames_of(entries[once]), "mapcount") == 1]] |= 0x80
        return out.tobytes()

    def leads_to(self, zone: int, start: int, end: int) -> bool:
        """Whether an entry of pages [start, end) leads to a frame of `zone`."""
        return any_of(pte.zones_of(self.mm.table.read(start, end)) == zone)

    def residency(self, address: int, pages: int) -> Residency:
        """Where the pages live now: owners of zones, and for each page an index into them (-1: none, -2: in transit)."""
        start = address >> PAGE_SHIFT
        entries = self.mm.table.read(start, start + pages)
        kinds = entries & pte.KIND
        zones = pte.zones_of(entries).astype(np.intp)
        lives = ((kinds == pte.PRESENT) & (entries & pte.SPECIAL == 0)) | (kinds == pte.DEVICE) | (kinds == pte.EXCLUSIVE)
        numbers = np.unique(zones[lives]).tolist()
        out = np.full(pages, -1, np.int16)
        out[lives] = np.searchsorted(numbers, zones[lives])
        out[kinds == pte.MIGRATION] = -2
        return Residency(tuple(self.memory.zones[number].owner for number in numbers), out)
