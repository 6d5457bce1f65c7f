"""Faults in real processes: at points of host and devices, of nodes and links, by Python and from the command line."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
import trio

import hmmnet
from hmmnet.errors import BusError, HmmnetError, KernelError, PeerError
from hmmnet.faults import fault

PAGE = 4096
COUNT = 1 << 12


async def command(*words: str) -> str:
    """What a command prints; its errors, if it fails."""
    done = await trio.run_process([sys.executable, "-m", "hmmnet", *words], capture_stdout=True, capture_stderr=True, check=False)
    return (done.stdout if done.returncode == 0 else done.stderr).decode()


async def test_points_of_both_sides_and_the_command_line() -> None:
    """A device refuses its jobs, the host an allocation; faults are listed and removed by other processes, and all is well again."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = await machine.create_process()
        address = await process.malloc(COUNT * 8)
        await process.write(address, np.arange(COUNT, dtype="<u8"))

        async def total() -> object:
            return (await process.launch("reduction", "gpu0", "demand", a=address, n=COUNT, dtype="<u8")).results["sum"]

        usual = await total()
        assert await command("fault", "add", "point.fail", "gpu0", "point=device.job_start", "-m", machine.name) == (
            "fault 1: point.fail gpu0\n"
        )
        with pytest.raises(KernelError, match="ENOMEM"):
            await total()
        number = machine.add_fault(fault("alloc.host"))
        with pytest.raises(KernelError, match="ENOMEM"):
            await process.write(await process.mmap(PAGE), b"x")
        listed = await command("fault", "ls", "-m", machine.name)
        assert [line.split()[:2] for line in listed.splitlines()] == [["1", "point.fail"], [str(number), "alloc.host"]]
        assert "no fault has number 9" in await command("fault", "rm", "9", "-m", machine.name)
        assert await command("fault", "rm", "all", "-m", machine.name) == ""
        assert await total() == usual
        assert 'did you mean "point.fail"?' in await command("fault", "add", "point.fial", "-m", machine.name)
        assert "cannot be done in the real world" in await command("fault", "add", "partition", "-m", machine.name)
        await process.exit()


async def test_a_device_hangs_and_dies_by_fault() -> None:
    """Shorter than the lease a hang is only slow; a device that dies in the middle of a copy leaves the source as it was."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = await machine.create_process()
        address = await process.malloc(64 * PAGE)
        await process.write(address, b"data" * 16 * PAGE)
        await process.migrate(address, PAGE, "gpu1")
        machine.add_fault(fault("hang", "gpu1", lasts="300 ms"))
        began_s = time.monotonic()
        assert await process.read(address, 4) == b"data"
        assert time.monotonic() - began_s > 0.2
        machine.add_fault(fault("point.crash", "gpu0", point="migrate.mid_copy"))
        with pytest.raises((PeerError, KernelError)):
            await process.migrate(address, 64 * PAGE, "gpu0")
        assert await process.read(address, 64 * PAGE) == b"data" * 16 * PAGE
        await process.migrate(address, 8 * PAGE, "gpu1")
        machine.add_fault(fault("crash", "gpu1"))
        with pytest.raises(BusError, match='only copy on device "gpu1"'):
            await process.read(address, PAGE)
        with pytest.raises(HmmnetError, match='no device is called "gpu7"'):
            machine.add_fault(fault("crash", "gpu7"))
        await process.exit()
