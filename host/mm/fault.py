"""CPU page faults over ranges (mm/memory.c): everything that can be settled without waiting.

`touch` makes a list of pages of one VMA accessible, as a load or a store of each would, and stops at the first page that needs somebody
else: a device that has the page, a migration that must end, mirrors that must be told before the entry changes. The caller
(`space.py`) sees to that and calls again.

What the kernel does per page is done here per list: never-touched pages get frames from one allocation, consecutive where they can
be, so that a later DMA sees one run; a load of never-touched memory maps the zero page; a store to a page that this process
has alone is made writable in place; one to a shared page (or to the zero page) is a copy, before which mirrors are told (`COW`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from hmmnet.errors import KernelError
from hmmnet.pages import FEW, HUGE_PAGES, HUGE_SHIFT, ZERO_FRAME, ZONE_SHIFT, Words, all_of, any_of, bits_in_all, word_of

from . import filehuge, huge, pte
from .filemap import end_in, fault_around, file_offsets, map_file, read_fault
from .guard import guarded, is_guard
from .mm import Mm
from .swap import swap_in
from .vma import VM_SHARED, VM_UFFD_MISSING, Vma

ENOMEM = 12


class Cause(IntEnum):
    """Why a page cannot be had at once."""

    NOTHING = 0
    DEVICE = 1
    """Device-private: has to come home."""
    MIGRATION = 2
    """Under migration: wait for its end."""
    COW = 3
    """To be copied, after mirrors have dropped the old page."""
    EXCLUSIVE = 4
    """A device has atomic access: to be taken away, after it was told."""
    MARKER = 5
    """Poisoned, or a guard page."""
    BEYOND = 6
    """Behind the end of the file that is mapped."""
    MISSING = 7
    """Nothing there, and a userfaultfd wants to hear of it."""


_CAUSE = np.zeros(8, dtype=np.uint8)
_CAUSE[pte.DEVICE] = Cause.DEVICE
_CAUSE[pte.MIGRATION] = Cause.MIGRATION
_CAUSE[pte.EXCLUSIVE] = Cause.EXCLUSIVE
_CAUSE[pte.MARKER] = Cause.MARKER
_CAUSES = [Cause(int(number)) for number in _CAUSE]
"""The same as a list."""


_SETTLED = (
    (pte.KIND, pte.PRESENT, pte.YOUNG),
    (pte.KIND | pte.WRITE, pte.WRITABLE, pte.YOUNG | pte.DIRTY | pte.SOFT_DIRTY),
)
"""For a load, and for a store: which bits of an entry tell that its page is there with the right, what they are then, what is set."""


@dataclass(frozen=True, slots=True)
class Touched:
    """How far `touch` came: `done` pages of the list, and why not further; the `blocked` pages there have the same cause.

    `error` is what refused the page there, where others before it were made ready.
    """

    done: int
    cause: Cause = Cause.NOTHING
    blocked: int = 0
    error: KernelError | None = None


def touch(mm: Mm, vma: Vma, pages: Words, write: bool, keep: slice | None = None, node: int | None = None) -> Touched:
    """Make `pages` (ascending, all in `vma`, which allows the access) ready for a load or store, as far as that goes without waiting.

    `keep`: positions that the caller overwrites whole, so that new frames need not be zeroed. `node`: where new frames should come from,
    when not from the process's own. Raises KernelError(ENOMEM).
    """
    entries = mm.table.gather(pages, ascend=True)
    if _settled(mm, pages, entries, write):
        return Touched(len(pages))
    few = _touch_few(mm, vma, pages, entries, write, keep, mm.node if node is None else node)
    return _touch_many(mm, vma, pages, entries, write, keep, mm.node if node is None else node) if few is None else few


def _touch_many(mm: Mm, vma: Vma, pages: Words, entries: Words, write: bool, keep: slice | None, node: int) -> Touched:
    """`touch` for pages with `entries` of which some are not ready."""
    if any_of(entries & pte.KIND == pte.SWAP):
        swap_in(mm, vma, pages, entries, node)
    if any_of(entries & pte.KIND == pte.HINT):
        unhint(mm, pages, entries)
    causes = _causes(mm, vma, entries, write)
    if vma.file is not None:
        beyond = int(np.searchsorted(pages, end_in(vma)))
        causes[beyond:][entries[beyond:] == 0] = Cause.BEYOND
    if vma.flags & VM_UFFD_MISSING:
        missing = ((entries == 0) & (causes == 0)).nonzero()[0]
        if vma.file is not None and len(missing):
            missing = missing[vma.file.holes(file_offsets(vma, pages[missing]))]
        causes[missing] = Cause.MISSING
    if mm.unstable:
        causes[entries == 0] = Cause.MISSING
    blocked = causes != 0
    stop = int(np.argmax(blocked)) if any_of(blocked) else len(pages)
    if stop:
        _settle(mm, vma, pages[:stop], entries[:stop], write, keep, node)
    if stop == len(pages):
        return Touched(stop)
    cause = causes[stop]
    if cause == Cause.BEYOND and not write:
        fault_around(mm, vma, pages[stop : stop + 1])
    same = causes[stop:] == cause
    return Touched(stop, Cause(int(cause)), len(same) if all_of(same) else int(np.argmin(same)))


def _touch_few(mm: Mm, vma: Vma, pages: Words, entries: Words, write: bool, keep: slice | None, node: int) -> Touched | None:
    """`touch` for a few pages of private memory, of which Python sees sooner than numpy why each cannot be had at once.

    None, and nothing done, where they are not few or private, and where some are of huge pages, or have to be seen to before (swap, hints).
    """
    if len(pages) > FEW or vma.file is not None or vma.flags & (VM_UFFD_MISSING | VM_SHARED) or mm.unstable:
        return None
    causes = []
    for entry in entries.tolist():
        kind = entry & pte.KIND
        if entry & pte.HUGE or kind in (pte.SWAP, pte.HINT):
            return None
        cause = _CAUSES[kind]
        if write and entry & (pte.KIND | pte.WRITE | pte.ANON_EXCLUSIVE) == pte.PRESENT and not _is_alone(mm, entry):
            cause = Cause.COW
        causes.append(cause)
    stop = next((at for at, cause in enumerate(causes) if cause), len(causes))
    if stop:
        _settle(mm, vma, pages[:stop], entries[:stop], write, keep, node)
    if stop == len(causes):
        return Touched(stop)
    end = next((at for at in range(stop, len(causes)) if causes[at] is not causes[stop]), len(causes))
    return Touched(stop, causes[stop], end - stop)


def _is_alone(mm: Mm, entry: int) -> bool:
    """Whether nobody but this entry holds its frame."""
    frame = entry >> pte.FRAME_SHIFT
    zone = mm.memory.zones[frame >> ZONE_SHIFT]
    return not entry & pte.SPECIAL and zone.cells.refcount[frame - zone.base] == 1


def touch_one(mm: Mm, vma: Vma, page: int, write: bool) -> bool:
    """`touch` for one page without arrays; False, having done nothing, where that is not the simple case. Raises KernelError(ENOMEM)."""
    entry = mm.table.get(page)
    if entry & pte.KIND == pte.PRESENT:
        if not write:
            entry |= pte.YOUNG
        elif entry & (pte.WRITE | pte.ANON_EXCLUSIVE) and entry & (pte.WRITE | pte.HUGE) != pte.HUGE:
            entry |= pte.WRITE | pte.YOUNG | pte.DIRTY | pte.SOFT_DIRTY
        else:
            return False
        mm.table.mark_one(page, entry)
        return True
    if entry or not vma.is_anonymous or vma.flags & VM_UFFD_MISSING or huge.may_be_huge(vma) or mm.unstable:
        return False
    if write:
        mm.anon_prepare(vma)
        frame = mm.memory.allocate_one(vma.anon, page - vma.start + vma.pgoff, mm.node, mm.cgroup)
        if frame is None:
            raise mm.out_of_memory("page fault", np.array([page], np.uint64))
        mm.rss += 1
        entry = pte.entry(pte.PRESENT, frame, pte.FRESH_WRITE)
    else:
        entry = pte.entry(pte.PRESENT, ZERO_FRAME, pte.ZERO_ENTRY)
    mm.table.set(page, entry)
    return True


def settled_few(mm: Mm, start: int, end: int, write: bool) -> bool:
    """Whether all of a few pages are there, with the right, as mostly; then that is all of `touch`, without arrays."""
    mask, there, bits = _SETTLED[write]
    entries = mm.table.numbers(range(start, end))
    for entry in entries:
        if entry & mask != there:
            return False
    for page, entry in enumerate(entries, start):
        if entry & bits != bits:
            mm.table.mark_one(page, entry | bits)
    return True


def _settled(mm: Mm, pages: Words, entries: Words, write: bool) -> bool:
    """The case that costs least: every page is there, with the right. Keeps the accessed and dirty bits as hardware does."""
    mask, there, bits = _SETTLED[write]
    if len(pages) <= FEW:
        for entry in entries.tolist():
            if entry & mask != there:
                return False
    elif not all_of(entries & mask == there):
        return False
    if bits_in_all(entries) & bits != bits:
        mm.table.mark(pages, entries, bits)
    return True


def _causes(mm: Mm, vma: Vma, entries: Words, write: bool) -> npt.NDArray[np.uint8]:
    """Why each page cannot be had at once (`Cause`)."""
    kinds = pte.kinds_of(entries)
    causes = _CAUSE[kinds.astype(np.intp)]
    if write and not vma.flags & VM_SHARED:
        shared = ((entries & (pte.KIND | pte.WRITE | pte.ANON_EXCLUSIVE)) == pte.PRESENT).nonzero()[0]
        if len(shared):
            ours = (entries[shared] & pte.SPECIAL == 0) & (mm.memory.field(pte.frames_of(entries[shared]), "refcount") == 1)
            whole = ours & (entries[shared] & pte.HUGE != 0)
            if any_of(whole):
                ours[whole] = huge.alone(mm, entries[shared[whole]])
            causes[shared[~ours]] = Cause.COW
    return causes


def _settle(mm: Mm, vma: Vma, pages: Words, entries: Words, write: bool, keep: slice | None, node: int) -> None:
    """Pages that are empty, or there: give them what the access needs."""
    empty = entries == 0
    if any_of(empty):
        _populate(mm, vma, pages, empty, write, keep, node)
    if not all_of(empty):
        there = ~empty
        bits = pte.WRITE | pte.YOUNG | pte.DIRTY | pte.SOFT_DIRTY if write else pte.YOUNG
        if write and not vma.flags & VM_SHARED:
            bits |= pte.ANON_EXCLUSIVE
            reused = entries[there & (entries & (pte.WRITE | pte.ANON_EXCLUSIVE) == 0)]
            mm.memory.move_anon(pte.frames_of(reused), vma.anon)
        mm.table.mark(pages[there], entries[there], bits)
        if write:
            for block in huge.blocks_of(pages[there][entries[there] & (pte.HUGE | pte.WRITE) == pte.HUGE]):  # pmd_mkwrite
                for _, part, _ in mm.table.parts(block, block + HUGE_PAGES):
                    part[part != 0] |= word_of(bits & (pte.WRITE | pte.ANON_EXCLUSIVE))


def _populate(mm: Mm, vma: Vma, pages: Words, empty: npt.NDArray[np.bool_], write: bool, keep: slice | None, node: int) -> None:
    """do_anonymous_page, or do_fault where a file is mapped, for the `empty` ones of `pages`."""
    whole = all_of(empty)
    new = pages if whole else pages[empty]
    if vma.file is not None:
        _populate_from_file(mm, vma, new, write, node)
        return
    if huge.may_be_huge(vma):
        new = new[~huge.populate(mm, vma, new, write=write, node=node)]
        keep, whole = None, False
        if len(new) == 0:
            return
    if not write:
        mm.table.scatter(new, pte.entry(pte.PRESENT, ZERO_FRAME, pte.ZERO_ENTRY))
        return
    if keep is not None and not whole:
        before = np.cumsum(empty)
        low, high = min(keep.start, len(pages)), min(keep.stop, len(pages))
        keep = slice(int(before[low - 1]) if low else 0, int(before[high - 1]) if high else 0)
    make(mm, vma, new, pte.FRESH_WRITE, keep, node)


def _populate_from_file(mm: Mm, vma: Vma, pages: Words, write: bool, node: int) -> None:
    """do_read_fault, do_shared_fault or do_cow_fault for each of `pages`, which are empty and inside the file."""
    pages = pages[~filehuge.populate(mm, vma, pages, write=write, node=node)]
    if len(pages) == 0:
        return
    if not write:
        read_fault(mm, vma, pages, node)
        return
    assert vma.file is not None, "a VMA with a file"
    frames = vma.file.filled(file_offsets(vma, pages), node, mm.cgroup)
    if vma.flags & VM_SHARED:
        map_file(mm, vma, pages, frames, write=True)
    else:
        mm.memory.copy(frames, make(mm, vma, pages, pte.FRESH_WRITE, slice(0, len(pages)), node))


def make(mm: Mm, vma: Vma, pages: Words, bits: int, keep: slice | None = None, node: int | None = None) -> Words:
    """New anonymous pages at `pages`, present with `bits`; their frames. Raises KernelError(ENOMEM)."""
    frames = mm.memory.allocate_charged(mm.cgroup, len(pages), mm.node if node is None else node, keep)
    if frames is None:
        raise mm.out_of_memory("page fault", pages)
    index = mm.anon_index(vma, pages)
    mm.memory.map_new(frames, vma.anon, index)
    mm.table.scatter(pages, pte.entries_of(pte.PRESENT, frames, bits))
    mm.rss += len(pages)
    return frames


def break_cow(mm: Mm, vma: Vma, pages: Words) -> None:
    """do_wp_page's copy: a private page for each of `pages` that is still present and read-only. The mirrors have been told."""
    entries = mm.table.gather(pages)
    still = entries & (pte.KIND | pte.WRITE) == pte.PRESENT
    pages, entries = pages[still], entries[still]
    if len(pages) == 0:
        return
    old = pte.frames_of(entries)
    zero = entries & pte.SPECIAL != 0
    copied = (~zero).nonzero()[0]
    new = make(mm, vma, pages, pte.FRESH_WRITE)
    if len(copied):
        mm.memory.copy(old[copied], new[copied])
        mm.memory.unmap(old[copied])
        mm.rss -= len(copied)


