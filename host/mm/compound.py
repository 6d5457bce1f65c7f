"""Huge pages in migrations that go page by page (MIGRATE_VMA_SELECT_COMPOUND; `folio_split` of struct dev_pagemap_ops).

Most huge pages have a row of their own (`pmd.py`). This is for the others: shared after fork, held page by page, torn off on the way.

The arrays of a migration have a word for each small page, of huge pages too; what makes 512 of them one is the HUGE bit of their
entries, which migration entries carry along. It stays as long as all 512 go the same way, from one aligned run to another:

- pages of a block of which only a part is collected are mapped one by one first (`tear_collected`);
- a block whose target is not one aligned run (the driver had no large page, or gave up some of it) arrives as small pages (`fit_targets`);
- a block that was never touched, or is the huge zero page, becomes a huge page of the device if its targets are one (`join_inserted`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmmnet.host.interfaces import Migration
from hmmnet.pages import (
    HUGE_PAGES,
    HUGE_SHIFT,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    Words,
    all_of,
    any_of,
    bits_in_all,
    bits_in_any,
    is_one_run,
    word_of,
)

from . import pte
from .frames import PhysicalMemory
from .huge import blocks_of, split_entries
from .mm import Mm
from .zones import COMPOUND

BOTH = MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE
_SHIFT = word_of(HUGE_SHIFT)

Rows = npt.NDArray[np.intp]


def is_huge_run(frames: Words) -> bool:
    """Whether `frames` can be one huge page."""
    return len(frames) == HUGE_PAGES and int(frames[0]) % HUGE_PAGES == 0 and is_one_run(frames)


def whole_blocks(entries: Words, pages: Words) -> list[int]:
    """Where in `pages` huge pages begin that are there whole, by the `entries` that mapped them."""
    if not bits_in_any(entries) & pte.HUGE:
        return []
    first = np.flatnonzero((entries & pte.HUGE != 0) & (pages % HUGE_PAGES == 0))
    last = HUGE_PAGES - 1
    return [at for at in first.tolist() if at + last < len(pages) and int(pages[at + last]) == int(pages[at]) + last]


def tear_collected(mm: Mm, pages: Words, entries: Words, rows: Rows) -> Rows:
    """`rows` of `pages` are about to be collected: blocks that are not there whole are mapped one by one, or left out.

    Memory of a device can be torn at any time; a page of system memory that could not be split is held by somebody, and stays. Changes
    `entries` as it does the table.
    """
    taken = entries if len(rows) == len(entries) else entries[rows]
    if not bits_in_any(taken) & pte.HUGE:
        return rows
    huge = taken & pte.HUGE != 0
    blocks = pages[rows] >> _SHIFT
    keep = np.ones(len(rows), np.bool_)
    for block in np.unique(blocks[huge]).tolist():
        at = blocks == block
        if int(np.count_nonzero(at)) == HUGE_PAGES:
            continue
        if any_of(entries[rows[at]] < pte.DEVICE_MIN):
            keep &= ~at
        else:
            split_entries(mm, block << HUGE_SHIFT)
            entries[rows[at]] &= ~word_of(pte.HUGE)
    return rows[keep]


def tear_mapped(mm: Mm, pages: Words, entries: Words) -> Words:
    """A further mapping of collected pages: its huge pages that are not there whole are mapped one by one. Its `entries` then."""
    if not bits_in_any(entries) & pte.HUGE:
        return entries
    entries = entries.copy()
    huge = entries & pte.HUGE != 0
    blocks, counts = np.unique(pages[huge] >> _SHIFT, return_counts=True)
    for block in blocks[counts < HUGE_PAGES].tolist():
        split_entries(mm, block << HUGE_SHIFT)
        entries[pages >> _SHIFT == block] &= ~word_of(pte.HUGE)
    return entries


def fit_targets(memory: PhysicalMemory, mm: Mm | None, migration: Migration) -> None:
    """Folios whose targets are not one aligned run are split, while nobody can touch them; those without any stay, as they are."""
    source = migration.source
    whole = bits_in_all(source) & BOTH == BOTH
    rows = None if whole else (source & word_of(BOTH) == BOTH).nonzero()[0]
    frames = (source if rows is None else source[rows]) >> word_of(MIGRATE_PFN_SHIFT)
    if not memory.bits_in_any(frames, "flags") & COMPOUND:
        return
    large = memory.field(frames, "flags") & COMPOUND != 0
    rows, frames = large.nonzero()[0] if rows is None else rows[large], frames[large]
    targets = migration.target[rows]
    heads = frames >> _SHIFT
    for head in np.unique(heads).tolist():
        at = heads == head
        new = targets[at]
        valid = new & word_of(MIGRATE_PFN_VALID) != 0
        if any_of(valid) and not (all_of(valid) and is_huge_run(frames[at]) and is_huge_run(new >> word_of(MIGRATE_PFN_SHIFT))):
            split_under_way(memory, mm, migration, rows[at], head)


def split_under_way(memory: PhysicalMemory, mm: Mm | None, migration: Migration, rows: Rows, head: int) -> None:
    """Split the folio of block `head` of frames, `rows` of `migration`, that is behind migration entries."""
    frames = np.arange(head << HUGE_SHIFT, (head + 1) << HUGE_SHIFT, dtype=np.uint64)
    for zone, _, at in memory.groups(frames):
        zone.flags[at] &= ~np.uint32(COMPOUND)
    if mm is not None:
        _split_blocks(mm, migration.pages[rows])
    for mapped in migration.others:
        _split_blocks(mapped.mm, mapped.pages[pte.frames_of(mapped.entries) >> _SHIFT == np.uint64(head)])


def _split_blocks(mm: Mm, pages: Words) -> None:
    for block in blocks_of(pages) if len(pages) else ():
        if mm.table.get(block) & pte.HUGE:
            split_entries(mm, block)


def split_zeros(mm: Mm, pages: Words, entries: Words) -> npt.NDArray[np.bool_]:
    """None of `pages` becomes a huge page; the huge zero page, which a load may have mapped there since they were collected, is split."""
    for block in np.unique(pages[entries & pte.HUGE != 0] >> _SHIFT).tolist():
        split_entries(mm, block << HUGE_SHIFT)
    return np.zeros(0, np.bool_)


def join_inserted(mm: Mm, pages: Words, entries: Words, frames: Words) -> npt.NDArray[np.bool_]:
    """Which of `pages`, that a migration fills with `frames`, become huge pages; what was the huge zero page only in part is split."""
    joined = np.zeros(len(pages), np.bool_)
    blocks = pages >> _SHIFT
    for block in np.unique(blocks).tolist():
        at = blocks == block
        whole = int(np.count_nonzero(at)) == HUGE_PAGES and is_huge_run(frames[at])
        if whole and block << HUGE_SHIFT not in mm.small_blocks:  # where there is a page table, nothing is mapped as one
            joined |= at
        elif any_of(entries[at] & pte.HUGE != 0):
            split_entries(mm, block << HUGE_SHIFT)
        else:
            mm.small_blocks.add(block << HUGE_SHIFT)
    return joined
