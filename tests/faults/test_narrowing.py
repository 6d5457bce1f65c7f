"""What narrows a fault to some processes, addresses or events: where it has a meaning it is kept to, everywhere else it is a mistake."""

from __future__ import annotations

from typing import Any, Literal

import pytest

import hmmnet
from hmmnet.errors import HmmnetError, KernelError
from hmmnet.faults import KINDS, POINTS, Fault, MessageFault, Plan, PointFault, Way, Where, fault
from hmmnet.faults.messages import TELLING
from hmmnet.faults.plan import named
from hmmnet.sim import SimulatedMachine
from tests.sim.everything import MACHINE, PAGE, everything
from tests.sim.test_catalogue import SETTINGS

NOBODY = {"process": 4242, "range": "0x7000000000000000+4096"}
"""A process that there is not, and addresses beyond all that there are: a process that ends gives up each of its own."""
GIVEN: dict[str, dict[str, Any]] = {
    **{name: {} for name in KINDS},
    **{name: SETTINGS[name] for name in SETTINGS if KINDS[name].parameter("point")},
    **{name: {"message": TELLING} for name in KINDS if KINDS[name].parameter("message")},
    "alternate": {"to": "gpu1"},
    "point.crash": {"point": "migrate.before_copy"},
    "point.hang": {"point": "migrate.before_copy"},
    "old_version": {"message": TELLING},
    "ecc.uncorrectable": {"range": "0x10000+4096"},
}
"""How each kind is made so that it can be narrowed, if ever."""
NARROWED: tuple[Literal["process", "range"], ...] = ("process", "range")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_narrowed_or_refuses_to_be(kind: str) -> None:
    """A kind that takes a process (or a range) never happens for one that there is not; each other says why it takes none."""
    made: list[Fault] = []
    for name in NARROWED:
        given = {**GIVEN[kind], name: NOBODY[name]}
        if KINDS[kind].narrowed_by(name) == "never":
            with pytest.raises(HmmnetError, match=rf"fault {kind}: {name}: .*(tell|whole|no world).*; leave it out"):
                fault(kind, **given)
        else:
            made.append(fault(kind, **given))
    if not made or made[0].at_once:
        return

    async def main(machine: SimulatedMachine) -> None:
        for one in made:
            machine.add_fault(one)
        await everything(machine)
        assert machine.carrier.fired() == {kind: 0}

    hmmnet.simulate(main, MACHINE)


@pytest.mark.parametrize("kind", ["invalidate.late", "invalidate.slow", "invalidate.wide", "delay"])
def test_invalidations_of_one_process_or_range(kind: str) -> None:
    """Those of the process, or that touch the pages, and no others; all of them without either."""

    async def main(machine: SimulatedMachine) -> dict[str, int]:
        one, other = await machine.create_process(), await machine.create_process()
        here, there = [await process.mmap(4 * PAGE) for process in (one, other)]
        for process, address in ((one, here), (other, there)):
            await process.write(address, b"x" * 4 * PAGE)
            await process.migrate(address, 4 * PAGE, "gpu0")
        given = {"message": TELLING} if kind == "delay" else {}
        narrowed: dict[str, dict[str, Any]] = {
            "all": {},
            "its": {"process": one.pid},
            "there": {"process": one.pid, "range": f"0x{here + PAGE:x}+4096"},
            "nowhere": {"process": one.pid, "range": "0x1000+4096"},
        }
        numbers = {what: machine.add_fault(kind, **given, **more) for what, more in narrowed.items()}
        await one.munmap(here, PAGE)
        await one.munmap(here + PAGE, 2 * PAGE)
        await other.munmap(there, PAGE)
        happened = {row["number"]: row["fired"] for row in machine.list_faults()}
        return {what: happened[number] for what, number in numbers.items()}

    assert hmmnet.simulate(main, MACHINE).value == {"all": 3, "its": 2, "there": 1, "nowhere": 0}


