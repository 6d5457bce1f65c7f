"""The two seams inside the host: what an address space offers to HMM, and what HMM needs of a device.

`mirror`, `migrate` and `notifier` are written against these and never against sockets or one kind of memory: `AddressSpace` has a
modelled implementation (`host.mm`) and will have one over a live process; `DeviceLink` has one over sessions and DMA streams and one
that is a plain object in tests.

Waiting happens in four places only (an ack, a transfer, a page lock, the clock); everything else here is synchronous, and a
synchronous call is atomic: no other task runs in between. That takes the place of the kernel's page table spinlocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import IntFlag, StrEnum
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hmmnet.pages import HUGE_PAGES, Words, word_of

if TYPE_CHECKING:
    from hmmnet.errors import KernelError
    from hmmnet.faults.injector import Points

    from .mm.huge import Large
    from .mm.mm import Mm
    from .mm.rmap import Mapped


class Event(StrEnum):
    """enum mmu_notifier_event (include/linux/mmu_notifier.h)."""

    UNMAP = "unmap"
    CLEAR = "clear"
    PROTECTION_VMA = "protection_vma"
    PROTECTION_PAGE = "protection_page"
    SOFT_DIRTY = "soft_dirty"
    RELEASE = "release"
    MIGRATE = "migrate"
    EXCLUSIVE = "exclusive"
    INVALIDATE = "invalidate"
    """The one event of v25 (HMM_UPDATE_INVALIDATE), whatever the reason."""


class Select(IntFlag):
    """enum migrate_vma_direction: what migrate_vma_setup collects."""

    SYSTEM = 1
    DEVICE_PRIVATE = 2
    DEVICE_COHERENT = 4
    COMPOUND = 8
    ANY_OWNER = 16
    """Pages of every device, as v25 takes them, which knew no owners."""
    PEERS = 32
    """Of the devices' pages those of others, whose page maps have the same owner (`host.peers`); not those of the device itself."""
    PARTS_STAY = 64
    """As up to Linux 6.18: a page of a large folio that is mapped page by page stays (PageTransCompound); today the folio is split."""

    if TYPE_CHECKING:

        def has(self, bits: Select) -> int:
            """Which of `bits` it has, as a number, for who only asks whether: in a thirtieth of the time that `self & bits` takes."""
    else:
        has = int.__and__


NO_OWNER = -1

Told: TypeAlias = Mapping[int, Sequence[Words]]
"""The pages of which mirrors were told (CLEAR), by process."""
NOBODY: Told = {}


@dataclass(eq=False)
class Migration:
    """One run of migrate_vma over `pages` (ascending). All arrays have one element for each page.

    `source` and `target` hold MIGRATE_PFN words. `saved` are the page table entries that the migration entries replaced (0: none was
    installed). The address space fills everything except `target`, which the driver's side sets before `migrate_pages`.
    """

    pages: Words
    source: Words
    target: Words
    saved: Words
    owner: int = NO_OWNER
    fault_frame: int | None = None
    compound: bool = False
    """Huge pages go as one (Select.COMPOUND)."""
    large: bool = False
    """Each row is a huge page: `pages` are the first ones, words have COMPOUND, frames are heads, `saved` are PMDs (`mm.pmd`)."""
    torn: list[Migration] = field(default_factory=list)
    """Of a `large` one: what began as a huge page and goes on page by page. Those rows are void (0)."""
    others: list[Mapped] = field(default_factory=list)
    """Further mappings (in other processes, by row of this migration) that were replaced by migration entries."""

    @property
    def count(self) -> int:
        """Pages that it is about."""
        return len(self.pages) * (HUGE_PAGES if self.large else 1)

    @property
    def cpages(self) -> int:
        """Pages collected and still to move."""
        rows = int(np.count_nonzero(self.source & word_of(2)))
        return (rows * HUGE_PAGES if self.large else rows) + sum(part.cpages for part in self.torn)


@dataclass(frozen=True)
class Walk:
    """One look at a range, as hmm_range_fault's walkers see it, without faulting.

    `words` are HMM_PFN words. `read` and `write` tell which pages want a fault and of which kind; `write` implies `read`. When `errno` is
    not 0 the walk ended with that (positive) error at page `failed`; words beyond are the input's.
    """

    words: Words
    read: npt.NDArray[np.bool_]
    write: npt.NDArray[np.bool_]
    errno: int = 0
    failed: int = 0


class Acknowledgement(Protocol):
    """The second pass of an invalidation (mmu_interval_notifier_finish): started on every device first, then waited for on each."""

    async def finish(self) -> None:
        """Return when the device has dropped the range and is quiet there, or has been fenced. Raises nothing for a lost device."""
        ...


