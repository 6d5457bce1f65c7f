"""What the cover letter of v25 promises to everybody who has nothing to do with devices, kept on a v25 host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import trio

import hmmnet
from hmmnet.errors import KernelError, SignalError
from hmmnet.host import v25
from hmmnet.host.mm.invariants import check
from hmmnet.pages import PAGE_SIZE
from hmmnet.program import Process
from hmmnet.sim import SimulatedMachine

from .dummy import Ground

PAGES = 8


async def posix(process: Process, between: Any) -> list[object]:
    """A program that uses its memory in every way; `between` is awaited before each step. What it saw."""
    seen: list[object] = []
    address = await process.mmap(PAGES * PAGE_SIZE)
    await process.write(address, np.arange(PAGES * PAGE_SIZE // 8, dtype="<u8"))

    async def step(name: str, call: Any) -> Any:
        await between(address)
        try:
            answer = await call
        except (KernelError, SignalError) as error:
            answer = type(error).__name__, getattr(error, "name", ""), getattr(error, "address", 0) - address
        seen.append((name, answer if isinstance(answer, bytes | int | tuple) else None))
        return answer

    await step("read", process.read(address, 2 * PAGE_SIZE))
    await step("write", process.write(address + PAGE_SIZE, b"new" * 1000))
    await step("read-only", process.mprotect(address + 2 * PAGE_SIZE, PAGE_SIZE, "r"))
    await step("store to read-only", process.store(address + 2 * PAGE_SIZE, 1))
    await step("load from read-only", process.load(address + 2 * PAGE_SIZE))
    await step("unmap", process.munmap(address + 4 * PAGE_SIZE, PAGE_SIZE))
    await step("load from a hole", process.load(address + 4 * PAGE_SIZE))
    await step("drop", process.madvise(address + 5 * PAGE_SIZE, PAGE_SIZE, "DONTNEED"))
    await step("load what was dropped", process.load(address + 5 * PAGE_SIZE))
    target = await process.mmap(PAGE_SIZE, "none")
    await step("move", process.mremap(address + 6 * PAGE_SIZE, PAGE_SIZE, PAGE_SIZE, target))
    await step("load what moved", process.load(target))
    await step("lock", process.mlock(address, 2 * PAGE_SIZE))
    await step("bad unmap", process.munmap(address + 1, PAGE_SIZE))
    child = await process.fork()
    await step("child stores", child.store(address, 77))
    await step("parent loads", process.load(address))
    await step("parent stores", process.store(address + 8, 78))
    await step("child loads", child.load(address + 8))
    await child.exit()
    await step("read all", process.read(address, 4 * PAGE_SIZE))
    seen[-2] = seen[-2]
    return [entry for entry in seen if entry[0] != "move"]  # type: ignore[index]


def test_programs_see_no_difference() -> None:
    """The same results, errors and signals: today without devices, v25 without, v25 with every page on a device before each step."""

    async def quiet(_: int) -> None:
        return

    async def without(machine: SimulatedMachine) -> list[object]:
        return await posix(await machine.create_process(), quiet)

    async def with_devices(machine: SimulatedMachine) -> list[object]:
        process = await machine.create_process()
        moved: list[int] = []

        async def migrate(address: int) -> None:
            moved.append(await process.migrate(address, 2 * PAGE_SIZE, "gpu0"))

        seen = await posix(process, migrate)
        assert sum(moved) >= 8 * PAGE_SIZE
        return seen

    today = hmmnet.simulate(without).value
    assert ("load from a hole", ("SegmentationFault", "", 4 * PAGE_SIZE)) in today
    assert hmmnet.simulate(without, personality="v25").value == today
    assert hmmnet.simulate(with_devices, personality="v25").value == today
    assert hmmnet.simulate(with_devices).value == today


async def test_children_are_not_mirrored() -> None:
    """fork copies no mirror: what the child does to its own memory tells the parent's driver nothing but what concerns shared pages."""
    ground = Ground()
    await ground.register()
    address = await ground.space.mmap(2 * PAGE_SIZE)
    await ground.space.store(address, b"a" * 2 * PAGE_SIZE)
    child = ground.bench.spaces[2] = await ground.space.fork(2, ground.bench.new_hub())
    told = len(ground.dummy.log)
    await child.store(address, b"child")
    await child.mprotect(address, PAGE_SIZE, "r")
    await child.munmap(address, 2 * PAGE_SIZE)
    await child.exit()
    assert len(ground.dummy.log) == told
    assert await ground.space.load(address, 5) == b"aaaaa"
    await ground.space.munmap(address, PAGE_SIZE)
    assert len(ground.dummy.log) == told + 1


