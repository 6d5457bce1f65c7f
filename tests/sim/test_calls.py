"""System calls at their edges, and calls that a device's death interrupts, on a simulated machine: each has its error, none hangs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from inspect import iscoroutinefunction
from typing import Any

import numpy as np
import pytest
import trio

import hmmnet
from hmmnet.errors import HmmnetError, KernelError, RemoteError
from hmmnet.faults import Controls, PointFault, fault
from hmmnet.pages import HUGE_PAGES, PAGE_SIZE
from hmmnet.program import Process
from hmmnet.sim import SimulatedMachine, run_virtual, simulated
from hmmnet.topology.load import load

from .countdown import Countdown

MIB = 1 << 20


def test_system_calls_at_their_edges() -> None:
    """What mmap, malloc, mlock, migrate, open devices and launch refuse, and what they make of odd sizes."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        huge = await process.mmap(PAGE_SIZE, hugetlb=True)
        assert (await process.residency(huge, HUGE_PAGES)).pages.shape == (HUGE_PAGES,)
        populated = await process.mmap(3 * PAGE_SIZE, populate=True)
        read_only = await process.mmap(PAGE_SIZE, "r", populate=True)
        assert len(await process.pagemap(populated, 3)) == 3
        assert await process.load(read_only) == 0
        await process.mlock(populated, PAGE_SIZE)
        await process.munlock(populated, PAGE_SIZE)
        assert await process.migrate(populated, 0, "gpu0") == 0
        handle = await process.open("gpu0")
        file = await process.memfd_create(PAGE_SIZE)
        refused: list[tuple[str, Callable[[], Awaitable[Any]]]] = [
            ("EINVAL", lambda: process.mmap(PAGE_SIZE, hugetlb=True, file=file)),
            ("EBADF", lambda: process.mmap(PAGE_SIZE, file=object())),  # type: ignore[arg-type]  # no file at all
            ("ENODEV", lambda: process.mmap(PAGE_SIZE, file=handle)),
            ("EINVAL", lambda: process.malloc(-1)),
            ("migrate: ENOENT", lambda: process.migrate(populated, PAGE_SIZE, "gpu9")),
            ("launch: ENOENT", lambda: process.launch("reduction", "gpu9", a=populated, n=1)),
            ("E2BIG", lambda: process.launch("vector_add", "gpu0", text="x" * (2 * MIB))),
            ("EINVAL", lambda: handle.ioctl("migrate_to_dev", -1, 1)),
            ("EINVAL", lambda: handle.ioctl("migrate_to_dev", 0, 1 << 40)),
        ]
        for name, call in refused:
            with pytest.raises(KernelError, match=name):
                await call()
        await handle.close()
        with pytest.raises(KernelError, match="EBADF"):
            await handle.ioctl("migrate_to_dev", populated, 1)
        with pytest.raises(KernelError, match="EBADF"):
            await handle.close()
        await process.exit()

    hmmnet.simulate(main)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_every_call_of_a_process_that_has_ended_is_esrch(how: str) -> None:
    """Whatever is asked, with arguments that are right or wrong; but to end it once more does nothing, and its handles are closed."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.malloc(PAGE_SIZE)
        handle = await process.open("gpu0")
        calls: dict[str, tuple[Any, ...]] = {
            "mmap": (PAGE_SIZE,),
            "memfd_create": (PAGE_SIZE,),
            "mremap": (address, PAGE_SIZE, 2 * PAGE_SIZE),
            "malloc": (1,),
            "write": (address, b"x"),
            "load": (address,),
            "store": (address, 1),
            "fetch_add": (address, 1),
            "read_array": (address, "<u8", 1),
            "open": ("gpu0",),
            "launch": ("reduction", "gpu0"),
            "migrate": (address, PAGE_SIZE, "gpu0"),
            "set_oom_score_adj": (0,),
            "mprotect": (address, PAGE_SIZE, "r"),
            "madvise": (address, PAGE_SIZE, "DONTNEED"),
            **dict.fromkeys(("smaps", "clear_refs", "oom_score", "fork"), ()),
            **dict.fromkeys(("read", "munmap", "mlock", "munlock", "userfaultfd"), (address, PAGE_SIZE)),
            **dict.fromkeys(("get_user_pages", "pagemap", "pagemap_words", "residency"), (address, 1)),
        }
        served = {name for name, call in vars(type(process)).items() if iscoroutinefunction(call) and not name.startswith("_")}
        assert served - {"exit", "kill", "reap"} == calls.keys()
        await getattr(process, how)()
        for name, given in calls.items():
            for arguments in (given, tuple(-1 for _ in given)):
                with pytest.raises(KernelError, match=rf"^{name}: ESRCH.* has exited"):
                    await getattr(process, name)(*arguments)
        with pytest.raises(KernelError, match="EBADF"):
            await handle.ioctl("migrate_to_dev", address, 1)
        await process.kill()
        await process.exit()

    hmmnet.simulate(main)


@pytest.mark.parametrize("call", ["munmap", "mprotect", "madvise", "mremap"])
def test_a_call_at_whose_beginning_its_process_exits_is_esrch(call: str) -> None:
    """It waits at that step boundary, and meanwhile the process ends."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(PAGE_SIZE)
        machine.add_fault(fault("process.exit", point=f"process.{call}"))
        machine.add_fault(fault("point.delay", point=f"process.{call}"))
        more = {"mprotect": ("r",), "madvise": ("DONTNEED",), "mremap": (2 * PAGE_SIZE,)}.get(call, ())
        with pytest.raises(KernelError, match=f"^{call}: ESRCH.* has exited"):
            await getattr(process, call)(address, PAGE_SIZE, *more)

    hmmnet.simulate(main)