def unshare(mm: Mm, vma: Vma, page: int) -> None:
    """do_wp_page with FAULT_FLAG_UNSHARE: `page`, present and shared, becomes the process's own, still read-only. Mirrors were told."""
    entry = mm.table.get(page)
    frame = entry >> pte.FRAME_SHIFT
    if entry & (pte.KIND | pte.ANON_EXCLUSIVE) != pte.PRESENT:
        return
    pages, old = np.array([page], np.uint64), np.array([frame], np.uint64)
    if entry & pte.SPECIAL:
        make(mm, vma, pages, pte.PRESENT | pte.YOUNG | pte.ANON_EXCLUSIVE)
    elif int(mm.memory.field(old, "refcount")[0]) == 1:
        mm.memory.move_anon(old, vma.anon)
        mm.table.set(page, entry | pte.ANON_EXCLUSIVE)
    else:
        new = make(mm, vma, pages, pte.PRESENT | pte.YOUNG | pte.ANON_EXCLUSIVE | entry & (pte.SOFT_DIRTY | pte.UFFD_WP))
        mm.memory.copy(old, new)
        mm.memory.unmap(old)
        mm.rss -= 1


def set_exclusive(mm: Mm, pages: Words) -> int:
    """Give a device exclusive access to `pages` as far as they are present and writable; how many. Mirrors have been told.

    The entry forgets young and dirty; what it becomes again is clean and old but for what `restore_exclusive` adds.
    """
    entries = mm.table.gather(pages)
    ready = entries & (pte.KIND | pte.WRITE | pte.HUGE) == pte.WRITABLE
    count = len(pages) if all_of(ready) else int(np.argmin(ready))
    if count:
        kept = entries[:count] & ~word_of(pte.KIND | pte.YOUNG | pte.DIRTY)
        mm.table.scatter(pages[:count], pte.with_bits(kept, pte.EXCLUSIVE))
    return count


