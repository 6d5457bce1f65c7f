"""migrate_device_pfns on whatever frames: system memory moves by frame as device memory does, for everybody who maps it."""

from __future__ import annotations

import numpy as np

from hmmnet.host.mm import pte
from hmmnet.host.mm.collect import collect_frames, move
from hmmnet.host.mm.finalize import finalize

from .files import BASE, PAGE, symbols
from .machine import MIGRATE, SHIFT, VALID, Machine, page_bytes, span

FIRST = BASE // PAGE


async def test_system_memory_moves_by_frame_for_everybody() -> None:
    """Frames in no order, two processes, no address given; held, idle and file frames stay out. Both find their data on the device."""
    machine = Machine()
    parent = machine.process()
    await parent.mmap(4 * PAGE, "rw", BASE)
    await parent.store(BASE, b"".join(page_bytes(i + 1) for i in range(4)))
    child = await machine.fork(parent)
    held = await parent.get_pages(FIRST + 2, 1)
    shared = await parent.mmap(PAGE, "rw", 2 * BASE, shared=True)
    await parent.store(shared, b"f")
    frames = pte.frames_of(parent.mm.table.read(FIRST, FIRST + 4))
    file_frame = int(parent.mm.table.get(shared // PAGE)) >> pte.FRAME_SHIFT
    wanted = np.array([frames[3], 4000, frames[0], file_frame, frames[2], frames[1]], np.uint64)
    told = {space.number: [span(FIRST, 4)] for space in (parent, child)}
    migration = collect_frames(machine.memory, wanted, told)
    assert (migration.source & MIGRATE != 0).tolist() == [True, False, True, False, False, True]
    going = np.flatnonzero(migration.source & MIGRATE)
    device = machine.devices[64]
    got = device.allocator.allocate(len(going))
    assert got is not None
    migration.target[going] = got.frames << SHIFT | VALID
    machine.copy(migration)
    move(machine.memory, None, migration)
    finalize(machine.memory, None, migration)
    assert migration.cpages == 3
    for space in (parent, child):
        assert symbols(space, BASE, 4) == "SSPS"
    parent.put_pages(held)
    assert await child.load(BASE, 4 * PAGE) == b"".join(page_bytes(i + 1) for i in range(4))
    assert symbols(parent, BASE, 4) == "PPPP"
    machine.check()


async def test_who_was_not_told_keeps_the_page() -> None:
    """A process that came to share a frame after the announcements has not let go of it; nor has one that was told of other pages."""
    machine = Machine()
    parent = machine.process()
    await parent.mmap(2 * PAGE, "rw", BASE)
    await parent.store(BASE, b"x" * 2 * PAGE)
    child = await machine.fork(parent)
    frames = pte.frames_of(parent.mm.table.read(FIRST, FIRST + 2))
    assert collect_frames(machine.memory, frames, {parent.number: [span(FIRST, 2)]}).cpages == 0
    told = {parent.number: [span(FIRST, 2)], child.number: [span(FIRST + 1, 1)]}
    migration = collect_frames(machine.memory, frames, told)
    assert (migration.source & MIGRATE != 0).tolist() == [False, True]
    move(machine.memory, None, migration)
    finalize(machine.memory, None, migration)
    machine.check()
