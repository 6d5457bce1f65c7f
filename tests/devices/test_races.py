"""Races between what a device does and what the host does to it, each made to happen on purpose.

The oracle is the data: whatever is read at the end is the last thing that was written, and the host saw no DMA without a translation.
"""

from __future__ import annotations

import numpy as np
import pytest
import trio
import trio.testing

from hmmnet.devices.context import RETRIES_MAX
from hmmnet.devices.locks import RangeLock
from hmmnet.errors import KernelError
from hmmnet.pages import PAGE_SIZE, to_wire
from hmmnet.testing.scripted_host import ScriptedHost, counters_of, machine, results_of, u64, until
from hmmnet.wire import messages as m

PAGE = 0x10000


async def filled(host: ScriptedHost, pages: int, value: int = 1) -> int:
    at = host.mmap(PAGE, pages)
    await host.cpu_write(at, np.full(pages * 512, value, dtype="<i8").tobytes())
    return at


async def test_invalidation_between_the_answer_and_its_use() -> None:
    """The host changes the page after it has read it for us and before we have heard: the words are thrown away and read again."""
    async with machine() as (host, _):
        at = await filled(host, 1)
        times = 0

        async def change() -> None:
            nonlocal times
            times += 1
            if times == 1:
                async with host.invalidated(PAGE, PAGE + 1, "clear"):
                    host.table[PAGE].frame = host._frame()

        host.pauses[m.RangeFault] = change
        finished = await host.launch("reduction", placement="remote", a=at, n=512)
        assert results_of(finished) == {"sum": 0}
        assert len(host.sent(m.RangeFault)) == 2


async def test_a_page_that_changes_for_ever_is_ebusy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A range that is invalidated on every attempt ends with EBUSY instead of hanging."""
    assert RETRIES_MAX > 1
    monkeypatch.setattr("hmmnet.devices.context.RETRIES_MAX", 5)
    async with machine(model="dmirror") as (host, _):
        await filled(host, 1)

        async def change() -> None:
            async with host.invalidated(PAGE, PAGE + 1, "clear"):
                host.table[PAGE].write = True

        host.pauses[m.RangeFault] = change
        with pytest.raises(KernelError, match="EBUSY"):
            await host.ioctl("read", PAGE, 1)
        assert len(host.sent(m.RangeFault)) == 5


async def test_invalidation_waits_for_dma_that_is_under_way() -> None:
    """A store that is on the wire lands before the page may change hands."""
    async with machine(model="dmirror") as (host, _):
        at = await filled(host, 1)
        await host.ioctl("write", PAGE, 1, bytes([5]) * PAGE_SIZE)
        order = []
        begun = trio.Event()

        async def slow() -> None:
            begun.set()
            await trio.sleep(0.05)
            order.append("landing")

        host.pauses[m.DmaWrite] = slow

        async def invalidate() -> None:
            await begun.wait()
            async with host.invalidated(PAGE, PAGE + 1, "clear"):
                order.append("quiet")
                assert host.arena.pages[host.table[PAGE].frame][0] == 9

        async with trio.open_nursery() as nursery:
            nursery.start_soon(invalidate)
            nursery.start_soon(host.ioctl, "write", PAGE, 1, bytes([9]) * PAGE_SIZE)
        assert order == ["landing", "quiet"]
        assert await host.cpu_read(at, 1) == b"\x09"


async def test_migration_waits_for_own_dma_to_the_page() -> None:
    """A page that is written over the link migrates only when the store is over, and arrives with it."""
    async with machine(model="dmirror") as (host, _):
        await filled(host, 1)
        await host.ioctl("write", PAGE, 1, bytes([5]) * PAGE_SIZE)
        begun = trio.Event()

        async def slow() -> None:
            begun.set()
            await trio.sleep(0.05)

        host.pauses[m.DmaWrite] = slow
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.ioctl, "write", PAGE, 1, bytes([9]) * PAGE_SIZE)
            await begun.wait()
            _, data = await host.ioctl("migrate_to_dev", PAGE, 1)
        assert data == bytes([9]) * PAGE_SIZE


async def test_a_range_fault_and_a_migration_of_the_same_page_take_turns() -> None:
    """Words read before the migration may not be programmed after it: they lead to the page's old place."""
    async with machine() as (host, _):
        at = await filled(host, 16)
        begun = trio.Event()

        async def slow() -> None:
            begun.set()
            await trio.sleep(0.02)

        host.pauses[m.RangeFault] = slow
        async with trio.open_nursery() as nursery:

            async def remote() -> None:
                finished = await host.launch("vector_add", placement="remote", a=at, b=at, out=at, n=16 * 512, dtype="<i8")
                assert finished.error == ""

            nursery.start_soon(remote)
            await begun.wait()
            await host.ioctl("migrate_to_dev", PAGE, 16)
        assert (np.frombuffer(await host.cpu_read(at, 16 * PAGE_SIZE), "<i8") == 2).all()
        assert (await host.figures())["pages_used"] == 0