def restore_exclusive(mm: Mm, pages: Words) -> None:
    """remove_device_exclusive_entry: those of `pages` that a device holds exclusively are ordinary again. The device has been told."""
    entries = mm.table.gather(pages)
    held = entries & pte.KIND == pte.EXCLUSIVE
    back = entries[held] ^ word_of(pte.EXCLUSIVE ^ pte.PRESENT)
    back[back & pte.WRITE != 0] |= word_of(pte.DIRTY)
    if len(back):
        mm.table.scatter(pages[held], back)


def _zap_few(mm: Mm, mapped: Sequence[tuple[int, int]]) -> None:
    """`zap` of a few pages with their entries, where nothing is mapped as a block, and no folio is folded."""
    frames = []
    for page, entry in mapped:
        mm.table.ptes.set(page, 0)
        kind = entry & pte.KIND
        if kind == pte.SWAP:
            mm.memory.swap.free(np.array([entry >> pte.FRAME_SHIFT], np.uint64))
        elif kind != pte.MARKER and not entry & pte.SPECIAL:
            mm.rss -= 1
            if kind != pte.MIGRATION:
                frames.append(entry >> pte.FRAME_SHIFT)
    mm.memory.unmap_few(frames)


def zap(mm: Mm, pages: Words) -> None:
    """Drop what is mapped at `pages` (zap_pte_range); last references go back to the allocator or the driver."""
    entries = mm.table.gather(pages)
    mm.table.scatter(pages, 0)
    kinds = entries & pte.KIND
    swapped = kinds == pte.SWAP
    if any_of(swapped):
        mm.memory.swap.free(pte.frames_of(entries[swapped]))
    counted = (kinds != pte.NONE) & (kinds != pte.MARKER) & (entries & pte.SPECIAL == 0) & ~swapped
    mm.rss -= int(np.count_nonzero(counted))
    mapped = counted & (kinds != pte.MIGRATION)
    if any_of(mapped):
        mm.memory.unmap(pte.frames_of(entries[mapped]))


