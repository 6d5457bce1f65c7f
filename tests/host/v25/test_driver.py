"""What a device's range fault becomes on a v25 host: mapping by mapping, wish by wish, and with the errors of table A3."""

from __future__ import annotations

import errno

import numpy as np
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.faults import Controls, PointFault
from hmmnet.faults.injector import Injector
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Event, Select
from hmmnet.host.mirror import Request
from hmmnet.host.notifier import Subscription
from hmmnet.host.personality import V25
from hmmnet.host.v25 import driver
from hmmnet.pages import HMM_PFN_ERROR, HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE, HMM_PFN_VALID, HMM_PFN_WRITE, PAGE_SIZE, PAGES_MAX, Words
from tests.host.fakes import ZONE, Bench, FakeLink

from .dummy import Ground, refused

READ, BOTH = HMM_PFN_REQ_FAULT, HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE
MAPPED = HMM_PFN_VALID | HMM_PFN_WRITE
TOP = 0xE0 << 56


class Device:
    """A device that asks, with one subscription over everything."""

    def __init__(self, ground: Ground, link: FakeLink | None = None) -> None:
        self.ground = ground
        self.hub: Hub = ground.bench.hub(ground.space)
        self.link = link or FakeLink("gpu0", ZONE)
        self.subscription: Subscription = self.hub.insert(0, PAGES_MAX, self.link, 1)

    async def ask(self, address: int, pages: int, flags: int = 0, inputs: list[int] | None = None, timeout_s: float = 1.0) -> Words:
        words = None if inputs is None else np.array(inputs, np.uint64)
        request = Request(address >> 12, pages, ZONE, flags, 0 if inputs is None else (1 << 64) - 1, words)
        sequence, got = await driver.range_fault(self.ground.space, self.hub, self.subscription, request, timeout_s)
        assert sequence == self.subscription.sequence
        return got

    async def bits(self, address: int, pages: int, flags: int = 0, inputs: list[int] | None = None) -> list[int]:
        return [word & TOP for word in (await self.ask(address, pages, flags, inputs)).tolist()]


async def test_a_range_over_holes_and_rights() -> None:
    """A look: ERROR for a hole and for memory without the right to read, nothing for what was never touched."""
    ground = Ground()
    device = Device(ground)
    address = await ground.space.mmap(6 * PAGE_SIZE)
    await ground.space.store(address, bytes(2 * PAGE_SIZE))
    await ground.space.munmap(address + 3 * PAGE_SIZE, PAGE_SIZE)
    await ground.space.mprotect(address + PAGE_SIZE, PAGE_SIZE, "none")
    assert await device.bits(address, 6) == [MAPPED, HMM_PFN_ERROR, 0, HMM_PFN_ERROR, 0, 0]
    assert await device.bits(address + 6 * PAGE_SIZE, 1) == [HMM_PFN_ERROR]
    for first, flags, why in ((3, READ, "is not mapped"), (6, READ, "is not mapped"), (1, READ, "PROT_NONE"), (1, BOTH, "PROT_NONE")):
        page = (address >> 12) + first
        with refused(errno.EFAULT, rf"page 0x{page:x} .*{why} \(asked for: pages 0x{page:x} to 0x{page:x}\)"):
            await device.ask(address + first * PAGE_SIZE, 1, flags)
    fixed = await ground.space.mmap(PAGE_SIZE, "r")
    with refused(errno.EPERM, "is mapped without the right to write"):
        await device.ask(fixed, 1, BOTH)
    assert await device.bits(fixed, 1, READ) == [HMM_PFN_VALID]


async def test_each_page_has_its_own_wish() -> None:
    """v25 has one for a call: pages that want the same go together, and no page gets more than it asked for."""
    ground = Ground()
    device = Device(ground)
    address = await ground.space.mmap(5 * PAGE_SIZE)
    assert await device.bits(address, 5, inputs=[0, READ, READ, BOTH, 0]) == [0, HMM_PFN_VALID, HMM_PFN_VALID, MAPPED, 0]
    assert await device.bits(address, 5, BOTH, inputs=[0, 0, 0, 0, 0]) == [MAPPED] * 5


