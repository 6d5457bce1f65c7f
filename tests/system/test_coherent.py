"""Coherent memory on real processes: CPU, devices and pins reach one memory in place, and know when it is lost."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import trio

import hmmnet
from hmmnet.errors import BusError, KernelError
from hmmnet.topology.load import parse

PAGE = 4096
MACHINE = parse("""
[[memory]]
name = "node0"
size = "256 MiB"
[[device]]
name = "hopper[0-1]"
kind = "coherent"
memory = "64 MiB"
[[device]]
name = "gpu0"
memory = "64 MiB"
[[link]]
a = "node0"
b = "hopper[0-1]"
bandwidth = "100 GB/s"
latency = "1 us"
[[link]]
a = "node0"
b = "gpu0"
bandwidth = "10 GB/s"
latency = "1 us"
""")


async def test_cpu_and_devices_share_coherent_memory_in_place() -> None:
    """Stores of the CPU and of two kinds of device are seen by all, without one migration after the first; the link carries them."""
    with trio.fail_after(60):
        async with hmmnet.launch(MACHINE) as machine:
            process = await machine.process()
            count = 1 << 14
            pages = count * 8 // PAGE
            address = await process.malloc(count * 8)
            await process.write(address, np.arange(count, dtype="<u8"))
            assert await process.migrate(address, count * 8, "hopper0") == count * 8
            before = {(link["link"], link["source"]): link["bytes_moved"] for link in (await machine.report())["links"]}
            values = np.arange(count, dtype="<u8")
            assert (await process.read_array(address, "<u8", count) == values).all()
            await process.store(address + 8, 77)
            values[1] = 77
            for device in ("hopper0", "hopper1", "gpu0"):
                done = await process.launch("vector_add", device, "remote", a=address, b=address, out=address, n=count, dtype="<u8")
                assert done.counters["pages_in"] == 0
                values *= 2
                assert (await process.read_array(address, "<u8", count) == values).all(), device
            where = await process.residency(address, pages)
            assert [where.owners[owner] for owner in np.unique(where.pages)] == ["hopper0"]
            report = await machine.report()
            moved = {(link["link"], link["source"]): link["bytes_moved"] for link in report["links"]}
            grown = {key for key in moved if moved[key] > before[key]}
            assert {source for _, source in grown} == {"node0", "hopper0", "hopper1", "gpu0"}
            assert all(figures["iommu_refused"] == 0 for figures in report["devices"].values())
            assert await process.migrate(address, count * 8, "host") == count * 8
            assert (await process.read_array(address, "<u8", count) == values).all()


async def test_a_lost_coherent_device_takes_its_pages_along() -> None:
    """kill -9: SIGBUS that names device and page for the CPU, and a fault for a device that had the page mapped in place."""
    with trio.fail_after(60):
        async with hmmnet.launch(MACHINE) as machine:
            process = await machine.process()
            address = await process.mmap(2 * PAGE)
            await process.write(address, b"x" * PAGE)
            await process.migrate(address, PAGE, "hopper0")
            arguments = {"a": address, "b": address, "out": address + PAGE, "n": 8, "dtype": "<u8"}
            await process.launch("vector_add", "gpu0", "remote", **arguments)
            child = await process.fork()
            os.kill((await machine.report())["devices"]["hopper0"]["pid"], signal.SIGKILL)
            while (await machine.report())["devices"]["hopper0"]["state"] != "lost":
                await trio.sleep(0.01)
            for victim in (process, child):
                with pytest.raises(BusError, match="hopper0") as held:
                    await victim.load(address)
                assert held.value.address == address
            with pytest.raises(BusError):
                await process.launch("vector_add", "gpu0", "remote", **arguments)
            await process.munmap(address, PAGE)
            await process.mmap(PAGE, "rw", address)
            assert await process.load(address) == 0


async def test_pins_and_fork_of_coherent_pages() -> None:
    """A short pin leaves a page where it is and reads it there, a long-term one brings it home; a pinned page is copied at fork."""
    with trio.fail_after(60):
        async with hmmnet.launch(MACHINE) as machine:
            process = await machine.process()
            address = await process.mmap(3 * PAGE)
            await process.write(address, b"".join(bytes([i]) * PAGE for i in (1, 2, 3)))
            await process.migrate(address, 3 * PAGE, "hopper0")
            short = await process.get_user_pages(address, 1, write=True, pin=True)
            assert await short.read(1) == b"\x01" * PAGE
            long = await process.get_user_pages(address + PAGE, 1, pin=True, longterm=True)
            where = await process.residency(address, 3)
            assert [where.owners[owner] for owner in where.pages] == ["hopper0", "node0", "hopper0"]
            with pytest.raises(KernelError, match="EBUSY"):
                await process.get_user_pages(address, 1, pin=True, longterm=True)
            child = await process.fork()
            await process.store(address, 9)
            assert (await short.read(1))[:8] == (9).to_bytes(8, "little")
            assert (await child.read(address, 1), await child.read(address + 2 * PAGE, 1)) == (b"\x01", b"\x03")
            await child.store(address + 2 * PAGE, 5)
            assert await process.read(address + 2 * PAGE, 1) == b"\x03"
            await short.put()
            await long.put()
