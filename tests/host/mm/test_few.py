"""migrate_vma of a few pages without arrays, against the general way with them: the same words, entries and counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from hmmnet.host.interfaces import Select
from hmmnet.host.mm import few, pte
from hmmnet.host.mm.collect import collect, move, restore, sharers
from hmmnet.host.mm.fault import zap
from hmmnet.host.mm.finalize import finalize
from hmmnet.host.mm.vma import VM_READ, VM_UFFD_MISSING
from hmmnet.host.mm.zones import ANON, LOCKED
from hmmnet.pages import (
    FEW,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    PAGE_SHIFT,
    ZONE_SHIFT,
)

from .machine import span, words
from .moving import FRAMES, GPU, MOVES, OTHER, RW, World, always_with_arrays


def short_ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that go the short way from now on, in their order."""
    taken: list[str] = []

    def noting(name: str, step: Callable[..., bool]) -> Callable[..., bool]:
        def noted(*arguments: object) -> bool:
            short = step(*arguments)
            if short:
                taken.append(name)
            return short

        return noted

    for name in ("collect", "move", "finalize", "unshared"):
        monkeypatch.setattr(few, name, noting(name, getattr(few, name)))
    return taken


def random_world(random: Random, pages: int) -> World:
    """Some pages in states that a migration may meet, with targets ready."""
    world = World(random.choice((RW, RW, VM_READ)), random.choice(("private", "private", "coherent")))
    world.memory.zones[OTHER].pgmap_owner = random.choice((world.memory.zones[GPU].pgmap_owner, world.memory.zones[OTHER].pgmap_owner))
    world.memory.zones[OTHER].lost = random.choice(("",) * 9 + ("unplugged",))
    charge = 0
    if random.random() < 0.3:
        world.mm.cgroup = group = world.memory.cgroups.create("jobs", random.choice((None, (pages + random.randrange(3)) << PAGE_SHIFT)))
        charge = group.charge_bits
    for page in range(100, 100 + pages):
        entry = random.choice(("none", "zero", "host", "host", "gpu", "gpu", "other", "swap", "exclusive"))
        bits = random.choice((0, pte.WRITE | pte.DIRTY)) | random.choice((0, pte.YOUNG)) | random.choice((0, pte.ANON_EXCLUSIVE))
        if entry in {"host", "exclusive"}:
            frames = world.memory.allocate(1)
            assert frames is not None
            frame = int(frames[0])
        else:
            frame = (GPU if entry == "gpu" else OTHER) << ZONE_SHIFT | page - 97
        if entry in {"host", "gpu", "other", "exclusive"}:
            zone = world.memory.zone(frame)
            at = frame - zone.base
            zone.refcount[at] = 1 + random.choice((0, 0, 0, 0, 1, 2))
            zone.mapcount[at] = 1
            zone.pincount[at] = random.choice((0, 0, 0, 0, 1))
            zone.flags[at] = ANON | random.choice((0, 0, 0, 0, LOCKED)) | charge
            if charge:
                assert world.mm.cgroup is not None
                assert world.mm.cgroup.try_charge(1)
            zone.index[at] = page
            kind = pte.EXCLUSIVE if entry == "exclusive" else pte.DEVICE if zone.kind == "private" else pte.PRESENT
            world.mm.table.set(page, pte.entry(kind, frame, bits))
            world.mm.rss += 1
            world.vma.anon = zone.mapping[at] = world.vma.anon or world.memory.new_anon_vma(1)
        elif entry != "none":
            world.mm.table.set(page, pte.ZERO_ENTRY if entry == "zero" else pte.entry(pte.SWAP, 5))
    if random.random() < 0.3:  # userfaultfd wants to hear of what is missing in some of it
        start = random.randrange(100, 107)
        world.mm.vmas.update(start, random.randrange(start + 1, 108), lambda vma: replace(vma, flags=vma.flags | VM_UFFD_MISSING))
    return world


def random_choice(random: Random) -> tuple[Select, int]:
    """What a migration takes, and in whose name."""
    beside = random.choice((Select(0), Select(0), Select.COMPOUND, Select.ANY_OWNER, Select.PEERS, Select.ANY_OWNER | Select.PEERS))
    return Select(random.choice((1, 2, 4, 6, 7, 7))) | beside, random.choice((GPU, GPU, OTHER, -1))


def random_target(random: Random, world: World, row: int) -> int:
    """A frame for that row, of a device or of the host; 0: none."""
    target = random.choice((0, 0, 0)) if random.random() < 0.2 else random.choice((FRAMES + 19, (OTHER << ZONE_SHIFT) + 19, -1))
    if target != -1:
        return target and target + row
    got = world.memory.allocate(1)
    assert got is not None
    return int(got[0])


