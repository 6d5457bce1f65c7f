"""A look at a page table as v25's walker made it (hmm_vma_walk_pmd): one word for each page, and which pages want a fault first.

Rights are those of the entry alone, and the right to read that of the VMA. What differs from today's table: an empty entry is told from one
that cannot be looked at; a page in a device's private memory is always reported, whoever owns it, and never brought home for a reader;
a huge page is 512 pages.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hmmnet.host.mm import pte
from hmmnet.pages import Words

from .pfn import (
    HMM_PFN_DEVICE_UNADDRESSABLE,
    HMM_PFN_EMPTY,
    HMM_PFN_ERROR,
    HMM_PFN_READ,
    HMM_PFN_SHIFT,
    HMM_PFN_SPECIAL,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
)

Flags = npt.NDArray[np.bool_]
_SHIFT = np.uint64(HMM_PFN_SHIFT)


class Look(NamedTuple):
    """Words for a snapshot; `missing` are pages that a fault would bring, `moving` those under migration, of which neither is known yet."""

    words: Words
    missing: Flags
    moving: Flags


def look(entries: Words, *, write: bool) -> Look:
    """What the walker says of `entries` of a readable VMA; with `write`, one that cannot be written is missing."""
    kinds = pte.kinds_of(entries)
    writable = entries & np.uint64(pte.WRITE) != 0
    special = entries & np.uint64(pte.SPECIAL) != 0
    present, private = kinds == pte.PRESENT, kinds == pte.DEVICE
    mapped = present | private
    words = np.where(mapped, pte.frames_of(entries) << _SHIFT | np.uint64(HMM_PFN_VALID | HMM_PFN_READ), np.uint64(0))
    words[mapped & writable] |= np.uint64(HMM_PFN_WRITE)
    words[present & special] |= np.uint64(HMM_PFN_SPECIAL)
    words[private] |= np.uint64(HMM_PFN_DEVICE_UNADDRESSABLE)
    words[kinds == pte.NONE] = HMM_PFN_EMPTY
    markers = kinds == pte.MARKER
    pages_missing = (kinds == pte.NONE) | (kinds == pte.SWAP) | (markers & (pte.frames_of(entries) == pte.MARKER_UFFD_WP))
    words[markers & ~pages_missing | (kinds == pte.EXCLUSIVE)] = HMM_PFN_ERROR
    missing = pages_missing | (mapped & ~writable & write)
    return Look(words, missing, kinds == pte.MIGRATION)
