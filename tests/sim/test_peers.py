"""Pages go from GPU to GPU over the links between them, and through no memory of the host.

                node0 ──pcie── gpu0 ┐
                  ├────pcie─── gpu1 ┼── nvswitch     gpu0, gpu1: one owner
                  ├────pcie─── gpu2 ┘                gpu2, private and small
                  └────pcie─── far                   no way but through node0: an owner of its own

Oracle: the bytes that each link has carried, the figures of the links, and plain Python for what the pages hold.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import trio

import hmmnet
from hmmnet.errors import BusError, HmmnetError, KernelError
from hmmnet.faults import fault
from hmmnet.host.dma_map import page_map_owners
from hmmnet.host.relay import PIECE_PAGES, pieces
from hmmnet.host.service import Host
from hmmnet.observe.counters import DEVICE_TO_DEVICE
from hmmnet.pages import HUGE_PAGES, LARGE
from hmmnet.sim import SimulatedMachine, run_virtual, simulated
from hmmnet.topology.load import load, parse

from .countdown import Countdown

PAGE = 4096
MIB = 1 << 20
TEXT = """
[[memory]]
name = "node0"
size = "256 MiB"
[[switch]]
name = "nvswitch"
[[device]]
name = "gpu[0-1]"
memory = "64 MiB"
[[device]]
name = "gpu2"
memory = "2 MiB"
[[device]]
name = "far"
memory = "64 MiB"
[[link]]
a = "node0"
b = "gpu[0-2]"
bandwidth = "10 GB/s"
latency = "1 us"
[[link]]
a = "node0"
b = "far"
bandwidth = "10 GB/s"
latency = "1 us"
[[link]]
a = "nvswitch"
b = "gpu[0-2]"
bandwidth = "40 GB/s"
latency = "1 us"
"""
MACHINE = parse(TEXT)
NBYTES = 48 * MIB
PATTERN = np.random.default_rng(7).integers(0, 256, NBYTES, np.uint8).tobytes()


async def carried(machine: SimulatedMachine) -> dict[str, int]:
    """Bytes by kind of link."""
    found: dict[str, int] = {"host": 0, "peer": 0}
    for link in (await machine.report())["links"]:
        found["peer" if "nvswitch" in link["link"] else "host"] += link["bytes_moved"]
    return found


async def frames_of_host(machine: SimulatedMachine) -> int:
    return cast(Host, machine.host).memory.nodes[0].allocator.used_count


async def owners_of(process: hmmnet.program.Process, address: int, pages: int) -> set[str]:
    there = await process.residency(address, pages)
    return {there.owners[place] for place in there.pages.tolist()}


@pytest.mark.parametrize("huge", [False, True])
def test_pages_go_over_the_peer_link_alone(huge: bool) -> None:
    """48 MiB, in small pages and in huge ones: nothing on a host link, no host frame, at the speed of the peer links, and counted so."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(NBYTES)
        if not huge:
            await process.madvise(address, NBYTES, "NOHUGEPAGE")
        await process.write(address, PATTERN)
        assert await process.migrate(address, NBYTES, "gpu0") == NBYTES
        before, frames, began_s = await carried(machine), await frames_of_host(machine), machine.emulated_s()
        assert await process.migrate(address, NBYTES, "gpu1") == NBYTES
        took_s, after = machine.emulated_s() - began_s, await carried(machine)
        assert after == {"host": before["host"], "peer": 2 * NBYTES}
        assert NBYTES / 40e9 < took_s < 1.2 * NBYTES / 40e9
        assert await owners_of(process, address, NBYTES // PAGE) == {"gpu1"}
        assert await frames_of_host(machine) == frames
        (counted,) = [row for row in (await machine.report())["profile"] if row["kind"] == DEVICE_TO_DEVICE]
        assert counted["total_bytes"] == NBYTES
        assert await process.read(address, NBYTES) == PATTERN
        await process.exit()

    hmmnet.simulate(main, MACHINE)


def test_a_job_takes_what_it_faults_on_from_its_peer() -> None:
    """gpu1 adds up what gpu0 has: its pages move over the peer links, none of them home first."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        count = MIB // 8
        address = await process.mmap(MIB)
        await process.write(address, np.arange(count, dtype="<u8"))
        assert await process.migrate(address, MIB, "gpu0") == MIB
        before = await carried(machine)
        done = await process.launch("reduction", "gpu1", a=address, n=count, dtype="<u8")
        assert done.results["sum"] == count * (count - 1) // 2
        after = await carried(machine)
        assert (after["host"] - before["host"], after["peer"]) == (0, 2 * MIB)
        assert await owners_of(process, address, MIB // PAGE) == {"gpu1"}
        await process.exit()

    hmmnet.simulate(main, MACHINE)


def test_without_a_way_of_their_own_pages_stay_or_come_home_first() -> None:
    """`far` has another owner: a migration passes over gpu0's pages, as migrate_vma does, and a job brings them home first."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(MIB)
        await process.write(address, PATTERN[:MIB])
        await process.migrate(address, MIB, "gpu0")
        assert await process.migrate(address, MIB, "far") == 0
        assert await owners_of(process, address, MIB // PAGE) == {"gpu0"}
        await process.launch("reduction", "far", a=address, n=MIB // 8, dtype="<u8")
        assert (await carried(machine))["peer"] == 0
        assert await process.read(address, MIB) == PATTERN[:MIB]
        await process.exit()

    hmmnet.simulate(main, MACHINE)


def test_a_full_peer_takes_what_fits() -> None:
    """Partial success: 2 MiB of 4 go, the others stay on their device, and every byte is right."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(4 * MIB)
        await process.madvise(address, 4 * MIB, "NOHUGEPAGE")
        await process.write(address, PATTERN[: 4 * MIB])
        await process.migrate(address, 4 * MIB, "gpu0")
        assert await process.migrate(address, 4 * MIB, "gpu2") == 2 * MIB
        assert await owners_of(process, address, 4 * MIB // PAGE) == {"gpu0", "gpu2"}
        assert await process.read(address, 4 * MIB) == PATTERN[: 4 * MIB]
        await process.exit()

    hmmnet.simulate(main, MACHINE)


async def device_to_device_bytes(machine: SimulatedMachine) -> int:
    """What the profile has counted."""
    return sum(row["total_bytes"] for row in (await machine.report())["profile"] if row["kind"] == DEVICE_TO_DEVICE)


@pytest.mark.parametrize("cut", ["before", "under way"])
def test_a_cut_way_holds_back_the_peers_pages_alone(cut: str) -> None:
    """Links of gpu0 are down, or go down for too long: its pages stay, the host's move, jobs on others go on, nothing is counted."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        size = 16 * MIB
        address = await process.mmap(2 * size)
        await process.madvise(address, 2 * size, "NOHUGEPAGE")
        await process.write(address, PATTERN[: 2 * size])
        assert await process.migrate(address, size, "gpu0") == size
        after = "0 s" if cut == "before" else "0.2 ms"
        for link in ("node0-gpu0", "nvswitch-gpu0"):
            machine.add_fault(fault("link.down", on=link, after=after))
        assert await process.migrate(address, 2 * size, "gpu1") == size
        assert await owners_of(process, address, size // PAGE) == {"gpu0"}
        assert await owners_of(process, address + size, size // PAGE) == {"gpu1"}
        assert await device_to_device_bytes(machine) == 0
        done = await process.launch("reduction", "gpu1", a=address + size, n=512, dtype="<u8")
        assert done.results["sum"] == sum(np.frombuffer(PATTERN[size : size + PAGE], "<u8").tolist()) % (1 << 64)
        machine.carrier.heal()
        assert await process.read(address, 2 * size) == PATTERN[: 2 * size]
        assert machine.audit(quiet=True) == []
        await process.exit()

    hmmnet.simulate(main, MACHINE)


def test_a_source_that_fails_keeps_its_pages() -> None:
    """Its copy engine gives up: nothing of it moves or is counted, and the same works once it is well."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(4 * MIB)
        await process.write(address, PATTERN[: 4 * MIB])
        assert await process.migrate(address, 4 * MIB, "gpu0") == 4 * MIB
        machine.add_fault(fault("point.fail", point="device.copy_out", on="gpu0", times=1))
        assert await process.migrate(address, 4 * MIB, "gpu1") == 0
        assert await owners_of(process, address, MIB // PAGE) == {"gpu0"}
        assert await device_to_device_bytes(machine) == 0
        assert await process.migrate(address, 4 * MIB, "gpu1") == 4 * MIB
        assert await device_to_device_bytes(machine) == 4 * MIB
        assert await process.read(address, 4 * MIB) == PATTERN[: 4 * MIB]
        await process.exit()

    hmmnet.simulate(main, MACHINE)


@pytest.mark.parametrize("cut", [False, True])
def test_coherent_memory_of_a_peer_goes_by_its_links_too(cut: bool) -> None:
    """In one stream out of the shared memory, counted as device to device; without a way it stays."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(8 * MIB)
        await process.write(address, PATTERN[: 8 * MIB])
        assert await process.migrate(address, 8 * MIB, "gpu0") == 8 * MIB
        before = await carried(machine)
        if cut:
            for link in ("node0-gpu0", "nvswitch-gpu0"):
                machine.add_fault(fault("link.down", on=link))
        moved = 0 if cut else 8 * MIB
        assert await process.migrate(address, 8 * MIB, "gpu1") == moved
        assert await carried(machine) == {"host": before["host"], "peer": 2 * moved}
        assert await device_to_device_bytes(machine) == moved
        machine.carrier.heal()
        assert await process.read(address, 8 * MIB) == PATTERN[: 8 * MIB]
        await process.exit()

    hmmnet.simulate(main, parse(TEXT.replace('name = "gpu[0-1]"', 'name = "gpu[0-1]"\nkind = "coherent"')))


def test_shared_and_mixed_pages_go_together() -> None:
    """A range of pages of the host, of a peer, never touched, and shared with a child: all arrive, for both processes."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(16 * PAGE)
        await process.write(address, PATTERN[: 12 * PAGE])
        await process.migrate(address, 8 * PAGE, "gpu0")
        child = await process.fork()
        assert await process.migrate(address, 16 * PAGE, "gpu1") == 16 * PAGE
        assert [await owners_of(one, address, 12) for one in (process, child)] == [{"gpu1"}] * 2
        for one in (process, child):
            assert await one.read(address, 16 * PAGE) == PATTERN[: 12 * PAGE] + bytes(4 * PAGE)
        await child.exit()
        await process.exit()

    hmmnet.simulate(main, MACHINE)


async def one_life(at: int, victim: str) -> bool:
    """Kill a device at message `at` of migrations from gpu0 to gpu1 and back; whether they were still running then."""
    trace, size = Countdown(at), 24 * PAGE
    async with simulated(MACHINE, trace=trace) as machine, trio.open_nursery() as nursery:
        process = await machine.create_process()

        async def kill() -> None:
            await trace.now.wait()
            if victim in machine.running:
                await machine.kill_device(victim)

        nursery.start_soon(kill)
        address = await process.mmap(size)
        await process.write(address, PATTERN[:size])
        for place in ("gpu0", "gpu1", "gpu0"):
            try:
                await process.migrate(address, size, place)
            except HmmnetError:
                assert victim not in machine.running
        causes: list[str] = []
        for page in range(size // PAGE):
            try:
                read = await process.read(address + page * PAGE, PAGE)
            except BusError as gone:
                causes.append(str(gone))
            else:
                assert read == PATTERN[page * PAGE : (page + 1) * PAGE]
        hit = trace.now.is_set()
        assert hit or not causes
        assert all(victim in cause for cause in causes)
        nursery.cancel_scope.cancel()
        await process.exit()
        await trio.sleep(10)
        host = cast(Host, machine.host)
        assert host.memory.nodes[0].allocator.used_count == 1, "host frames are left over"
        for name, device in host.devices.items():
            assert name == victim or device.life is None or not len(device.life.page_map.used_frames()), f"{name} has frames left over"
    return hit


@pytest.mark.parametrize("victim", ["gpu0", "gpu1"])
def test_death_of_either_at_every_message(victim: str) -> None:
    """Source or target dies at every message in turn: only what lived on it alone is lost, and says so; nothing leaks."""
    at = 1
    while run_virtual(one_life, at, victim, seed=3, limit_s=600.0):
        at += 1
    assert at > 60


def test_owners_follow_the_links() -> None:
    """Devices of one model have one owner where links lead between them without a host memory; switches count, models part."""
    assert page_map_owners(MACHINE) == {"gpu0": "gpu0", "gpu1": "gpu0", "gpu2": "gpu0", "far": "far"}
    assert set(page_map_owners(load("nvlink-8")).values()) == {"gpu0"}
    assert page_map_owners(load("two-gpus")) == {"gpu0": "gpu0", "gpu1": "gpu1"}
    mixed = parse(TEXT.replace('name = "gpu2"', 'name = "gpu2"\nmodel = "dmirror"'))
    assert page_map_owners(mixed)["gpu2"] == "gpu2"


def test_dmirror_takes_nothing_from_others() -> None:
    """Its driver selects system memory: on a machine with peer links, too, pages of the other unit stay, with ENOENT for who wants them."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(4 * PAGE)
        await process.write(address, PATTERN[: 4 * PAGE])
        await process.migrate(address, 4 * PAGE, "gpu0")
        assert await process.migrate(address, 4 * PAGE, "gpu1") == 0
        handle = await process.open("gpu1")
        with pytest.raises(KernelError, match="ENOENT"):
            await handle.ioctl("migrate_to_dev", address, 4)
        assert await owners_of(process, address, 4) == {"gpu0"}
        await process.exit()

    hmmnet.simulate(main, parse(TEXT.replace('memory = "64 MiB"', 'memory = "64 MiB"\nmodel = "dmirror"')))


def test_pieces_of_a_relay_hold_whole_pages() -> None:
    """Small and huge ones in one list: each piece has at most `PIECE_PAGES`, in order, and none is empty."""
    frames = np.concatenate((np.arange(700, dtype=np.uint64), np.arange(40, dtype=np.uint64) * HUGE_PAGES | np.uint64(LARGE)))
    cut = list(pieces(frames))
    assert [frame for piece in cut for frame in frames[piece].tolist()] == frames.tolist()
    weights = [int(np.where(frames[piece] >= np.uint64(LARGE), HUGE_PAGES, 1).sum()) for piece in cut]
    assert max(weights) <= PIECE_PAGES
    assert min(weights) > 0
    assert len(cut) == 3
