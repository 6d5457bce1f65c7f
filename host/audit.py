"""What must hold of a whole machine, asked of a running host: the invariants of the books, and of what devices believe.

`mm/invariants.py` looks at the host's own tables (I2 to I5, I8). Here the rest of what the host can see: that no device may reach a page
with a right that the page table does not give (I1), as far as its IOMMU domain goes, and, where the device's own mirror can be seen (in a
simulated machine), there too; that no mirror is told of anything once it has unsubscribed (I7); and that nothing has leaked.

`Audit` does the same after every step of a program, for what that has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hmmnet.pages import FEW, ZONE_SHIFT, Words, word_of
from hmmnet.pagetable import PageTable

from .device import Context, Device
from .mm import pte
from .mm.frames import PhysicalMemory
from .mm.invariants import check
from .mm.ledger import Ledger
from .mm.space import Space

USABLE = frozenset((pte.PRESENT, pte.DEVICE, pte.EXCLUSIVE))
"""Kinds of entries that a translation may stand for."""
Mask = npt.NDArray[np.bool_]
IOMMU, MIRROR = "the IOMMU of ", "the mirror of "
"""Who believes something: one of these, and the device's name."""


def books(memory: PhysicalMemory, spaces: Iterable[Space], *, quiet: bool) -> list[str]:
    """What is wrong with tables and frames. `quiet`: nothing is under way, so nothing may be in transit; without processes nothing is used.

    Silent while somebody changes a layout: in the middle of a fork or an exit pages are counted that nobody has, or the other way round.
    """
    spaces = list(spaces)
    if any(space.mmap_lock.written for space in spaces):
        return []
    mms = [space.mm for space in spaces]
    try:
        check(memory, mms, quiet=quiet)
    except AssertionError as wrong:
        return [_said(wrong)]
    return left_over(memory) if quiet and not mms else []


def left_over(memory: PhysicalMemory) -> list[str]:
    """Where something is in use when no process is there any more: a memory of the host, of a device, of one that was lost; swap.

    Broken frames stay so; they are none of it.
    """
    found = []
    for zone in memory.zones.values():
        frames = int(np.count_nonzero(zone.referenced(zone.used.stop)[1 if zone.number == 0 else 0 :]))
        lost = f" (zone {zone.number}, which was lost: {zone.lost})" if zone.lost else ""
        found += [f"{zone.owner}{lost}: {frames} frames are left over"] if frames else []
    return found + ([f"swap: {memory.swapped_out} slots are left over"] if memory.swapped_out else [])


def _said(wrong: AssertionError) -> str:
    """What a rule says of who broke it; under pytest, which explains asserts, without the explanation: that differs from run to run."""
    return str(wrong).partition("\n")[0]


def domains(devices: Mapping[str, Device]) -> list[str]:
    """I1 of every translation that a living device's IOMMU domain holds."""
    found: list[str] = []
    for device in devices.values():
        for context in [] if device.life is None else device.life.contexts.values():
            pages, frames, writable = context.domain.translations()
            found += believed(context, IOMMU + device.spec.name, pages, frames, writable)
    return found


def believed(context: Context, who: str, pages: Words, frames: Words, writable: Mask) -> list[str]:
    """I1: the first of the translations that somebody holds of a process which the page table has not, with that right; mostly none."""
    if len(pages) == 0:
        return []
    bad = stale(context, pages, frames, writable)
    return [described(context, who, int(pages[i]), int(frames[i]), may_write=bool(writable[i])) for i in bad.nonzero()[0][:1].tolist()]


def stale(context: Context, pages: Words, frames: Words, writable: Mask) -> Mask:
    """Which of those translations the page table does not have, with that right.

    None while an invalidation of that process is open, and none of pages that are in transit: then the device is being told. Memory that
    was lost with its device is reached by nobody any more once all mirrors of it have been told.
    """
    if context.hub.core.active or len(pages) == 0:
        return np.zeros(len(pages), np.bool_)
    entries = context.space.entries(pages)
    kinds = pte.kinds_of(entries)
    present = (kinds == pte.PRESENT) | (kinds == pte.DEVICE) | (kinds == pte.EXCLUSIVE)
    for number in withdrawn(context.life.page_map.memory):
        present &= pte.zones_of(entries) != number
    rights = (entries & word_of(pte.WRITE) != 0) | (kinds == pte.EXCLUSIVE)
    good: Mask = (kinds == pte.MIGRATION) | (present & (pte.frames_of(entries) == frames) & (rights | ~writable))
    return ~good


def any_stale(context: Context, who: Translations, pages: Iterable[int], gone: Sequence[int]) -> bool:
    """Whether a translation of a few pages is `stale`: a tenth of what arrays cost. `gone`: see `withdrawn`."""
    for page in pages:
        held = who.held_one(page)
        if held is not None and not has_right(context.space.entry(page), *held, gone):
            return True
    return False


def has_right(entry: int, frame: int, may_write: bool, gone: Sequence[int]) -> bool:
    """Whether a page table entry stands behind a translation to `frame`, as `stale` says of many."""
    kind = entry & pte.KIND
    if kind == pte.MIGRATION:
        return True
    if kind not in USABLE or entry >> pte.FRAME_SHIFT != frame or frame >> ZONE_SHIFT in gone:
        return False
    return not may_write or entry & pte.WRITE != 0 or kind == pte.EXCLUSIVE