async def test_special_mappings_are_refused() -> None:
    """A look is EINVAL, a fault EFAULT: there is nothing that could be mapped."""
    ground = Ground()
    device = Device(ground)
    hugetlb = await ground.space.mmap_hugetlb(2 << 20, "rw", None)
    with refused(errno.EINVAL):
        await device.ask(hugetlb, 1)
    with refused(errno.EFAULT, "is of the huge page pool"):
        await device.ask(hugetlb, 1, READ)


async def test_another_devices_page_is_shown_and_brought_home_for_who_needs_it() -> None:
    """Shown with a frame and the right, but not VALID; faulted in, it is a CPU's touch that brings it home."""
    ground = Ground()
    device = Device(ground)
    address = await ground.space.mmap(2 * PAGE_SIZE)
    await ground.space.store(address, b"x" * 2 * PAGE_SIZE)
    await ground.to_device(address, 2)
    words = await device.ask(address, 2)
    assert [word & TOP for word in words.tolist()] == [HMM_PFN_WRITE] * 2
    assert [word & ~TOP for word in words.tolist()] == [ground.dummy.table[address + i * PAGE_SIZE] for i in range(2)]
    assert await device.bits(address, 2, READ) == [MAPPED] * 2
    assert len(ground.dummy.freed) == 2
    assert await ground.space.load(address, 1) == b"x"


async def test_a_range_that_keeps_changing_is_ebusy() -> None:
    """It waits for a change to end, begins anew when one came in between, and gives up when the time is over."""
    ground = Ground()
    device = Device(ground)
    address = await ground.space.mmap(PAGE_SIZE)
    got: list[list[int]] = []

    async def ask() -> None:
        got.append(await device.bits(address, 1, READ))

    gate = device.link.hold()

    async def change() -> None:
        async with device.hub.invalidate(Event.CLEAR, address >> 12, (address >> 12) + 1):
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(change)
        await wait_all_tasks_blocked()
        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        assert got == []
        gate.set()
    assert got == [[HMM_PFN_VALID]]
    with refused(errno.EBUSY):
        await device.ask(address, 1, READ, timeout_s=-1.0)


async def test_the_steps_of_the_retry_protocol_are_reached() -> None:
    """Faults can be put between them, as on a host of today: held up before the last look, an invalidation has it begin anew."""
    ground = Ground()
    injector = Injector()
    hub = ground.bench.hub(ground.space)
    hub.points = injector.points_of("host")
    device = Device(ground)
    address = await ground.space.mmap(PAGE_SIZE)
    number = injector.add(PointFault("retry.before_read_retry", "pause", controls=Controls(nth=1)))
    injector.record()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(device.ask, address, 1, READ)
        await wait_all_tasks_blocked()
        await ground.space.store(address, b"x")  # in the place of the zero page that was looked at
        injector.release(number)
    assert injector.reached["retry.after_read_begin"] == 2
    assert injector.reached["retry.before_read_retry"] == 2
    assert injector.reached["hub.before_callbacks"] == 1


def test_what_a_migration_selects() -> None:
    """Everything of everybody, and nothing as a huge page."""
    chosen = driver.selected(Select.SYSTEM | Select.COMPOUND)
    assert chosen & Select.ANY_OWNER
    assert chosen & Select.DEVICE_PRIVATE
    assert chosen & Select.DEVICE_COHERENT
    assert not chosen & Select.COMPOUND


async def test_memory_that_was_removed_has_nothing_to_evict() -> None:
    """Who maps its frames is not even looked up."""
    bench = Bench(personality=V25)
    frames = np.array([bench.page_map.zone.base], np.uint64)
    bench.page_map.remove()
    assert await driver.evict(bench.homing, bench.link, frames, "release") == 0
