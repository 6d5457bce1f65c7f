"""Whole machines that keep v25's rules: device processes of every model run on them, over links, with their drivers' part in the host."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trio
from msgspec import json, to_builtins

import hmmnet
from hmmnet.errors import BusError, HmmnetError, KernelError, TopologyError
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.host import v25
from hmmnet.host.__main__ import decode_config
from hmmnet.host.interfaces import NO_OWNER
from hmmnet.host.mm.invariants import check
from hmmnet.host.process import Process
from hmmnet.host.service import Host
from hmmnet.host.v25.order import hub_of
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE
from hmmnet.sim import SimulatedMachine
from hmmnet.topology.load import load, parse
from hmmnet.wire.memory_transport import MemoryTransport

from .dummy import Listener, Public

SMALL = parse("""
[[memory]]
name = "node0"
size = "64 MiB"
[[device]]
name = "gpu[0-1]"
memory = "16 MiB"
[[device]]
name = "dmirror[0-1]"
model = "dmirror"
memory = "16 MiB"
unit = 0
[[device]]
name = "dmirror[2-3]"
model = "dmirror"
memory = "16 MiB"
kind = "coherent"
unit = 2
[[link]]
a = "node0"
b = "gpu[0-1]"
bandwidth = "10 GB/s"
latency = "1 us"
[[link]]
a = "node0"
b = "dmirror[0-3]"
bandwidth = "10 GB/s"
latency = "1 us"
""")
"""Little memory, because the books are looked through whole."""
PAGES = 64
LENGTH = PAGES * PAGE_SIZE
NUMBERS = np.arange(LENGTH // 8, dtype="<u8")


def host_of(machine: SimulatedMachine) -> Host:
    assert isinstance(machine.host, Host)
    return machine.host


async def filled(machine: SimulatedMachine) -> tuple[Process, int]:
    """A process with a buffer of numbers."""
    process = await machine.create_process()
    assert isinstance(process, Process)
    address = await process.mmap(LENGTH)
    await process.write(address, NUMBERS)
    return process, address


def books(machine: SimulatedMachine) -> None:
    """The invariants hold."""
    host = host_of(machine)
    check(host.memory, [space.mm for space in host.spaces.values()])


def test_pages_stream_to_a_device_and_home() -> None:
    """Explicit migration out and home, a CPU's touch, a job by demand faults: the bytes are right, over the links, and the books agree."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await filled(machine)
        assert await process.migrate(address, LENGTH, "gpu0") == LENGTH
        assert await process.load(address + 8) == 1
        assert await process.migrate(address, LENGTH, "host") == LENGTH - PAGE_SIZE
        out = await process.mmap(LENGTH)
        await process.launch("vector_add", "gpu0", a=address, b=address, out=out, n=len(NUMBERS), dtype="<u8")
        assert (await process.read_array(out, "<u8", len(NUMBERS)) == 2 * NUMBERS).all()
        report = await machine.report()
        assert report["personality"] == "v25"
        assert sum(link["bytes_moved"] for link in report["links"]) > 3 * LENGTH
        assert all(figures["iommu_refused"] == 0 for figures in report["devices"].values())
        books(machine)

    hmmnet.simulate(main, SMALL, personality="v25")


def test_a_device_is_told_at_the_end() -> None:
    """When the device hears of a munmap the pages are gone already; it holds nothing of them when munmap returns."""

    async def main(machine: SimulatedMachine) -> list[tuple[int, int, str]]:
        process, address = await filled(machine)
        handle = await process.open("dmirror0")
        await handle.ioctl("read", address, PAGES)
        told: list[tuple[int, int, str]] = []
        link = next(link for link in host_of(machine).links.values() if link.name == "dmirror0")
        tell = link.invalidate_start

        def listen(context: int, subscription: int, start: int, end: int, event: object, owner: int, sequence: int) -> object:
            gone = process.space.vma_at(start) is None
            assert owner == NO_OWNER
            told.append((start - (address >> PAGE_SHIFT), end - start, f"{event} {gone}"))
            return tell(context, subscription, start, end, event, owner, sequence)  # type: ignore[arg-type]

        link.invalidate_start = listen  # type: ignore[assignment, method-assign]
        await process.munmap(address + 8 * PAGE_SIZE, 4 * PAGE_SIZE)
        with pytest.raises(KernelError, match="EFAULT"):
            await handle.ioctl("read", address + 8 * PAGE_SIZE, 1)
        done = await handle.ioctl("read", address, 8)
        assert done.faults == 0
        return told

    assert hmmnet.simulate(main, SMALL, personality="v25").value == [(8, 4, "invalidate True")]