def withdrawn(memory: PhysicalMemory) -> list[int]:
    """The zones of lost memory that nobody may translate to any more."""
    return [zone.number for zone in memory.zones.values() if zone.withdrawn]


def described(context: Context, who: str, page: int, frame: int, *, may_write: bool) -> str:
    """A translation that is stale, in words."""
    entry = int(context.space.entries(np.array([page], np.uint64))[0])
    where = f"page 0x{page:x} of process {context.space.number} as frame 0x{frame:x}"
    table = f"0x{entry:x}" if entry else "nothing"
    return f"{who} {'may write' if may_write else 'may read'} {where}, the page table has {table} there (I1)"


class Translations(Protocol):
    """What somebody translates: an IOMMU domain, a device's mirror."""

    def touched(self) -> Words:
        """The pages with translations that may be others since the last call."""
        ...

    def translations(self) -> tuple[Words, Words, Mask]:
        """(pages, frames, may write) of everything that may be used now."""
        ...

    def held(self, pages: Words) -> tuple[Words, Words, Mask]:
        """The same of those of `pages` that have some."""
        ...

    def held_one(self, page: int) -> tuple[int, bool] | None:
        """(frame, may write) of a page, if it has one."""
        ...


class Mirrored(Translations, Protocol):
    """A device's mirror: a page table that says itself whether `touched` has anything to tell."""

    table: PageTable


NO_MIRRORS: Mapping[str, Sequence[tuple[int, Mirrored]]] = {}
"""None can be seen."""


Suspect = tuple[str, str, Context, Translations, bool]
"""Somebody whose translations have to be looked at: a kind, a device, of which context, and whether they may be others than they were."""


class Audit:
    """The invariants of one machine for who asks after every step: of what has changed since the last call.

    There can be one for each machine, as there is one `Ledger`.
    """

    def __init__(self, memory: PhysicalMemory, spaces: Mapping[int, Space], devices: Mapping[str, Device], late: Sequence[str]) -> None:
        self._late = late
        self._spaces = spaces
        self._devices = devices
        self._ledger = Ledger(memory)
        self._memory = memory
        self._withdrawn: list[int] = []
        self._left: dict[Translations, list[Words]] = {}
        """Pages that could not be checked yet, because mirrors of their process were just being told."""

    def changes(self, mirrors: Mapping[str, Sequence[tuple[int, Mirrored]]], now_s: float) -> list[str]:
        """What is wrong with what has changed. `mirrors` are those that can be seen, by device: (process, mirror)."""
        for space in self._spaces.values():
            if space.mmap_lock.readers < 0:
                return list(self._late)  # see `books`
        found = list(self._late)
        changed: dict[int, Words] | None = None
        try:
            changed = self._ledger.look([space.mm for space in self._spaces.values()], now_s)
        except AssertionError as wrong:
            found.append(_said(wrong))
        if self._withdrawn != (now_withdrawn := withdrawn(self._memory)):  # no entry changes by that
            self._withdrawn, changed = now_withdrawn, None
        suspects = self._suspects(mirrors, changed)
        before, self._left = self._left, {}  # who is not among the suspects has gone
        for suspect in suspects:
            kind, device, context, who, _ = suspect
            number = context.space.number
            left = before.pop(who, []) if before else []
            if changed is None or number not in self._spaces:
                found += believed(context, kind + device, *who.translations())
                if left:
                    self._left[who] = left
            else:
                if number in changed:
                    left.append(changed[number])
                found += self._believed(suspect, left)
        return found

    def _suspects(self, mirrors: Mapping[str, Sequence[tuple[int, Mirrored]]], changed: Mapping[int, Words] | None) -> list[Suspect]:
        """Whom to ask: whose translations may be others, or were not checked, or whose process has gone.

        Or has entries in `changed`: nearly nobody after most steps. None: everybody, every IOMMU domain and the `mirrors`.
        """
        found: list[Suspect] = []
        spaces, left = self._spaces, self._left
        news = changed is None or changed or left  # else only their own changes matter
        for device in self._devices.values():
            life = device.life
            for context in () if life is None else life.contexts.values():
                domain, number = context.domain, context.space.number
                touched = domain.table.changed
                if touched or number not in spaces or (news and (changed is None or number in changed or domain in left)):
                    found.append((IOMMU, device.spec.name, context, domain, touched))
        for name, seen in mirrors.items():
            for number, mirror in seen:
                table = mirror.table
                touched = table.ptes.changed or table.pmds.changed
                if touched or number not in spaces or (news and (changed is None or number in changed or mirror in left)):
                    life = self._devices[name].life
                    of_process = None if life is None else life.context_of(number)
                    if of_process is not None:
                        found.append((MIRROR, name, of_process, mirror, touched))
        return found

    def _believed(self, suspect: Suspect, left: list[Words]) -> list[str]:
        """I1 of the pages of one mirror that changed, and of those that are `left`, because their entries did, or from before."""
        kind, device, context, who, has_changed = suspect
        if has_changed and len(touched := who.touched()):
            left.append(touched)
        if not left:
            return []
        if context.hub.core.active:
            self._left[who] = left
            return []
        pages = left[0] if len(left) == 1 else np.concatenate(left)
        if len(pages) <= FEW:
            wrong = any_stale(context, who, pages.tolist(), self._withdrawn)
        else:
            wrong = bool(np.count_nonzero(stale(context, *who.held(pages))))
        if not wrong:
            return []
        self._left[who] = left
        return believed(context, kind + device, *who.translations())
