"""Host memory is used up, and a fault wants a page: somebody is killed for it, as by Linux's OOM killer, and the fault is taken anew.

Oracle: oom_badness (who has most), mm/memory.c (only who is killed himself learns of it).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Literal

import pytest
import trio

import hmmnet
from hmmnet.errors import KernelError
from hmmnet.faults import fault
from hmmnet.host.mm.fault import Touched
from hmmnet.sim import SimulatedMachine

from .scarce import DMIRROR, MACHINE, MIB, PAGE, filled, host_of, is_alive, used_up

FIVE = [(True, False)] * 5 + [(False, True)]
"""What is said of five tries in vain, and at their end."""


def test_a_cpu_fault_has_the_largest_killed(caplog: pytest.LogCaptureFixture) -> None:
    """The small one goes on; the log names the victim, what it had, and what is free now."""

    async def main(machine: SimulatedMachine) -> None:
        large, _ = await filled(machine, 5 * MIB)
        small, _ = await filled(machine, 2 * MIB)
        more = await small.mmap(3 * MIB)
        await small.write(more, b"y" * 3 * MIB)
        assert await small.read(more, 3 * MIB) == b"y" * 3 * MIB
        with pytest.raises(KernelError, match="ESRCH"):
            await large.mmap(PAGE)
        said = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
        assert len(said) == 1
        assert f"process {small.pid} wants a page: killed process {large.pid}, which had 1280 pages" in said[0]
        await small.exit()

    with caplog.at_level(logging.WARNING, "hmmnet.host"):
        hmmnet.simulate(main, MACHINE)


def test_who_is_killed_himself_is_told() -> None:
    """The largest wants more: ENOMEM, and it is gone; the other has lost nothing."""

    async def main(machine: SimulatedMachine) -> None:
        small, address = await filled(machine, 2 * MIB)
        large, _ = await filled(machine, 4 * MIB)
        more = await large.mmap(4 * MIB)
        with pytest.raises(KernelError, match="ENOMEM"):
            await large.write(more, b"y" * 4 * MIB)
        await trio.sleep(1)
        with pytest.raises(KernelError, match="ESRCH"):
            await large.mmap(PAGE)
        assert await small.read(address, 2 * MIB) == b"x" * 2 * MIB
        again = await small.mmap(4 * MIB)
        await small.write(again, b"z" * 4 * MIB)
        await small.exit()

    hmmnet.simulate(main, MACHINE)


def test_whom_the_owner_protects_is_not_killed() -> None:
    """With -1000 for everybody a fault ends with ENOMEM as before, and the process goes on."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await filled(machine, 6 * MIB)
        await process.set_oom_score_adj(-1000)
        more = await process.mmap(4 * MIB)
        with pytest.raises(KernelError, match=r"ENOMEM.*used up"):
            await process.write(more, b"y" * 4 * MIB)
        assert await process.read(address, PAGE) == b"x" * PAGE
        await process.exit()

    hmmnet.simulate(main, MACHINE)


def test_a_page_that_wants_to_come_home_has_somebody_killed() -> None:
    """migrate_to_ram allocates, too: what a CPU touches on the device comes home into the memory of the victim."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await filled(machine, MIB)
        assert await process.migrate(address, MIB, "gpu0") == MIB
        large, _ = await filled(machine, 7 * MIB)
        rest = await large.mmap(2 * MIB)
        await large.set_oom_score_adj(-1000)
        await process.set_oom_score_adj(-1000)
        with pytest.raises(KernelError, match="ENOMEM"):
            await large.write(rest, b"y" * 2 * MIB)
        await large.set_oom_score_adj(0)
        assert await process.read(address, MIB) == b"x" * MIB
        assert await process.load(address) == int.from_bytes(b"x" * 8, "little")
        with pytest.raises(KernelError, match="ESRCH"):
            await large.mmap(PAGE)
        await process.exit()

    hmmnet.simulate(main, MACHINE)


@pytest.mark.parametrize("personality", ["today", "v25"])
def test_a_device_fault_has_somebody_killed(personality: Literal["today", "v25"]) -> None:
    """hmm_range_fault makes pages, too: a job that writes to fresh memory goes on with the memory of the victim, whose own job ends."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        a = await process.mmap(PAGE)
        await process.write(a, b"\1\0\0\0\0\0\0\0" * 512)
        out = await process.mmap(PAGE)
        large, _ = await filled(machine, 7 * MIB)
        rest = await large.mmap(2 * MIB)
        await large.set_oom_score_adj(-1000)
        await process.set_oom_score_adj(-1000)
        with pytest.raises(KernelError, match="ENOMEM"):
            await large.write(rest, b"y" * 2 * MIB)
        await large.set_oom_score_adj(0)
        await process.launch("vector_add", "gpu0", "remote", a=a, b=a, out=out, n=512, dtype="<u8")
        assert await process.load(out) == 2
        with pytest.raises(KernelError, match="ESRCH"):
            await large.mmap(PAGE)
        await process.exit()

    hmmnet.simulate(main, MACHINE, personality=personality)


