"""The reverse map (mm/rmap.c): which processes map a frame, and where.

An anonymous frame knows the anon_vma it was made in (`mapping`) and the page where it was first mapped (`index`). Every process of the
family that still maps it does so at that very page, unless the VMA was moved: then at the same distance into a VMA whose `pgoff` tells.
So the search is, for each process of the family, one look into its page table at all the indices at once, and one for each VMA that
lies elsewhere than its `pgoff`. An entry that holds the frame is a mapping; one that does not was unmapped, copied, or never existed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmmnet.pages import Number, Words, all_of, distinct, largest, smallest

from . import pte
from .frames import PhysicalMemory
from .located import Located, every_row
from .mm import Mm
from .vma import Vma

FEW = 8
"""Anon_vmas up to which a list of them is gone through one by one: a child of the eighth generation has as many."""

Rows = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Mapped:
    """Mappings of some frames in one process: frame number ``rows[i]`` of the list is mapped at ``pages[i]`` by ``entries[i]``."""

    mm: Mm
    rows: Rows
    pages: Words
    entries: Words
    ascend: bool = False
    """Whether the pages ascend for certain (see `hmmnet.pages.is_one_run`)."""

    def at(self, which: Rows | slice | npt.NDArray[np.bool_], rows: Rows | None = None) -> Mapped:
        """Those at `which` (ascending); `rows` in the place of theirs, if that is given."""
        return Mapped(self.mm, self.rows[which] if rows is None else rows, self.pages[which], self.entries[which], self.ascend)


def mappings(memory: PhysicalMemory, frames: Words | Located, known: tuple[Mm, Words] | None = None) -> Iterator[Mapped]:
    """Every mapping of `frames`: present, device-private or exclusive entries.

    `known` are a process and the pages (ascending) at which it maps them; where those are the frames' indices it is left out, for want of
    others.
    """
    there = frames if isinstance(frames, Located) else memory.located(frames)
    mappers, indices = there.fields("mapping", "index")
    for family, rows in _by_family(memory, mappers):
        at = chosen(indices, rows)
        same = known is not None and np.array_equal(at, chosen(known[1], rows))
        for mm in memory.families[family]:
            if known is None or mm is not known[0] or not same:
                yield from _in_process(mm, rows, at, chosen(there.frames, rows), ascend=same)


def chosen(values: npt.NDArray[Number], rows: Rows) -> npt.NDArray[Number]:
    """Those of `values` at `rows` (ascending), themselves if that is all: as it mostly is, and picking them costs as much as a pass."""
    return values if len(rows) == len(values) else values[rows]


def _by_family(memory: PhysicalMemory, anon_vmas: npt.NDArray[np.uint32]) -> Iterator[tuple[int, Rows]]:
    """Rows of `anon_vmas` by the family that they belong to."""
    if len(anon_vmas) == 0:
        return
    if all_of(anon_vmas == anon_vmas[0]):  # as it mostly is: sorting to find that out costs ten passes
        family = memory.anon_families.get(int(anon_vmas[0]), 0)
        if family:
            yield family, every_row(len(anon_vmas))
        return
    known, which = np.unique(anon_vmas, return_inverse=True)
    families = np.array([memory.anon_families.get(number, 0) for number in known.tolist()])[which]
    for family in np.unique(families).tolist():
        if family:
            yield family, (families == family).nonzero()[0]


def places(memory: PhysicalMemory, frames: Words) -> Iterator[tuple[Mm, Words]]:
    """Where each of `frames` may be mapped, whether it is or not: the pages that an rmap walk visits, by process.

    The kernel announces CLEAR for each of them when it unmaps a shared page for migration, even where the page has been copied or unmapped
    since, and in the process that migrates itself (recordings r00992, r00945, r01323 show it by mirror entries that are gone).
    """
    indices, anon_vmas = memory.fields(frames, "index", "mapping")
    yield from _places_of_files(memory, indices, anon_vmas)
    for family, rows in _by_family(memory, anon_vmas):
        for mm in memory.families[family]:
            at, numbers = chosen(indices, rows), chosen(anon_vmas, rows)
            parts = [_inside(vma, at, numbers) for vma in mm.vmas.all() if vma.anon]
            parts = [part for part in parts if len(part)]
            if parts:
                yield mm, distinct(parts[0] if len(parts) == 1 else np.concatenate(parts))


def _places_of_files(memory: PhysicalMemory, indices: Words, numbers: npt.NDArray[np.uint32]) -> Iterator[tuple[Mm, Words]]:
    """`places` for frames of page caches: wherever a process maps that page of the file (rmap_walk_file)."""
    if not memory.files:
        return
    for number in np.unique(numbers).tolist():
        file = memory.files.get(number)
        if file is None:
            continue
        offsets = indices[numbers == number]
        for space in list(file.mappers.values()):
            parts = [
                offsets[(offsets >= vma.pgoff) & (offsets < vma.pgoff + vma.end - vma.start)] - vma.pgoff + vma.start
                for vma in space.mm.vmas.all()
                if vma.file is file
            ]
            pages = np.concatenate(parts) if parts else offsets[:0]
            if len(pages):
                yield space.mm, distinct(pages)


def _inside(vma: Vma, indices: Words, anon_vmas: npt.NDArray[np.uint32]) -> Words:
    """The pages of `vma` that have one of `indices` in one of its anon_vmas."""
    first, end = vma.pgoff, vma.pgoff + vma.end - vma.start
    low, high = smallest(indices), largest(indices)
    if high < first or low >= end:
        return indices[:0]
    here = _one_of(anon_vmas, (vma.anon, *vma.chain))
    if low < first or high >= end:
        here &= (indices >= first) & (indices < end)
    found = indices if all_of(here) else indices[here]
    return found if vma.pgoff == vma.start else found - vma.pgoff + vma.start


def _one_of(anon_vmas: npt.NDArray[np.uint32], few: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Which of `anon_vmas` are among a `few`: comparing with each costs a pass, np.isin thirty."""
    if len(few) > FEW:
        return np.isin(anon_vmas, few)
    out: npt.NDArray[np.bool_] = anon_vmas == few[0]
    for number in few[1:]:
        if all_of(out):
            break
        out |= anon_vmas == number
    return out


def _in_process(mm: Mm, rows: Rows, indices: Words, frames: Words, *, ascend: bool) -> Iterator[Mapped]:
    found = _look(mm, rows, indices, frames, ascend=ascend)
    if len(found.rows):
        yield found
    if len(found.rows) == len(rows):
        return
    for vma in mm.vmas.all():
        if vma.pgoff != vma.start:
            inside = ((indices >= vma.pgoff) & (indices < vma.pgoff + vma.end - vma.start)).nonzero()[0]
            if len(inside):
                found = _look(mm, rows[inside], indices[inside] - vma.pgoff + vma.start, frames[inside], ascend=ascend)
                if len(found.rows):
                    yield found


def _look(mm: Mm, rows: Rows, pages: Words, frames: Words, *, ascend: bool) -> Mapped:
    entries = mm.table.gather(pages, ascend=ascend)
    some = pte.sample(entries)
    kinds = some & pte.KIND
    hit = (pte.frames_of(entries) == frames) & (
        ((kinds == pte.PRESENT) & (some & pte.SPECIAL == 0)) | (kinds == pte.DEVICE) | (kinds == pte.EXCLUSIVE) | (kinds == pte.HINT)
    )
    found = Mapped(mm, rows, pages, entries, ascend)
    return found if all_of(hit) else found.at(hit)
