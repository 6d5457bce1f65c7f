"""A link that takes longer: what crosses it is late, in the direction that is meant, and what goes another way is in time.

```
node0 ---- gpu0          pcie0, pcie1: 1 us
  |         |            nvlink: 1 us
  +------- gpu1
```
"""

from __future__ import annotations

import pytest

import hmmnet
from hmmnet.cli.toxics import Sights, faults_for
from hmmnet.errors import HmmnetError
from hmmnet.faults import Fault, fault
from hmmnet.sim import SimulatedMachine
from hmmnet.topology.load import parse

from .everything import MIB, PAGE

PAIR = parse("""
name = "pair"
[[memory]]
name = "node0"
size = "256 MiB"
[[device]]
name = "gpu[0-1]"
memory = "64 MiB"
[[link]]
name = "pcie[0-1]"
a = "node0"
b = "gpu[0-1]"
bandwidth = "16 GB/s"
latency = "1 us"
[[link]]
name = "nvlink"
a = "gpu0"
b = "gpu1"
bandwidth = "100 GB/s"
latency = "1 us"
""")
LATE_S = 0.05
NBYTES = 2 * MIB


def taken(made: list[Fault], nbytes: int = NBYTES, rounds: int = 1) -> tuple[list[list[float]], int]:
    """Seconds that `nbytes` take from the host to gpu0, to gpu1, back and home while faults act; and how often those have happened."""

    async def main(machine: SimulatedMachine) -> tuple[list[list[float]], int]:
        process = await machine.create_process()
        address = await process.mmap(nbytes)
        for one in made:
            machine.add_fault(one)
        found = []
        for number in range(rounds):
            await process.write(address, bytes([number + 1]) * nbytes)
            times = []
            for target in ("gpu0", "gpu1", "gpu0", "host"):
                began_s = machine.emulated_s()
                assert await process.migrate(address, nbytes, target) == nbytes
                times.append(machine.emulated_s() - began_s)
            assert await process.read(address, nbytes) == bytes([number + 1]) * nbytes
            found.append(times)
        await process.exit()
        return found, sum(machine.carrier.fired().values())

    return hmmnet.simulate(main, PAIR, seed=3).value


@pytest.mark.parametrize(("on", "late"), [("gpu0<->host", (0, 3)), ("host->gpu0", (0,)), ("gpu*->host", (3,)), ("gpu1<->host", ())])
@pytest.mark.parametrize("nbytes", [NBYTES, PAGE])
def test_a_way_to_the_host_delays_what_crosses_it_and_no_other(on: str, late: tuple[int, ...], nbytes: int) -> None:
    """As flows and as single pages; copies between the devices go over their own link, and are as fast as ever."""
    (usual,), _ = taken([], nbytes)
    (times,), fired = taken([fault("link.latency", on, latency=f"{LATE_S} s")], nbytes)
    for step, (with_s, without_s) in enumerate(zip(times, usual, strict=True)):
        assert with_s == pytest.approx(without_s + LATE_S * (step in late), abs=1e-4), step
    assert fired == len(late)


def test_the_words_of_the_command_line_come_down_to_that() -> None:
    """``fault add gpu0<->host latency=50ms``: what goes from device to device is not late."""
    sights = Sights(PAIR.device_names, {link.name: frozenset((link.a, link.b)) for link in PAIR.links})
    (made,) = faults_for("gpu0<->host", [f"latency={LATE_S}s"], sights)
    (usual,), _ = taken([])
    (times,), _ = taken([fault(**made)])
    assert [with_s > without_s + LATE_S / 2 for with_s, without_s in zip(times, usual, strict=True)] == [True, False, False, True]


def test_jitter_is_drawn_for_each_transfer_and_controls_count_them() -> None:
    """Within its bounds, no two alike; with `times` only so many are late."""
    usual = taken([])[0][0][0]
    rounds, fired = taken([fault("link.latency", "host->gpu0", latency="0 s", jitter=f"{LATE_S} s")], rounds=8)
    extra = [times[0] - usual for times in rounds]
    assert all(-1e-4 < one < LATE_S + 1e-4 for one in extra)
    assert len({round(one, 5) for one in extra}) == fired == 8
    rounds, fired = taken([fault("link.latency", "host->gpu0", latency=f"{LATE_S} s", times=2)], rounds=4)
    assert [times[0] > LATE_S for times in rounds] == [True, True, False, False]
    assert fired == 2


def test_bandwidth_is_lost_in_one_direction() -> None:
    """Of a way; the other carries what it did."""
    (usual,), _ = taken([])
    (times,), _ = taken([fault("link.slow", "gpu0->host", factor=0.1)])
    assert times[3] / usual[3] > 5
    assert times[:3] == pytest.approx(usual[:3], rel=0.01)


@pytest.mark.parametrize(
    ("kind", "on", "says"),
    [
        ("link.latency", "gpu0->gpu1", "is no way; write DEVICE<->host"),
        ("link.down", "gpu0->host", "a link is down in both directions; write gpu0<->host"),
        ("p2p.suspend", "gpu0<->host", "links from device to device are on no way to the host"),
    ],
)
def test_ways_that_a_fault_of_links_cannot_be_on(kind: str, on: str, says: str) -> None:
    """It is said before anything begins."""
    with pytest.raises(HmmnetError, match=says):
        fault(kind, on)


@pytest.mark.parametrize(
    ("on", "says"),
    [
        ("gpu7<->host", 'no device is called "gpu7"; did you mean "gpu'),
        ("pcie7", 'no link is called "pcie7"; did you mean "pcie'),
    ],
)
def test_ways_that_a_machine_has_not(on: str, says: str) -> None:
    """Named as any other target."""

    async def main(machine: SimulatedMachine) -> None:
        with pytest.raises(HmmnetError, match=says):
            machine.add_fault(fault("link.latency", on))
        assert machine.carrier.active == {}

    hmmnet.simulate(main, PAIR)
