"""Machines of little host memory, processes that fill it, and who of them is alive."""

from __future__ import annotations

from typing import cast

import hmmnet
from hmmnet.errors import KernelError
from hmmnet.host.service import Host
from hmmnet.sim import SimulatedMachine
from hmmnet.topology.load import parse

PAGE = 4096
MIB = 1 << 20
TOML = """
[[memory]]
name = "node0"
size = "8 MiB"
[[device]]
name = "gpu0"
memory = "8 MiB"
[[link]]
a = "node0"
b = "gpu0"
bandwidth = "10 GB/s"
latency = "1 us"
"""
MACHINE = parse(TOML)
DMIRROR = parse(TOML.replace("memory =", 'model = "dmirror"\nunit = 0\nmemory ='))


def host_of(machine: SimulatedMachine) -> Host:
    """The host itself, which shows more than a program sees."""
    return cast(Host, machine.host)


async def filled(machine: SimulatedMachine, nbytes: int) -> tuple[hmmnet.program.Process, int]:
    """A process that has so much, and where."""
    process = await machine.create_process()
    address = await process.mmap(nbytes)
    await process.write(address, b"x" * nbytes)
    return process, address


async def used_up(machine: SimulatedMachine) -> hmmnet.program.Process:
    """A process that takes what is left, and then may be killed like any other."""
    process = await machine.create_process()
    pages = host_of(machine).memory.nodes[0].allocator.free_count
    address = await process.mmap(pages * PAGE)
    await process.write(address, b"z" * pages * PAGE)
    assert host_of(machine).memory.is_used_up
    return process


async def is_alive(process: hmmnet.program.Process) -> bool:
    """Whether it can still map something."""
    try:
        await process.mmap(PAGE)
    except KernelError as error:
        if error.name == "ESRCH":
            return False
        raise
    return True
