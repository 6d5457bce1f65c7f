"""Thrashing: pages that a device faults on again and again, because somebody takes them away as fast as they come; what a driver does then.

nvidia-uvm's detection and cure (uvm_perf_thrashing.c), with its numbers. A fault on a page that was served a moment ago is an *event*;
after a few in a row the page thrashes. Then the device waits for a while before it serves the page again, so that whoever has it can use it
(*throttling*); if that does not help, the page stays where it is for much longer, and is used over the link (*pinning*). uvm sees all
processors and lets one of them go on while the others nap; a driver here knows only its own device, so naps differ in length, drawn from a
seed: two devices in lockstep, each of which has what the other one needs, would else nap in lockstep, too.

Pure; the caller owns time. Everything is kept page by page in arrays, for the pages that faulted last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hmmnet.pages import Words, all_of, any_of

LAPSE_S = 500e-6
"""Emulated seconds within which a fault on a page that was served counts as an event (uvm_perf_thrashing_lapse_usec); also a nap."""
EVENTS_MIN = 3
"""Events in a row that make thrashing (uvm_perf_thrashing_threshold)."""
THROTTLES_MAX = 10
"""Naps for a page until it is pinned (uvm_perf_thrashing_pin_threshold)."""
PIN_S = 300 * LAPSE_S
"""How long it stays where it is (uvm_perf_thrashing_pin)."""
EPOCH_S = 2000 * LAPSE_S
"""A page that is quiet for so long begins anew (uvm_perf_thrashing_epoch) ..."""
RESETS_MAX = 4
"""... but so many times only (uvm_perf_thrashing_max_resets): what comes back again and again is not looked at with fresh eyes."""
NAP_LEAST, NAP_MOST = 0.5, 1.5
"""How naps differ, as parts of a lapse."""
PAGES_KEPT = 4096
"""Pages that are remembered: those that faulted last."""

Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Verdict:
    """What is to be done with faulting pages: those to be served `after` a nap of `nap_s` emulated seconds, the rest at once."""

    after: Mask
    nap_s: float


@dataclass
class _Books:
    """What is known of pages, one row each, ascending."""

    pages: Words = field(default_factory=lambda: np.zeros(0, np.uint64))
    served_s: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    events: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    throttles: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    pinned_until_s: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    resets: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def keep(self, rows: npt.NDArray[np.intp] | Mask) -> None:
        """Only these rows, in their order."""
        for name, column in list(vars(self).items()):
            setattr(self, name, column[rows])

    def add(self, pages: Words, now_s: float) -> None:
        """Rows for `pages` that have none."""
        at = self.pages.searchsorted(pages)
        known = at < len(self.pages)
        known[known] = self.pages[at[known]] == pages[known]
        new = pages[~known]
        count = len(new)
        if not count:
            return
        ordered = all_of(at[~known] == len(self.pages))
        self.pages = np.concatenate((self.pages, new))
        self.served_s = np.concatenate((self.served_s, np.full(count, -np.inf)))
        self.events = np.concatenate((self.events, np.zeros(count, np.int64)))
        self.throttles = np.concatenate((self.throttles, np.zeros(count, np.int64)))
        self.pinned_until_s = np.concatenate((self.pinned_until_s, np.full(count, -np.inf)))
        self.resets = np.concatenate((self.resets, np.zeros(count, np.int64)))
        if len(self.pages) > PAGES_KEPT:
            since_s = np.where(np.isin(self.pages, pages), now_s, np.maximum(self.served_s, self.pinned_until_s))
            self.keep(np.argsort(since_s, kind="stable")[-max(PAGES_KEPT // 2, len(pages)) :])
            ordered = False
        if not ordered:
            self.keep(np.argsort(self.pages, kind="stable"))


class Thrashing:
    """What one context's fault service knows of pages that come and go; `seed` is what naps are drawn from."""

    def __init__(self, seed: str) -> None:
        self.naps = 0
        self.pins = 0
        self._random = Random(seed)  # noqa: S311 - chance, not secrecy
        self._books = _Books()

    def look(self, pages: Words, now_s: float) -> Verdict:
        """`pages` (ascending, each once) fault at `now_s`: which of them thrash."""
        books = self._books
        books.add(pages, now_s)
        rows = np.searchsorted(books.pages, pages)
        quiet_s = now_s - books.served_s[rows]
        begins = rows[(quiet_s > EPOCH_S) & (books.resets[rows] < RESETS_MAX) & (books.events[rows] + books.throttles[rows] > 0)]
        books.resets[begins] += 1
        books.events[begins] = books.throttles[begins] = 0
        books.events[rows] = np.where(quiet_s <= LAPSE_S, books.events[rows] + 1, 0)
        books.served_s[rows] = now_s
        thrash = (books.events[rows] >= EVENTS_MIN) & (books.pinned_until_s[rows] <= now_s)
        books.throttles[rows[thrash]] += 1
        pinned = rows[thrash & (books.throttles[rows] > THROTTLES_MAX)]
        books.pinned_until_s[pinned] = now_s + PIN_S
        books.throttles[pinned] = 0
        self.pins += len(pinned)
        after = thrash & (books.pinned_until_s[rows] <= now_s)
        if not any_of(after):
            return Verdict(after, 0.0)
        return Verdict(after, self.nap_s())

    def nap_s(self) -> float:
        """How long the next nap is, in emulated seconds."""
        self.naps += 1
        return LAPSE_S * self._random.uniform(NAP_LEAST, NAP_MOST)

    def napped(self, pages: Words, now_s: float) -> None:
        """The nap for `pages` is over: the time until the next event counts from here."""
        books = self._books
        books.served_s[np.isin(books.pages, pages)] = now_s

    def pinned(self, now_s: float) -> Words:
        """The pages that are to stay where they are, ascending."""
        books = self._books
        return books.pages[books.pinned_until_s > now_s]


def without(ranges: list[tuple[int, int]], pinned: Words) -> list[tuple[int, int]]:
    """Page ranges (ascending, apart) without `pinned` pages (ascending)."""
    if not len(pinned):
        return ranges
    left: list[tuple[int, int]] = []
    for start, end in ranges:
        at = start
        for page in pinned[(pinned >= np.uint64(start)) & (pinned < np.uint64(end))].tolist():
            if page > at:
                left.append((at, page))
            at = page + 1
        if at < end:
            left.append((at, end))
    return left
