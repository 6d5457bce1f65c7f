"""The mirrored page table of one context, and the device's half of the read-begin / read-retry protocol.

What ``hmm_mirror`` drivers keep: for each page of the mirrored process that the device may use, a frame and rights. The CPU page table
is elsewhere, in another process, so a translation is a promise with a condition: *good until you are told to drop it*.

The protocol (mm/mmu_notifier.c, Documentation/mm/hmm.rst): the host answers a range fault with words and the subscription's sequence.
Before the device programs them it compares that sequence with the one it was last told by an `Invalidate` (`is_current`). If it was told
a later one, something was dropped since the words were read: throw them away and ask again. An earlier one is good: the host moves a
sequence on without a word where the device holds nothing. In the kernel the comparison and the programming happen under the driver's lock;
here both are synchronous calls with no await between them, so no message can be handled in between.

The sequence does not cover migrations that the device caused itself: drivers filter those events, and so does the host. Nor does it
cover a `CopyOut`. Both change translations all the same, so whoever holds words in flight also holds a `Watch`: every local reason
to drop pages is entered in the watches it overlaps, and `is_current` is false for a watch with an entry, or for words that lead to an
own frame that was copied out since the watch began. (test_hmm itself loses here: a range fault that read a device page while a CPU
fault was taking it home programs a dead frame.)

Entries: frame number from bit 8, VALID 1, WRITE 2, ATOMIC 4; 0 is no entry. A huge page of the own memory is one entry for its block
(`hmmnet.pagetable`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hmmnet.pages import (
    HMM_PFN_ERROR,
    HMM_PFN_FRAME_MASK,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HUGE_SHIFT,
    LARGE,
    PAGES_MAX,
    Words,
    all_of,
    among,
    any_of,
    ascending,
    has_large,
    largest,
    page_by_page,
    runs_of,
    smallest,
    word_of,
)
from hmmnet.pagetable import PageTable

from .memory import Memory

ENTRY_VALID = 1
ENTRY_WRITE = 2
ENTRY_ATOMIC = 4
ENTRY_SHIFT = 8

_SHIFT = word_of(ENTRY_SHIFT)
_VALID = word_of(ENTRY_VALID)
_WRITE = word_of(ENTRY_WRITE)
_WRITABLE = _VALID | _WRITE
_PFN_VALID = word_of(HMM_PFN_VALID)
_PFN_USABLE = word_of(HMM_PFN_VALID | HMM_PFN_ERROR)
_PFN_WRITE = word_of(HMM_PFN_WRITE)
_PFN_FRAME = word_of(HMM_PFN_FRAME_MASK)
_PAGE = word_of(LARGE - 1)
_BLOCK = word_of(HUGE_SHIFT)
_NO_PAGES = np.zeros(0, dtype=np.uint64)


def frames_of(entries: Words) -> Words:
    """The frame numbers in mirror entries."""
    return entries >> _SHIFT


def allows(entries: Words, write: bool) -> npt.NDArray[np.bool_]:
    """Which entries permit an access."""
    needed = _WRITABLE if write else _VALID
    allowed: npt.NDArray[np.bool_] = (entries & needed) == needed
    return allowed


@dataclass(eq=False)
class Subscription:
    """An interval that the host tells us about; `sequence` is what the last invalidation set."""

    number: int
    start: int
    end: int
    sequence: int


@dataclass(eq=False)
class Watch:
    """Words about pages [start, end) are under way; `dropped` collects the page ranges that were dropped meanwhile.

    `announced` are those dropped for a migration of this device: they came before their pages were collected, so what the migration then
    brings is good. `since` is how many copies out the memory had counted before (`Memory.departures`). `subscription`: the words say at
    which of its sequences they are good, so what was dropped with a sequence of its own is not told twice; 0: they say nothing.
    """

    start: int
    end: int
    since: int
    subscription: int = 0
    dropped: list[tuple[int, int]] = field(default_factory=list)
    announced: list[tuple[int, int]] = field(default_factory=list)

    def keeps(self, pages: Words) -> npt.NDArray[np.bool_]:
        """Which of `pages` were not dropped since the watch began."""
        return _outside(pages, self.dropped) & _outside(pages, self.announced)

    def brings(self, pages: Words) -> npt.NDArray[np.bool_]:
        """Which of `pages`, that a migration has brought here, were not dropped after it had collected them."""
        return _outside(pages, self.dropped)


def _outside(pages: Words, ranges: list[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    outside = np.ones(len(pages), dtype=np.bool_)
    for start, end in ranges:
        outside &= (pages < np.uint64(start)) | (pages >= np.uint64(end))
    return outside


@dataclass(eq=False)
class Hidden:
    """Entries out of the table for the time of a migration."""

    watch: Watch
    pages: Words
    entries: Words


class Mirror:
    """The mirror of process number `process` in context `context`. `slot` is its number in the memory's reverse map."""

    def __init__(self, context: int, process: int, slot: int, memory: Memory, *, end_inclusive: bool = False) -> None:
        self.context = context
        self.process = process
        self.slot = slot
        self.end_inclusive = end_inclusive
        """test_hmm's callback drops one page too many: the one that begins at the end of the range (xa_for_each_range is inclusive)."""
        self.subscriptions: dict[int, Subscription] = {}
        self._memory = memory
        self.table = PageTable(ENTRY_SHIFT)
        """Page -> entry. Change it by the methods here."""
        self._watches: list[Watch] = []
        self._early: dict[int, int] = {}
        self._subscribing = 0

    # --- lookups --------------------------------------------------------------------------------------------------------------

    def translate(self, pages: Words) -> Words:
        """The entries of `pages`."""
        return self.table.gather(pages)

    def range(self, start: int, end: int) -> Words:
        """The entries of [start, end)."""
        return self.table.read(start, end)

    def translations(self, start: int = 0, most: int | None = None) -> tuple[Words, Words, npt.NDArray[np.bool_]]:
        """(pages, frames, may write) of every entry that may be used now, from page `start` on; of the first `most`."""
        pages = self.table.occupied(start, PAGES_MAX)
        entries = self.table.gather(pages)
        usable = allows(entries, False).nonzero()[0][:most]
        return pages[usable], frames_of(entries[usable]), allows(entries[usable], True)

    def touched(self) -> Words:
        """The pages with entries that may be others since the last call: for one who checks them."""
        small, blocks = self.table.ptes.take_touched_pages(), self.table.pmds.take_touched_pages()
        return small if not len(blocks) else np.concatenate((small, page_by_page((blocks << _BLOCK) | word_of(LARGE))))

    def held(self, pages: Words) -> tuple[Words, Words, npt.NDArray[np.bool_]]:
        """`translations`, of `pages`."""
        entries = self.table.gather(pages)
        usable = allows(entries, False)
        if not all_of(usable):
            pages, entries = pages[usable], entries[usable]
        return pages, frames_of(entries), allows(entries, True)

    def held_one(self, page: int) -> tuple[int, bool] | None:
        """(frame, may write) of one page, if it has an entry that may be used."""
        entry = self.table.get(page)
        return (entry >> ENTRY_SHIFT, entry & ENTRY_WRITE != 0) if entry & ENTRY_VALID else None

    def has_exclusive(self, start: int, end: int) -> bool:
        """Whether a page of [start, end) is mapped for exclusive access."""
        return any(bool((part & word_of(ENTRY_ATOMIC)).any()) for _, part, _ in self.table.parts(start, end))

    def mapped_count(self) -> int:
        """Valid entries."""
        return sum(int(np.count_nonzero(part)) * pages for _, part, pages in self.table.parts(0, PAGES_MAX))

    def vacant(self, start: int, end: int) -> Words:
        """The aligned blocks (page >> HUGE_SHIFT) of [start, end) of which nothing is mapped."""
        return self.table.untouched(start, end)

    # --- subscriptions --------------------------------------------------------------------------------------------------------

    def subscribing(self) -> None:
        """A Subscribe is on its way: an Invalidate for the new subscription may overtake our reading of the reply."""
        self._subscribing += 1

    def subscribed(self, number: int, start: int, end: int, sequence: int) -> Subscription:
        """The reply is here."""
        made = Subscription(number, start, end, self._early.pop(number, sequence))
        self.subscriptions[number] = made
        self.subscribe_over()
        return made

    def subscribe_over(self) -> None:
        """The Subscribe that `subscribing` announced is answered, or failed."""
        self._subscribing -= 1
        if not self._subscribing:
            self._early.clear()

    # --- dropping -------------------------------------------------------------------------------------------------------------

    def invalidate(
        self, subscription: int, start: int, end: int, sequence: int, *, announced: bool = False, keep_own: bool = False
    ) -> None:
        """mmu_interval_set_seq and the tearing down of [start, end), which no access survives from here on.

        `announced`: for a migration of this device, before anything was copied (see `Watch`). `keep_own`: under v25, which tells whoever
        migrates, too; pages that are in own memory stay there, or are asked for by `CopyOut`, which drops them.
        """
        known = self.subscriptions.get(subscription)
        told = 0
        if known is not None:
            known.sequence = sequence
            told = subscription
        elif self._subscribing:
            self._early[subscription] = sequence
        end = min(end + self.end_inclusive, PAGES_MAX)
        if keep_own:
            for _, part in self.table.present(start, end):
                part[~self._memory.owns(frames_of(part))] = 0
            self._tell_watches(start, end, told, announced=announced)
        else:
            self.drop(start, end, told, announced=announced)

    def drop(self, start: int, end: int, told: int = 0, *, announced: bool = False) -> None:
        """Remove the entries of [start, end) and mark what is under way for them. `told`: see `_tell_watches`."""
        self.table.clear(start, end)
        self._tell_watches(start, end, told, announced=announced)

    def drop_pages(self, pages: Words) -> None:
        """Remove the entries of `pages`, which may be large."""
        if len(pages) == 0:
            return
        if has_large(pages):
            large = pages >= word_of(LARGE)
            blocks = (pages[large] & _PAGE) >> _BLOCK
            for first, end in runs_of(np.sort(blocks)):
                self.drop(first << HUGE_SHIFT, end << HUGE_SHIFT)
            pages = pages[~large]
            if len(pages) == 0:
                return
        self.table.scatter(pages, 0)
        self._tell_watches(smallest(pages), largest(pages) + 1)

    def drop_frames(self, pages: Words, frames: Words) -> None:
        """Remove the entries of those `pages` (a hint from the reverse map) that lead to one of `frames` (sorted); both may be large."""
        if has_large(pages):
            large = pages >= word_of(LARGE)
            pmds = self.table.pmds.gather((pages[large] & _PAGE) >> _BLOCK)
            hit = (pmds != 0) & np.isin(frames_of(pmds) | word_of(LARGE), frames)
            self.drop_pages(pages[large][hit])
            pages = np.concatenate((pages[~large], self._one_by_one(pages[large][pmds == 0])))
            if len(pages) == 0:
                return
        frames = ascending(page_by_page(frames))
        entries = self.table.gather(pages)
        if not any_of(entries != 0):  # as it mostly is: they went when the pages were copied out
            return
        held = frames_of(entries)
        places = np.minimum(np.searchsorted(frames, held), len(frames) - 1)
        self.drop_pages(pages[frames[places] == held])

    def _one_by_one(self, large: Words) -> Words:
        """The pages of those `large` ones of which some are mapped by entries of their own."""
        blocks = (large & _PAGE) >> _BLOCK
        if len(blocks) == 0:
            return blocks
        vacant = self.table.untouched(int(blocks.min()) << HUGE_SHIFT, int(blocks.max()) + 1 << HUGE_SHIFT)
        return page_by_page(large[~np.isin(blocks, vacant)])

    def drop_page(self, page: int, frame: int) -> None:
        """Remove the entry of `page` if it leads to the own `frame`: `drop_frames` for one, without arrays."""
        if self.table.get(page) >> ENTRY_SHIFT == frame:
            self.table.set(page, 0)
            self._tell_watches(page, page + 1)

    def clear(self) -> None:
        """Forget everything (close, fence)."""
        self.table = PageTable(ENTRY_SHIFT)
        self._tell_watches(0, PAGES_MAX)

    def _tell_watches(self, start: int, end: int, told: int = 0, *, but: Watch | None = None, announced: bool = False) -> None:
        """[start, end) was dropped. `told`: by which subscription, if it has a new sequence now."""
        for watch in self._watches:
            if watch is not but and watch.start < end and start < watch.end and not (told and watch.subscription == told):
                (watch.announced if announced else watch.dropped).append((start, end))

    # --- programming ----------------------------------------------------------------------------------------------------------

    def watch(self, start: int, end: int, subscription: int = 0) -> Watch:
        """Begin to watch [start, end), for words that come with a sequence of `subscription` (0: with none); end it with `unwatch`."""
        made = Watch(start, end, self._memory.departures, subscription)
        self._watches.append(made)
        return made

    def unwatch(self, watch: Watch) -> None:
        """The words came and were used, or will not come."""
        self._watches.remove(watch)

    def is_current(self, subscription: Subscription, sequence: int, watch: Watch, words: Words) -> bool:
        """mmu_interval_read_retry, the other way round: whether `words` read at `sequence` still hold. Use them before any await."""
        if subscription.sequence > sequence or watch.dropped or watch.announced or subscription.number not in self.subscriptions:
            return False
        frames = words[(words & _PFN_USABLE) == _PFN_VALID] & _PFN_FRAME
        own = frames[self._memory.owns(frames)]
        return not len(own) or all_of(self._memory.stays(own, watch.since))

    def program(self, start: int, words: Words) -> None:
        """Enter a range fault's usable words from page `start` on; entries of pages without a usable word stay as they are."""
        usable = (words & _PFN_USABLE) == _PFN_VALID
        if not any_of(usable):
            return
        frames = words & _PFN_FRAME
        entries = frames << _SHIFT | _VALID | np.where(words & _PFN_WRITE != 0, _WRITE, word_of(0))
        if all_of(usable):
            self.table.write(start, entries)
        else:
            self.table.scatter((np.flatnonzero(usable) + start).astype(np.uint64), entries[usable])
        own = usable & self._memory.owns(frames)
        if any_of(own):
            self._memory.note_mapping(self.slot, (np.flatnonzero(own) + start).astype(np.uint64), frames[own])

    def program_own(self, pages: Words, frames: Words, writable: npt.NDArray[np.bool_]) -> None:
        """Enter pages that just moved into own frames; both may be large, at the same positions."""
        if len(pages) == 0:
            return
        entries = (frames & _PAGE) << _SHIFT | _VALID | np.where(writable, _WRITE, word_of(0))
        if has_large(pages):
            large = pages >= word_of(LARGE)
            blocks = (pages[large] & _PAGE) >> _BLOCK
            for first, end in runs_of(np.sort(blocks)):
                self.table.clear(first << HUGE_SHIFT, end << HUGE_SHIFT)
            self.table.set_pmds(blocks, entries[large])
            self.table.scatter(pages[~large], entries[~large])
        else:
            self.table.scatter(pages, entries)
        self._memory.note_mapping(self.slot, pages, frames)

    def program_exclusive(self, start: int, words: Words) -> None:
        """Enter pages from `start` on that this device has to itself."""
        frames = words & _PFN_FRAME
        self.table.write(start, frames << _SHIFT | word_of(ENTRY_VALID | ENTRY_ATOMIC))
        own = self._memory.owns(frames)
        if own.any():
            self._memory.note_mapping(self.slot, (np.flatnonzero(own) + start).astype(np.uint64), frames[own])

    # --- migration of pages that are mapped where they are ------------------------------------------------------------------------

    def hide(self, start: int, end: int) -> Hidden:
        """Take the entries of [start, end) that lead to memory not ours out of the table, while their pages may be moving."""
        watch = self.watch(start, end)
        pages = self.table.occupied(start, end)
        if len(pages) == 0:
            return Hidden(watch, _NO_PAGES, _NO_PAGES)
        entries = self.table.gather(pages)
        foreign = ~self._memory.owns(frames_of(entries))
        if any_of(foreign):
            pages = pages[foreign]
            self.table.scatter(pages, 0)
            self._tell_watches(start, end, but=watch)
            return Hidden(watch, pages, entries[foreign])
        return Hidden(watch, _NO_PAGES, _NO_PAGES)

    def restore(self, hidden: Hidden, moved: Words) -> None:
        """The move is over: entries of pages that stayed (not in `moved`, and not dropped meanwhile) are back."""
        self.unwatch(hidden.watch)
        if len(hidden.pages):
            stayed = hidden.watch.keeps(hidden.pages) & ~among(hidden.pages, page_by_page(moved))
            self.table.scatter(hidden.pages[stayed], hidden.entries[stayed])