def test_a_memory_cgroup_and_a_fault_plan_kill_nobody() -> None:
    """At a limit, and where a failure is injected, ENOMEM is the answer, and everybody lives, though host memory is used up as well."""

    async def main(machine: SimulatedMachine) -> None:
        other, kept = await filled(machine, MIB)
        assert await other.migrate(kept, MIB, "gpu0") == MIB
        await machine.create_cgroup("job", MIB)
        process = await machine.create_process(cgroup="job")
        address = await process.mmap(4 * MIB)
        await process.write(address, b"y" * MIB)
        shared = await process.mmap(PAGE, shared=True)
        fresh = await other.mmap(PAGE)
        rest = await used_up(machine)
        for start in (address + MIB, shared):
            with pytest.raises(KernelError, match=r'ENOMEM.*memory cgroup "job"'):
                await process.store(start, 1)
        machine.add_fault(fault("alloc.host", nth=1))
        with pytest.raises(KernelError, match=r"ENOMEM.*injected"):
            await other.store(fresh, 1)
        machine.add_fault(fault("point.fail", point="host.alloc.home", nth=1))
        with pytest.raises(KernelError, match="ENOMEM"):
            await other.load(kept)
        assert [await is_alive(one) for one in (other, process, rest)] == [True] * 3
        await rest.exit()
        await other.store(fresh, 1)
        await process.exit()
        await other.exit()

    hmmnet.simulate(main, MACHINE)


def test_the_memory_of_a_victim_that_a_gpu_mirrors_is_waited_for() -> None:
    """The reaper leaves what a device mirrors; the exit gives it back, and until then nobody else is killed."""

    async def main(machine: SimulatedMachine) -> None:
        mirrored, address = await filled(machine, 4 * MIB)
        await mirrored.launch("reduction", "gpu0", "remote", a=address, n=512, dtype="<u8")
        bystander, _ = await filled(machine, 2 * MIB)
        small, _ = await filled(machine, MIB)
        more = await small.mmap(2 * MIB)
        await small.write(more, b"y" * 2 * MIB)
        assert [await is_alive(one) for one in (mirrored, bystander, small)] == [False, True, True]

    hmmnet.simulate(main, MACHINE)


def test_the_wait_for_a_victim_is_bounded() -> None:
    """Whose memory cannot be had within a second does not keep everybody waiting: the next one is killed."""

    async def main(machine: SimulatedMachine) -> None:
        stuck, _ = await filled(machine, 4 * MIB)
        following, _ = await filled(machine, 3 * MIB)
        small, _ = await filled(machine, PAGE)
        more = await small.mmap(2 * MIB)
        async with host_of(machine).processes[stuck.pid].space.mmap_lock.write():
            began = trio.current_time()
            await small.write(more, b"y" * 2 * MIB)
            assert 1 <= trio.current_time() - began < 1.5
        assert [await is_alive(one) for one in (stuck, following, small)] == [False, False, True]

    hmmnet.simulate(main, MACHINE)


def test_a_cancelled_fault_leaves_nobody_half_killed() -> None:
    """Cancelled while the reaper waits for the victim's lock: the victim ends all the same, and its memory is had by who asks next."""

    async def main(machine: SimulatedMachine) -> None:
        large, _ = await filled(machine, 5 * MIB)
        small, _ = await filled(machine, 2 * MIB)
        more = await small.mmap(2 * MIB)
        async with host_of(machine).processes[large.pid].space.mmap_lock.write():
            with trio.move_on_after(0.01):
                await small.write(more, b"y" * 2 * MIB)
        await trio.sleep(1)
        assert large.pid not in host_of(machine).spaces
        await small.write(more, b"y" * 2 * MIB)
        assert await is_alive(small)

    hmmnet.simulate(main, MACHINE)


