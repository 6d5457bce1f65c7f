"""Whom a fault may be on: what a machine has, and what its world reaches. Both worlds refuse the same."""

from __future__ import annotations

import re
from typing import Any

import pytest

import hmmnet
from hmmnet.errors import HmmnetError, PlanError
from hmmnet.faults import Controls, MessageFault, Plan, PointFault, Way, fault
from hmmnet.faults.kinds import World
from hmmnet.faults.plan import AnyFault
from hmmnet.faults.targets import check_target, target_mistakes
from hmmnet.sim import SimulatedMachine
from hmmnet.topology.load import load

TOPOLOGY = load("two-gpus")
MISSPELT: list[dict[str, Any]] = [
    {"kind": "alloc.device", "on": "gpu9"},
    {"kind": "point.delay", "on": "gpu9", "point": "device.job_start"},
    {"kind": "clock.jump", "on": "gpu9"},
    {"kind": "loss", "on": "gpu9<->host"},
    {"kind": "copy.corrupt", "on": "gpu9"},
    {"kind": "crash", "on": "gpu9", "after": "1 s"},
    {"kind": "process.exit", "on": "gpu9", "point": "migrate.after"},
    {"kind": "alternate", "to": "gpu9"},
    {"kind": "point.crash", "point": "hub.after_acks", "node": "gpu9"},
]


@pytest.mark.parametrize("world", ["sim", "real"])
@pytest.mark.parametrize("given", MISSPELT, ids=lambda given: str(given["kind"]))
def test_a_device_that_there_is_not_is_a_mistake(given: dict[str, Any], world: World) -> None:
    """Also as the node that is to die, as the other device, and of a fault that begins later."""
    with pytest.raises(
        HmmnetError, match=f'fault {given["kind"]}: .*no device is called "gpu9"; did you mean .gpu[01].[?] There are gpu0, gpu1'
    ):
        check_target(fault(**given), TOPOLOGY, world)


@pytest.mark.parametrize("given", [one | ({"on": "gpu*"} if "on" in one else {}) for one in MISSPELT[:3]], ids=str)
def test_patterns_and_everybody_are_right(given: dict[str, Any]) -> None:
    """As they are without a target."""
    kind = str(given["kind"])
    more = {name: value for name, value in given.items() if name not in ("kind", "on")}
    assert target_mistakes(fault(**given), TOPOLOGY, "real") == target_mistakes(fault(kind, **more), TOPOLOGY, "sim") == []


def test_a_simulated_machine_refuses_what_it_has_not() -> None:
    """Named faults and bare effects; nothing is left of them."""

    async def main(machine: SimulatedMachine) -> None:
        wrong: list[AnyFault] = [PointFault("device.job_start", "fail", "gpu9"), MessageFault("loss", Way("gpu9"), Controls(nth=1))]
        wrong += [fault(**given) for given in MISSPELT]
        for one in wrong:
            with pytest.raises(HmmnetError, match='no device is called "gpu9"'):
                machine.add_fault(one)
        with pytest.raises(HmmnetError, match='no link is called "node0-gpu7"; did you mean "node0-gpu'):
            machine.add_fault(fault("link.down", "node0-gpu7"))
        assert machine.carrier.active == {}

    hmmnet.simulate(main)


def test_what_a_real_process_never_sees_is_refused_there() -> None:
    """A host does not pass devices' points, and a device ends nobody else; one simulated world sees all of it."""
    early = fault("process.fork", point="device.before_write")
    with pytest.raises(HmmnetError, match=r'"device\.before_write" is passed in a device\'s own process, where the host cannot act'):
        check_target(early, TOPOLOGY, "real")
    other = fault("point.crash", "gpu0", point="device.job_step", node="gpu1")
    with pytest.raises(HmmnetError, match="which can crash nobody else; say on=gpu1"):
        check_target(other, TOPOLOGY, "real")
    check_target(other, TOPOLOGY, "sim")


def test_the_host_acts_at_its_own_points() -> None:
    """A simulated host, too: what works there works on real processes."""
    with pytest.raises(HmmnetError, match=r'"device\.fetch" is passed in a device.*; give a point of the host'):
        check_target(fault("process.fork", point="device.fetch"), TOPOLOGY, "sim")
    check_target(fault("process.fork", point="*.before_*"), TOPOLOGY, "real")
    check_target(fault("point.crash", "gpu1", point="device.job_step", node="gpu1"), TOPOLOGY, "real")


ON = 'on: "{}" tells no device, so that it would never happen on "gpu0"; leave it out'
DEAF: list[tuple[dict[str, Any], str]] = [
    ({"kind": "alloc.host", "on": "gpu0"}, ON.format("host.alloc.frame")),
    ({"kind": "alloc.cgroup", "on": "gpu0"}, ON.format("memcg.charge")),
    ({"kind": "point.fail", "on": "gpu0", "point": "host.alloc.*"}, ON.format("host.alloc.*")),
    ({"kind": "point.delay", "on": "gpu0", "point": "hub.*"}, ON.format("hub.*")),
    ({"kind": "point.fail", "on": "gpu0", "point": "migrate.count"}, ON.format("migrate.count")),
    ({"kind": "process.exit", "on": "gpu0", "point": "process.fork"}, ON.format("process.fork")),
    ({"kind": "process.exit", "on": "gpu0"}, 'on: it is done at once, to the whole, so that "gpu0" means nothing; leave it out'),
    ({"kind": "host.crash", "on": "gpu0"}, 'on: there is one host, so that "gpu0" means nothing; leave it out'),
    (
        {"kind": "process.munmap", "point": "migrate.mid_copy"},
        'range: missing: "migrate.mid_copy" does not tell which addresses; give some, such as 0x7f0000000000+64KiB',
    ),
]
"""What would wait for ever, and why."""


@pytest.mark.parametrize(("given", "says"), DEAF)
def test_what_nobody_tells_is_refused(given: dict[str, Any], says: str) -> None:
    """With place, cause and mend: in a plan, with the line, and of one fault; the live command hands on what a host says."""
    text = f"# a plan\n{Plan([fault(**given)]).as_toml()}"
    with pytest.raises(PlanError) as wrong:
        Plan.parse(text, "deaf.toml").check("sim", TOPOLOGY)
    assert str(wrong.value) == f"deaf.toml:2: fault 1: {says}"
    worlds: tuple[World, ...] = ("sim", "real")
    for world in worlds:
        if world not in fault(**given).kind.not_in:
            with pytest.raises(HmmnetError, match=re.escape(f"fault {given['kind']}: {says}")):
                check_target(fault(**given), TOPOLOGY, world)


def test_a_fault_at_a_point_that_tells_no_device() -> None:
    """Also one that is made of the point itself; a pattern that means other points, too, is right."""

    async def main(machine: SimulatedMachine) -> None:
        with pytest.raises(HmmnetError, match=r'on: "host\.alloc\.frame" tells no device'):
            machine.add_fault(PointFault("host.alloc.frame", "fail", device="gpu0"))
        machine.add_fault(PointFault("host.alloc.frame", "fail"))
        machine.add_fault(PointFault("*", "delay", device="gpu0", delay_s=1e-6))
        machine.add_fault("point.fail", on="*", point="host.alloc.*", times=1)

    hmmnet.simulate(main)


def test_a_misspelt_point_is_a_mistake_of_every_kind_that_has_points() -> None:
    """Also where the host does something there."""
    with pytest.raises(HmmnetError, match=r'no point is called "migrate[.]befor_copy"; did you mean "migrate[.]before_copy"'):
        fault("process.exit", point="migrate.befor_copy")
