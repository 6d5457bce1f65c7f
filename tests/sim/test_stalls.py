"""A copy engine that stops in the middle of a stream, while its device's heart beats: nobody waits for ever, and who is slow lives."""

from __future__ import annotations

import contextlib

import pytest
import trio

import hmmnet
from hmmnet.devices.models.dmirror import Dmirror
from hmmnet.errors import BusError, KernelError, PeerError
from hmmnet.fabric.sender import DOWN_S
from hmmnet.faults import fault
from hmmnet.faults.kinds import Fault
from hmmnet.host.service import Host
from hmmnet.host.watchdog import ANSWER_S, HUNG_S, WATCHDOG_S
from hmmnet.program import Process
from hmmnet.sim import SimulatedMachine
from hmmnet.topology.load import parse
from hmmnet.wire.exchange import LEASE_S

PAGE = 4096
MACHINE = parse("""
[[memory]]
name = "node0"
size = "64 MiB"
[[device]]
name = "gpu[0-1]"
memory = "16 MiB"
[[link]]
a = "node0"
b = "gpu[0-1]"
bandwidth = "10 GB/s"
latency = "1 us"
[[link]]
a = "gpu0"
b = "gpu1"
bandwidth = "40 GB/s"
latency = "1 us"
""")
COMMANDED = parse("""
[[memory]]
name = "node0"
size = "64 MiB"
[[device]]
name = "unit0"
model = "dmirror"
memory = "16 MiB"
[[link]]
a = "node0"
b = "unit0"
bandwidth = "10 GB/s"
latency = "1 us"
""")

PAGES = 1200
"""Five chunks."""
DATA = bytes(range(1, 251)) * (PAGES * PAGE // 250 + 1)
ASIDE = b"aside" * 100
MOST_S = 2 * WATCHDOG_S + ANSWER_S + LEASE_S
LOST = r"its copy engine has hung: stream \d+ has not moved for 10 s and waits for nothing"

STALLS = {
    "home, from the first chunk": (fault("copy.stall", "gpu0", direction="to_host"), "gpu0", "host", "gpu0"),
    "home, in the middle": (fault("point.pause", "gpu0", point="device.mid_copy", nth=3), "gpu0", "host", "gpu0"),
    "home, before the first chunk": (fault("point.pause", "gpu0", point="device.copy_out"), "gpu0", "host", "gpu0"),
    "both ways": (fault("copy.stall", "gpu0"), "gpu0", "host", "gpu0"),
    "to another, at the source": (fault("copy.stall", "gpu0", direction="to_host"), "gpu0", "gpu1", "gpu0"),
    "to another, in the middle": (fault("point.pause", "gpu0", point="device.mid_copy", nth=3), "gpu0", "gpu1", "gpu0"),
    "to another, at the target": (fault("copy.stall", "gpu1", direction="to_device"), "gpu0", "gpu1", ""),
    "there": (fault("copy.stall", "gpu0", direction="to_device"), "host", "gpu0", ""),
    "there, in the middle": (fault("point.pause", "gpu0", point="migrate.mid_copy", nth=3), "host", "gpu0", ""),
}
"""What stalls for ever, from where to where, and which device is lost."""


async def _migrates(process: Process, address: int, pages: int, owner: str) -> None:
    with contextlib.suppress(PeerError, KernelError):
        await process.migrate(address, pages * PAGE, owner)


async def _placed(process: Process, owner: str) -> int:
    """Where `DATA` lie, in the memory of `owner`."""
    address = await process.mmap(PAGES * PAGE)
    await process.write(address, DATA[: PAGES * PAGE])
    if owner != "host":
        await process.migrate(address, PAGES * PAGE, owner)
    return address


@pytest.mark.parametrize("stall", STALLS)
def test_a_copy_engine_that_stalls_holds_nobody_for_ever(stall: str) -> None:
    """A CPU that touches a page under way goes on in time. What only a hung device had is lost; what is elsewhere is not."""
    what, source, target, loses = STALLS[stall]

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await _placed(process, source)
        aside = await process.mmap(PAGE)
        await process.write(aside, ASIDE)
        await process.migrate(aside, PAGE, "gpu1")
        machine.add_fault(what)
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_migrates, process, address, PAGES, target)
            await trio.sleep(0.1)
            if loses:
                with pytest.raises(BusError, match=LOST):
                    await process.read(address + 700 * PAGE, PAGE)
            else:
                assert await process.read(address + 700 * PAGE, PAGE) == DATA[700 * PAGE : 701 * PAGE]
            assert HUNG_S <= trio.current_time() - began_s < MOST_S
        machine.heal()
        devices = (await machine.report())["devices"]
        assert [name for name in MACHINE.device_names if devices[name]["state"] != "ready"] == ([loses] if loses else [])
        if not loses:
            assert await process.read(address, PAGES * PAGE) == DATA[: PAGES * PAGE]
        assert await process.read(aside, len(ASIDE)) == ASIDE
        assert machine.audit() == []
        await process.exit()

    hmmnet.simulate(main, MACHINE, limit_s=300.0)