def test_nobody_dies_for_who_is_dead() -> None:
    """Two accesses of one process find no memory. It is the largest, so it is killed; its other access kills nobody."""

    async def main(machine: SimulatedMachine) -> None:
        large, address = await filled(machine, 5 * MIB)
        await large.launch("reduction", "gpu0", "remote", a=address, n=512, dtype="<u8")
        others = [(await filled(machine, MIB))[0] for _ in range(2)]
        more = await large.mmap(4 * MIB)
        errors = []

        async def write(start: int) -> None:
            with pytest.raises(KernelError, match="ENOMEM") as raised:
                await large.write(start, b"y" * 2 * MIB)
            errors.append(raised.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, more)
            nursery.start_soon(write, more + 2 * MIB)
        assert len(errors) == 2
        assert [await is_alive(one) for one in (large, *others)] == [False, True, True]

    hmmnet.simulate(main, MACHINE)


def test_who_exits_has_nobody_killed() -> None:
    """An access that goes on while its process ends finds no memory: ENOMEM, and it is not worth a life."""

    async def main(machine: SimulatedMachine) -> None:
        ending, _ = await filled(machine, PAGE)
        more = await ending.mmap(PAGE)
        rest = await used_up(machine)
        host = host_of(machine)
        host.processes[ending.pid].ended = True
        with pytest.raises(KernelError, match="ENOMEM"):
            await host.spaces[ending.pid].store(more, b"1")
        assert await is_alive(rest)
        await ending.exit()

    hmmnet.simulate(main, MACHINE)


def test_a_device_that_cannot_close_a_victims_file_ends_nobody_else() -> None:
    """The dmirror wants its pages home when it is closed, for which there is no room: the victim is gone, and the host goes on."""

    async def main(machine: SimulatedMachine) -> None:
        victim, address = await filled(machine, 3 * MIB)
        await victim.open("gpu0")
        assert await victim.migrate(address, 3 * MIB, "gpu0") == 3 * MIB
        await victim.set_oom_score_adj(500)
        rest, _ = await filled(machine, 6 * MIB)
        child = await victim.fork()  # keeps the pages on the device
        asker = await machine.create_process()
        for process in (rest, child, asker):
            await process.set_oom_score_adj(-1000)
        more = await asker.mmap(4 * MIB)
        with pytest.raises(KernelError, match="ENOMEM"):
            await asker.write(more, b"y" * 4 * MIB)
        await trio.sleep(1)
        assert victim.pid not in host_of(machine).processes
        await rest.exit()
        assert await child.read(address, 3 * MIB) == b"x" * 3 * MIB
        await child.exit()
        await asker.exit()

    hmmnet.simulate(main, DMIRROR)


