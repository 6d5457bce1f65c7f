"""Whom a fault may be on: what a machine has, and what its world reaches. Both worlds refuse the same."""

from __future__ import annotations

from typing import Any

import pytest

import hmmnet
from hmmnet.errors import HmmnetError
from hmmnet.faults import Controls, MessageFault, PointFault, Way, fault
from hmmnet.faults.kinds import World
from hmmnet.faults.plan import AnyFault
from hmmnet.faults.targets import check_target, wrong_targets
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
    assert wrong_targets(fault(**given), TOPOLOGY, "real") == wrong_targets(fault(kind, **more), TOPOLOGY, "sim") == []


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


def test_a_misspelt_point_is_a_mistake_of_every_kind_that_has_points() -> None:
    """Also where the host does something there."""
    with pytest.raises(HmmnetError, match=r'no point is called "migrate[.]befor_copy"; did you mean "migrate[.]before_copy"'):
        fault("process.exit", point="migrate.befor_copy")
