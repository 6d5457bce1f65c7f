"""Files in memory and their page cache (mm/filemap.c, mm/shmem.c): what memfd_create gives, and what is behind MAP_SHARED|MAP_ANONYMOUS.

A file is a size and a table from page offset to frame, sparse: a *hole* has no frame until somebody stores there, or maps it. The cache
holds one reference of each frame; mappings and pins add theirs. A cached frame is not ANON: its `mapping` is the file's number and its
`index` the page offset, as `folio->mapping` and `folio->index`.

What a CPU fault does depends on the mapping (do_fault):

- a *load* maps the cached page, a hole being filled first, and with it what is cached nearby (`do_fault_around`, 16 pages);
- a *store* to a shared mapping maps the cached page, writable;
- a *store* to a private one is a copy: an anonymous page with the file's bytes, that is the process's alone from then on.

MADV_PAGEOUT takes file pages out of memory, too, as shmem does: to swap, from where whoever wants one next has it back.

A page behind the end of the file is SIGBUS. `File.mappers` (the kernel's i_mmap) are the address spaces that have mapped the file: whoever
punches or truncates (`truncate.py`) asks each where. Large folios of a cache are in `filehuge.py`. No entry of these pages is ever a
migration entry: pages of files stay where they are.

A file lives while somebody has it open or maps it, which is counted (struct file's f_count, and i_mmap): when Python's collector gets round
to an object decides nothing, so the frames go back at the same moment of every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hmmnet.arena import Bytes
from hmmnet.errors import KernelError, OutOfMemory
from hmmnet.pages import HUGE_PAGES, HUGE_SHIFT, PAGE_SHIFT, PAGE_SIZE, PAGES_MAX, Words, word_of
from hmmnet.sparse import SparseTable

from . import pte
from .frames import PhysicalMemory
from .locks import RwLock
from .memcg import MemoryCgroup
from .mm import Mm
from .vma import VM_SHARED, VM_WRITE, Vma
from .zones import COMPOUND

if TYPE_CHECKING:
    from .faulting import Faulting

FAULT_AROUND_PAGES = 16
"""fault_around_bytes, 64 KiB: what one fault on a file maps when it is cached."""
PTRS_PER_PTE = 512
SWAPPED = word_of(1 << 63)
"""Marks a slot of swap where else a frame stands; no frame has a number as large."""
ENOMEM = 12


class File:
    """A file of `size` bytes, all holes; of the huge page `pool`, if it says so.

    Its frames go back when nobody has it any more: no descriptor, no call under way, no mapping.
    """

    def __init__(self, memory: PhysicalMemory, size: int, *, pool: bool = False) -> None:
        self.memory = memory
        self.size = size
        self.pool = pool
        """MAP_HUGETLB: all of it in huge pages, which cannot be split."""
        self.blocks: set[int] = set()
        """Which blocks of 512 page offsets are one large folio each (`filehuge.py`)."""
        self.number = memory.new_file_number()
        self.mappers: dict[int, Faulting] = {}
        """i_mmap: the address spaces that have mapped the file, by number."""
        self.openings = 0
        """f_count: descriptors that lead here, and calls under way that have looked one up."""
        self.lock = RwLock()
        """i_rwsem: whoever writes, cuts or punches has it for writing. Outside all other locks, so inside it devices may be waited for."""
        self.mapping = RwLock()
        """i_mmap_rwsem, the other way round: whoever maps the file has it for reading while a VMA of it comes to be; for writing, who has
        told everybody who maps it, and wants nobody more. Inside the mmap lock; inside it mirrors are waited for, and nothing else."""
        self._cache = SparseTable()
        """What is at each page offset: a frame, or a slot of swap with `SWAPPED` (the kernel keeps a value entry there), or nothing."""

    # --- who has it -----------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """One more has it open; `close` must follow."""
        self.openings += 1

    def close(self) -> None:
        """fput: one less has it open."""
        assert self.openings > 0, f"file {self.number} is closed more often than it was opened"
        self.openings -= 1
        self._let_go()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Open while the block runs (fdget, fdput): a call that waits keeps the file, whoever closes it meanwhile."""
        self.open()
        try:
            yield
        finally:
            self.close()

    def mapped_by(self, space: Faulting) -> None:
        """An address space has mapped it."""
        self.mappers[space.number] = space

    def unmapped_by(self, number: int) -> None:
        """Address space `number` maps it no more."""
        self.mappers.pop(number, None)
        self._let_go()

    def _let_go(self) -> None:
        """The last who had it is gone: so is what it held (evict_inode)."""
        if not self.openings and not self.mappers:
            self.drop(0, PAGES_MAX)
            self.memory.files.pop(self.number, None)

    # --- its pages ------------------------------------------------------------------------------------------------------------

    @property
    def pages(self) -> int:
        """Pages up to the end of the file."""
        return self.size + PAGE_SIZE - 1 >> PAGE_SHIFT

    def cached(self, offsets: Words) -> Words:
        """The frames at page `offsets`; 0 for holes, and for what was swapped out."""
        found = self._cache.gather(offsets)
        found[found >= SWAPPED] = 0
        return found

    def holes(self, offsets: Words) -> npt.NDArray[np.bool_]:
        """Which of the pages at `offsets` have never had anything, here or in swap."""
        missing: npt.NDArray[np.bool_] = self._cache.gather(offsets) == 0
        return missing

    def filled(self, offsets: Words, node: int, group: MemoryCgroup | None) -> Words:
        """The frames at page `offsets` (distinct); holes get zeroed ones, from `node` if it has room, charged to `group`.

        What is in swap is read back (shmem_swapin_folio), charged to the group that had it. Raises KernelError(ENOMEM).
        """
        frames = self._cache.gather(offsets)
        absent, swapped = frames == 0, frames >= SWAPPED
        if absent.any() or swapped.any():
            self.memory.refuse_armed("host.alloc.page_cache", int(np.count_nonzero(absent | swapped)), None)
            new = self._zeroed(int(np.count_nonzero(absent)), node, group)
            if swapped.any():
                slots = frames[swapped] ^ SWAPPED
                try:
                    frames[swapped] = self.memory.swap.load(slots, node, "page fault")
                except KernelError:
                    self.memory.put(new)
                    raise
                self.memory.swap.free(slots)
            frames[absent] = new
            fresh = absent | swapped
            for zone, rows, at in self.memory.groups(frames[fresh]):
                zone.mapping[at] = self.number
                zone.index[at] = offsets[fresh][rows]
            self.memory.files[self.number] = self
            self._cache.scatter(offsets[fresh], frames[fresh])
        return frames

    def _zeroed(self, wanted: int, node: int, group: MemoryCgroup | None) -> Words:
        """`wanted` zeroed frames. Raises KernelError(ENOMEM)."""
        if wanted == 0:
            return np.zeros(0, np.uint64)
        new = self.memory.allocate_charged(group, wanted, node)
        if new is None:
            if why := "" if group is None else group.shortage(wanted):
                raise KernelError(ENOMEM, "page fault", f"a file wants {wanted} pages and {why}")
            raise OutOfMemory(ENOMEM, "page fault", f"a file wants {wanted} pages and the host's memory is used up", wanted)
        return new

    def page_out(self, offsets: Words) -> bool:
        """shmem_writepage: cached pages at `offsets`, which nobody maps or holds, go to swap. False, nothing done, when that is full."""
        frames = self.cached(offsets)
        slots = self.memory.swap.save(self.memory, frames)
        if slots is None:
            return False
        for block in self.blocks & set(np.unique(offsets >> word_of(HUGE_SHIFT)).tolist()):
            self.split(block)
        self._cache.scatter(offsets, slots | SWAPPED)
        _put(self.memory, frames)
        return True

    def read(self, offset: int, length: int) -> bytes:
        """pread(2): `length` bytes from byte `offset` on, fewer at the end of the file. Holes read as zero and stay holes.

        Raises KernelError(ENOMEM) for more than this program can hold.
        """
        length = max(0, min(length, self.size - offset))
        if length == 0:
            return b""
        try:
            out = np.zeros(((offset + length - 1 >> PAGE_SHIFT) - (offset >> PAGE_SHIFT) + 1) * PAGE_SIZE, np.uint8)
        except MemoryError:
            raise KernelError(ENOMEM, "pread", f"{length} bytes do not fit into this program at once; read them in pieces") from None
        offsets = _covering(offset, length)
        offsets = offsets[~self.holes(offsets)]
        if len(offsets):
            frames = self.filled(offsets, 0, None)
            data = np.empty(len(offsets) * PAGE_SIZE, np.uint8)
            self.memory.read(frames, 0, data)
            out.reshape(-1, PAGE_SIZE)[(offsets - np.uint64(offset >> PAGE_SHIFT)).astype(np.intp)] = data.reshape(-1, PAGE_SIZE)
        first = offset & PAGE_SIZE - 1
        return out[first : first + length].tobytes()

    def write(self, offset: int, data: Bytes, node: int, group: MemoryCgroup | None = None) -> None:
        """pwrite(2): the file grows where `data` goes beyond its end. Raises KernelError(ENOMEM)."""
        if len(data) == 0:
            return
        frames = self.filled(_covering(offset, len(data)), node, group)
        self.memory.write(frames, offset & PAGE_SIZE - 1, data)
        self.size = max(self.size, offset + len(data))

    def zero(self, offset: int, length: int) -> None:
        """Clear bytes inside one page, where there is one."""
        if self._cache.get(offset >> PAGE_SHIFT) and length > 0:
            frame = int(self.filled(_covering(offset, 1), 0, None)[0])
            self.memory.write_small(frame, offset & PAGE_SIZE - 1, bytes(length))

    def adopt(self, block: int, frames: Words) -> None:
        """The huge page of `frames` is the cache's, at a block that has nothing: a reference of each is handed over."""
        offsets = np.arange(block << HUGE_SHIFT, block + 1 << HUGE_SHIFT, dtype=np.uint64)
        for zone, rows, at in self.memory.groups(frames):
            zone.flags[at] |= np.uint32(COMPOUND)
            zone.mapping[at] = self.number
            zone.index[at] = offsets[rows]
        self._cache.scatter(offsets, frames)
        self.blocks.add(block)

    def split(self, block: int) -> None:
        """The pages of a large folio, which nobody maps as one any more, are ordinary ones."""
        self.blocks.discard(block)
        frames = self.cached(np.arange(block << HUGE_SHIFT, block + 1 << HUGE_SHIFT, dtype=np.uint64))
        for zone, _, at in self.memory.groups(frames[frames != 0]):
            zone.flags[at] &= ~np.uint32(COMPOUND)

    def around(self, first: int, end: int) -> tuple[int, int]:
        """Pages [first, end), and all of the large folios of which they are a part."""
        if first >> HUGE_SHIFT in self.blocks:
            first = first >> HUGE_SHIFT << HUGE_SHIFT
        if end & HUGE_PAGES - 1 and end >> HUGE_SHIFT in self.blocks:
            end = (end >> HUGE_SHIFT) + 1 << HUGE_SHIFT
        return first, end

    def drop(self, first: int, end: int) -> None:
        """truncate_inode_pages: pages [first, end) become holes. Nobody maps them any more; who pinned one keeps it.

        A large folio of which a part goes is split.
        """
        for block in [block for block in self.blocks if block << HUGE_SHIFT < end and first < block + 1 << HUGE_SHIFT]:
            self.split(block)
        found = self._cache.gather(self._cache.occupied(first, end))
        self._cache.clear(first, end)
        _let_go(self.memory, found)


