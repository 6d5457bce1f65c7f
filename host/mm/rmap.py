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

from hmmnet.pages import Words

from . import pte
from .frames import PhysicalMemory
from .mm import Mm
from .vma import Vma

Rows = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Mapped:
    """Mappings of some frames in one process: frame number ``rows[i]`` of the list is mapped at ``pages[i]`` by ``entries[i]``."""

    mm: Mm
    rows: Rows
    pages: Words
    entries: Words


def mappings(memory: PhysicalMemory, frames: Words) -> Iterator[Mapped]:
    """Every mapping of `frames`: present, device-private or exclusive entries."""
    indices = memory.field(frames, "index")
    for family, rows in _by_family(memory, memory.field(frames, "mapping")):
        for mm in memory.families[family]:
            yield from _in_process(mm, rows, indices[rows], frames[rows])


def _by_family(memory: PhysicalMemory, anon_vmas: npt.NDArray[np.uint32]) -> Iterator[tuple[int, Rows]]:
    """Rows of `anon_vmas` by the family that they belong to."""
    known, which = np.unique(anon_vmas, return_inverse=True)
    families = np.array([memory.anon_families.get(number, 0) for number in known.tolist()])[which]
    for family in np.unique(families).tolist():
        if family:
            yield family, np.flatnonzero(families == family)


def places(memory: PhysicalMemory, frames: Words) -> Iterator[tuple[Mm, Words]]:
    """Where each of `frames` may be mapped, whether it is or not: the pages that an rmap walk visits, by process.

    The kernel announces CLEAR for each of them when it unmaps a shared page for migration, even where the page has been copied or unmapped
    since, and in the process that migrates itself (recordings r00992, r00945, r01323 show it by mirror entries that are gone).
    """
    indices = memory.field(frames, "index")
    anon_vmas = memory.field(frames, "mapping")
    yield from _places_of_files(memory, indices, anon_vmas)
    for family, rows in _by_family(memory, anon_vmas):
        for mm in memory.families[family]:
            found = [_inside(vma, indices[rows], anon_vmas[rows]) for vma in mm.vmas.all() if vma.anon]
            pages = np.concatenate(found) if found else indices[:0]
            if len(pages):
                yield mm, np.unique(pages)


def _places_of_files(memory: PhysicalMemory, indices: Words, numbers: npt.NDArray[np.uint32]) -> Iterator[tuple[Mm, Words]]:
    """`places` for frames of page caches: wherever a process maps that page of the file (rmap_walk_file)."""
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
                yield space.mm, np.unique(pages)


def _inside(vma: Vma, indices: Words, anon_vmas: npt.NDArray[np.uint32]) -> Words:
    """The pages of `vma` that have one of `indices` in one of its anon_vmas."""
    here = (indices >= vma.pgoff) & (indices < vma.pgoff + vma.end - vma.start) & np.isin(anon_vmas, (vma.anon, *vma.chain))
    return indices[here] - vma.pgoff + vma.start


def _in_process(mm: Mm, rows: Rows, indices: Words, frames: Words) -> Iterator[Mapped]:
    found = _look(mm, rows, indices, frames)
    if len(found.rows):
        yield found
    if len(found.rows) == len(rows):
        return
    for vma in mm.vmas.all():
        if vma.pgoff != vma.start:
            inside = np.flatnonzero((indices >= vma.pgoff) & (indices < vma.pgoff + vma.end - vma.start))
            if len(inside):
                found = _look(mm, rows[inside], indices[inside] - vma.pgoff + vma.start, frames[inside])
                if len(found.rows):
                    yield found


def _look(mm: Mm, rows: Rows, pages: Words, frames: Words) -> Mapped:
    entries = mm.table.gather(pages)
    kinds = entries & pte.KIND
    hit = (pte.frames_of(entries) == frames) & (
        ((kinds == pte.PRESENT) & (entries & pte.SPECIAL == 0)) | (kinds == pte.DEVICE) | (kinds == pte.EXCLUSIVE) | (kinds == pte.HINT)
    )
    return Mapped(mm, rows[hit], pages[hit], entries[hit])