def test_a_job_that_nobody_waits_for_ends() -> None:
    """Cancelled in the middle of its faults: the device is told, and takes the next one."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.malloc(8 * MIB)
        await process.write(address, np.ones(MIB, "<u8"))
        with trio.move_on_after(20e-6) as scope:
            await process.launch("vector_add", "gpu0", a=address, b=address, out=address, n=MIB, dtype="<u8")
        assert scope.cancelled_caught
        done = await process.launch("reduction", "gpu0", a=address, n=MIB, dtype="<u8")
        assert MIB <= done.results["sum"] <= 2 * MIB
        await process.exit()

    hmmnet.simulate(main)


async def _open(process: Process, address: int) -> None:
    handle = await process.open("dmirror1")
    await handle.close()


async def _command(process: Process, address: int) -> None:
    handle = await process.open("dmirror1")
    await handle.ioctl("write", address, 64, data=bytes(64 * PAGE_SIZE))
    await handle.ioctl("read", address, 64)
    await handle.close()


async def _exclusive(process: Process, address: int) -> None:
    handle = await process.open("dmirror1")
    await handle.ioctl("exclusive", address, 4)
    await process.store(address, 1)
    await handle.close()


async def _release(process: Process, address: int) -> None:
    handle = await process.open("dmirror1")
    await handle.ioctl("migrate_to_dev", address, 64)
    await handle.ioctl("release", 0, 1)
    await handle.close()


async def _exit(process: Process, address: int) -> None:
    await process.migrate(address, 64 * PAGE_SIZE, "dmirror1")
    await process.exit()


@pytest.mark.parametrize("call", [_open, _command, _exclusive, _release, _exit])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_death_interrupts_a_call(call: Callable[[Process, int], Awaitable[None]], seed: int) -> None:
    """The device dies at each message in turn: the call ends, well or with its error, and the machine goes on."""

    async def one_life(at: int) -> bool:
        trace = Countdown(at)
        async with simulated("dmirror-4", trace=trace) as machine, trio.open_nursery() as nursery:
            process = await machine.create_process()
            address = await process.mmap(64 * PAGE_SIZE)
            await process.write(address, bytes(64 * PAGE_SIZE))

            async def kill() -> None:
                await trace.now.wait()
                await machine.kill_device("dmirror1")

            nursery.start_soon(kill)
            refused: HmmnetError | None = None
            try:
                await call(process, address)
            except HmmnetError as error:
                refused = error
            killed = "dmirror1" not in machine.running
            nursery.cancel_scope.cancel()
            assert refused is None or (killed and ("dmirror1" in str(refused) or "EBADF" in str(refused)))
            if killed:
                await machine.start_device("dmirror1")
            other = await machine.create_process()
            await (await other.open("dmirror1")).close()
            await other.exit()
            await process.exit()
        return trace.now.is_set()

    at = 17  # before that the machine is not up
    while run_virtual(one_life, at, seed=seed, limit_s=600.0):
        at += 1
    assert at > 20


@pytest.mark.parametrize("to", ["gpu0", "host"])
@pytest.mark.parametrize(("how", "why"), [("hole", "is not mapped"), ("none", "not readable"), ("w", "not readable")])
def test_a_migration_ends_where_nothing_can_migrate(how: str, why: str, to: str) -> None:
    """A hole, or a mapping without read right, in the middle: what lies before it moves, then EINVAL names the address and the mapping."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(6 * PAGE_SIZE)
        await process.write(address, bytes(range(6)) * PAGE_SIZE)
        if to == "host":
            assert await process.migrate(address, 6 * PAGE_SIZE, "gpu0") == 6 * PAGE_SIZE
        bad = address + 3 * PAGE_SIZE
        await (process.munmap(bad, PAGE_SIZE) if how == "hole" else process.mprotect(bad, PAGE_SIZE, how))
        with pytest.raises(KernelError, match=f"migrate: EINVAL: address 0x{bad:x} of process .*{why}; 12288 bytes") as refused:
            await process.migrate(address, 6 * PAGE_SIZE, to)
        assert how == "hole" or f"[0x{bad:x}, 0x{bad + PAGE_SIZE:x})" in str(refused.value)
        there = await process.residency(address, 6)
        owners = [there.owners[there.pages[i]] for i in (0, 1, 2, 4, 5)]
        behind = "gpu0" if to == "host" else "node0"
        assert owners == ["node0" if to == "host" else "gpu0"] * 3 + [behind] * 2
        with pytest.raises(KernelError, match="nothing has moved"):
            await process.migrate(bad, 3 * PAGE_SIZE, to)
        assert await process.read(address, 3) == bytes(range(3))

    hmmnet.simulate(main, "two-gpus")