async def test_cpu_fault_while_words_for_the_page_are_under_way() -> None:
    """The device asks for a page of its own at the moment at which a CPU fault takes it home: the dead frame is not mapped."""
    async with machine(model="dmirror") as (host, _):
        at = await filled(host, 1, value=3)
        await host.ioctl("migrate_to_dev", PAGE, 1)
        async with host.invalidated(PAGE, PAGE + 1, "protection_vma"):
            pass
        first = True

        async def take_home() -> None:
            nonlocal first
            if first:
                first = False
                await host.cpu_write(at, bytes([7]))

        host.pauses[m.RangeFault] = take_home
        reply, data = await host.ioctl("read", PAGE, 1)
        assert data[:2] == bytes([7, 0])
        assert reply.faults == 1
        assert (await host.figures())["pages_used"] == 0


async def test_unmapping_while_a_job_runs() -> None:
    """Half of the data goes away under the job: it ends with a clean fault in that half, and the device goes on."""
    async with machine() as (host, _):
        at = await filled(host, 64)
        begun = trio.Event()
        finished: list[m.Finished] = []

        async def signal() -> None:
            begun.set()

        host.pauses[m.Migrate] = signal

        async def job() -> None:
            finished.append(await host.launch("reduction", a=at, n=64 * 512))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(job)
            await begun.wait()
            await host.munmap(PAGE + 32, 32)
        if finished[0].error:
            address = finished[0].fault_address
            assert address is not None
            assert (PAGE + 32) * PAGE_SIZE <= address < (PAGE + 64) * PAGE_SIZE
        else:
            assert results_of(finished[0]) == {"sum": 64 * 512}
        assert results_of(await host.launch("reduction", a=at, n=32 * 512)) == {"sum": 32 * 512}
        assert (await host.figures())["pages_used"] == 32


async def test_a_failed_migration_leaves_everything_as_it_was() -> None:
    """The host gives up after it has streamed: the frames are free again, nothing may land in them, the page is used at home."""
    async with machine() as (host, _):
        at = await filled(host, 16)
        real = host._copy_in

        async def copied_and_failed(sources: list[int], targets: list[int], zeros: list[int]) -> None:
            stream = host.new_stream()
            await host.session.ask(m.CopyIn(stream, to_wire(u64(targets)), to_wire(u64(zeros))), m.Done)
            host.migrations.pop().over.set()
            raise KernelError(12, "migrate_vma", "on purpose")

        host._copy_in = copied_and_failed  # type: ignore[method-assign]
        finished = await host.launch("reduction", a=at, n=16 * 512)
        assert results_of(finished) == {"sum": 16 * 512}
        assert counters_of(finished)["pages_in"] == 0
        assert (await host.figures())["pages_used"] == 0
        host._copy_in = real  # type: ignore[method-assign]
        await host.ioctl("migrate_to_dev", PAGE, 16)
        assert all(host.on_device(PAGE, 16))
        assert (np.frombuffer(await host.cpu_read(at, 16 * PAGE_SIZE), "<i8") == 1).all()


async def test_two_contexts_of_one_process_keep_their_data() -> None:
    """One context writes a page over the link while the other migrates it: no store is lost."""
    async with machine() as (host, _):
        at = await filled(host, 16, value=0)
        one = host.mmap(PAGE + 32, 16)
        await host.cpu_write(one, np.ones(16 * 512, dtype="<i8").tobytes())
        await host.open(2, 10)
        rounds = 8

        async def adding() -> None:
            for _ in range(rounds):
                finished = await host.launch("vector_add", placement="remote", context=2, a=at, b=one, out=at, n=16 * 512, dtype="<i8")
                assert finished.error == ""

        async def moving() -> None:
            for _ in range(rounds):
                await host.ioctl("migrate_to_dev", PAGE, 16)
                await host.ioctl("migrate_to_sys", PAGE, 16)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(adding)
            nursery.start_soon(moving)
        assert (np.frombuffer(await host.cpu_read(at, 16 * PAGE_SIZE), "<i8") == rounds).all()


