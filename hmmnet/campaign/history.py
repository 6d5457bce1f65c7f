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
was stored twice its loads force nothing. Arrays throughout: a row for each word, a column for each value that may still be loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Ticks = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

COLUMNS = 8
"""Values of one word that may still be loaded: as many as stores to it at once, and one. With more the word is wild for a while."""
NEVER = 1 << 62
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


@dataclass(frozen=True, eq=False)
class StoreMark:
    """A store under way: words [first, first + count), the columns it took, when it began."""

    first: int
    count: int
    columns: npt.NDArray[np.intp]
    began: int


@dataclass(frozen=True, eq=False)
class LoadMark:
    """A load under way; `sure` are the words that were not wild when it began."""

    first: int
    count: int
    began: int
    sure: Flags


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
        shape = (words, COLUMNS)
        self._value = np.zeros(shape, np.uint64)
        self._live = np.zeros(shape, np.bool_)
        self._begin = np.zeros(shape, np.int64)
        self._end = np.zeros(shape, np.int64)
        self._low = np.full(shape, NEVER, np.int64)
        self._high = np.full(shape, ALWAYS, np.int64)
        self._wild = np.full(words, ALWAYS, np.int64)
        """Since when nothing is known of a word; `NEVER` while a wild store is under way."""
        self._tamed = np.full(words, ALWAYS, np.int64)
        """When a word was last made known again: a load that began before may return what has been forgotten since."""
        self._wilds = np.zeros(words, np.int64)
        """Wild stores under way."""
        self._live[:, 0] = True
        self._low[:, 0] = 0
        self._high[:, 0] = 0

    # --- stores ---------------------------------------------------------------------------------------------------------------

    def store_begins(self, first: int, values: Words) -> StoreMark:
        """`values` are about to be stored from word `first` on."""
        count, now = len(values), self.clock.tick()
        rows = slice(first, first + count)
        self._bury(rows)
        live = self._live[rows]
        columns = live.argmin(axis=1)
        at = np.arange(count)
        full = live[at, columns]
        if full.any():
            self._wild[rows][full] = now
        where = (at + first, columns)
        self._value[where] = values
        self._live[where] = True
        self._begin[where] = now
        self._end[where] = self._low[where] = NEVER
        self._high[where] = ALWAYS
        return StoreMark(first, count, columns, now)

    def store_ends(self, mark: StoreMark, *, certain: bool = True) -> None:
        """It is over; not `certain`: it failed, and may have happened in part."""
        now = self.clock.tick()
        rows = np.arange(mark.first, mark.first + mark.count)
        mine = self._begin[rows, mark.columns] == mark.began
        where = (rows[mine], mark.columns[mine])
        self._end[where] = now
        if certain:
            self._low[where] = np.minimum(self._low[where], now)
            self._high[where] = np.maximum(self._high[where], mark.began)
            self._tame(rows, mark.began)

    def _bury(self, rows: slice) -> None:
        """Forget values that no load can return any more: overwritten before the oldest load under way began."""
        low, begin = self._low[rows], self._begin[rows]
        settled = np.where((low < self.clock.oldest) & self._live[rows], begin, ALWAYS).max(axis=1)
        self._live[rows] &= np.minimum(low, self._end[rows]) >= settled[:, None]

    def _tame(self, rows: npt.NDArray[np.intp], began: int) -> None:
        """A known store that began after everything wild had ended makes a word known again."""
        known = (self._wild[rows] != ALWAYS) & (self._wild[rows] < began)
        if known.any():
            tamed = rows[known]
            self._live[tamed] &= self._end[tamed] > self._wild[tamed][:, None]
            self._wild[tamed] = ALWAYS
            self._tamed[tamed] = self.clock.now

    # --- what nobody knows ----------------------------------------------------------------------------------------------------

    def wild_begins(self, first: int, count: int) -> None:
        """Something stores what nobody knows."""
        self._wilds[first : first + count] += 1
        self._wild[first : first + count] = NEVER

    def wild_ends(self, first: int, count: int) -> None:
        """It is over; the words stay unknown until they are stored to."""
        rows = slice(first, first + count)
        self._wilds[rows] -= 1
        self._wild[rows] = np.where(self._wilds[rows] > 0, NEVER, self.clock.tick())

    # --- loads ----------------------------------------------------------------------------------------------------------------

    def load_begins(self, first: int, count: int) -> LoadMark:
        """Words are about to be loaded. `load_ends`, or `load_fails`, ends it."""
        return LoadMark(first, count, self.clock.begin(), self._wild[first : first + count] == ALWAYS)

    def load_fails(self, mark: LoadMark) -> None:
        """It returned nothing, or nothing that says anything."""
        self.clock.end(mark.began)

    def load_ends(self, mark: LoadMark, values: Words, ended: int | None = None) -> Wrong | None:
        """It returned `values`. Returns the first word that cannot be explained. `ended`: when it was over, if that was earlier."""
        now = self.clock.tick() if ended is None else ended
        rows = slice(mark.first, mark.first + mark.count)
        sure = mark.sure & (self._wild[rows] == ALWAYS) & (self._tamed[rows] < mark.began)
        match = self._live[rows] & (self._value[rows] == values[:, None]) & (self._begin[rows] < now)
        matches = match.sum(axis=1)
        unknown = sure & (matches == 0)
        if unknown.any():
            self.clock.end(mark.began)
            return self._unknown(mark.first + int(unknown.argmax()), int(values[unknown.argmax()]))
        column = match.argmax(axis=1)
        wrong = self._join(mark, np.flatnonzero(sure & (matches == 1)), column, now)
        self.clock.end(mark.began)
        return wrong

    def _join(self, mark: LoadMark, places: npt.NDArray[np.intp], column: npt.NDArray[np.intp], now: int) -> Wrong | None:
        """The load belongs to the clusters `column`; the first that is then forced before and behind another one."""
        rows, columns = places + mark.first, column[places]
        low = np.minimum(self._low[rows, columns], np.minimum(now, self._end[rows, columns]))
        high = np.maximum(np.maximum(self._high[rows, columns], mark.began), self._begin[rows, columns])
        self._low[rows, columns], self._high[rows, columns] = low, high
        others = self._live[rows].copy()
        others[np.arange(len(rows)), columns] = False
        torn = others & (low[:, None] < self._high[rows]) & (self._low[rows] < high[:, None])
        if not torn.any():
            return None
        place = int(torn.any(axis=1).argmax())
        return self._torn(int(rows[place]), int(columns[place]), int(torn[place].argmax()), mark.began)

    def _unknown(self, word: int, value: int) -> Wrong:
        live = [f"0x{int(self._value[word, column]):x}" for column in np.flatnonzero(self._live[word])]
        return Wrong(word, value, f"was overwritten before, or never stored; it can be {' or '.join(live)}")

    def _torn(self, word: int, mine: int, other: int, began: int) -> Wrong:
        value, newer = int(self._value[word, mine]), int(self._value[word, other])
        if self._low[word, other] < began:
            return Wrong(word, value, f"was overwritten with 0x{newer:x} before")
        return Wrong(word, value, f"comes before and after 0x{newer:x}: somebody has seen them in the other order")

    # --- looking --------------------------------------------------------------------------------------------------------------

    def settled(self, first: int, count: int) -> tuple[Words, Flags]:
        """The values that a load now must return, and for which words there is only one."""
        rows = slice(first, first + count)
        certain = self._live[rows] & (self._low[rows] < NEVER)
        column = np.where(certain, self._begin[rows], ALWAYS).argmax(axis=1)
        at = np.arange(count)
        newest = self._begin[rows][at, column]
        others = self._live[rows] & (self._end[rows] >= newest[:, None])
        others[at, column] = False
        return self._value[rows][at, column], ~others.any(axis=1) & (self._wild[rows] == ALWAYS)


class Counter:
    """A word that is only ever added one to, atomically, and loaded: what each addition returns must be unique and in order."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._begun = 0
        self._seen: set[int] = set()
        self._floors: list[tuple[int, int]] = [(0, 0)]
        """(when, the least that an access beginning later must find), ascending."""

    def add_begins(self) -> int:
        """An addition begins; when."""
        self._begun += 1
        return self.clock.tick()

    def add_ends(self, began: int, old: int) -> str:
        """It returned `old`; what is wrong with that."""
        wrong = self.load_ends(began, old)
        if old in self._seen:
            wrong = f"two additions found {old}: one is lost"
        self._seen.add(old)
        self._raise(old + 1)
        return wrong

    def load_ends(self, began: int, value: int) -> str:
        """A load that began then returned `value`; what is wrong with that."""
        floor = next((least for when, least in reversed(self._floors) if when < began), 0)
        if value < floor:
            return f"{value} is older than {floor}, which somebody had seen before"
        self._raise(value)
        return f"{value} is more than the {self._begun} additions so far" if value > self._begun else ""

    def _raise(self, least: int) -> None:
        if least > self._floors[-1][1]:
            self._floors.append((self.clock.tick(), least))
