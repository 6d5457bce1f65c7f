"""Memory that breaks (MADV_HWPOISON): SIGBUS for everybody who maps it, EFAULT for devices, and its frame is never given out again.

Oracle: mm/memory-failure.c, mm/madvise.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hmmnet.errors import BusError, KernelError
from hmmnet.host.poison import ROUNDS_MAX, memory_failure
from hmmnet.host.service import Host
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE
from tests.host.scripted_device import running_host

from .fakes import Bench

pytestmark = pytest.mark.virtual_time


def used(host: Host) -> int:
    return sum(node.allocator.used_count for node in host.memory.nodes)


async def test_poison_reaches_everybody_and_stays() -> None:
    """Parent and child; the neighbours live on; unmapped, the addresses are good again, the frame is not."""
    async with running_host("gpu0") as (host, _):
        parent = await host.create_process()
        address = await parent.mmap(4 * PAGE_SIZE)
        await parent.write(address, bytes([7]) * 4 * PAGE_SIZE)
        child = await parent.fork()
        await parent.madvise(address + PAGE_SIZE, PAGE_SIZE, "HWPOISON")
        for process in (parent, child):
            with pytest.raises(BusError, match="poisoned") as fatal:
                await process.read(address, 2 * PAGE_SIZE)
            assert fatal.value.address == address + PAGE_SIZE
            assert await process.read(address + 2 * PAGE_SIZE, 1) == b"\7"
            page = np.array([address // PAGE_SIZE + 1], np.uint64)
            async with process.space.mmap_lock.read():
                with pytest.raises(KernelError, match="EFAULT"):
                    await process.space.fault_in(page, np.array([False]))
        assert (await host.report())["poisoned_pages"] == 1
        await parent.munmap(address, 4 * PAGE_SIZE)
        await parent.mmap(4 * PAGE_SIZE, "rw", address)
        assert await parent.read(address + PAGE_SIZE, 1) == b"\0"
        await child.exit()
        await parent.exit()
        assert used(host) == 1


async def test_a_huge_page_loses_one_page() -> None:
    """It is split; the other 511 are as they were."""
    async with running_host("gpu0") as (host, _):
        process = await host.create_process()
        address = await process.mmap(512 * PAGE_SIZE)
        await process.madvise(address, 512 * PAGE_SIZE, "HUGEPAGE")
        await process.write(address, bytes([5]) * 512 * PAGE_SIZE)
        await process.madvise(address + 9 * PAGE_SIZE, PAGE_SIZE, "HWPOISON")
        assert await process.read(address, 9 * PAGE_SIZE) == bytes([5]) * 9 * PAGE_SIZE
        with pytest.raises(BusError):
            await process.load(address + 9 * PAGE_SIZE)
        await process.exit()
        assert used(host) == 1


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "mapped in parts"])
async def test_a_huge_page_that_somebody_holds_stays_whole(parts: bool) -> None:
    """MF_MSG_UNSPLIT_THP: EBUSY, and the page is as before; what lies before it is poisoned. Let go of, it breaks."""
    async with running_host("gpu0") as (host, _):
        process = await host.create_process()
        address = await process.mmap(1024 * PAGE_SIZE, address=1 << 30)
        await process.write(address, bytes([5]) * 512 * PAGE_SIZE)
        huge = address + 512 * PAGE_SIZE
        await process.madvise(huge, 512 * PAGE_SIZE, "HUGEPAGE")
        await process.write(huge, bytes([6]) * 512 * PAGE_SIZE)
        if parts:
            await process.mprotect(huge, PAGE_SIZE, "r")
        held = await process.get_user_pages(huge + 100 * PAGE_SIZE, 1, write=True, pin=True)
        with pytest.raises(KernelError, match=rf"EBUSY: page 0x{huge // PAGE_SIZE:x} .* huge page that somebody holds") as caught:
            await process.madvise(huge - PAGE_SIZE, 3 * PAGE_SIZE, "HWPOISON")
        assert caught.value.call == "madvise"
        with pytest.raises(BusError):
            await process.load(huge - PAGE_SIZE)
        assert await process.read(huge, 512 * PAGE_SIZE) == bytes([6]) * 512 * PAGE_SIZE
        assert (await host.report())["poisoned_pages"] == 1
        await held.put()
        await process.madvise(huge, PAGE_SIZE, "HWPOISON")
        with pytest.raises(BusError):
            await process.load(huge)
        assert host.audit(quiet=True) == []
        await process.exit()
        assert used(host) == 2


async def test_what_is_nobodys_own_is_busy() -> None:
    """The zero page and pages of files; what comes before is poisoned; nothing mapped is EFAULT."""
    async with running_host("gpu0") as (host, _):
        process = await host.create_process()
        address = await process.mmap(2 * PAGE_SIZE)
        await process.write(address, b"x")
        with pytest.raises(KernelError, match="EBUSY"):
            await process.madvise(address, 2 * PAGE_SIZE, "HWPOISON")
        with pytest.raises(BusError):
            await process.read(address, 1)
        assert await process.read(address + PAGE_SIZE, 1) == b"\0"
        file = await process.memfd_create(PAGE_SIZE)
        shared = await process.mmap(PAGE_SIZE, shared=True, file=file)
        with pytest.raises(KernelError, match="EBUSY"):
            await process.madvise(shared, PAGE_SIZE, "HWPOISON")
        assert await process.read(shared, 1) == b"\0"
        with pytest.raises(KernelError, match="EFAULT"):
            await process.madvise(1 << 40, PAGE_SIZE, "HWPOISON")
        assert (await host.report())["poisoned_pages"] == 1


async def test_what_cannot_break_is_refused_at_once() -> None:
    """An address inside a page is EINVAL, more than can be held at once ENOMEM, a hole EFAULT: nothing is poisoned."""
    async with running_host("gpu0") as (host, _):
        process = await host.create_process()
        address = await process.mmap(2 * PAGE_SIZE)
        for start, length, name in (
            (address + 8, PAGE_SIZE, "EINVAL"),
            (address, 1 << 46, "ENOMEM"),
            (address - (1 << 30), PAGE_SIZE, "EFAULT"),
        ):
            with pytest.raises(KernelError, match=name):
                await process.madvise(start, length, "HWPOISON")
        assert (await host.report())["poisoned_pages"] == 0
        await process.exit()


@pytest.mark.parametrize("times", [1, ROUNDS_MAX])
async def test_what_others_move_meanwhile_breaks_where_it_is_then(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Between the look for its frame and the break a page goes to a device (an eviction, a prefetch): it is looked for again, a bounded
    number of times.
    """
    bench = Bench()
    space = bench.space()
    address = await space.mmap(2 * PAGE_SIZE)
    await space.store(address, bytes([5]) * 2 * PAGE_SIZE)
    left = times

    async def others(*arguments: Any, **how: Any) -> None:
        nonlocal left
        if left:
            left -= 1
            await bench.to_device(space, address, 1)

    monkeypatch.setattr("hmmnet.host.poison.split_large", others)
    page = address >> PAGE_SHIFT
    if times < ROUNDS_MAX:
        await memory_failure(bench.memory, bench.spaces, space, page, page + 1)
        with pytest.raises(BusError, match="poisoned"):
            await space.load(address, 1)
    else:
        with pytest.raises(KernelError, match=rf"EBUSY: pages 0x{page:x} to 0x{page:x} of process 1 were moved by others {times} times"):
            await memory_failure(bench.memory, bench.spaces, space, page, page + 1)
        assert await space.load(address, PAGE_SIZE) == bytes([5]) * PAGE_SIZE
    assert left == 0
    assert await space.load(address + PAGE_SIZE, PAGE_SIZE) == bytes([5]) * PAGE_SIZE
    await space.exit()
    assert bench.host_pages_used() == bench.memory.poisoned == (times < ROUNDS_MAX)