def _covering(offset: int, length: int) -> Words:
    """The page offsets that bytes [offset, offset + length) touch."""
    return np.arange(offset >> PAGE_SHIFT, (offset + length - 1 >> PAGE_SHIFT) + 1, dtype=np.uint64)


def _put(memory: PhysicalMemory, frames: Words) -> None:
    """The cache lets go of `frames`."""
    for zone, _, at in memory.groups(frames):
        zone.mapping[at] = 0
        zone.index[at] = 0
    memory.put(frames)


def _let_go(memory: PhysicalMemory, found: Words) -> None:
    """What a cache had is dropped: frames, and slots of swap."""
    swapped = found >= SWAPPED
    if swapped.any():
        memory.swap.free(found[swapped] ^ SWAPPED)
    _put(memory, found[~swapped])


# --- in an address space ----------------------------------------------------------------------------------------------------------


def file_offsets(vma: Vma, pages: Words) -> Words:
    """linear_page_index: where in the file `pages` of `vma` lie."""
    return pages - np.uint64(vma.start) + np.uint64(vma.pgoff)


def end_in(vma: Vma) -> int:
    """The first page of `vma` that lies beyond the end of its file, or the end of the VMA."""
    assert vma.file is not None, "a VMA with a file"
    return min(vma.end, max(vma.start, vma.start + vma.file.pages - vma.pgoff))


