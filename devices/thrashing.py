"""Thrashing: pages that a device faults on again and again, because somebody takes them away as fast as they come; what a driver does then.

nvidia-uvm's detection and cure (uvm_perf_thrashing.c), with its numbers. A fault on a page that was served a moment ago is an *event*;
after a few in a row the page thrashes. Then the device waits for a while before it serves the page again, so that whoever has it can use it
(*throttling*); if that does not help, the page stays where it is for much longer, and is used over the link (*pinning*). uvm sees all
processors and lets one of them go on while the others nap; a driver here knows only its own device, so naps differ in length, drawn from a
seed: two devices in lockstep, each of which has what the other one needs, would else nap in lockstep, too.

Pure; the caller owns time. Pages are looked at one by one: a batch of faults has a few, and at most 256.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hmmnet.pages import Words

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

_NONE = np.zeros(0, np.uint64)
Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Verdict:
    """What is to be done with faulting pages: those to be served `after` a nap of `nap_s` emulated seconds, the rest at once."""

    after: Mask
    nap_s: float


@dataclass(slots=True)
class _History:
    """Of a page that has faulted soon after it was served."""

    events: int = 0
    throttles: int = 0
    pinned_until_s: float = -math.inf
    resets: int = 0

    def note_fault(self, quiet_s: float, now_s: float) -> bool:
        """It faults at `now_s`, `quiet_s` after it was served. Returns whether it thrashes: then it naps, or is pinned."""
        if quiet_s > LAPSE_S:
            if quiet_s > EPOCH_S and self.resets < RESETS_MAX and self.events + self.throttles:
                self.resets += 1
                self.throttles = 0
            self.events = 0
            return False
        self.events += 1
        return self.events >= EVENTS_MIN and self.pinned_until_s <= now_s


class Thrashing:
    """What one context's fault service knows of pages that come and go; `seed` is what naps are drawn from."""

    def __init__(self, seed: str) -> None:
        self.naps = 0
        self.pins = 0
        self._random = Random(seed)  # noqa: S311 - chance, not secrecy
        self._served_s: dict[int, float] = {}
        """When pages were served last."""
        self._histories: dict[int, _History] = {}
        """Of the few of them that come and go."""
        self._pinned_until_s = -math.inf
        """When the last pin ends."""

    def note_faults(self, pages: Words, now_s: float) -> Verdict:
        """`pages` (ascending, each once) fault at `now_s`, which is remembered: which of them thrash."""
        numbers = pages.tolist()
        after = np.zeros(len(numbers), np.bool_)
        nap = False
        for row, page in enumerate(numbers):
            quiet_s = now_s - self._served_s.get(page, -math.inf)
            known = self._histories.get(page)
            if known is None:
                if quiet_s > LAPSE_S:  # as mostly
                    continue
                known = self._histories[page] = _History()
            if known.note_fault(quiet_s, now_s):
                after[row] = naps = self._nap_or_pin(known, now_s)
                nap |= naps
        self._served_s.update(dict.fromkeys(numbers, now_s))
        if len(self._served_s) > PAGES_KEPT:
            self._forget()
        return Verdict(after, self.draw_nap() if nap else 0.0)

    def _nap_or_pin(self, page: _History, now_s: float) -> bool:
        """A page that thrashes naps once more; one that has napped so often is pinned from now on. Returns whether it naps."""
        page.throttles += 1
        if page.throttles <= THROTTLES_MAX:
            return True
        page.throttles = 0
        page.pinned_until_s = self._pinned_until_s = now_s + PIN_S
        self.pins += 1
        return False

    def _forget(self) -> None:
        """Only the half of the pages that faulted last is remembered; for those that are pinned, the end of that counts."""
        last_s = self._served_s | {page: max(self._served_s[page], known.pinned_until_s) for page, known in self._histories.items()}
        kept = sorted(last_s, key=last_s.__getitem__)[len(last_s) // 2 :]
        self._served_s = {page: self._served_s[page] for page in kept}
        self._histories = {page: known for page in kept if (known := self._histories.get(page)) is not None}

    def draw_nap(self) -> float:
        """One more nap: how long it is, in emulated seconds."""
        self.naps += 1
        return LAPSE_S * self._random.uniform(NAP_LEAST, NAP_MOST)

    def napped(self, pages: Words, now_s: float) -> None:
        """The nap for `pages` is over: the time until the next event counts from here."""
        self._served_s.update(dict.fromkeys(self._served_s.keys() & pages.tolist(), now_s))

    def pinned(self, now_s: float) -> Words:
        """The pages that are to stay where they are, ascending."""
        if self._pinned_until_s <= now_s:
            return _NONE
        return np.array(sorted(page for page, known in self._histories.items() if known.pinned_until_s > now_s), np.uint64)


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