def test_a_page_that_comes_home_is_announced_to_everybody() -> None:
    """To drivers in the host, whose words do not hold then, and to devices that have nothing there."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await filled(machine)
        space, listener, at = process.space, Listener(), address + 8 * PAGE_SIZE
        hub, _ = hub_of(space.hub, "test")
        async with space.mmap_lock.write():
            await v25.hmm_mirror_register(listener.mirror, space)
        for others in ((), ("dmirror1", "gpu1")):
            for name in others:
                await process.launch("reduction", name, a=address, n=1)
            await process.migrate(address, LENGTH, "gpu0")
            async with space.mmap_lock.read():
                vma, tracked, pfns = v25.find_vma(space, at), v25.HmmRange(), np.zeros(1, np.uint64)
                assert vma is not None
                v25.hmm_vma_get_pfns(vma, tracked, at, at + PAGE_SIZE, pfns)
            listener.log.clear()
            before = hub.messages
            assert await process.load(at) == NUMBERS[8 * 512]
            assert not v25.hmm_vma_range_done(vma, tracked)
            assert listener.log == [("", at >> PAGE_SHIFT, (at >> PAGE_SHIFT) + 1)]
            assert hub.messages - before == 1 + len(others)
            await process.migrate(address, LENGTH, "host")

    hmmnet.simulate(main, SMALL, personality="v25")


def test_a_page_goes_from_device_to_device() -> None:
    """Without owners migrate_vma takes another device's page: private memory by way of the host, coherent memory at once."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await filled(machine)
        for device, owner in (("dmirror0", "0"), ("dmirror1", "1"), ("dmirror2", "2"), ("dmirror3", "3"), ("dmirror0", "0")):
            handle = await process.open(device)
            done = await handle.ioctl("migrate_to_dev", address, PAGES)
            assert (np.frombuffer(done.data, "<u8") == NUMBERS).all()
            where = await process.residency(address, PAGES)
            assert {where.owners[i] for i in where.pages.tolist()} == {f"dmirror{owner}"}
        books(machine)
        used = [figures["pages_used"] for figures in (await machine.report())["devices"].values()]
        assert used == [0, 0, PAGES, 0, 0, 0]
        assert (await process.read_array(address, "<u8", len(NUMBERS)) == NUMBERS).all()

    hmmnet.simulate(main, SMALL, personality="v25")