def map_file(mm: Mm, vma: Vma, pages: Words, frames: Words, *, write: bool) -> None:
    """set_pte_range: cached `frames` become present at `pages`; writable where the mapping is shared and may write."""
    bits = pte.YOUNG | (pte.WRITE if vma.flags & (VM_SHARED | VM_WRITE) == VM_SHARED | VM_WRITE else 0)
    if write:
        bits |= pte.DIRTY | pte.SOFT_DIRTY
    mm.table.scatter(pages, pte.entries_of(pte.PRESENT, frames, bits))
    mm.rss += len(pages)
    for zone, _, at in mm.memory.groups(frames):
        zone.refcount[at] += 1
        zone.mapcount[at] += 1


def read_fault(mm: Mm, vma: Vma, pages: Words, node: int) -> None:
    """do_read_fault for each of `pages` (ascending, empty, inside the file): they are mapped, and what is cached around them."""
    assert vma.file is not None, "a VMA with a file"
    windows = _windows(vma, pages)
    map_file(mm, vma, pages, vma.file.filled(file_offsets(vma, pages), node, mm.cgroup), write=False)
    _map_cached(mm, vma, windows)


def fault_around(mm: Mm, vma: Vma, pages: Words) -> None:
    """do_fault_around alone. It comes before the fault itself, so also a load behind the end of the file maps its neighbours.

    The load itself is SIGBUS (recording r00308).
    """
    _map_cached(mm, vma, _windows(vma, pages))