def test_what_a_topology_says_of_a_device_reaches_its_jobs() -> None:
    """``atomics = false`` and ``page_sizes`` without 2 MiB of one device: it refuses what wants them, with its name; the other does not."""
    plain = load("two-gpus")
    devices = tuple(
        replace(device, atomics=False, page_sizes=(4 << 10, 64 << 10)) if device.name == "gpu0" else device for device in plain.devices
    )

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(PAGE_SIZE)
        with pytest.raises(RemoteError, match=r'device "gpu0" has no atomic operations \(atomics = false\)'):
            await process.launch("fetch_add", "gpu0", a=address)
        await process.launch("fetch_add", "gpu1", a=address)
        with pytest.raises(KernelError, match='page_sizes of device "gpu0" are 4 KiB, 64 KiB'):
            await process.launch("peek", "gpu0", "demand-2m", a=address, n=1)
        await process.launch("peek", "gpu1", "demand-2m", a=address, n=1)
        assert await process.load(address) == 1

    hmmnet.simulate(main, replace(plain, devices=devices))


def test_a_mapping_that_cannot_move_ends_a_migration() -> None:
    """Of three that go two at a time, the first fails: its error is the call's, the one beside it has moved, the last does not begin."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(6 * PAGE_SIZE)
        await process.write(address, b"x" * 6 * PAGE_SIZE)
        await process.mprotect(address + 2 * PAGE_SIZE, 2 * PAGE_SIZE, "r")
        machine.add_fault(PointFault("migrate.before_copy", "fail", controls=Controls(nth=1)))
        with pytest.raises(HmmnetError, match=r"injected at migrate\.before_copy"):
            await process.migrate(address, 6 * PAGE_SIZE, "gpu0")
        where = await process.residency(address, 6)
        assert [where.owners[place] for place in where.pages] == ["node0", "node0", "gpu0", "gpu0", "node0", "node0"]
        assert await process.read(address, 6 * PAGE_SIZE) == b"x" * 6 * PAGE_SIZE
        assert await process.migrate(address, 6 * PAGE_SIZE, "gpu0") == 6 * PAGE_SIZE
        await process.exit()

    hmmnet.simulate(main)