class Destination(Protocol):
    """Host memory for pages that come home, had when it is first asked for: a link can tell the device first, and allocate meanwhile."""

    def frames(self) -> Words:
        """The host frames. Raises KernelError(ENOMEM)."""
        ...


class DeviceLink(Protocol):
    """A device as the host's HMM core sees it. Copies raise `PeerLost` when the device is gone."""

    name: str
    zone: int
    kind: str
    """``private`` or ``coherent``."""
    node: int
    """The host memory nearest to it."""

    def invalidate_start(
        self, context: int, subscription: int, start: int, end: int, event: Event, owner: int, sequence: int
    ) -> Acknowledgement | None:
        """Tell the device to drop [start, end), without waiting; None when it has nothing left to drop (it is gone and fenced)."""
        ...

    async def copy_in(self, source_frames: Words, target_frames: Words, zero_frames: Words) -> None:
        """DMA host frames to device frames, and zero others on the device; return when all landed. All may be large (`pages.LARGE`)."""

    async def copy_out(self, context: int, pages: Words, frames: Words, destination: Destination) -> None:
        """The device drops its entries for `pages` and its `frames` are copied to the destination; return when all landed.

        All may be large (`pages.LARGE`).
        """

    async def fetch(self, context: int, page: int, frame: int, allocate: Callable[[], int]) -> None:
        """`copy_out` of one page into the host frame that `allocate` gives (and raises KernelError(ENOMEM)): a CPU waits for it."""
        ...

    async def answers_apart(self, node: int, answers: int) -> None:
        """Pages came to host memory `node` together that a CPU would have waited for one by one: let the ways of `answers` pass, too."""

    def free_frames(self, frames: Words) -> None:
        """folio_free: tell the driver, without waiting. `frames` may have large ones (`pages.LARGE`)."""

    def free_frame(self, frame: int) -> None:
        """`free_frames` of one, which is not large."""

    def no_large(self, context: int) -> bool:
        """Whether this allocation of a large page fails, as the driver was told by that open file (HMM_DMIRROR_FLAG_FAIL_ALLOC): once.

        Asked before each, wherever the large page is to be, and only where one is wanted.
        """
        ...


class MmapLock(Protocol):
    """The mmap lock of an address space."""

    def read(self) -> AbstractAsyncContextManager[object]:
        """Hold it for reading."""
        ...


class Notifier(Protocol):
    """What changes a page table announces to."""

    def invalidate(self, event: Event, start: int, end: int, owner: int = NO_OWNER) -> AbstractAsyncContextManager[object]:
        """Entered before [start, end) changes, left afterwards."""
        ...

    def pass_through(self, page: int, owner: int) -> bool:
        """A MIGRATE of `page` by the device of zone `owner`, announced and over at once if nobody has to be told; else `invalidate`."""
        ...


class Area(Protocol):
    """A VMA, as far as migration looks at it."""

    start: int
    end: int