def _map_cached(mm: Mm, vma: Vma, pages: Words) -> None:
    """filemap_map_pages: those of `pages` that are empty and cached become present."""
    assert vma.file is not None, "a VMA with a file"
    pages = pages[mm.table.gather(pages) == 0]
    frames = vma.file.cached(file_offsets(vma, pages))
    there = frames != 0
    if there.any():
        map_file(mm, vma, pages[there], frames[there], write=False)


def _windows(vma: Vma, pages: Words) -> Words:
    """The pages around all of `pages` (ascending) that fault. One that an earlier window maps does not fault, so it opens none.

    A window is the aligned block of 16 around the fault; where the VMA begins inside the block, 16 pages from there on (mm/memory.c).
    """
    file = vma.file
    assert file is not None, "a VMA with a file"
    start, end = vma.start, end_in(vma)
    block = pages // FAULT_AROUND_PAGES * FAULT_AROUND_PAGES
    low = np.maximum(block, start)
    if start % FAULT_AROUND_PAGES and low[0] == start:
        covered = (low > start) & (pages < start + FAULT_AROUND_PAGES) & (pages // PTRS_PER_PTE == pages[0] // PTRS_PER_PTE)
        low = low[~(covered & (file.cached(file_offsets(vma, pages)) != 0))]
    low = np.unique(low)
    table_end = (low // PTRS_PER_PTE + 1) * PTRS_PER_PTE
    high = np.minimum(np.minimum(low + FAULT_AROUND_PAGES, table_end), end)
    grid = low[:, None] + np.arange(FAULT_AROUND_PAGES, dtype=np.uint64)
    return np.unique(grid[grid < high[:, None]])


def ranges_of(mm: Mm, file: File, first: int, end: int) -> Iterator[tuple[Vma, int, int]]:
    """Where `mm` maps pages [first, end) of `file`: (VMA, first page, end)."""
    for vma in mm.vmas.all():
        if vma.file is file:
            low = max(vma.start, vma.start + first - vma.pgoff)
            high = min(vma.end, vma.start + end - vma.pgoff)
            if low < high:
                yield vma, low, high