def test_a_device_is_told_of_its_own_migration() -> None:
    """That device alone, when the fault is on it."""

    async def main(machine: SimulatedMachine) -> dict[str, int]:
        machine.add_fault("invalidate.wrong_owner", on="gpu1")
        process = await machine.create_process()
        address = await process.mmap(4 * PAGE)
        fired = []
        for device in ("gpu0", "gpu1"):
            await process.write(address, b"x" * 4 * PAGE)
            await process.launch("vector_add", device, a=address, b=address, out=address, n=8, dtype="<u8")
            fired.append(machine.carrier.fired()["invalidate.wrong_owner"])
        return dict(zip(("gpu0", "gpu1"), fired, strict=True))

    counts = hmmnet.simulate(main, MACHINE).value
    assert counts["gpu0"] == 0
    assert counts["gpu1"] > 0


def test_points_tell_what_they_say() -> None:
    """Each that is reached, of each occurrence at which there is something to tell; the others tell nothing."""
    met: dict[str, list[Where]] = {}

    async def main(machine: SimulatedMachine) -> None:
        machine.injector.add(PointFault("*", "call", call=lambda where: met.setdefault(where.point, []).append(where)))
        await everything(machine)

    hmmnet.simulate(main, MACHINE)
    del met["memcg.charge"]  # told by some who charge, not by all
    for name, places in met.items():
        told = {
            "device": any(where.device for where in places),
            "process": any(where.process for where in places),
            "range": any(where.start and where.pages for where in places),
            "event": any(where.event for where in places),
        }
        assert tuple(one for one, there in told.items() if there) == POINTS[name].tells, name
        if told["process"]:
            assert all(where.process for where in places), name
    assert len(met) > len(POINTS) - 8
    assert all(POINTS[name].tells in ((), ("device",)) for name in set(POINTS) - set(met))


def test_a_deed_where_nobody_is_named() -> None:
    """Chunks are nobody's: the process that is named exits while those of another are copied."""

    async def main(machine: SimulatedMachine) -> None:
        one, other = await machine.create_process(), await machine.create_process()
        address = await one.mmap(4 * PAGE)
        await one.write(address, b"x" * 4 * PAGE)
        machine.add_fault("process.exit", process=other.pid, point="migrate.mid_copy", times=1)
        await one.migrate(address, 4 * PAGE, "gpu0")
        with pytest.raises(KernelError, match="ESRCH"):
            await other.mmap(PAGE)
        assert await one.read(address, PAGE) == b"x" * PAGE
        assert machine.carrier.fired() == {"process.exit": 1}

    hmmnet.simulate(main, MACHINE)


@pytest.mark.parametrize(
    ("kind", "given", "wrong"),
    [
        ("point.fail", {"point": "migrate.mid_copy", "event": "unmap"}, 'event: "migrate.mid_copy" does not tell it'),
        ("point.delay", {"point": "process.*", "event": "unmap"}, r'event: "process\.\*" does not tell it'),
        ("process.exit", {"range": "0x1000+4096"}, "range: it is done at once, to the whole"),
        ("loss", {"process": 7, "message": "Done"}, "process: messages do not tell it, but for Invalidate; .*message=Invalidate"),
        ("copy.slow", {"process": 7, "range": "0x1000+4096"}, 'process: "migrate.mid_copy" does not tell it.*; range: "migrate.mid_copy"'),
    ],
)
def test_what_cannot_be_narrowed_so(kind: str, given: dict[str, Any], wrong: str) -> None:
    """It depends on the point, and on the message; every mistake is named."""
    with pytest.raises(HmmnetError, match=wrong):
        fault(kind, **given)


@pytest.mark.parametrize("nobody", [0, "0"])
def test_process_0_is_any(nobody: int | str) -> None:
    """However it is written: it narrows nothing, and is no mistake."""
    assert fault("delay", process=nobody) == fault("delay")


def test_a_message_that_tells_nothing_is_not_narrowed() -> None:
    """Nor does one that is narrowed lose that when it is written down."""
    with pytest.raises(HmmnetError, match="only Invalidate tells a process"):
        MessageFault("loss", process=7)
    low = MessageFault("loss", Way("gpu0"), message=TELLING, process=7, start=0x1000, end=0x3000)
    (back,) = Plan.parse(Plan((named(low),)).as_toml()).faults
    assert isinstance(back, Fault)
    assert list(back.effects) == [low]