def test_a_device_that_is_not_reached_does_not_hold_what_goes_to_another() -> None:
    """It never hears that its pages are to leave: as long as for one page that a CPU wants."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await _placed(process, "gpu0")
        machine.add_fault(fault("loss", "host->gpu0", channel="control", message="CopyOut"))
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_migrates, process, address, PAGES, "gpu1")
            await trio.sleep(0.1)
            with pytest.raises(BusError, match="its copy engine did not answer within 5 s"):
                await process.read(address, PAGE)
        assert ANSWER_S <= trio.current_time() - began_s < ANSWER_S + LEASE_S
        await process.exit()

    hmmnet.simulate(main, MACHINE, limit_s=300.0)


def test_a_device_that_does_not_say_how_its_copies_go_on_is_lost() -> None:
    """The question never arrives: that costs it its life as soon as any answer does that waits for nothing."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await _placed(process, "gpu0")
        machine.add_fault(fault("copy.stall", "gpu0", direction="to_host"))
        machine.add_fault(fault("loss", "host->gpu0", channel="control", message="ShowStreams"))
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_migrates, process, address, PAGES, "host")
            await trio.sleep(0.1)
            with pytest.raises(BusError, match="its copy engine did not answer within 5 s"):
                await process.read(address, PAGE)
        assert WATCHDOG_S + ANSWER_S <= trio.current_time() - began_s < MOST_S
        await process.exit()

    hmmnet.simulate(main, MACHINE, limit_s=300.0)