@pytest.mark.parametrize("migrated", [False, True], ids=["in memory", "on the device"])
async def test_no_cow_hazard(migrated: bool) -> None:
    """A page that a device could write before fork: afterwards it must ask again, and what it then writes is the parent's alone."""
    ground = Ground()
    await ground.register()
    address = await ground.space.mmap(PAGE_SIZE)
    await ground.space.store(address, b"before")
    if migrated:
        await ground.to_device(address, 1)
    ground.dummy.table[address] = 1
    child = ground.bench.spaces[2] = await ground.space.fork(2, ground.bench.new_hub())
    assert ground.dummy.table == {}
    word = v25.HMM_PFN_VALID | v25.HMM_PFN_READ | (v25.HMM_PFN_DEVICE_UNADDRESSABLE if migrated else 0)
    assert await ground.bits(address, 1) == [word]
    assert await ground.bits(address, 1, write=True) == [v25.HMM_PFN_VALID | v25.HMM_PFN_READ | v25.HMM_PFN_WRITE]
    async with ground.space.mmap_lock.read():
        vma, tracked, pfns = ground.snapshot(address, 1)
        frame = v25.hmm_pfn_to_frame(int(pfns[0]))
        assert v25.hmm_vma_range_done(vma, tracked)
    assert frame is not None
    ground.bench.memory.write_small(frame, 0, b"device")
    assert await child.load(address, 6) == b"before"
    assert await ground.space.load(address, 6) == b"device"
    check(ground.bench.memory, [space.mm for space in ground.bench.spaces.values()])


async def test_nobody_can_pin_device_private_pages() -> None:
    """Whoever takes a reference, of whatever kind, gets a page of system memory: the device's page is home and free."""
    ground = Ground()
    address = await ground.space.mmap(4 * PAGE_SIZE)
    await ground.space.store(address, b"x" * 4 * PAGE_SIZE)
    await ground.to_device(address, 4)
    kinds: list[dict[str, bool]] = [{}, {"write": True}, {"pin": True}, {"pin": True, "write": True, "longterm": True}]
    for i, how in enumerate(kinds):
        frames = await ground.space.get_pages((address >> 12) + i, 1, **how)
        assert v25.migrate_pfn(int(frames[0])) < v25.migrate_pfn(ground.dummy.devmem.pfn_first)
        ground.space.put_pages(frames, pin=how.get("pin", False))
    assert len(ground.dummy.freed) == 4
    assert ground.dummy.devmem.used_pages == 0


async def test_pinned_pages_never_migrate() -> None:
    """Not for a pin, not for a plain reference; after it is let go they do."""
    ground = Ground()
    address = await ground.space.mmap(2 * PAGE_SIZE)
    await ground.space.store(address, b"x" * 2 * PAGE_SIZE)
    pinned = await ground.space.get_pages(address >> 12, 1, pin=True)
    held = await ground.space.get_pages((address >> 12) + 1, 1)
    src, _ = await ground.to_device(address, 2)
    assert not (src & np.uint64(v25.MIGRATE_PFN_MIGRATE)).any()
    ground.bench.memory.write_small(int(pinned[0]), 0, b"dma")
    assert await ground.space.load(address, 3) == b"dma"
    ground.space.put_pages(pinned, pin=True)
    ground.space.put_pages(held)
    src, _ = await ground.to_device(address, 2)
    assert (src & np.uint64(v25.MIGRATE_PFN_MIGRATE)).all()
    await trio.lowlevel.checkpoint()
