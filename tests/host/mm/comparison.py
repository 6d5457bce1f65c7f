"""What the reference tests compare after every operation: a machine, with its devices' mirrors, and the model of it (`model.py`).

`compare` is the invariants I2 to I5 and I8 (`Machine.check`), I6 by the bytes of every page that the model knows, wherever the page is, and
I1 by every entry of every mirror: it may be held, leads where the page table leads, and gives no more than that and the model allow.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hmmnet.host.mm import pte
from hmmnet.host.mm.space import Space
from hmmnet.pages import HMM_PFN_ERROR, HMM_PFN_FRAME_MASK, HMM_PFN_VALID, HMM_PFN_WRITE

from .machine import Machine
from .mirrored import DeviceMirror
from .model import Cell, Model, Place

HIDDEN = frozenset((pte.NONE, pte.SWAP, pte.HINT, pte.MARKER))
"""Kinds of entries of which a device sees nothing, whoever it is."""


class Comparison:
    """A machine and its model. `mirrors` are those that are open, by process and zone; `first` is page 0 of messages."""

    def __init__(self, machine: Machine, model: Model, first: int) -> None:
        self.machine = machine
        self.model = model
        self.first = first
        self.spaces: dict[int, Space] = {}
        self.mirrors: dict[tuple[int, int], DeviceMirror] = {}

    def watched(self) -> Iterable[Place]:
        """The places that are compared: all that the model knows, and more."""
        raise NotImplementedError

    def may_forget(self, place: Place, cell: Cell) -> bool:
        """Whether the model need not know of a page of zeros: it may be the zero page, or any other, wherever it is."""
        return not cell.held

    def space(self, which: int) -> Space:
        """One of the living processes."""
        living = list(self.spaces.values())
        return living[which % len(living)]

    def entry(self, place: Place) -> int:
        """The page table's entry."""
        return self.spaces[place[0]].mm.table.get(place[1])

    def named(self, place: Place) -> str:
        """A place in a message."""
        return f"page {place[1] - self.first} of process {place[0]}"

    def bytes(self, entry: int) -> bytes:
        """What an entry leads to, in swap or in a memory."""
        if entry & pte.KIND != pte.SWAP:
            return self.machine.bytes_of(entry >> pte.FRAME_SHIFT)
        return self.machine.memory.swap.contents(np.array([entry >> pte.FRAME_SHIFT], np.uint64)).tobytes()

    def compare(self) -> None:
        """Everything, between two operations."""
        self.machine.check()
        for place in [place for place, cell in self.model.cells.items() if not any(cell.data) and self.may_forget(place, cell)]:
            self.model.drop(place)
        self._part()
        for place in self.watched():
            self._compare_page(place)
        for (process, _), mirror in self.mirrors.items():
            for page in mirror.table:
                self._compare_seen(mirror, (process, page))

    def _part(self) -> None:
        """Whoever takes a shared page out of swap has one of his own: sharers that lead to different pages now share no longer."""
        for cell in {id(cell): cell for cell in self.model.cells.values() if len(cell.places) > 1}.values():
            leads: dict[tuple[bool, int], list[Place]] = {}
            for place in sorted(cell.places):
                entry = self.entry(place)
                leads.setdefault((entry & pte.KIND == pte.SWAP, entry >> pte.FRAME_SHIFT), []).append(place)
            for places in list(leads.values())[1:]:
                part = Cell(bytearray(cell.data), cell.zone)
                for place in places:
                    self.model.put(place, part)

    def _compare_page(self, place: Place) -> None:
        entry, cell = self.entry(place), self.model.cells.get(place)
        if entry == 0 or entry & pte.SPECIAL:
            assert cell is None or not any(cell.data), f"{self.named(place)} is lost"
            return
        assert self.bytes(entry) == self.model.data(place), f"{self.named(place)} holds something else"
        if cell is not None and any(cell.data) and entry & pte.KIND != pte.SWAP:
            zone = entry >> pte.FRAME_SHIFT + 36
            assert zone == cell.zone, f"{self.named(place)} is in zone {zone}, not {cell.zone}"

    def _compare_seen(self, mirror: DeviceMirror, place: Place) -> None:
        """I1 of one entry of a mirror: against the model, and against the page table."""
        seen, entry, cell = mirror.table[place[1]], self.entry(place), self.model.cells.get(place)
        who = f"{mirror.name}'s mirror has {self.named(place)}"
        assert place[1] in self.model.mirrors[place[0], mirror.zone], f"{who}, which was taken from it"
        assert entry >> pte.FRAME_SHIFT == seen.frame, f"{who} as frame 0x{seen.frame:x}, the page table has 0x{entry:x} there (I1)"
        assert seen.atomic or "r" in self.model.rights[place], f"{who}, which is not readable (I1)"  # exclusive access asks to write only
        held = entry & pte.KIND == pte.EXCLUSIVE
        assert seen.atomic == held, f"{who} {'exclusively' if seen.atomic else 'though a device has it exclusively'}, 0x{entry:x} (I1)"
        if seen.write or seen.atomic:
            assert entry & pte.WRITE, f"{who} for writing, the page table has 0x{entry:x} there (I1)"
            assert self.model.writable(place), f"{who} for writing, which is not writable (I1)"
            assert self.model.is_alone(place), f"{who} for writing, which others share (I2)"
        if cell is not None and any(cell.data):
            assert cell.exclusive == seen.atomic, f"{who}, exclusively or not"
            assert not self.model.hides(place, mirror.zone) or seen.atomic, f"{who}, which is on another device"

    def check_snapshot(self, place: Place, zone: int, word: int) -> None:
        """A word of a snapshot by the device of `zone`: the column "need = none" of table A3."""
        entry, kind, cell = self.entry(place), self.entry(place) & pte.KIND, self.model.cells.get(place)
        if "r" not in self.model.rights.get(place, ""):
            assert word == HMM_PFN_ERROR, f"{self.named(place)} cannot be looked at, a snapshot shows 0x{word:x}"
            return
        known = cell is not None and any(cell.data)
        foreign = kind == pte.EXCLUSIVE or (kind == pte.DEVICE and entry >> pte.FRAME_SHIFT + 36 != zone)
        hidden = kind in HIDDEN or (self.model.hides(place, zone) if known else foreign)
        if hidden:
            assert word == 0, f"{self.named(place)} is not for {zone}, a snapshot shows 0x{word:x}"
            return
        assert word & HMM_PFN_VALID, f"{self.named(place)} is there, a snapshot shows 0x{word:x}"
        assert word & HMM_PFN_FRAME_MASK == entry >> pte.FRAME_SHIFT, f"a snapshot shows another frame for {self.named(place)}"
        assert bool(word & HMM_PFN_WRITE) == bool(entry & pte.WRITE), f"a snapshot shows another right to {self.named(place)}"
        assert not word & HMM_PFN_WRITE or (self.model.writable(place) and self.model.is_alone(place)), (
            f"{self.named(place)} is not writable"
        )
