"""A region of memory that actors share: where it is mapped, with which rights, and the history of its words.

Mappings change while others access them. What an access may meet then is judged by three counts for each page, noted when it begins and
looked at again when it ends: changes of *place* (unmapped, moved: an access may be SIGSEGV, and a store may be nowhere), of *rights*
(SIGSEGV, or not), and pages that were *given up* (a reference to the old page shows what was there). If nothing changed, the outcome is
fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from hmmnet.pages import PAGE_SIZE
from hmmnet.program import MemoryFile

from .history import Clock, History
from .words import HUGE_SPREAD

WORD_BYTES = 8
WORDS_PER_PAGE = PAGE_SIZE // WORD_BYTES
RIGHTS = {"none": 0, "r": 1, "rw": 3}
READ, WRITE = 1, 2

Counts = tuple[int, ...]


class Look(NamedTuple):
    """The `counts` of a region when an access to some of its pages began. `changes` are those of the region then; -1: one was under way."""

    pages: slice
    counts: dict[str, Counts]
    changes: int

    def changing(self, what: str) -> bool:
        """Whether one of its pages was changing then."""
        return any(count & 1 for count in self.counts[what][self.pages])


class Region:
    """`pages` pages at `base`. `spread` says where each lies behind it, in pages; `file` is what is mapped, if it is a file."""

    def __init__(self, clock: Clock, number: int, kind: str, pages: int, base: int) -> None:
        self.number = number
        self.kind = kind
        self.pages = pages
        self.base = base
        self.spread = list(HUGE_SPREAD[:pages]) if kind == "huge" else list(range(pages))
        self.span_pages = 512 if kind == "huge" else pages
        self.history = History(clock, pages * WORDS_PER_PAGE)
        self.file: MemoryFile | None = None
        self.rights = [RIGHTS["rw"]] * pages
        self._counts: dict[str, Counts] = dict.fromkeys(("place", "rights", "given_up"), (0,) * pages)
        """Never changed, but made anew: accesses keep what there was when they began, and most begin and end without a change."""
        self._changes = 0
        """Changes of any kind that have begun."""
        self._changing = 0
        """Those under way."""

    @property
    def is_private(self) -> bool:
        """Whether a child has a copy of its own."""
        return self.kind in {"anon", "huge", "lanes", "counters"}

    @property
    def span_bytes(self) -> int:
        """What is mapped."""
        return self.span_pages * PAGE_SIZE

    def address(self, word: int) -> int:
        """Of a word, where the region is now."""
        page, inside = divmod(word, WORDS_PER_PAGE)
        return self.base + self.spread[page] * PAGE_SIZE + inside * WORD_BYTES

    def word_at(self, address: int) -> int | None:
        """The word at an address, if it is one of this region's."""
        page, inside = divmod(address - self.base, PAGE_SIZE)
        return self.spread.index(page) * WORDS_PER_PAGE + inside // WORD_BYTES if page in self.spread else None

    def run(self, page: int, count: int) -> tuple[int, int]:
        """(first, how many) of at most `count` pages from `page` on that lie behind each other."""
        page %= self.pages
        spread, last, end = self.spread, page, page + count - 1
        if end >= self.pages:
            end = self.pages - 1
        while last < end and spread[last + 1] == spread[last] + 1:
            last += 1
        return page, last - page + 1

    def words(self, page: int, word: int, count: int) -> tuple[int, int]:
        """(first, how many) of at most `count` words from `word` of `page` on that lie behind each other."""
        first_page, pages = self.run(page, 2 + count // WORDS_PER_PAGE)
        first = first_page * WORDS_PER_PAGE + word % WORDS_PER_PAGE
        return first, min(count, (first_page + pages) * WORDS_PER_PAGE - first)

    # --- changes --------------------------------------------------------------------------------------------------------------

    @contextmanager
    def changing(self, what: str, page: int = 0, count: int | None = None) -> Iterator[None]:
        """`what` (``place``, ``rights``, ``given_up``) of some pages changes while the block runs."""
        pages = range(page, self.pages if count is None else page + count)
        self._changes += 1
        self._changing += 1
        self._count(what, pages)
        try:
            yield
        finally:
            self._changing -= 1
            self._count(what, pages)

    def _count(self, what: str, pages: range) -> None:
        """A change of some pages has begun, or ended."""
        counts = list(self._counts[what])
        for page in pages:
            counts[page] += 1
        self._counts = {**self._counts, what: tuple(counts)}

    def look(self, first: int, count: int) -> Look:
        """An access to words begins."""
        pages = slice(first // WORDS_PER_PAGE, (first + count - 1) // WORDS_PER_PAGE + 1)
        return Look(pages, self._counts, -1 if self._changing else self._changes)

    def stayed(self, look: Look, what: str = "place") -> bool:
        """Whether nothing changed since, and nothing was changing."""
        pages = look.pages
        return look.changes == self._changes or (look.counts[what][pages] == self._counts[what][pages] and not look.changing(what))

    def may(self, look: Look, right: int) -> bool | None:
        """Whether the access had that right on all pages; None: it changed meanwhile."""
        if look.changes != self._changes and not (self.stayed(look) and self.stayed(look, "rights")):
            return None
        return bool(min(self.rights[look.pages]) & right)  # who may store may load, so that the least says what all may