def test_a_stream_that_its_device_has_given_up_ends_at_the_host_too() -> None:
    """All its chunks are lost, and what it says when it gives up as well: the device is well, and asked for the pages again."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await _placed(process, "gpu0")
        number = machine.add_fault(fault("copy.lost", "gpu0", direction="to_host"))
        with pytest.raises(PeerError, match="its sender knows nothing of it any more"):
            await process.migrate(address, PAGES * PAGE, "host")
        assert trio.current_time() < 2 * MOST_S + 60
        machine.remove_fault(number)
        assert (await process.residency(address, PAGES)).owners == ("gpu0",)
        assert await process.read(address, PAGES * PAGE) == DATA[: PAGES * PAGE]
        assert (await machine.report())["devices"]["gpu0"]["lives"] == 1
        await process.exit()

    hmmnet.simulate(main, MACHINE, limit_s=600.0)


def _taken_s(way: str, pages: int, slow: Fault, *, slow_s: float, after_s: float = 0.0, deaf: bool = False) -> float:
    """Emulated seconds of a copy whose links are slow for so long, from `after_s` on. A `deaf` device is not told of it, and of its end."""

    async def main(machine: SimulatedMachine) -> float:
        process = await machine.create_process()
        address = await _placed(process, "host" if way == "there" else "gpu0")
        began_s = machine.emulated_s()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.migrate, address, pages * PAGE, {"there": "gpu0", "home": "host", "across": "gpu1"}[way])
            await trio.sleep(after_s)
            number = machine.add_fault(slow)
            if deaf:
                machine.add_fault(fault("loss", "host->gpu0", channel="bulk", lasts=f"{slow_s + 0.1} s"))
            await trio.sleep(slow_s)
            machine.remove_fault(number)
        taken_s = machine.emulated_s() - began_s
        await trio.sleep(1)
        assert not any(machine.device(name).copies._leaving for name in MACHINE.device_names), "no engine waits on"
        assert await process.read(address, PAGES * PAGE) == DATA[: PAGES * PAGE]
        assert (await machine.report())["devices"]["gpu0"]["lives"] == 1
        await process.exit()
        return taken_s

    return hmmnet.simulate(main, MACHINE, limit_s=300.0).value


VERY_SLOW = fault("link.slow", "*", factor=1e-8)
WAYS = {"there": 10e9, "home": 10e9, "across": 40e9}
"""And the bandwidth of their links."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pages", [PAGES, 100])
def test_a_link_that_was_very_slow_for_a_second_costs_that_second(way: str, pages: int) -> None:
    """Chunks that wait for their moment, and one that has left, take what they would have taken, once the link is what it was."""
    taken_s = _taken_s(way, pages, VERY_SLOW, slow_s=1.0)
    assert taken_s == pytest.approx(1.0 + pages * PAGE / WAYS[way] + 1e-6, abs=5e-7)


def test_single_pages_cost_no_more_than_that_second() -> None:
    """CPUs load them, each 41 s behind the one before; and what is migrated meanwhile, or afterwards, does not wait for them."""

    async def main(machine: SimulatedMachine) -> float:
        process = await machine.create_process()
        address = await _placed(process, "gpu0")
        began_s = machine.emulated_s()
        number = machine.add_fault(VERY_SLOW)
        async with trio.open_nursery() as nursery:
            for page in (0, 300, 600):
                nursery.start_soon(process.read, address + page * PAGE, 8)
            await trio.sleep(0.5)
            nursery.start_soon(process.migrate, address + 1000 * PAGE, 8 * PAGE, "host")
            await trio.sleep(0.5)
            machine.remove_fault(number)
            await process.migrate(address + 900 * PAGE, 8 * PAGE, "host")
        taken_s = machine.emulated_s() - began_s
        assert await process.read(address, PAGES * PAGE) == DATA[: PAGES * PAGE]
        await process.exit()
        return taken_s

    assert hmmnet.simulate(main, MACHINE, limit_s=300.0).value == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_a_link_that_becomes_slow_has_carried_what_it_has(way: str) -> None:
    """Half of it before, a fiftieth of the other half while it is slow, the rest afterwards."""
    half_s = PAGES * PAGE / WAYS[way] / 2
    taken_s = _taken_s(way, PAGES, fault("link.slow", "*", factor=1e-3), after_s=half_s, slow_s=20 * half_s)
    assert taken_s == pytest.approx(half_s * (1 + 20 + 0.98) + 1e-6, abs=1e-6)


@pytest.mark.parametrize("pages", [PAGES, 100])
def test_a_device_that_has_not_heard_that_its_link_is_faster_is_told_again(pages: int) -> None:
    """The word was lost. It has no chunk out that would be credited: it says, when it is asked, that it waits for its moment; or asks."""
    assert 1.0 < _taken_s("home", pages, VERY_SLOW, slow_s=1.0, deaf=True) < HUNG_S


