"""What may be given where faults are wanted: one reading for every world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import hmmnet
from hmmnet.errors import HmmnetError
from hmmnet.faults import Controls, MessageFault, Plan, PlanError, as_plan, fault
from hmmnet.faults.forms import one_fault
from hmmnet.faults.plan import named
from hmmnet.sim import SimulatedMachine

TEXT = '[[fault]]\nkind = "loss"\nprobability = 0.25\n'
QUARTER = fault("loss", probability=0.25)
FORMS: dict[str, Callable[[Path], Any]] = {
    "a file's name": lambda folder: str(folder / "ok.toml"),
    "a path": lambda folder: folder / "ok.toml",
    "a plan": lambda _: Plan.parse(TEXT),
    "a fault": lambda _: QUARTER,
    "a fault of messages": lambda _: MessageFault("loss", controls=Controls(0.25)),
    "a dictionary": lambda _: {"kind": "loss", "probability": 0.25},
    "kinds": lambda _: {"loss": 0.25},
    "a kind's parameters": lambda _: {"loss": {"probability": 0.25}},
    "a list": lambda folder: [folder / "ok.toml"],
    "a generator": lambda _: ({"kind": "loss", "probability": chance} for chance in (0.25,)),
}


@pytest.fixture
def given(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    (tmp_path / "ok.toml").write_text(TEXT)
    return FORMS[request.param](tmp_path)


async def begun(machine: SimulatedMachine) -> list[Any]:
    """The faults that it has, and what it says when they have ended."""
    await trio.lowlevel.checkpoint()
    faults = machine.list_faults()
    machine.heal()
    assert machine.list_faults() == []
    return [(one["fault"]["kind"], one["fault"].get("probability", 1.0)) for one in faults]


@pytest.mark.parametrize("given", FORMS, indirect=True)
def test_every_form_is_a_plan_of_every_world(given: Any) -> None:
    """A simulation begins with it; a machine of processes would, which is seen before one is started."""
    plan = as_plan(given)
    assert list(map(named, plan.faults)) == [QUARTER]
    assert hmmnet.simulate(begun, faults=plan).value == [("loss", 0.25)]
    assert [named(one) for one in hmmnet.launch(faults=plan).plan.faults] == [QUARTER]


@pytest.mark.parametrize("given", FORMS, indirect=True)
def test_simulate_and_add_fault_take_it_as_it_is(given: Any) -> None:
    """Nobody has to know `as_plan`."""

    async def main(machine: SimulatedMachine) -> list[Any]:
        machine.add_fault(given)
        return await begun(machine)

    if isinstance(given, list):
        assert hmmnet.simulate(begun, faults=given).value == [("loss", 0.25)]
    assert hmmnet.simulate(main).value == [("loss", 0.25)]


def test_several_are_one_plan() -> None:
    """In their order; a kind by its name is as it is by itself."""
    plan = as_plan(["crash", {"loss": 0.25, "delay": {"latency": "5 ms"}}, Plan([fault("hang", "gpu0")])])
    assert plan.faults == (fault("crash"), QUARTER, fault("delay", latency="5 ms"), fault("hang", "gpu0"))
    assert as_plan(()).faults == ()


def test_a_launch_says_what_real_processes_cannot_do() -> None:
    """With the line of the file, before anything is started."""
    plan = Plan.parse('\n[[fault]]\nkind = "restart.kept"\n', "my.toml")
    with pytest.raises(PlanError, match=r'^my.toml:2: fault 1: the fault "restart.kept" cannot be done in the real world'):
        hmmnet.launch(faults=plan)
    with pytest.raises(PlanError, match=r'no device is called "gpu7"'):
        hmmnet.launch(faults={"kind": "crash", "on": "gpu7"})


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (3, r"^faults: 3 is no plan: a plan file"),
        ([3], r"^faults\[0\]: 3 is no plan"),
        ("missing.toml", r"^missing.toml: cannot be read: No such file"),
        ("los", r'^fault los: kind: no fault is called "los"; did you mean "loss"'),
        ("l" * 5000, r'^fault l+: kind: no fault is called "l+"; `hmmnet fault kinds` lists them'),
        ("l" * 5000 + "/x.toml", r"^l+/x.toml: cannot be read: File name too long"),
        ({"kind": "loss", "probability": 7}, r"^faults: fault 1: probability: 7.0 is not between 0 and 1"),
        ({"loss": "often"}, r"^faults: loss is 'often': a probability or a dictionary is wanted"),
    ],
)
def test_what_is_none_is_refused(wrong: Any, complaint: str) -> None:
    """By its place, with the mend."""
    with pytest.raises(HmmnetError, match=complaint):
        hmmnet.simulate(begun, faults=wrong)


def test_add_fault_begins_one() -> None:
    """A plan of several has as many numbers; parameters go with a kind's name."""
    with pytest.raises(HmmnetError, match=r"begins one fault, and that plan has 2; call it for each"):
        one_fault([QUARTER, QUARTER], {})
    with pytest.raises(HmmnetError, match=r"begins one fault, and that plan has 0"):
        one_fault(Plan(), {})
    with pytest.raises(HmmnetError, match=r"nth: a fault that is made already has its parameters"):
        one_fault({"kind": "loss"}, {"nth": 3})
    assert one_fault("loss", {"probability": 0.25}) == QUARTER