def zap_range(mm: Mm, start: int, end: int, *, guards: bool = False) -> None:
    """`zap` of all that is mapped in [start, end), huge pages as what they are. No frame may be there twice.

    Guard pages stay, unless the `guards` go, too (ZAP_FLAG_DROP_MARKER).
    """
    blocks = mm.table.blocks(start, end)
    if len(blocks):
        huge.zap(mm, blocks)
    pages = mm.table.occupied(start, end)
    if len(pages) <= FEW and not mm.table.pmd_count and not mm.memory.has_folded:
        numbers = pages.tolist()
        entries = mm.table.numbers(numbers)
        left = [(page, entry) for page, entry in zip(numbers, entries, strict=True) if guards or not is_guard(entry)]
        _zap_few(mm, left)
        return
    if not guards:
        pages = pages[~guarded(mm.table.gather(pages))]
    if len(pages):
        zap(mm, pages)


def hint(mm: Mm, start: int, end: int) -> int:
    """change_prot_numa: the next access to each present small page of [start, end) faults; how many they are. Mirrors were told."""
    count = 0
    for _, part in mm.table.ptes.present(start, end):
        present = (part & (pte.KIND | pte.SPECIAL | pte.HUGE) == pte.PRESENT) & (part < pte.DEVICE_MIN)
        part[present] |= word_of(pte.HINT)
        count += int(np.count_nonzero(present))
    return count