def test_a_device_that_reads_over_a_link_that_was_very_slow_lets_go_when_all_is_there() -> None:
    """Its chunk left when it was slow. What is unmapped then costs the device nothing."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await _placed(process, "host")
        handle = await process.open("unit0")
        number = machine.add_fault(fault("link.slow", "*", factor=1e-6))
        began_s = machine.emulated_s()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handle.ioctl, "read", address, 200)
            await trio.sleep(1)
            machine.remove_fault(number)
        assert machine.emulated_s() - began_s == pytest.approx(1, abs=0.01)
        await process.munmap(address, PAGES * PAGE)
        assert (await machine.report())["devices"]["unit0"]["lives"] == 1
        await process.exit()

    hmmnet.simulate(main, COMMANDED, limit_s=300.0)


SLOW: dict[str, tuple[Fault, ...]] = {
    "stalled for 18 s": (fault("copy.stall", "gpu0", lasts="18 s"),),
    "chunks that take 15 s": (fault("copy.slow", "gpu0", latency="15 s"),),
    "starved": (fault("cpu.starve", "gpu0", latency="0.9 s"), fault("copy.slow", "gpu0", latency="4 s")),
    "a link repaired within a chunk": (fault("link.slow", "*", factor=1e-6), fault("link.down", "node0-gpu0", after="20 s", lasts="25 s")),
    "a link down": (fault("link.down", "node0-gpu0", after="100 us", lasts="40 s"),),
    "a chunk lost on a slow link": (fault("link.slow", "*", factor=3e-6), fault("copy.lost", "gpu0", nth=2)),
    "cut off": (fault("partition", "gpu0", channel="bulk", after="100 us", lasts="45 s"),),
    "a slow network": (fault("reorder", "gpu0", channel="bulk", latency="25 s"),),
    "a slow clock": (fault("clock.skew", "gpu0", factor=0.5),),
}
"""What costs no device its life, from a moment at which the copy is under way."""


CLOCKS = ("is righted", "jumps", "runs faster")


@pytest.mark.parametrize("factor", [1.0, 1e-2, 1e-5])
def test_a_slow_link_that_is_down_for_good_holds_nobody_for_ever(factor: float) -> None:
    """However far away the moment is that a device's chunk waits for: who reads hears of it within little more than `DOWN_S`."""

    async def main(machine: SimulatedMachine) -> float:
        process = await machine.create_process()
        address = await _placed(process, "gpu0")
        if factor < 1.0:
            machine.add_fault("link.slow", on="*", factor=factor)
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def cut() -> None:
                await trio.sleep(50e-6 / factor)
                machine.add_fault("link.down", on="*")

            nursery.start_soon(cut)
            with pytest.raises(BusError):
                await process.read(address, PAGES * PAGE)
        return trio.current_time() - began_s

    assert hmmnet.simulate(main, MACHINE, limit_s=1000.0).value < DOWN_S + 50e-6 / factor + 15.0


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_clock_that_changes_while_a_chunk_waits_for_its_moment_costs_nothing(clock: str) -> None:
    """Its moment comes or has passed before the sleep is over, and the device says that it waits for that."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await _placed(process, "gpu0")
        machine.add_fault(fault("link.slow", "*", factor=2e-6))  # 52 s a chunk
        skew = machine.add_fault(fault("clock.skew", "gpu0", factor=0.5)) if clock == "is righted" else 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.migrate, address, PAGES * PAGE, "host")
            await trio.sleep(5)
            if clock == "is righted":
                machine.remove_fault(skew)
            elif clock == "jumps":
                machine.add_fault(fault("clock.jump", "gpu0", by="60 s"))
            else:
                assert isinstance(machine.host, Host)
                machine.host.set_rate(10.0)
        machine.heal()
        assert await process.read(address, PAGES * PAGE) == DATA[: PAGES * PAGE]
        assert (await machine.report())["devices"]["gpu0"]["lives"] == 1
        await process.exit()

    hmmnet.simulate(main, MACHINE, limit_s=3000.0)


@pytest.mark.parametrize("way", ["there", "home"])
@pytest.mark.parametrize("slow", SLOW)
def test_who_is_slow_lives(slow: str, way: str) -> None:
    """It takes longer than what makes the host ask, and every byte is right."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await _placed(process, "host" if way == "there" else "gpu0")
        for what in SLOW[slow]:
            machine.add_fault(what)
        if slow == "a slow clock":
            await trio.sleep(90)  # then it is 45 s behind
        began_s = trio.current_time()
        await process.migrate(address, PAGES * PAGE, "gpu0" if way == "there" else "host")
        assert trio.current_time() - began_s > WATCHDOG_S or (slow, way) == ("a slow clock", "there"), (
            "the host's clock paces what goes there"
        )
        machine.heal()
        await trio.sleep(1)  # the last steps of a migration run behind its answer
        assert (await process.residency(address, PAGES)).owners == ("gpu0" if way == "there" else "node0",)
        assert await process.read(address, PAGES * PAGE) == DATA[: PAGES * PAGE]
        devices = (await machine.report())["devices"]
        assert all(devices[name]["state"] == "ready" and devices[name]["lives"] == 1 for name in MACHINE.device_names)
        await process.exit()

    hmmnet.simulate(main, MACHINE, limit_s=3000.0)


