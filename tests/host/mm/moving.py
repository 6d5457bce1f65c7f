"""Migrations by hand, for their tests: a process with eight pages and two devices, and the general way for few pages, too."""

from __future__ import annotations

import numpy as np
import pytest

from hmmnet.host.interfaces import Migration, Select
from hmmnet.host.mm import few, pte
from hmmnet.host.mm.collect import collect, move
from hmmnet.host.mm.fault import touch
from hmmnet.host.mm.finalize import finalize
from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.host.mm.invariants import check
from hmmnet.host.mm.mm import Mm
from hmmnet.host.mm.vma import VM_READ, VM_WRITE, Vma
from hmmnet.pages import (
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    ZONE_SHIFT,
)

from .machine import span, words

RW = VM_READ | VM_WRITE
GPU, OTHER = 64, 65
FRAMES = GPU << ZONE_SHIFT
MOVES = MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE


class World:
    """One process with a VMA of eight pages from 100, two private devices."""

    def __init__(self, flags: int = RW, kind: str = "private") -> None:
        self.memory = PhysicalMemory()
        self.memory.add_node("node0", 64)
        self.freed: list[int] = []
        for zone in (GPU, OTHER):
            device = self.memory.add_device(zone, kind, f"gpu{zone - 64}", 32)
            device.on_free = lambda frames: self.freed.extend(frames.tolist())
            device.offered = 32  # frames are taken without a grant here
        self.mm = Mm(1, self.memory)
        self.vma = Vma(100, 108, flags, 100)
        self.mm.vmas.add(self.vma)

    def touch(self, *pages: int, write: bool = True) -> None:
        """The CPU accesses pages."""
        for page in pages:
            vma = self.mm.vmas.find(page)
            assert vma is not None
            assert touch(self.mm, vma, words(page), write).done == 1

    def collect(self, start: int = 100, count: int = 4, select: Select = Select.SYSTEM, owner: int = GPU) -> Migration:
        return collect(self.mm, span(start, count), select, owner)

    def finish(self, migration: Migration, first: int = FRAMES) -> None:
        """Targets for all, from frame `first` on; move, finalize."""
        migration.target[:] = (span(first, len(migration.pages)) << np.uint64(MIGRATE_PFN_SHIFT)) | np.uint64(MIGRATE_PFN_VALID)
        move(self.memory, self.mm, migration)
        finalize(self.memory, self.mm, migration)
        check(self.memory, [self.mm])

    def kinds(self) -> list[int]:
        kinds: list[int] = pte.kinds_of(self.mm.table.read(100, 108)).tolist()
        return kinds

    def state(self) -> tuple[object, ...]:
        """Everything that a migration may change."""
        zones = [
            (
                zone.refcount.tolist(),
                zone.mapcount.tolist(),
                zone.flags[zone.refcount > 0].tolist(),
                zone.mapping.tolist(),
                zone.index[zone.refcount > 0].tolist(),
            )
            for zone in self.memory.zones.values()
        ]
        return (
            self.mm.table.read(100, 108).tolist(),
            self.mm.rss,
            zones,
            self.memory.nodes[0].allocator.used_count,
            self.memory.cgroups.charged(),
        )


def always_with_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a few pages take the general way."""
    for name in ("collect", "move", "finalize", "unshared"):
        monkeypatch.setattr(few, name, lambda *_: False)