def unhint(mm: Mm, pages: Words, entries: Words) -> None:
    """do_numa_page: those `entries` of `pages` that are hints are present again, with the rights that they had; in `entries`, too."""
    hinted = entries & pte.KIND == pte.HINT
    entries[hinted] ^= word_of(pte.HINT ^ pte.PRESENT)
    mm.table.scatter(pages[hinted], entries[hinted])


def age(mm: Mm, start: int, end: int, bits: int) -> None:
    """Clear `bits` (young, dirty) of present pages; entries of a device stay as they are (h15, h55)."""
    for _, part, _ in mm.table.parts(start, end):
        part[pte.is_present(part) & (part & pte.SPECIAL == 0)] &= ~np.uint64(bits)


def move_entries(mm: Mm, start: int, target: int, count: int) -> None:
    """move_page_tables: the entries of `count` pages change place; whatever lives there goes along, on a device or not."""
    if not (start ^ target) & huge.HUGE_MASK:
        blocks = mm.table.blocks(start, start + count)
        moved = mm.table.take_pmds(blocks) | word_of(pte.SOFT_DIRTY)
        mm.table.set_pmds(blocks + np.uint64(target >> HUGE_SHIFT) - np.uint64(start >> HUGE_SHIFT), moved)
    pages = mm.table.occupied(start, start + count)
    if len(pages):
        entries = mm.table.gather(pages)
        mm.table.clear(start, start + count)
        mm.table.scatter(pages - np.uint64(start) + np.uint64(target), entries | word_of(pte.SOFT_DIRTY))


def protect(mm: Mm, start: int, end: int, writable: bool, shared: bool = False) -> None:
    """change_protection for entries of [start, end) after the VMA's rights changed.

    Losing the right to write takes WRITE from every kind of entry, and soft-dirty from those of a device. Getting it gives WRITE back only
    to present pages that this process has alone (can_change_pte_writable), in a `shared` mapping to all; entries of a device keep theirs.
    """
    alone = 0 if shared else pte.ANON_EXCLUSIVE
    for _, part, _ in mm.table.parts(start, end):
        part[part & pte.KIND == pte.HINT] ^= word_of(pte.HINT ^ pte.PRESENT)
        if writable:
            part[part & (pte.KIND | alone | pte.SPECIAL) == pte.PRESENT | alone] |= word_of(pte.WRITE)
        else:
            writable_device = part & (pte.KIND | pte.WRITE) == pte.DEVICE | pte.WRITE
            if any_of(writable_device):
                part[writable_device] &= ~word_of(pte.SOFT_DIRTY)
            part &= ~word_of(pte.WRITE)