@pytest.mark.parametrize("pages", [1, 2, 3, FEW])
@pytest.mark.parametrize("seed", range(150))
def test_a_few_pages_without_arrays_equal_a_few_pages_with(seed: int, pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way gives the words, entries and counts that the general way gives, on random states and histories; it is taken.

    All go it up to their collection; beyond, what is charged to a cgroup when it is made and what is unmapped on the way do not.
    """
    outcomes = []
    taken = short_ways(monkeypatch)
    expected = ["collect"]
    for short in (True, False):
        if not short:
            assert taken == expected
            always_with_arrays(monkeypatch)
        random = Random(seed)
        world = random_world(random, pages)
        select, owner = random_choice(random)
        fault_frame = random.choice((None, world.mm.table.get(100) >> pte.FRAME_SHIFT))
        migration = collect(world.mm, span(100, pages), select, owner, fault_frame)
        after_collect = copy.deepcopy(world.state()), migration.source.tolist(), migration.saved.tolist()
        for row in range(pages):
            target = random_target(random, world, row)
            if target:
                migration.target[row] = target << MIGRATE_PFN_SHIFT | MIGRATE_PFN_VALID
        unmapped = [row for row in range(pages) if random.random() < 0.1 and world.kinds()[row] == pte.MIGRATION]
        for row in unmapped:
            zap(world.mm, span(100 + row, 1))
        if short:
            made = ((migration.source & np.uint64(MOVES)) == MIGRATE_PFN_MIGRATE) & (migration.target != 0)
            expected += ["move"] if world.mm.cgroup is None or not made.any() else []
            expected += ["finalize"] if not unmapped else []
        move(world.memory, world.mm, migration)
        if random.random() < 0.2:
            restore(world.memory, world.mm, migration)
        after_move = copy.deepcopy(world.state()), migration.source.tolist(), migration.saved.tolist()
        finalize(world.memory, world.mm, migration)
        outcomes.append((after_collect, after_move, world.state(), migration.source.tolist(), sorted(world.freed)))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("seed", range(50))
def test_who_alone_maps_a_few_pages_has_no_sharers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short answer is the general one: nobody else has to be told."""
    random = Random(seed)
    world = random_world(random, FEW)
    select, owner = random_choice(random)
    shared = random.choice((None, *range(FEW)))
    if shared is not None:
        entry = world.mm.table.get(100 + shared)
        if entry & pte.KIND in {pte.PRESENT, pte.DEVICE} and not entry & pte.SPECIAL:
            zone = world.memory.zone(entry >> pte.FRAME_SHIFT)
            zone.mapcount[(entry >> pte.FRAME_SHIFT) - zone.base] = 2
    taken = short_ways(monkeypatch)
    short = [pages.tolist() for _, pages in sharers(world.mm, span(100, FEW), select, owner)]
    assert taken == ([] if short else ["unshared"])
    always_with_arrays(monkeypatch)
    assert short == [pages.tolist() for _, pages in sharers(world.mm, span(100, FEW), select, owner)]


@pytest.mark.parametrize("seed", range(150))
def test_a_page_that_a_cpu_touches_goes_as_any_other(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`take` and `bring` of one page equal the steps of the general way for it: the same pages go, and become the same."""
    outcomes = []
    always_with_arrays(monkeypatch)
    for at_once in (True, False):
        random = Random(seed)
        world = random_world(random, 2)
        target = random_target(Random(3), world, 0)
        owner, unmaps = random.choice((GPU, GPU, OTHER)), random.random() < 0.2
        migration = collect(world.mm, words(100), Select.DEVICE_PRIVATE, owner) if not at_once else None
        frame = few.take(world.mm, 100, owner) if migration is None else int(migration.source[0]) >> MIGRATE_PFN_SHIFT or None
        if frame is not None and random.random() < 0.2:
            world.memory.zone(frame).refcount[frame & (1 << ZONE_SHIFT) - 1] += 1
        if frame is not None and unmaps:
            zap(world.mm, span(100, 1))
        if frame is None:
            world.memory.put(words(target))
        elif migration is None:
            few.bring(world.mm, 100, frame, target)
        else:
            migration.target[0] = target << MIGRATE_PFN_SHIFT | MIGRATE_PFN_VALID
            move(world.memory, world.mm, migration)
            finalize(world.memory, world.mm, migration)
        outcomes.append((frame, world.state(), world.freed))
    assert outcomes[0] == outcomes[1]