def test_a_range_that_is_partly_there_stays_readable() -> None:
    """The driver hears of its own migration, and keeps what is in its own memory: half home, and all of it there again."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await filled(machine)
        handle = await process.open("dmirror0")
        await handle.ioctl("migrate_to_dev", address, PAGES)
        await process.read(address, LENGTH // 2)
        done = await handle.ioctl("migrate_to_dev", address, PAGES)
        assert done.cpages == PAGES
        assert (np.frombuffer(done.data, "<u8") == NUMBERS).all()
        books(machine)

    hmmnet.simulate(main, SMALL, personality="v25")


def test_closing_a_device_brings_its_pages_home() -> None:
    """Without eviction by frame the ranges of everybody who maps them are migrated: a child's too, and memory without access rights."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await filled(machine)
        handle = await process.open("dmirror0")
        await handle.ioctl("migrate_to_dev", address, PAGES)
        child = await process.fork()
        await process.munmap(address, LENGTH // 2)
        await child.mprotect(address, PAGE_SIZE, "none")
        await handle.ioctl("release", 0, 1)
        assert (await machine.report())["devices"]["dmirror0"]["pages_used"] == 0
        await child.mprotect(address, PAGE_SIZE, "r")
        assert (await child.read_array(address, "<u8", len(NUMBERS)) == NUMBERS).all()
        books(machine)

    hmmnet.simulate(main, SMALL, personality="v25")


def test_a_device_write_breaks_cow_of_its_own_page() -> None:
    """Shared after fork and on the device: today such a write is EFAULT; under v25 the page comes home, and the writer gets its own."""

    async def main(machine: SimulatedMachine) -> str:
        process, address = await filled(machine)
        handle = await process.open("dmirror0")
        await handle.ioctl("migrate_to_dev", address, 1)
        child = await process.fork()
        try:
            await handle.ioctl("write", address, 1, b"\xff" * PAGE_SIZE)
        except KernelError as error:
            return error.name
        assert await child.load(address + 8) == 1
        assert await process.read(address, 4) == b"\xff" * 4
        books(machine)
        return "written"

    assert hmmnet.simulate(main, SMALL, personality="v25").value == "written"
    assert hmmnet.simulate(main, SMALL).value == "EFAULT"


def test_what_came_later_is_refused() -> None:
    """Exclusive access, and advice that a kernel of that time does not know; today's machine has both."""

    async def main(machine: SimulatedMachine) -> list[str]:
        process, address = await filled(machine)
        handle = await process.open("dmirror0")
        seen: list[str] = []
        for call in (
            handle.ioctl("exclusive", address, 1),
            process.madvise(address, PAGE_SIZE, "PAGEOUT"),
            process.madvise(address, PAGE_SIZE, "POPULATE_WRITE"),
            process.madvise(address, PAGE_SIZE, "DONTNEED"),
        ):
            try:
                await call
                seen.append("")
            except KernelError as error:
                seen.append(error.name)
        host = host_of(machine)
        try:
            host.personality.check_exclusive()
        except KernelError as error:
            seen.append(error.name)
        return seen

    assert hmmnet.simulate(main, SMALL, personality="v25").value == ["EBUSY", "EINVAL", "EINVAL", "", "EOPNOTSUPP"]
    assert hmmnet.simulate(main, SMALL).value == ["", "", "", ""]


def test_a_page_that_waits_for_a_userfaultfd_can_be_read_unlocked() -> None:
    """Not blocking, a device's fault drops the lock and comes again; blocking, it is refused."""

    async def main(machine: SimulatedMachine) -> bytes:
        process = await machine.create_process()
        handle = await process.open("dmirror0")
        address = await process.mmap(PAGE_SIZE)
        registration = await process.userfaultfd(address, PAGE_SIZE)
        with pytest.raises(KernelError) as info:
            await handle.ioctl("read", address, 1)
        assert info.value.code == errno.EFAULT

        async def fill() -> None:
            await registration.copy(await registration.read(), b"u" * PAGE_SIZE)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill)
            done = await handle.ioctl("read_unlocked", address, 1)
        return done.data[:4]

    assert hmmnet.simulate(main, SMALL, personality="v25").value == b"uuuu"


def test_devices_reach_public_memory_of_a_driver_in_the_host() -> None:
    """By DMA beside a memory of the host, to read and to write; when its memory is removed nothing is left."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await filled(machine)
        kernel = host_of(machine).kernel
        assert kernel is not None
        driver = Public(kernel)
        async with process.space.mmap_lock.read():
            vma = v25.find_vma(process.space, address)
            assert vma is not None
            await driver.migrate(vma, address, 4)
        arguments = {"a": address, "b": address, "out": address, "n": len(NUMBERS), "dtype": "<u8"}
        await process.launch("vector_add", "gpu0", "remote", **arguments)
        assert driver.devmem.used_pages == 4
        assert (await process.read_array(address, "<u8", len(NUMBERS)) == 2 * NUMBERS).all()
        assert all(figures["iommu_refused"] == 0 for figures in (await machine.report())["devices"].values())
        await process.munmap(address, LENGTH)
        await kernel.hmm_devmem_remove(driver.devmem)
        books(machine)

    hmmnet.simulate(main, SMALL, personality="v25")


async def test_the_host_process_takes_a_personality() -> None:
    """A flag of its configuration, which goes before the topology's; one that there is not is refused."""
    config = {"name": "m", "topology": to_builtins(load("two-gpus")), "directory": "d", "secret_file": "s"}
    assert decode_config(json.encode(config)).personality == ""
    assert decode_config(json.encode(config | {"personality": "v25"})).personality == "v25"
    with pytest.raises(HmmnetError, match="personality"):
        decode_config(json.encode(config | {"personality": "v26"}))
    for given, named in (("", "today"), ("v25", "v25")):
        host = Host(load("two-gpus"), MemoryTransport(), Path(), bytes(32), EmulatedClock(), personality=given)
        assert host.personality.name == named
        assert (host.kernel is None) == (named == "today")
    with pytest.raises(HmmnetError, match="there are today, v25"):
        Host(load("two-gpus"), MemoryTransport(), Path(), bytes(32), EmulatedClock(), personality="v26")