async def test_a_lapsed_lease_costs_the_mirror_and_nothing_else() -> None:
    """Translations go at once; a job that runs meanwhile faults, and ends right when the host is back."""
    async with machine() as (host, device):
        at = await filled(host, 4)
        await host.ioctl("migrate_to_dev", PAGE, 2)
        await host.launch("reduction", a=at, n=4 * 512)
        mirror = device.contexts[1].context.mirror
        assert mirror.mapped_count() == 4
        used = device.memory.used_pages
        device.drop_mirrors()
        assert mirror.mapped_count() == 0
        assert device.memory.used_pages == used
        assert results_of(await host.launch("reduction", a=at, n=4 * 512)) == {"sum": 4 * 512}
        assert mirror.mapped_count() == 4


async def test_a_host_that_falls_silent_costs_the_mirror() -> None:
    """No frame comes for longer than the lease: the translations go by themselves. The host speaks again, and the job ends right."""
    async with machine({"lease_s": 0.4, "heartbeat_s": 0.05, "patience_s": 30.0}) as (host, device):
        at = await filled(host, 4)
        await host.launch("reduction", a=at, n=4 * 512)
        mirror = device.contexts[1].context.mirror
        assert mirror.mapped_count() == 4
        speak = host.session._transmit
        host.session._transmit = lambda _: None
        await until(lambda: mirror.mapped_count() == 0)
        host.session._transmit = speak
        assert results_of(await host.launch("reduction", a=at, n=4 * 512)) == {"sum": 4 * 512}
        assert mirror.mapped_count() == 4


async def test_fencing_forgets_and_ends_jobs() -> None:
    """When the host is lost the mirror is empty at once."""
    async with machine() as (host, device):
        at = await filled(host, 4)
        await host.launch("reduction", a=at, n=4 * 512)
        mirror = device.contexts[1].context.mirror
        assert mirror.mapped_count() == 4
        device.fence()
        assert mirror.mapped_count() == 0


async def test_turns_are_fair_and_ranges_apart_do_not_wait() -> None:
    """Overlapping ranges take turns in the order of asking, others pass."""
    lock, order = RangeLock(), []
    release = trio.Event()

    async def holder(name: str, start: int, end: int, wait: bool = False) -> None:
        async with lock.hold(start, end):
            order.append(name)
            if wait:
                await release.wait()

    async with trio.open_nursery() as nursery:
        for name, start, end, wait in (("a", 0, 10, True), ("b", 5, 15, False), ("c", 12, 20, False), ("d", 30, 40, False)):
            nursery.start_soon(holder, name, start, end, wait)
            await trio.testing.wait_all_tasks_blocked()
        assert order == ["a", "d"]
        release.set()
    assert order == ["a", "d", "b", "c"]
    assert lock.held == 0


async def test_several_wait_for_one_turn() -> None:
    """Nobody of those who wait for the same operation is forgotten, also if one of them gives up."""
    lock, passed = RangeLock(), set[int]()

    async def waiter(start: int) -> None:
        async with lock.hold(start, start + 1):
            passed.add(start)

    async with trio.open_nursery() as nursery:
        async with lock.hold(0, 10):
            for start in (1, 3, 5):
                nursery.start_soon(waiter, start)
            with trio.move_on_after(0.01):
                await waiter(7)
            await trio.testing.wait_all_tasks_blocked()
            assert not passed
    assert passed == {1, 3, 5}
    assert lock.held == 0


async def test_a_cancelled_turn_lets_others_pass() -> None:
    """Whoever gives up waiting is not waited for."""
    lock = RangeLock()
    async with lock.hold(0, 10):
        with trio.move_on_after(0.01):
            async with lock.hold(5, 6):
                pytest.fail("the range is held")
    with trio.fail_after(1):
        async with lock.hold(0, 100):
            assert lock.held == 1
