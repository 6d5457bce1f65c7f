"""The two kinds of words that v25 hands to a driver: HMM_PFN_* of a mirror and MIGRATE_PFN_* of a migration (Linux 4.14).

They differ from today's in every bit: there is one for the right to read, and others for what the walker met. A migration says who holds a
page's lock (LOCKED), whether it lives on a device (DEVICE) and whether its data are lost (ERROR).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from hmmnet.pages import DEVICE_ZONE_MIN, ZONE_SHIFT, Words

HMM_PFN_VALID: Final = 1 << 0
"""The frame is good to be mapped."""
HMM_PFN_READ: Final = 1 << 1
HMM_PFN_WRITE: Final = 1 << 2
HMM_PFN_ERROR: Final = 1 << 3
"""Nothing can be had there: poisoned, behind the end of a file, or without the right that was asked for."""
HMM_PFN_EMPTY: Final = 1 << 4
"""Nothing is mapped there yet (pte_none)."""
HMM_PFN_SPECIAL: Final = 1 << 5
"""A page without a struct page that a device could use; together with VALID and READ: the zero page."""
HMM_PFN_DEVICE_UNADDRESSABLE: Final = 1 << 6
"""It lives in the private memory of a device, whichever that is."""
HMM_PFN_SHIFT: Final = 7

MIGRATE_PFN_VALID: Final = 1 << 0
MIGRATE_PFN_MIGRATE: Final = 1 << 1
MIGRATE_PFN_LOCKED: Final = 1 << 2
MIGRATE_PFN_WRITE: Final = 1 << 3
MIGRATE_PFN_DEVICE: Final = 1 << 4
MIGRATE_PFN_ERROR: Final = 1 << 5
"""In `dst`, on the way home: the data are lost."""
MIGRATE_PFN_SHIFT: Final = 6

DEVICE_FRAME_MIN: Final = DEVICE_ZONE_MIN << ZONE_SHIFT
"""Frames from here on are devices'."""


def hmm_pfn_to_frame(word: int) -> int | None:
    """hmm_pfn_t_to_pfn: the frame of a word, None where it has none."""
    return word >> HMM_PFN_SHIFT if word & HMM_PFN_VALID else None


def migrate_pfn(frame: int) -> int:
    """migrate_pfn: the word of a destination, without LOCKED."""
    return frame << MIGRATE_PFN_SHIFT | MIGRATE_PFN_VALID


def migrate_pfn_to_frame(word: int) -> int | None:
    """migrate_pfn_to_page: the frame of a word, None where it has none."""
    return word >> MIGRATE_PFN_SHIFT if word & MIGRATE_PFN_VALID else None


def frames_of(words: Words) -> Words:
    """The frames of MIGRATE_PFN words."""
    return words >> np.uint64(MIGRATE_PFN_SHIFT)
