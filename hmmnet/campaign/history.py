"""The history checker: every word is a register, and every load of it must be explainable.

Accesses overlap in time, so "the latest store" is not one value but what *some* order of the accesses allows that respects who ended
before whom began. For registers whose stored values differ that is decided exactly by clusters (Gibbons and Korach, Testing Shared
Memories, 1997): a store and the loads that returned its value must stand together in every order. A cluster A is forced before B when an
access of A ended before one of B began; no order exists if and only if two clusters are forced both ways. So for each word and each
value that can still be loaded two numbers are kept, `low` (the earliest end in the cluster) and `high` (the latest begin in it), and each
load is checked when it ends: what is named is the first access that cannot be explained.

Stores that failed may have happened or not. Such a cluster forces nothing until somebody has loaded its value; from then on it was there
before the store's error was reported, because nothing may write on behalf of somebody who was told that it failed.

Two words for what cannot be known: a *wild* store leaves values that nobody knows (until the next store that is known), and where a value
was stored twice its loads force nothing. Arrays throughout: a place for each word, and a row for each value that may still be loaded. Most
words have one or two of those, so only as many rows are looked at as are in use (`_depth`). A store gets rows when something overlaps it
or looks at those words, or when it fails; one that nothing overlaps leaves its value in the first row, alone. A load of such words has one
answer, and is checked in a few steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmmnet.pages import all_of, any_of

Words = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]
Place = tuple[npt.NDArray[np.intp] | int, npt.NDArray[np.intp] | slice]
"""Rows, and words."""

ROWS = 8
"""Values of one word that may still be loaded: as many as stores to it at once, and one. With more the word is wild for a while."""
NEVER = (1 << 31) - 1
"""The end of what has not ended."""
ALWAYS = -1
"""The begin of what forces nothing."""


class Clock:
    """Ticks: every begin and every end of an access has its own. Kept too: which loads are under way, since when."""

    def __init__(self) -> None:
        self.now = 0
        self._open: dict[int, None] = {}

    def tick(self) -> int:
        """The next."""
        self.now += 1
        return self.now

    def begin(self) -> int:
        """A load begins."""
        now = self.tick()
        self._open[now] = None
        return now

    def end(self, began: int) -> None:
        """It is over."""
        del self._open[began]

    @property
    def oldest(self) -> int:
        """When the oldest load under way began; now, if there is none."""
        return next(iter(self._open), self.now)


@dataclass(eq=False, slots=True)
class StoreMark:
    """A store under way, of `values` to words [first, first + count); when it began."""

    first: int
    count: int
    values: Words
    began: int
    rows: npt.NDArray[np.intp] | int | None = None
    """The row that each value has; None: none yet, for nobody has looked at those words meanwhile."""
    alone: bool = True
    """No other access to those words has been under way meanwhile."""


@dataclass(eq=False, slots=True)
class LoadMark:
    """A load under way; `sure` are the words that were not wild when it began (None: all)."""

    first: int
    count: int
    began: int
    sure: Flags | None


@dataclass(frozen=True)
class Wrong:
    """A load that cannot be explained: the word, what was loaded, and why not."""

    word: int
    value: int
    why: str


class History:
    """The registers of one region of `words` words, all zero at first."""

    def __init__(self, clock: Clock, words: int) -> None:
        self.clock = clock
        self.words = words
        shape = (ROWS, words)
        self._value = np.zeros(shape, np.uint64)
        self._marks = bytearray(ROWS * words)
        """The same bytes as `_live`, row after row: for who only asks whether there is one."""
        self._live = np.frombuffer(self._marks, np.bool_).reshape(shape)
        self._begin = np.zeros(shape, np.int32)
        self._end = np.zeros(shape, np.int32)
        self._low = np.zeros(shape, np.int32)
        self._high = np.zeros(shape, np.int32)
        self._wild = np.full(words, ALWAYS, np.int32)
        """Since when nothing is known of a word; `NEVER` while a wild store is under way."""
        self._tamed = np.full(words, ALWAYS, np.int32)
        """When a word was last made known again: a load that began before may return what has been forgotten since."""
        self._wilds = np.zeros(words, np.int32)
        """Wild stores under way."""
        self._forgotten: set[tuple[int, int]] = set()
        """(word, when it began) of stores under way that there was no room for."""
        self._never_wild = True
        """Nothing was ever wild."""
        self._deepest = 1
        """Rows that were ever in use."""
        self._under_way: list[StoreMark | LoadMark] = []
        self._live[0] = True

    def _depth(self, words: slice) -> int:
        """How many rows hold all values of `words` that may still be loaded."""
        depth = self._deepest
        while depth > 1:
            row = (depth - 1) * self.words
            if self._marks.find(1, row + words.start, row + words.stop) >= 0:
                break
            depth -= 1
        return depth

    def _begins(self, mark: StoreMark | LoadMark) -> None:
        """Stores that overlap it get rows, and so does it, if it is one."""
        first, end = mark.first, mark.first + mark.count
        for other in self._under_way:
            if other.first < end and first < other.first + other.count:
                self._meets(other)
                self._meets(mark)
        self._under_way.append(mark)

    def _meets(self, mark: StoreMark | LoadMark) -> None:
        if isinstance(mark, StoreMark):
            mark.alone = False
            self._place(mark)

    # --- stores ---------------------------------------------------------------------------------------------------------------

    def store_begins(self, first: int, values: Words) -> StoreMark:
        """`values` are about to be stored from word `first` on."""
        mark = StoreMark(first, len(values), values, self.clock.tick())
        self._begins(mark)
        return mark

    def _place(self, mark: StoreMark) -> None:
        """What is being stored may be loaded from now on."""
        if mark.rows is not None:
            return
        words = slice(mark.first, mark.first + mark.count)
        depth = self._depth(words)
        if depth > 1:  # else there is one value each, and nothing that has overwritten it
            depth = self._bury(words, depth)
        if depth >= self._deepest and depth < ROWS:
            self._deepest = depth + 1
        row = self._free_row(words, depth)
        if row < ROWS:
            self._put((row, words), mark.values, mark.began)
            mark.rows = row
        else:
            mark.rows = self._put_anywhere(words, mark.values, mark.began)

    def _free_row(self, words: slice, depth: int) -> int:
        """The first row of `depth` and one more in which none of `words` has a value; `ROWS`: there is none."""
        row = 1 if depth == 1 else 0
        while row < depth and self._marks.find(1, row * self.words + words.start, row * self.words + words.stop) >= 0:
            row += 1
        return row

    def _put_anywhere(self, words: slice, values: Words, now: int) -> npt.NDArray[np.intp]:
        """Values that are being stored, each in a row where there is room for it; the rows. One that there is no room for is forgotten."""
        live = self._live[:, words]
        rows: npt.NDArray[np.intp] = live.argmin(axis=0)
        at = np.arange(len(values))
        full = live[rows, at]
        if full.any():
            self._grow_wild(words, full, now)
            self._forget(np.flatnonzero(full) + words.start, rows[full])
        self._put((rows, at + words.start), values, now)
        return rows

    def _put(self, where: Place, values: Words, now: int) -> None:
        """A value that is being stored."""
        self._value[where] = values
        self._live[where] = True
        self._begin[where] = now
        self._end[where] = self._low[where] = NEVER
        self._high[where] = ALWAYS

    def _grow_wild(self, words: slice, which: Flags, now: int) -> None:
        self._never_wild = False
        self._wild[words][which] = np.maximum(self._wild[words][which], now)

    def _forget(self, words: npt.NDArray[np.intp], rows: npt.NDArray[np.intp]) -> None:
        """Values there is no room for. A word of which a store under way is forgotten is unknown until that has ended, too."""
        for word, row in zip(words.tolist(), rows.tolist(), strict=True):
            if self._end[row, word] == NEVER:
                self._forgotten.add((word, int(self._begin[row, word])))
                self.wild_begins(word, 1)

    def store_ends(self, mark: StoreMark, *, certain: bool = True) -> None:
        """It is over; not `certain`: it failed, and may have happened in part."""
        now = self.clock.tick()
        self._under_way.remove(mark)
        is_known = self._is_known(mark)
        if mark.alone and is_known and certain:
            self._alone(mark, now)
            return
        self._place(mark)
        assert mark.rows is not None, "a store that has been placed has rows"
        if is_known and isinstance(mark.rows, int) and self._ends_in(mark.rows, mark, now, certain=certain):
            return
        words = np.arange(mark.first, mark.first + mark.count)
        rows = np.broadcast_to(mark.rows, words.shape)
        mine = self._begin[rows, words] == mark.began
        where = (rows[mine], words[mine])
        self._end[where] = now
        if certain:
            self._low[where] = np.minimum(self._low[where], now)
            self._high[where] = np.maximum(self._high[where], mark.began)
            self._tame(slice(mark.first, mark.first + mark.count), mark.began)
        for word in words[~mine].tolist() if self._forgotten else ():
            if (word, mark.began) in self._forgotten:
                self._forgotten.remove((word, mark.began))
                self.wild_ends(word, 1)

    def _is_known(self, mark: StoreMark | LoadMark) -> bool:
        """Whether nothing of those words is wild, nor was forgotten."""
        if self._never_wild:
            return True
        return not self._forgotten and int(np.maximum.reduce(self._wild[mark.first : mark.first + mark.count])) == ALWAYS

    def _ends_in(self, row: int, mark: StoreMark, now: int, *, certain: bool) -> bool:
        """`store_ends` where all values are in one row still, and no word is wild; False, and nothing done, where they are not."""
        words = slice(mark.first, mark.first + mark.count)
        if not all_of(self._begin[row, words] == mark.began):
            return False
        self._end[row, words] = now
        if certain:
            low, high = self._low[row, words], self._high[row, words]
            np.minimum(low, now, out=low)
            np.maximum(high, mark.began, out=high)
        return True

    def _alone(self, mark: StoreMark, now: int) -> None:
        """Nobody else has been at those words since the store began: it is what there is, and what was is gone."""
        words = slice(mark.first, mark.first + mark.count)
        self._value[0, words] = mark.values
        self._begin[0, words] = self._high[0, words] = mark.began
        self._end[0, words] = self._low[0, words] = now
        self._live[0, words] = True
        if (depth := self._depth(words)) > 1:
            self._live[1:depth, words] = False

    def _bury(self, words: slice, depth: int) -> int:
        """Forget values that no load can return any more: overwritten before the oldest load under way began. The `_depth` then."""
        low, live = self._low[:depth, words], self._live[:depth, words]
        settled = np.maximum.reduce(np.where((low < self.clock.oldest) & live, self._begin[:depth, words], ALWAYS))
        ended = np.minimum(low, self._end[:depth, words])
        dead = live & (ended < settled)
        while any_of(dead):  # and with a value all that is forced before it: nobody could tell that any more
            live ^= dead
            dead = live & (ended < np.maximum.reduce(np.where(dead, self._high[:depth, words], ALWAYS)))
        return self._depth(words)

    def _tame(self, words: slice, began: int) -> None:
        """A known store that began after everything wild had ended makes a word known again."""
        wild = self._wild[words]
        known = (wild != ALWAYS) & (wild < began)
        if known.any():
            tamed = np.flatnonzero(known) + words.start
            self._live[:, tamed] &= self._end[:, tamed] > self._wild[tamed]
            self._wild[tamed] = ALWAYS
            self._tamed[tamed] = self.clock.now

    # --- what nobody knows ----------------------------------------------------------------------------------------------------

    def wild_begins(self, first: int, count: int) -> None:
        """Something stores what nobody knows."""
        self._never_wild = False
        self._wilds[first : first + count] += 1
        self._wild[first : first + count] = NEVER

    def wild_ends(self, first: int, count: int) -> None:
        """It is over; the words stay unknown until they are stored to."""
        words = slice(first, first + count)
        self._wilds[words] -= 1
        self._wild[words] = np.where(self._wilds[words] > 0, NEVER, self.clock.tick())

    # --- loads ----------------------------------------------------------------------------------------------------------------

    def load_begins(self, first: int, count: int) -> LoadMark:
        """Words are about to be loaded. `load_ends`, or `load_fails`, ends it."""
        sure = None if self._never_wild else self._wild[first : first + count] == ALWAYS
        mark = LoadMark(first, count, self.clock.begin(), sure)
        self._begins(mark)
        return mark

    def load_fails(self, mark: LoadMark) -> None:
        """It returned nothing, or nothing that says anything."""
        self._under_way.remove(mark)
        self.clock.end(mark.began)

    def load_ends(self, mark: LoadMark, values: Words, ended: int | None = None) -> Wrong | None:
        """It returned `values`. Returns the first word that cannot be explained. `ended`: when it was over, if that was earlier."""
        now = self.clock.tick() if ended is None else ended
        self._under_way.remove(mark)
        words = slice(mark.first, mark.first + mark.count)
        depth = self._depth(words)
        sure = self._sure(mark, words)
        if depth == 1 and ended is None and sure is None and self._agrees(words, mark, values):
            return None
        match = self._live[:depth, words] & (self._value[:depth, words] == values)
        if ended is None and sure is None and np.count_nonzero(match) == mark.count:
            row = int(match[:, 0].argmax())
            if all_of(match[row]):
                wrong = self._join_row(mark, row, depth, now)
                self.clock.end(mark.began)
                return wrong
        match &= self._begin[:depth, words] < now
        matches = np.add.reduce(match, dtype=np.int8)
        unknown, once = matches == 0, matches == 1
        if sure is not None:
            unknown &= sure
            once &= sure
        if any_of(unknown):
            self.clock.end(mark.began)
            return self._unknown(mark.first + int(unknown.argmax()), int(values[unknown.argmax()]))
        places = once.nonzero()[0]
        wrong = self._join(mark, places, match.argmax(axis=0)[places], depth, now) if len(places) else None
        self.clock.end(mark.began)
        return wrong

    def _sure(self, mark: LoadMark, words: slice) -> Flags | None:
        """Of which words of a load that ends something is known; None: of all, as mostly."""
        if self._never_wild:
            return None
        sure: Flags = (self._wild[words] == ALWAYS) & (self._tamed[words] < mark.began)
        if mark.sure is not None:
            sure &= mark.sure
        return None if all_of(sure) else sure

    def _agrees(self, words: slice, mark: LoadMark, values: Words) -> bool:
        """Whether each of the words has one value, which is certain, and the load returned those: then it comes last."""
        if self._value[0, words].tobytes() != values.tobytes() or np.maximum.reduce(self._low[0, words]) == NEVER:
            return False
        high = self._high[0, words]
        np.maximum(high, mark.began, out=high)
        self.clock.end(mark.began)
        return True

    def _join_row(self, mark: LoadMark, row: int, depth: int, now: int) -> Wrong | None:
        """`_join` of all words of a load to one row, which is what a store that everybody sees whole leaves."""
        words = slice(mark.first, mark.first + mark.count)
        low, high = self._low[row, words], self._high[row, words]
        np.minimum(low, np.minimum(self._end[row, words], now), out=low)
        np.maximum(high, np.maximum(self._begin[row, words], mark.began), out=high)
        places = []
        for other in range(depth):
            torn = self._live[other, words] & (low < self._high[other, words]) & (self._low[other, words] < high)
            if other != row and any_of(torn):
                places.append((int(torn.argmax()), other))
        if not places:
            return None
        place, other = min(places)
        return self._torn(mark.first + place, row, other, mark.began)

    def _join(self, mark: LoadMark, places: npt.NDArray[np.intp], rows: npt.NDArray[np.intp], depth: int, now: int) -> Wrong | None:
        """The load belongs to the clusters `rows` of the words at `places`; the first that is then forced before and behind another one."""
        mine = rows * self.words + (places + mark.first)  # in the arrays as one row, where numpy finds places in half the time
        low = np.minimum(self._low.take(mine), np.minimum(self._end.take(mine), now))
        high = np.maximum(self._high.take(mine), np.maximum(self._begin.take(mine), mark.began))
        self._low.put(mine, low)
        self._high.put(mine, high)
        if depth == 1:
            return None
        words = slice(mark.first, mark.first + mark.count) if len(places) == mark.count else places + mark.first
        torn = self._live[:depth, words] & (low < self._high[:depth, words]) & (self._low[:depth, words] < high)
        torn[rows, np.arange(len(places))] = False
        if not any_of(torn):
            return None
        place = int(np.logical_or.reduce(torn).argmax())
        return self._torn(mark.first + int(places[place]), int(rows[place]), int(torn[:, place].argmax()), mark.began)

    def _unknown(self, word: int, value: int) -> Wrong:
        live = [f"0x{int(self._value[row, word]):x}" for row in np.flatnonzero(self._live[:, word])]
        return Wrong(word, value, f"was overwritten before, or never stored; it can be {' or '.join(live)}")

    def _torn(self, word: int, mine: int, other: int, began: int) -> Wrong:
        value, newer = int(self._value[mine, word]), int(self._value[other, word])
        if self._low[other, word] < began:
            return Wrong(word, value, f"was overwritten with 0x{newer:x} before")
        return Wrong(word, value, f"comes before and after 0x{newer:x}: somebody has seen them in the other order")

    # --- looking --------------------------------------------------------------------------------------------------------------

    def settled(self, first: int, count: int) -> tuple[Words, Flags]:
        """The values that a load now must return, and for which words there is only one."""
        words = slice(first, first + count)
        for mark in self._under_way:
            if isinstance(mark, StoreMark) and mark.first < words.stop and first < mark.first + mark.count:
                self._place(mark)
        certain = self._live[:, words] & (self._low[:, words] < NEVER)
        row = np.where(certain, self._begin[:, words], ALWAYS).argmax(axis=0)
        at = np.arange(count)
        newest = self._begin[:, words][row, at]
        others = self._live[:, words] & (self._end[:, words] >= newest)
        others[row, at] = False
        return self._value[:, words][row, at], ~others.any(axis=0) & (self._wild[words] == ALWAYS)
