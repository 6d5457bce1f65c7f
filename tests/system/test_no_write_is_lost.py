"""Two GPUs, the CPU and a restless migrator work on the same pages at once, each on words of its own: no increment may be lost.

        page:  | gpu0 demand | gpu1 demand | gpu0 remote | gpu1 remote | cpu | cpu |   <- 64 words each

       dram ---- pcie ---- gpu0        a mover sends random ranges to gpu0, gpu1 and home all the time;
          \\---- pcie ---- gpu1        another maps, fills, migrates and unmaps memory beside them

Oracle: every actor counts what it added where. At the end each word must hold exactly its actor's count, the IOMMU must have refused
nothing, and the devices' memory must be empty once the process is gone. False sharing makes every page change hands all the time.
Host and devices are the real ones, in one trio run over memory channels; `SEEDS` choose the ranges.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio

from hmmnet.devices.models.base import Device
from hmmnet.devices.service import serve
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.host.service import Host
from hmmnet.pages import PAGE_SIZE
from hmmnet.program import Process
from hmmnet.topology.model import DeviceSpec, LinkSpec, MemoryNode, Topology
from hmmnet.wire.memory_transport import MemoryTransport

SEEDS = (1, 2, 3)
PAGES = 6
WORDS = 64
ROUNDS = 25
GPUS = ("gpu0", "gpu1")
ACTORS = (("gpu0", "demand"), ("gpu1", "demand"), ("gpu0", "remote"), ("gpu1", "remote"), ("cpu", ""), ("cpu", ""))


def topology() -> Topology:
    devices = tuple(DeviceSpec(name, "gpu", 64 << 20, "private", "dram") for name in GPUS)
    links = tuple(LinkSpec(f"link-{name}", "dram", name, "pcie", 32e9, 1e-6) for name in GPUS)
    return Topology("soak", "", (MemoryNode("dram", 256 << 20),), devices, (), links)


@asynccontextmanager
async def machine(folder: Path) -> AsyncIterator[tuple[Host, list[Device]]]:
    """Host and devices in this run."""
    secret = bytes(32)
    with MemoryTransport() as transport:
        host = Host(topology(), transport, folder, secret, EmulatedClock(), scheme="mem")
        devices: list[Device] = []
        async with trio.open_nursery() as nursery, host.running():
            for name in GPUS:
                nursery.start_soon(serve, transport, host.control_endpoint, name, secret, 1, None, 10.0, devices.append)
                await host.device_ready(name)
            yield host, devices


class Field:
    """The shared pages, and who added how much where."""

    def __init__(self, process: Process, at: int, ones: int) -> None:
        self.process = process
        self.at = at
        self.ones = ones
        self.added = np.zeros((PAGES, len(ACTORS)), dtype=np.int64)

    async def act(self, actor: int, chance: random.Random) -> None:
        """Add one to the actor's words of random pages, again and again."""
        device, placement = ACTORS[actor]
        for _ in range(ROUNDS):
            page = chance.randrange(PAGES)
            at = self.at + page * PAGE_SIZE + actor * WORDS * 8
            if device == "cpu":
                await self.process.write(at, await self.process.read_array(at, "<i8", WORDS) + 1)
            else:
                await self.process.launch("vector_add", device, placement, a=at, b=self.ones, out=at, n=WORDS, dtype="<i8")
            self.added[page, actor] += 1

    async def move(self, chance: random.Random) -> None:
        """Send random ranges to and fro until cancelled."""
        while True:
            first = chance.randrange(PAGES)
            count = chance.randint(1, PAGES - first)
            await self.process.migrate(self.at + first * PAGE_SIZE, count * PAGE_SIZE, chance.choice((*GPUS, "host")))

    async def churn(self, chance: random.Random) -> None:
        """Map, fill, migrate, protect and unmap beside the field until cancelled."""
        while True:
            length = chance.randint(1, PAGES) * PAGE_SIZE
            there = await self.process.mmap(length)
            await self.process.write(there, b"x" * length)
            await self.process.migrate(there, length, chance.choice(GPUS))
            await self.process.munmap(there, length)
            await self.process.mprotect(self.ones, PAGE_SIZE, chance.choice(("r", "rw")))


@pytest.mark.parametrize("seed", SEEDS)
async def test_every_increment_counts(seed: int, tmp_path: Path) -> None:
    """Each word holds what its actor added, however often its page changed hands."""
    async with machine(tmp_path) as (host, devices):
        process = await host.create_process()
        at, ones = await process.mmap(PAGES * PAGE_SIZE), await process.mmap(PAGE_SIZE)
        await process.write(ones, np.ones(512, dtype="<i8"))
        field = Field(process, at, ones)
        with trio.fail_after(60):
            async with trio.open_nursery() as restless:
                restless.start_soon(field.move, random.Random(seed))
                restless.start_soon(field.churn, random.Random(-seed))
                async with trio.open_nursery() as actors:
                    for actor in range(len(ACTORS)):
                        actors.start_soon(field.act, actor, random.Random(seed * 100 + actor))
                restless.cancel_scope.cancel()
        words = (await process.read_array(at, "<i8", PAGES * 512)).reshape(PAGES, 512 // WORDS, WORDS)[:, : len(ACTORS)]
        assert (words == field.added[:, :, np.newaxis]).all()
        assert [about["iommu_refused"] for about in (await host.report())["devices"].values()] == [0, 0]
        await process.exit()
        with trio.fail_after(60):
            while any(device.memory.used_pages for device in devices):
                await trio.sleep(0.005)
