"""``--faults FILE``: a plan of faults for the machine that a command works on, and what came of it.

A plan is read and checked before anything starts (`plan_for`); its faults begin when every device is there (`Breaking.on`). The last
line, or the report for programs, says how often each kind has happened; where the work fails, a line on stderr does (`Breaking.telling`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from hmmnet.faults.kinds import Fault
    from hmmnet.faults.plan import Plan
    from hmmnet.sim.worlds import WorldName
    from hmmnet.topology.model import Topology

FaultsFile = Annotated[
    Path | None,
    typer.Option("--faults", help="A plan: faults that begin when every device is there.", show_default=False),
]
END_S = 5.0
"""Real seconds to take a plan's faults from a running machine that goes on without us."""
W = TypeVar("W")


def plan_for(path: Path | None, world: WorldName, topology: Topology | None = None) -> Breaking:
    """The plan in a file; an empty one without a file. Raises PlanError and HmmnetError with every mistake, and what `world` cannot do.

    `topology`, where it is known before the machine is, must have what the faults are on.
    """
    from hmmnet.faults.plan import Plan

    if path is None:
        return Breaking(Plan())
    plan = Plan.load(path)
    plan.check(world, topology)
    return Breaking(plan)


class Breaking:
    """The faults of a plan; `fired` counts by kind what happened on the machines that had them."""

    def __init__(self, plan: Plan) -> None:
        from hmmnet.faults.plan import named

        self.plan = plan
        self.faults = [named(one) for one in plan.faults]
        self.fired: Counter[str] = Counter()

    def __bool__(self) -> bool:
        """Whether there is any fault."""
        return bool(self.faults)

    @asynccontextmanager
    async def on(self, machine: Any, *, stays: bool = False) -> AsyncIterator[None]:
        """The faults act on `machine`, all of whose devices are there, while the block runs. Raises PlanError for what cannot be done.

        `stays`: the machine goes on without us, and must be rid of them.
        """
        if not self.faults:
            yield
            return
        before = dict((await machine.report())["faults"])
        numbers: list[int] = []
        try:
            for index, fault in enumerate(self.faults):
                with self.plan.naming(index):
                    numbers.append(await begin(machine, fault))
            yield
        except BaseException:
            await self._count_what_broke(machine, before)
            raise
        else:
            self._count(before, (await machine.report())["faults"])
        finally:
            if stays:
                await _end(machine, numbers)

    async def _count_what_broke(self, machine: Any, before: Mapping[str, int]) -> None:
        """Count although the work failed, if the machine still answers."""
        import trio

        from hmmnet.errors import HmmnetError

        with trio.move_on_after(END_S, shield=True), suppress(HmmnetError):
            self._count(before, (await machine.report())["faults"])

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Around the work: when it fails, the faults that may be why are told on stderr."""
        try:
            yield
        except BaseException:
            if self.fired:
                print(self.text, file=sys.stderr, flush=True)
            raise

    def world(self, launch: Callable[[], AbstractAsyncContextManager[W]]) -> Callable[[], AbstractAsyncContextManager[W]]:
        """What launches a world, with the faults on its `machine`."""

        @asynccontextmanager
        async def launched() -> AsyncIterator[W]:
            async with launch() as world, self.on(world.machine):  # type: ignore[attr-defined] # worlds of units have one
                yield world

        return launched

    def _count(self, before: Mapping[str, int], after: Mapping[str, int]) -> None:
        for fault in self.faults:
            self.fired.setdefault(fault.kind.name, 0)
        for kind in self.fired:
            self.fired[kind] += after.get(kind, 0) - before.get(kind, 0)

    def as_given(self) -> list[dict[str, Any]]:
        """What makes the faults again, as plain data, and the `place` of each in its file."""
        from hmmnet.faults.catalogue import as_given

        return [{**as_given(fault), "place": self.plan.place(index)} for index, fault in enumerate(self.faults)]

    @property
    def text(self) -> str:
        """The last line: how often each kind happened."""
        return told(self.fired)

    def as_json(self) -> dict[str, Any]:
        """What a report for programs says of it; nothing without a plan."""
        return {"faults": dict(self.fired)} if self else {}


def told(fired: Mapping[str, int]) -> str:
    """``faults: alloc.host 3, loss 12``."""
    return "faults: " + ", ".join(f"{kind} {count}" for kind, count in fired.items())


async def begin(machine: Any, fault: Fault) -> int:
    """A fault begins on a machine of any kind; its number. Raises HmmnetError."""
    from hmmnet.client import RemoteMachine
    from hmmnet.faults.catalogue import as_given

    if isinstance(machine, RemoteMachine):
        return await machine.add_fault(**as_given(fault))
    return int(machine.add_fault(fault))


async def _end(machine: Any, numbers: list[int]) -> None:
    import trio

    from hmmnet.errors import HmmnetError

    with trio.move_on_after(END_S, shield=True), suppress(HmmnetError):  # the machine may be what broke
        there = {one["number"] for one in await machine.list_faults()}
        for number in numbers:
            if number in there:
                await machine.remove_fault(number)
