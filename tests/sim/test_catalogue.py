"""The whole catalogue in a simulated machine: each kind does what its oracle allows, and afterwards everything works again."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import trio

import hmmnet
from hmmnet.errors import BusError, HmmnetError, KernelError, PeerError, PeerLost, SegmentationFault, SignalError
from hmmnet.faults import KINDS, Plan, fault
from hmmnet.faults.kinds import EACH
from hmmnet.sim import SimulatedMachine
from hmmnet.sim.run import SimulationStuck
from hmmnet.topology.load import parse
from hmmnet.wire.exchange import HEARTBEAT_S, LEASE_S

from .everything import COUNT, MACHINE, MIB, MOVED, NBYTES, PAGE, VALUES, everything
from .test_points import RIGHT, leave

SETTINGS: dict[str, dict[str, Any]] = {
    "loss": {"probability": 0.05},
    "delay": {"probability": 0.2},
    "garbage": {"channel": "bulk", "probability": 0.2},
    "truncate": {"channel": "bulk", "probability": 0.2},
    "old_version": {"nth": 9},
    "partition": {"after": "1 ms", "lasts": "400 ms"},
    "hold": {"after": "1 ms", "lasts": "400 ms"},
    "hang": {"after": "1 ms", "lasts": "400 ms"},
    "corrupt": {"probability": 0.2, "shape": "swap"},
    "copy.corrupt": {"probability": 0.3, "shape": "burst"},
    "copy.lost": {"probability": 0.2},
    "copy.stall": {"after": "1 ms", "lasts": "2 s"},
    "copy.timeout": {"nth": 2},
    "copy.error": {"nth": 2},
    "ecc.in_flight": {"nth": 2},
    "ecc.uncorrectable": {"range": "0x7fff00000000+4 GiB", "after": "1 ms"},
    "link.down": {"on": "node0-gpu0", "after": "1 ms"},
    "link.slow": {"on": "*gpu*"},
    "invalidate.lost": {"probability": 0.5},
    "ack.lost": {"probability": 0.3},
    "invalidate.silent": {"on": "gpu1", "nth": 2},
    "invalidate.refused": {"on": "gpu1", "nth": 2},
    "point.delay": {"point": "*"},
    "point.pause": {"point": "migrate.*", "after": "1 ms", "lasts": "1 s"},
    "point.fail": {"point": "migrate.before_collect", "nth": 2},
    "point.crash": {"point": "migrate.mid_copy", "nth": 2},
    "point.hang": {"point": "migrate.mid_copy", "nth": 2},
    "replay.lost": {"nth": 2},
    "fault.unserviceable": {"nth": 2},
    "alternate": {"to": "gpu1"},
    "crash": {"on": "gpu1", "after": "1 ms"},
    "host.crash": {"after": "200 us"},
    "unplug": {"on": "gpu1", "after": "1 ms"},
    "unload": {"on": "gpu1", "after": "1 ms"},
    "bounce": {"on": "gpu1", "after": "1 ms"},
    "restart.kept": {"on": "gpu1", "after": "1 ms"},
    "reset": {"on": "gpu1"},
    "release.during_fault": {"nth": 1},
    "cpu.starve": {"latency": "0.2 ms"},
    **{f"process.{deed}": {"point": "migrate.after_unmap", "nth": 2} for deed in ("exit", "kill", "oom", "exec", "munmap", "madvise")},
    **{f"process.{deed}": {"point": "migrate.after_unmap", "times": 3} for deed in ("fork", "mprotect", "mremap")},
    **{f"alloc.{what}": {"nth": 1} for what in ("host", "home", "page_cache", "cgroup")},
}
"""What a kind is tried with, where its defaults would be all or nothing."""
IN_SIM = sorted(name for name, kind in KINDS.items() if "sim" not in kind.not_in)
BREAKS = {
    *(
        "crash",
        "host.crash",
        "unplug",
        "unload",
        "bounce",
        "restart.kept",
        "reset",
        "point.crash",
        "point.hang",
        "point.fail",
        "copy.error",
        "copy.timeout",
        "ecc.in_flight",
    ),
    *("invalidate.silent", "invalidate.refused", "release.during_fault", "fault.unserviceable", "old_version", "link.down"),
    *("process.exit", "process.kill", "process.oom", "process.exec", "process.munmap", "process.madvise"),
    *("alloc.host", "alloc.home", "alloc.page_cache", "alloc.cgroup", "ecc.uncorrectable"),
    *("alloc.device", "invalidate.nested"),  # a dmirror has only what moved, and was not dropped since
    *("process.mprotect", "process.mremap"),  # who stores while memory is read-only, or elsewhere, gets a signal
}
"""Kinds after which a program may be told of an error. All others cost time, and where pages live."""
PLACES = {"pingpong", "thrash", "alternate", "prefetch.race", "alloc.device", "alloc.device_large", "page.retire", "process.fork"}
"""Kinds that change where pages live, and so how many move (one that came to be shared while its migration was announced stays): all data
are what they are without faults."""


@pytest.mark.parametrize("name", IN_SIM)
def test_every_kind(name: str) -> None:
    """Right results, or a clear error where the kind may bring one; then all faults end, and nothing has leaked or hangs."""

    async def main(machine: SimulatedMachine) -> None:
        machine.add_fault(fault(name, **SETTINGS.get(name, {})))
        with contextlib.suppress(KernelError, SignalError, PeerError) if name in BREAKS else contextlib.nullcontext():
            seen = await everything(machine)
            if name not in BREAKS:
                assert [one for at, one in enumerate(seen) if at not in MOVED] == [one for at, one in enumerate(RIGHT) if at not in MOVED]
                assert all(0 <= int(str(seen[at])) <= most for at, most in MOVED.items())
                assert name in PLACES or seen == RIGHT
        machine.heal()
        if name == "host.crash":
            assert machine.host_crashed
            await at_rest_without_host(machine)
            return
        await leave(machine)
        for device in MACHINE.device_names:
            if device not in machine.running:
                await machine.start_device(device)
        process = await machine.create_process()
        address = await process.malloc(MIB)
        await process.write(address, b"again" * PAGE)
        for device in ("gpu0", "gpu1", "gpu0"):
            await process.migrate(address, 5 * PAGE, device)
        assert await process.read(address, 5 * PAGE) == b"again" * PAGE
        await process.exit()

    hmmnet.simulate(main, MACHINE, limit_s=900.0)


async def at_rest_without_host(machine: SimulatedMachine) -> None:
    """Nothing brings it back; its devices have ended, and nobody asks what was let go of."""
    for call in (machine.create_process, machine.report, machine.check):
        with pytest.raises(PeerLost, match="the host has crashed"):
            await call()
    await trio.sleep(LEASE_S + 2 * HEARTBEAT_S)
    assert machine.running == ()
    assert machine.audit(quiet=True) == machine.left_over() == []


@pytest.mark.parametrize("name", sorted(name for name, kind in KINDS.items() if EACH in kind.holds))
def test_what_every_try_meets_lets_nothing_through(name: str) -> None:
    """As the catalogue says: with its defaults there is no end, or the device is given up; three times cost nothing but time."""

    async def main(machine: SimulatedMachine) -> int:
        process = await machine.create_process()
        data = await process.mmap(NBYTES)
        await process.write(data, VALUES)
        done = await process.launch("reduction", "gpu0", a=data, n=COUNT, dtype="<u8")
        await process.write(data, VALUES)
        return int(done.results["sum"])

    with pytest.raises((SimulationStuck, PeerError)):
        hmmnet.simulate(main, faults=[fault(name, "gpu0")], limit_s=30.0)
    some = hmmnet.simulate(main, faults=[fault(name, "gpu0", times=3)], limit_s=30.0)
    assert some.value == int(VALUES.sum())


def test_which_kinds_let_nothing_through() -> None:
    """Those that are mended by another try."""
    assert {name for name, kind in KINDS.items() if EACH in kind.holds} == {
        *("ack.lost", "copy.corrupt", "copy.lost", "corrupt", "loss", "replay.lost")
    }


@pytest.mark.parametrize("name", sorted(set(KINDS) - set(IN_SIM)))
def test_what_the_simulated_world_cannot_do(name: str) -> None:
    """It says so, and why."""

    async def main(machine: SimulatedMachine) -> None:
        with pytest.raises(HmmnetError, match="cannot be done in the sim world: "):
            machine.add_fault(fault(name, **({"to": "gpu1"} if name == "alternate" else {})))

    hmmnet.simulate(main, MACHINE)


def test_memory_breaks_wherever_it_lives() -> None:
    """At the host and on a device: SIGBUS for the CPU, EFAULT for a device, for these pages only; the frames are never used again."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(8 * PAGE)
        await process.write(address, b"x" * 8 * PAGE)
        await process.migrate(address, 4 * PAGE, "gpu0")
        for page in (1, 6):
            machine.add_fault(fault("ecc.uncorrectable", process=process.pid, range=f"0x{address + page * PAGE:x}+{PAGE}"))
        await trio.sleep(1)
        for page in range(8):
            if page in (1, 6):
                with pytest.raises(BusError):
                    await process.load(address + page * PAGE)
            else:
                assert await process.read(address + page * PAGE, 1) == b"x"
        with pytest.raises((SegmentationFault, BusError)):
            await process.launch("reduction", "gpu1", "remote", a=address, n=8 * PAGE // 8, dtype="<u8")
        assert (await machine.report())["poisoned_pages"] == 2
        await process.exit()

    hmmnet.simulate(main, MACHINE)


@pytest.mark.parametrize(
    ("advice", "kept", "inherited"),
    [("DONTNEED", b"\0", b"\0"), ("WILLNEED", b"x", b"x"), ("WIPEONFORK", b"x", b"\0"), ("GUARD_INSTALL", b"", b"")],
)
def test_any_advice_at_the_wrong_moment(advice: str, kept: bytes, inherited: bytes) -> None:
    """While pages move to a device their process gives that advice: they are kept, dropped, not inherited, or not to be touched."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(4 * PAGE)
        await process.write(address, b"x" * 4 * PAGE)
        machine.add_fault("process.madvise", advice=advice, point="migrate.after_unmap", times=1)
        await process.migrate(address, 4 * PAGE, "gpu0")
        await trio.sleep(0.01)
        child = await process.fork()
        for one, byte in ((process, kept), (child, inherited)):
            with contextlib.nullcontext() if byte else pytest.raises(SegmentationFault):
                assert await one.read(address, 4 * PAGE) == byte * 4 * PAGE
        await child.exit()
        await process.exit()

    hmmnet.simulate(main, MACHINE)


def test_what_is_done_to_addresses_needs_some() -> None:
    """Without a range nothing says which memory breaks: that is a mistake, not a fault that does nothing."""
    with pytest.raises(HmmnetError, match=r"fault ecc\.uncorrectable: range: missing: nothing else says which addresses"):
        fault("ecc.uncorrectable", process=1000)


@pytest.mark.parametrize("deed", ["mprotect", "mremap", "munmap", "madvise"])
def test_what_changes_memory_at_once_needs_some(deed: str) -> None:
    """So do changes of a mapping at once, in a plan, a test and on a running machine; at a point that says which pages are concerned."""
    with pytest.raises(HmmnetError, match=rf"fault process\.{deed}: range: missing: without a point it is done at once"):
        fault(f"process.{deed}", process=1000)
    with pytest.raises(HmmnetError, match=r"range: missing: without a point"):
        Plan.parse(f'[[fault]]\nkind = "process.{deed}"\n')
    assert not fault(f"process.{deed}", point="migrate.after_unmap").at_once
    assert fault(f"process.{deed}", range="0x10000+4096").at_once


def test_what_changes_memory_at_once_does_something() -> None:
    """The last page of the range is unmapped, the others are dropped; a page beside the range is neither."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(4 * PAGE)
        await process.write(address, b"x" * 4 * PAGE)
        for deed in ("mprotect", "mremap", "madvise", "munmap"):
            machine.add_fault(f"process.{deed}", process=process.pid, range=f"0x{address + PAGE:x}+{2 * PAGE}")
            await trio.sleep(0.01)
        assert await process.read(address, 2 * PAGE) == b"x" * PAGE + b"\0" * PAGE
        with pytest.raises(SegmentationFault):
            await process.load(address + 2 * PAGE)
        assert await process.read(address + 3 * PAGE, PAGE) == b"x" * PAGE
        await process.exit()

    hmmnet.simulate(main, MACHINE)


def test_links_are_slow_down_and_mended() -> None:
    """A tenth of the bandwidth takes ten times as long; a link that is down fails copies and leaves the source; mended, all is well."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(8 * MIB)
        await process.write(address, b"data" * (2 * MIB))

        async def there_and_back() -> float:
            began_s = machine.emulated_s()
            await process.migrate(address, 8 * MIB, "gpu0")
            await process.migrate(address, 8 * MIB, "host")
            return machine.emulated_s() - began_s

        usual_s = await there_and_back()
        slow = machine.add_fault(fault("link.slow", "node0-gpu0", factor=0.1))
        assert 8 < await there_and_back() / usual_s < 12
        machine.remove_fault(slow)
        assert await there_and_back() == pytest.approx(usual_s)
        down = machine.add_fault(fault("link.down", "node0-gpu0"))
        with pytest.raises(PeerError, match="links are down"):
            await process.migrate(address, 8 * MIB, "gpu0")
        assert await process.read(address, 8 * MIB) == b"data" * (2 * MIB)
        machine.remove_fault(down)
        assert await process.migrate(address, 8 * MIB, "gpu0") == 8 * MIB
        with pytest.raises(HmmnetError, match='no link is called "cable"; there are node0-gpu0'):
            machine.add_fault(fault("link.down", "cable"))
        await process.exit()

    hmmnet.simulate(main, MACHINE)


TWO_WAYS = """
name = "two-ways"
[[memory]]
name = "node0"
size = "256 MiB"
[[switch]]
name = "switch0"
[[device]]
name = "gpu0"
model = "gpu"
memory = "64 MiB"
[[link]]
name = "nvlink"
a = "node0"
b = "gpu0"
bandwidth = "4 GB/s"
[[link]]
name = "uplink"
a = "node0"
b = "switch0"
bandwidth = "1 GB/s"
[[link]]
name = "pcie"
a = "switch0"
b = "gpu0"
bandwidth = "1 GB/s"
"""
PATTERN = bytes(range(256)) * (8 * MIB // 256)


def moving(faults: list[tuple[str, float, float]], links: str = TWO_WAYS) -> tuple[dict[str, int], float]:
    """8 MiB to gpu0 and home while links go down, (link, when, for how long), in each direction; bytes by link, and how long it took."""

    async def main(machine: SimulatedMachine) -> tuple[dict[str, int], float]:
        process = await machine.create_process()
        address = await process.mmap(8 * MIB)
        await process.write(address, PATTERN)
        taken_s = 0.0
        for target in ("gpu0", "host"):
            for link, after_s, lasts_s in faults:
                machine.add_fault(fault("link.down", link, after=after_s, lasts=lasts_s))
            began_s = machine.emulated_s()
            assert await process.migrate(address, 8 * MIB, target) == 8 * MIB
            taken_s += machine.emulated_s() - began_s
            await trio.sleep(5)
        assert await process.read(address, 8 * MIB) == PATTERN
        carried = {link["link"]: link["bytes_moved"] for link in (await machine.report())["links"] if link["bytes_moved"]}
        await process.exit()
        return carried, taken_s

    return hmmnet.simulate(main, parse(links)).value


def test_transfers_under_way_take_another_link() -> None:
    """NVLink is lost in the middle of 8 MiB, in each direction: the rest goes over PCIe, every byte is right, and it takes its time."""
    usual, usual_s = moving([])
    assert set(usual) == {"nvlink"}
    carried, seconds = moving([("nvlink", 0.001, 1.0)])
    assert set(carried) == {"nvlink", "uplink", "pcie"}
    assert carried["uplink"] > 2 * MIB
    assert usual_s < seconds < 10 * usual_s


@pytest.mark.parametrize("how", ["another way", "longer"])
def test_a_transfer_home_that_goes_on_otherwise_takes_that_latency(how: str) -> None:
    """8 MiB on their way home go on over a link that takes 50 ms longer, or their own takes so: they are there so much later."""
    far = TWO_WAYS.replace('b = "switch0"\nbandwidth = "1 GB/s"', 'b = "switch0"\nbandwidth = "1 GB/s"\nlatency = "50 ms"')

    async def main(machine: SimulatedMachine) -> float:
        process = await machine.create_process()
        address = await process.mmap(8 * MIB)
        await process.write(address, PATTERN)
        assert await process.migrate(address, 8 * MIB, "gpu0") == 8 * MIB
        if how == "another way":
            machine.add_fault(fault("link.down", "nvlink", after=0.001))
        else:
            machine.add_fault(fault("link.latency", "nvlink", after=0.001, latency="50 ms"))
        began_s = machine.emulated_s()
        assert await process.migrate(address, 8 * MIB, "host") == 8 * MIB
        took_s = machine.emulated_s() - began_s
        assert await process.read(address, 8 * MIB) == PATTERN
        await process.exit()
        return took_s

    took_s = hmmnet.simulate(main, parse(far)).value
    assert 0.05 < took_s < (0.06 if how == "longer" else 2.1)  # what is lost with a link is sent again after a while


def test_transfers_under_way_wait_for_their_only_link() -> None:
    """Both ways are lost for a second: what is on the way goes on when they are back."""
    usual_s = moving([])[1]
    seconds = moving([("nvlink", 0.001, 1.0), ("pcie", 0.001, 1.0)])[1]
    assert 2.0 < seconds < 2.0 + 1.0 + 4 * usual_s


def test_numbers_times_and_once() -> None:
    """A fault has a number until it is removed, or its time is over; what happens once has none afterwards."""

    async def main(machine: SimulatedMachine) -> None:
        timed = machine.add_fault(fault("invalidate.slow", after="1 s", lasts="2 s"))
        kept = machine.add_fault(fault("loss", "gpu0->host", probability=0.1))
        once = machine.add_fault(fault("ecc.corrected", "gpu0", count=3))
        assert list(machine.carrier.active) == [timed, kept]
        assert [one["begun"] for one in machine.carrier.as_json()] == [False, True]
        await trio.sleep(2)
        assert [one["begun"] for one in machine.carrier.as_json()] == [True, True]
        await trio.sleep(2)
        assert machine.carrier.as_json() == [
            {"number": kept, "begun": True, "fired": 0, "fault": {"kind": "loss", "on": "gpu0->host", "probability": 0.1}},
        ]
        assert (await machine.report())["devices"]["gpu0"]["ecc_corrected"] == 3
        for number in (timed, once, 99):
            with pytest.raises(HmmnetError, match=f"no fault has number {number}"):
                machine.remove_fault(number)

    hmmnet.simulate(main, MACHINE)


@pytest.mark.parametrize("controls", [{"times": 1}, {"nth": 2}])
def test_a_fault_in_two_places_is_counted_as_one(controls: dict[str, int]) -> None:
    """The copy engine gives up once, on the way there or on the way back, and the count says so."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.malloc(MIB)
        await process.write(address, b"d" * MIB)
        machine.add_fault(fault("copy.error", "gpu0", **controls))
        lost = 0
        for target in ("gpu0", "host", "gpu0", "host"):
            try:
                await process.migrate(address, MIB, target)
            except PeerError:
                lost += 1
        assert lost == 1
        assert machine.carrier.fired() == {"copy.error": 1}
        assert await process.read(address, MIB) == b"d" * MIB

    hmmnet.simulate(main, MACHINE)


def test_a_device_that_starts_again_suffers_what_it_did() -> None:
    """A fault that acts is there for a new incarnation, too, and for a device that was away when it began; until it ends."""

    async def main(machine: SimulatedMachine) -> None:
        number = machine.add_fault(fault("clock.skew", "gpu*", factor=2))
        machine.add_fault(fault("page.retire", "gpu1", pages=8))
        usual = machine.device("gpu1").memory.free_pages + 8
        assert machine.device("gpu1").clock.rate == 2.0
        await machine.kill_device("gpu1")
        small = machine.add_fault(fault("buffer.overflow", "gpu1", entries=3))
        await machine.start_device("gpu1")
        device = machine.device("gpu1")
        assert device.clock.rate == 2.0
        assert device.memory.free_pages == usual, "what happens once is over: the new memory has all its pages"
        machine.remove_fault(number)
        machine.remove_fault(small)
        assert device.clock.rate == machine.device("gpu0").clock.rate == 1.0
        machine.add_fault(fault("reset", "gpu0"))
        assert machine.carrier.fired()["reset"] == 0

    hmmnet.simulate(main, MACHINE)


def test_a_device_that_never_acknowledges_is_lost_in_time() -> None:
    """The CPU goes on after the invalidation timeout and the lease, though the device's heart beats."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.malloc(MIB)
        await process.write(address, b"y" * MIB)
        await process.launch("reduction", "gpu1", "remote", a=address, n=16, dtype="<u8")
        machine.add_fault(fault("invalidate.silent", "gpu1"))
        began_s = trio.current_time()
        await process.munmap(address & ~(PAGE - 1), PAGE)
        assert 5.0 <= trio.current_time() - began_s < 8.0
        assert "did not let go" in (await machine.report())["devices"]["gpu1"]["last_loss"]
        machine.heal()
        await process.exit()

    hmmnet.simulate(main, MACHINE)