COMMAND_STALLS = {
    "from the first chunk": fault("copy.stall", "unit0", direction="to_host"),
    "in the middle": fault("point.pause", "unit0", point="device.mid_copy", nth=3),
}


@pytest.mark.parametrize("stall", COMMAND_STALLS)
def test_a_command_whose_data_stall_ends_with_its_device(stall: str) -> None:
    """By the rule of other streams: its caller hears why."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await _placed(process, "host")
        handle = await process.open("unit0")
        machine.add_fault(COMMAND_STALLS[stall])
        began_s = trio.current_time()
        with pytest.raises(PeerError, match=LOST):
            await handle.ioctl("read", address, PAGES)
        assert HUNG_S <= trio.current_time() - began_s < MOST_S
        machine.heal()
        assert await process.read(address, PAGES * PAGE) == DATA[: PAGES * PAGE]
        await process.exit()

    hmmnet.simulate(main, COMMANDED, limit_s=300.0)


COMMAND_SLOW = {
    "before it gives anything": fault("point.delay", "unit0", point="device.before_write", latency="45 s", nth=1),
    "chunks that take 15 s": fault("copy.slow", "unit0", latency="15 s"),
    "cut off": fault("partition", "unit0", channel="bulk", lasts="45 s"),
}


@pytest.mark.parametrize("slow", COMMAND_SLOW)
def test_a_command_may_take_its_time(slow: str) -> None:
    """Before it gives data, and between them, where something holds them."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await _placed(process, "host")
        handle = await process.open("unit0")
        machine.add_fault(COMMAND_SLOW[slow])
        began_s = trio.current_time()
        assert (await handle.ioctl("read", address, PAGES)).data == DATA[: PAGES * PAGE]
        assert trio.current_time() - began_s > HUNG_S
        assert (await machine.report())["devices"]["unit0"]["lives"] == 1
        await process.exit()

    hmmnet.simulate(main, COMMANDED, limit_s=300.0)


def test_a_command_that_is_answered_and_gives_nothing_holds_nobody_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a device may be wrong: who waits for its data hears of it, and the device lives."""

    async def gives_nothing(_dmirror: Dmirror, _stream: int, _data: object) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(Dmirror, "_give", gives_nothing)

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(PAGE)
        handle = await process.open("unit0")
        began_s = trio.current_time()
        with pytest.raises(PeerError, match="its sender knows nothing of it any more"):
            await handle.ioctl("read", address, 1)
        assert HUNG_S <= trio.current_time() - began_s < MOST_S
        assert (await machine.report())["devices"]["unit0"]["state"] == "ready"
        await handle.close()
        await process.exit()

    hmmnet.simulate(main, COMMANDED, limit_s=300.0)