def test_device_pages_are_charged_like_others() -> None:
    """A group's charge follows its pages to a device and home, and goes with them; never-touched ones are charged there."""

    async def main(machine: SimulatedMachine) -> list[int]:
        await machine.create_cgroup("jobs", 1 << 20)
        process = await machine.create_process(cgroup="jobs")
        address = await process.mmap(32 * PAGE_SIZE)
        await process.write(address, bytes(16 * PAGE_SIZE))
        seen: list[int] = []

        async def look() -> None:
            seen.append((await machine.report())["cgroups"]["jobs"]["current_bytes"] // PAGE_SIZE)

        await look()
        await process.migrate(address, 32 * PAGE_SIZE, "gpu0")
        await look()
        await process.read(address, 16 * PAGE_SIZE)
        await look()
        await process.munmap(address, 32 * PAGE_SIZE)
        await look()
        return seen

    assert hmmnet.simulate(main, SMALL, personality="v25").value == [16, 32, 32, 0]


def test_a_device_dies_with_pages() -> None:
    """What was only there is SIGBUS that names it; what is mirrored goes on; the machine, too."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await filled(machine)
        await process.migrate(address, LENGTH // 2, "gpu0")
        await machine.kill_device("gpu0")
        with pytest.raises(BusError, match="gpu0"):
            await process.load(address)
        assert await process.load(address + LENGTH // 2) == len(NUMBERS) // 2
        await machine.start_device("gpu0")
        assert await process.migrate(address + LENGTH // 2, LENGTH // 2, "gpu0") == LENGTH // 2
        await process.munmap(address, LENGTH)
        await trio.sleep(10)
        books(machine)

    hmmnet.simulate(main, SMALL, personality="v25")


def test_a_personality_is_named_in_a_topology_or_at_launch() -> None:
    """The argument wins; a name that there is not is refused at once, with those that there are."""
    text = 'personality = "v25"\n[[memory]]\nname = "dram"\nsize = "1 GiB"\n'
    assert load("two-gpus").personality == "today"
    assert parse(text).personality == "v25"
    with pytest.raises(TopologyError, match="v26"):
        parse(text.replace("v25", "v26"))

    async def which(machine: SimulatedMachine) -> str:
        personality: str = (await machine.report())["personality"]
        return personality

    old = replace(load("two-gpus"), personality="v25")
    assert hmmnet.simulate(which, old).value == "v25"
    assert hmmnet.simulate(which, old, personality="today").value == "today"
    for start in (lambda: hmmnet.launch(personality="v26"), lambda: hmmnet.simulate(which, personality="v26")):  # type: ignore[arg-type]
        with pytest.raises(HmmnetError, match="there are today, v25"):
            start()


async def test_real_processes_keep_v25_too() -> None:
    """Host inside, devices as processes: a job by demand faults, and a driver's kernel object for programs."""
    with trio.fail_after(60):
        async with hmmnet.launch("two-gpus", rate=1.0, personality="v25") as machine:
            process = await machine.process()
            address, out = await process.mmap(LENGTH), await process.mmap(LENGTH)
            await process.write(address, NUMBERS)
            await process.launch("vector_add", "gpu1", a=address, b=address, out=out, n=len(NUMBERS), dtype="<u8")
            assert (await process.read_array(out, "<u8", len(NUMBERS)) == 2 * NUMBERS).all()
            assert (await machine.report())["personality"] == "v25"