class AddressSpace(Protocol):
    """An mm_struct. Synchronous methods want the caller to hold what their docstring says; page arguments are page numbers."""

    number: int

    @property
    def points(self) -> Points:
        """Where faults are injected (`hmmnet.faults.points`)."""
        ...

    @property
    def node(self) -> int:
        """The host memory that new pages come from while it has room."""
        ...

    @property
    def mmap_lock(self) -> MmapLock:
        """The lock."""
        ...

    def read_killable(self) -> AbstractAsyncContextManager[object]:
        """The mmap lock for reading. Entering raises KernelError(EINTR) when the process is killed meanwhile."""
        ...

    async def relieved(self, error: KernelError) -> bool:
        """Whether a fault that ended with `error` can be taken anew, because somebody was killed for its memory. Hold no lock."""
        ...

    @property
    def hub(self) -> Notifier:
        """Where its changes are announced."""
        ...

    def vma_at(self, page: int) -> Area | None:
        """The VMA of `page`."""
        ...

    def walk(self, start: int, end: int, inputs: Words | None, default_flags: int, flags_mask: int, owner: int) -> Walk:
        """Table A3 for [start, end): no faulting, no waiting. Needs the mmap lock for reading."""
        ...

    def zone_at(self, page: int) -> int:
        """The zone that the entry of `page` leads to (0 for an empty one, too)."""
        ...

    def why_not(self, page: int, *, write: bool, start: int, end: int) -> str:
        """Why `page` of [start, end), which was asked for (for a `write`), cannot be had: the words of a CPU fault there."""
        ...

    def vma_end(self, page: int) -> int:
        """The end of the VMA that holds `page`; `page` itself when none does."""
        ...

    async def fault_in(self, pages: Words, write: npt.NDArray[np.bool_], node: int | None = None) -> None:
        """handle_mm_fault for each of `pages`; waits on migration entries, brings foreign device pages home.

        New frames come from host memory `node`, or where the process prefers. Needs the mmap lock for reading. Raises KernelError (EFAULT,
        EPERM, ENOMEM) for the first page that cannot be had.
        """
        ...

    async def make_exclusive(self, start: int, end: int, owner: int) -> int:
        """make_device_exclusive: how many pages from `start` on a device got. Raises KernelError: EFAULT or EOPNOTSUPP for none, ENOMEM."""
        ...

    async def make_exclusive_folios(self, start: int, end: int, owner: int) -> Words:
        """The same as Linux 6.12 did it, with all of a large page or nothing: HMM_PFN words, 0 for a page that was not had."""
        ...

    def exclusive_words(self, start: int, end: int) -> Words:
        """HMM_PFN words of the pages from `start` on that a device has exclusively, up to the first that it does not."""
        ...

    async def get_pages(self, start: int, count: int) -> Words:
        """get_user_pages: a reference of each of `count` pages from `start` on; their frames, 0 for the zero page. Raises KernelError."""
        ...

    def put_pages(self, frames: Words) -> None:
        """Drop what `get_pages` took."""
        ...

    def entry(self, page: int) -> int:
        """The page table entry of one page (`mm.pte`)."""
        ...

    def entries(self, pages: Words) -> Words:
        """The page table entries of `pages` (`mm.pte`)."""
        ...

    def check_migratable(self, start: int, end: int, fault_frame: int | None = None) -> None:
        """The argument checks of migrate_vma_setup; [start, end) must lie in one suitable VMA. Raises KernelError(EINVAL)."""
        ...

    def large(self, pages: Words, *, compound: bool, parts_stay: bool = False) -> list[Large]:
        """What is larger than a page and has to be split before `pages` can be collected; with `compound`, not what goes whole.

        With `parts_stay`, not what is mapped page by page.
        """
        ...

    def takeable(self, start: int, end: int, select: Select, owner: int) -> Words:
        """The blocks (page >> HUGE_SHIFT) of [start, end), in one VMA, that `collect_large` would take; they want no `sharers`."""
        ...

    def collect_large(self, blocks: Words, select: Select, owner: int) -> tuple[Migration, Words]:
        """`collect` for huge pages as one; the blocks that were takeable before mirrors were told and are not now come back too."""
        ...

    def tear(self, migration: Migration, rows: npt.NDArray[np.bool_], *, small: bool = False) -> Migration:
        """The pages of these rows of a `large` migration, which are void now, go on as the migration that is returned.

        `small`: they are split, and stay so wherever they go.
        """
        ...

    def split_going(self, migration: Migration, row: int) -> None:
        """The huge page that begins at `row` of a migration that is not `large` goes on as 512 ordinary pages."""
        ...

    def sharers(self, pages: Words, select: Select, owner: int) -> list[tuple[Mm, Words]]:
        """Where pages that several processes share may be mapped, of those that `collect` would take: (process, pages)."""
        ...

    def collect(self, pages: Words, select: Select, owner: int, fault_frame: int | None = None, told: Told = NOBODY) -> Migration:
        """migrate_vma_collect and migrate_vma_unmap (A4), after everybody was told (`announce.announced`): installs migration entries,
        refuses pinned pages and those that are mapped where nobody was `told`.
        """
        ...

    def migrate_pages(self, migration: Migration) -> None:
        """migrate_vma_pages: moves each page's identity to its target, inserts into empty entries, clears MIGRATE where it fails."""
        ...

    def migrate_restore(self, migration: Migration) -> None:
        """Nothing is to move: the identities go back. `migrate_finalize` must follow."""
        ...

    def migrate_finalize(self, migration: Migration) -> None:
        """migrate_vma_finalize: migration entries become the target, or the untouched source; frees what is left over; wakes waiters."""
        ...

    def take_one(self, page: int, zone: int) -> int | None:
        """`collect` for the one device page of `zone` that a CPU waits for; its frame. None, having done nothing, for any other case."""
        ...

    def bring_one(self, page: int, frame: int, target: int) -> bool:
        """What was taken has been copied to host frame `target` and lives there from now on.

        False when somebody holds on to `frame`: it stays there, and `target` is free.
        """
        ...

    def put_back_one(self, page: int, frame: int) -> None:
        """What was taken stays where it was."""
        ...