@pytest.mark.parametrize("failures", [1, 99])
def test_an_exit_that_fails_is_tried_again(failures: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few times, and what is left then is said; the host goes on either way."""

    async def main(machine: SimulatedMachine) -> None:
        victim, _ = await filled(machine, 5 * MIB)
        small, _ = await filled(machine, 2 * MIB)
        space, failed = host_of(machine).spaces[victim.pid], 0
        ends = space.exit

        async def exit_mmap() -> None:
            nonlocal failed
            failed += 1
            if failed <= failures:
                raise KernelError(errno.ENOMEM, "exit_mmap", "not now")
            await ends()

        monkeypatch.setattr(space, "exit", exit_mmap)
        more = await small.mmap(2 * MIB)
        await small.write(more, b"y" * 2 * MIB)
        await trio.sleep(2)
        said = [record.getMessage() for record in caplog.records if f"process {victim.pid}, killed" in record.getMessage()]
        assert (victim.pid in host_of(machine).spaces) == (failures > 1)
        assert [("not now" in line, "5 tries" in line) for line in said] == ([(True, False)] if failures == 1 else FIVE)
        if failures > 1:
            monkeypatch.setattr(space, "exit", ends)
            await victim.exit()
        await small.exit()

    with caplog.at_level(logging.WARNING, "hmmnet.host"):
        hmmnet.simulate(main, MACHINE)


async def _mlock(process: hmmnet.program.Process, address: int) -> None:
    await process.mlock(address, MIB)


async def _populate(process: hmmnet.program.Process, address: int) -> None:
    await process.madvise(address, MIB, "POPULATE_WRITE")


async def _pin(process: hmmnet.program.Process, address: int) -> None:
    held = await process.get_user_pages(address, MIB // PAGE, write=True, pin=True)
    assert held.count == MIB // PAGE
    await held.put()


async def _exclusive(process: hmmnet.program.Process, address: int) -> None:
    handle = await process.open("gpu0")
    await handle.ioctl("exclusive", address, 16)


WITHOUT: dict[Callable[[hmmnet.program.Process, int], Awaitable[None]], str] = {_mlock: "EAGAIN", _exclusive: "EBUSY"}
"""What calls that do not answer with ENOMEM make of it: __mlock_posix_error_return, dmirror_exclusive."""


@pytest.mark.parametrize("call", [_mlock, _populate, _pin, _exclusive])
def test_whoever_faults_on_behalf_of_a_process_has_somebody_killed(
    call: Callable[[hmmnet.program.Process, int], Awaitable[None]],
) -> None:
    """mlock, populate, pins and exclusive access make pages in the same way; two that are left are not enough, and are no excuse."""

    async def main(machine: SimulatedMachine) -> None:
        large, _ = await filled(machine, 6 * MIB)
        small, _ = await filled(machine, PAGE)
        address = await small.mmap(MIB)
        spare, kept = await filled(machine, 2 * PAGE)
        rest = await used_up(machine)
        await rest.set_oom_score_adj(-1000)
        await spare.munmap(kept, 2 * PAGE)
        await call(small, address)
        assert [await is_alive(one) for one in (large, small, spare, rest)] == [False, True, True, True]
        for process in (small, spare, rest):
            await process.exit()

    hmmnet.simulate(main, DMIRROR)


@pytest.mark.parametrize("call", [_mlock, _populate, _pin, _exclusive])
def test_without_anybody_to_kill_they_fail(call: Callable[[hmmnet.program.Process, int], Awaitable[None]]) -> None:
    """ENOMEM, or what the call makes of it, and the process goes on."""

    async def main(machine: SimulatedMachine) -> None:
        small, _ = await filled(machine, PAGE)
        address = await small.mmap(MIB)
        rest = await used_up(machine)
        for process in (small, rest):
            await process.set_oom_score_adj(-1000)
        with pytest.raises(KernelError, match=WITHOUT.get(call, "ENOMEM")):
            await call(small, address)
        assert await is_alive(small)
        assert await is_alive(rest)
        for process in (small, rest):
            await process.exit()

    hmmnet.simulate(main, DMIRROR)


def test_a_hole_is_not_worth_a_life() -> None:
    """mlock of memory that is not mapped, and more pages than a call may ask for, are ENOMEM, too: nobody is killed for those."""

    async def main(machine: SimulatedMachine) -> None:
        small, _ = await filled(machine, PAGE)
        hole = await small.mmap(MIB)
        await small.munmap(hole, MIB)
        rest = await used_up(machine)
        with pytest.raises(KernelError, match="ENOMEM"):
            await small.madvise(hole, MIB, "POPULATE_WRITE")
        with pytest.raises(KernelError, match="ENOMEM"):
            await small.get_user_pages(0, 1 << 25)
        assert await is_alive(rest)
        assert await is_alive(small)

    hmmnet.simulate(main, MACHINE)


def test_after_a_shortage_a_large_access_goes_on_in_large_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to single pages while memory is short, and up again when there is some: 1024 pages in a few rounds."""

    async def main(machine: SimulatedMachine) -> None:
        await filled(machine, 6 * MIB)
        small, _ = await filled(machine, PAGE)
        space, rounds = host_of(machine).spaces[small.pid], 0
        touch = space._touch

        def counted(start: int, end: int, *, write: bool, keep: tuple[int, int] | None) -> tuple[int, Touched]:
            nonlocal rounds
            rounds += 1
            return touch(start, end, write=write, keep=keep)

        monkeypatch.setattr(space, "_touch", counted)
        more = await small.mmap(4 * MIB)
        await small.write(more, b"y" * 4 * MIB)
        assert rounds < 64
        assert await small.read(more, 4 * MIB) == b"y" * 4 * MIB

    hmmnet.simulate(main, MACHINE)
