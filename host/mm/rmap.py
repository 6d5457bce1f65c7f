"""The reverse map (mm/rmap.c): which processes map a frame, and where.

An anonymous frame knows its family (`mapping`) and the page where it was first mapped (`index`). Every process of the family that still
maps it does so at that very page, unless the VMA was moved: then at the same distance into a VMA whose `pgoff` tells. So the search is, for
each process of the family, one look into its page table at all the indices at once, and one for each VMA that lies elsewhere than its
`pgoff`. An entry that holds the frame is a mapping; an entry that does not was unmapped, copied, or never existed.
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
    families = memory.field(frames, "mapping")
    indices = memory.field(frames, "index")
    for family in np.unique(families).tolist():
        rows = np.flatnonzero(families == family)
        for mm in memory.families.get(family, ()):
            yield from _in_process(mm, rows, indices[rows], frames[rows])


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
    entries = mm.table.take(pages)
    kinds = entries & pte.KIND
    hit = (pte.frames_of(entries) == frames) & (
        ((kinds == pte.PRESENT) & (entries & pte.SPECIAL == 0)) | (kinds == pte.DEVICE) | (kinds == pte.EXCLUSIVE)
    )
    return Mapped(mm, rows[hit], pages[hit], entries[hit])
