"""Page lists between a device and its host: what is offered to a migration, what the host answers, and what came of it.

Pages and frames are numbers in ascending order; a large one (`hmmnet.pages.LARGE`) stands for its 512. A migration's words are one for each
position of its range, a huge page's one for all of it. Pure: arrays in, arrays out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hmmnet.errors import ProtocolError
from hmmnet.pages import (
    HUGE_PAGES,
    LARGE,
    MIGRATE_PFN_COMPOUND,
    PAGES_MAX,
    Words,
    among,
    bits_in_any,
    from_wire,
    has_large,
    page_by_page,
    pages_in,
    word_of,
)

from .memory import PAGES_PER_LIST_MAX

_PAGE = word_of(LARGE - 1)


@dataclass(frozen=True)
class Moved:
    """What a migration did: the pages that moved, in order, and the errno at which it stopped early (0: it did not)."""

    listed: Words
    """The pages, large ones marked."""
    tried_until: int
    """From here on nothing was tried: the device had no frames left, or (with an errno) the host stopped there."""
    errno: int = 0

    @property
    def pages(self) -> Words:
        """The pages, one by one."""
        return page_by_page(self.listed)

    @property
    def count(self) -> int:
        """How many pages."""
        return pages_in(self.listed)


def positions(start: int, words: Words) -> Words:
    """The pages that MIGRATE_PFN `words` of a range from `start` on are for, large ones marked."""
    if not bits_in_any(words) & MIGRATE_PFN_COMPOUND:
        return np.arange(start, start + len(words), dtype=np.uint64)
    large = words & word_of(MIGRATE_PFN_COMPOUND) != 0
    counts = np.where(large, HUGE_PAGES, 1)
    pages = (np.cumsum(counts) - counts + start).astype(np.uint64)
    pages[large] |= word_of(LARGE)
    return pages


def positioned(start: int, end: int, pages: Words, frames: Words) -> Words:
    """`frames`, for `pages` of [start, end), position by position: 0 for pages that are not among them."""
    if pages_in(pages) == end - start:
        return frames
    if not has_large(pages):
        listed = np.zeros(end - start, np.uint64)
        listed[pages - np.uint64(start)] = frames
        return listed
    gaps = np.setdiff1d(np.arange(start, end, dtype=np.uint64), page_by_page(pages), assume_unique=True)
    order = np.argsort(np.concatenate((pages & _PAGE, gaps)), kind="stable")
    return np.concatenate((frames, np.zeros(len(gaps), np.uint64)))[order]


def matched(start: int, words: Words, pages: Words, frames: Words) -> tuple[Words, Words, Words]:
    """The host's `words` for a range, `pages` and the `frames` offered for them, one for one.

    `words` stand for as many pages as the range has (`Bus.migrate` sees to it) and `pages` lie in it, ascending: so as many words as pages,
    with no huge one among either, are of the same pages, which nobody compares.

    A huge page for which the host answers page by page goes page by page; words for what nothing was offered for are left out. Raises
    ProtocolError for a huge page where none was offered.
    """
    if len(words) == len(pages) and not bits_in_any(words) & MIGRATE_PFN_COMPOUND and not has_large(pages):
        return words, pages, frames  # all of the range, page by page
    answered = positions(start, words)
    if np.array_equal(answered, pages):
        return words, pages, frames
    apart = (pages >= word_of(LARGE)) & ~among(pages, answered)
    if apart.any():
        pages, frames = (np.concatenate((listed[~apart], page_by_page(listed[apart]))) for listed in (pages, frames))
        order = np.argsort(pages & _PAGE, kind="stable")
        pages, frames = pages[order], frames[order]
    if len(answered) != len(pages) or not np.array_equal(answered, pages):
        known = among(answered, pages)
        if has_large(answered[~known]) or int(np.count_nonzero(known)) != len(pages):
            raise ProtocolError("the host's Migrated has words for huge pages that were not offered, or none for pages that were")
        words = words[known]
    return words, pages, frames


def pages_listed(raw: bytes, what: str) -> Words:
    """The page list in `raw`, large pages marked. Raises ProtocolError for half a word, and for a page that no address space has."""
    if len(raw) % 8:
        raise ProtocolError(f"{what} has {len(raw)} bytes; a page list is whole 64-bit words")
    pages = from_wire(raw)
    if pages_in(pages) > PAGES_PER_LIST_MAX:
        raise ProtocolError(f"{what} stands for {pages_in(pages)} pages; at most {PAGES_PER_LIST_MAX} are taken")
    last = (pages & _PAGE).max() if len(pages) else 0
    if last >= PAGES_MAX:
        raise ProtocolError(f"{what} names page 0x{int(last):x}, which no address space has")
    return pages
