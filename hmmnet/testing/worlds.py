"""The machines of tests: real and simulated, for tests that await and for tests that block, all bounded and all listened to."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio

from hmmnet.blocking import Blocking, only_error
from hmmnet.errors import HmmnetError
from hmmnet.faults import Plan, Plannable, as_plan
from hmmnet.faults.plan import named
from hmmnet.machine import LaunchedBlockingMachine, LaunchedMachine, launch
from hmmnet.observe.logs import tracebacks
from hmmnet.sim import SimulatedMachine, Simulation, run_virtual, simulated
from hmmnet.sim.run import LIMIT_S
from hmmnet.topology.model import Topology

from .case import Case, Told
from .frozen import Frozen, FrozenMachine

T = TypeVar("T")
ELSEWHERE = "ask for simulated_machine or simulate instead"
"""The mend, where only real processes cannot do something."""
CRASHES_MAX = 8
"""Crashes of devices that a report tells: the first, with which it began."""
CRASH_ROWS = 5
"""Lines of each traceback: the place where the code of a model or policy gave up, and what it raised."""
_numbers = itertools.count(1)


class MachineOverdue(HmmnetError):
    """A test has kept its real machine longer than it may."""


@asynccontextmanager
async def real(case: Case) -> AsyncIterator[LaunchedMachine]:
    """A machine of real processes for at most `case.limit_s` real seconds, with the test's faults from the moment on when it is ready.

    Raises HmmnetError, for faults too that only a simulated machine can have; MachineOverdue.
    """
    _check_for_processes(case.plan)
    name = f"test-{os.getpid()}-{next(_numbers)}"
    with only_error():
        async with trio.open_nursery() as nursery, launch(case.topology, name=name) as machine:
            with case.listening(machine.host), case.hearing_faults(machine.host.faults, machine.emulated_s):
                _look_for_crashes(case, machine)
                case.hear_effects(machine.host, machine.emulated_s)
                case.plan.begin(machine.add_fault)
                nursery.start_soon(_bell, case.limit_s)
                yield machine
                nursery.cancel_scope.cancel()


def _look_for_crashes(case: Case, machine: LaunchedMachine) -> None:
    """What crashes in a device is in its log: while the machine is there, and a last time when its processes have ended."""

    def look(*, ended: bool = False) -> list[str]:
        found = tracebacks(machine.directory.logs, machine.device_names, ended=ended, rows=CRASH_ROWS)
        return list(itertools.islice(found, CRASHES_MAX))

    def last() -> None:
        case.look, case.crashes = None, look(ended=True)

    case.look = look
    machine.when_ended(last)


def _check_for_processes(plan: Plan) -> None:
    """Raises HmmnetError for a fault of `plan` that real processes cannot have."""
    try:
        for one in plan.faults:
            named(one)
    except HmmnetError as error:
        raise HmmnetError(f"{error}\n{ELSEWHERE}") from None


async def _bell(limit_s: float) -> None:
    await trio.sleep(limit_s)
    raise MachineOverdue(f"this test has kept its machine for {limit_s:g} s, which is as long as it may (ini hmmnet_timeout)")


@contextmanager
def real_blocking(case: Case) -> Iterator[LaunchedBlockingMachine]:
    """`real`, for tests that do not run under trio."""
    loop = Blocking(lambda: real(case))
    machine = LaunchedBlockingMachine(loop.start(), loop)
    try:
        yield machine
    finally:
        loop.stop()


@asynccontextmanager
async def virtual(case: Case) -> AsyncIterator[SimulatedMachine]:
    """A simulated machine, in a trio run in virtual time. Raises HmmnetError."""
    async with simulated(case.topology, trace=Told(case.story), seed=case.seed) as machine:
        with _told(case, machine, case.plan):
            yield machine


@contextmanager
def _told(case: Case, machine: SimulatedMachine, plan: Plan) -> Iterator[None]:
    """The faults of `plan` begin, and the story tells what happens while the block runs. Raises HmmnetError."""
    with case.listening(machine.host), case.hearing_faults(machine.carrier, trio.current_time):
        plan.begin(machine.add_fault)
        yield


@contextmanager
def virtual_blocking(case: Case) -> Iterator[FrozenMachine]:
    """`virtual`, for tests that do not run under trio."""
    world = Frozen(lambda: virtual(case), case.seed)
    machine = FrozenMachine(world.start(), world)
    try:
        yield machine
    finally:
        world.stop()


class Waiting:
    """Stands for a machine in a test that this plugin runs under trio: it is there while the test runs, and not before."""

    def __init__(self, enter: Callable[[], AbstractAsyncContextManager[Any]], run: Callable[..., Any]) -> None:
        self.enter = enter
        self.run = run
        """What runs an asynchronous function in the machine's world."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the machine of an asynchronous test has no {name!r} yet: it begins with the test; fixtures that use it need pytest-trio"
        )


class Simulate:
    """The fixture ``simulate``: `hmmnet.simulate` with the topology, the faults and the seed of the test."""

    def __init__(self, case: Case) -> None:
        self._case = case

    @property
    def seed(self) -> int:
        """The test's seed."""
        return self._case.seed

    def __call__(
        self,
        main: Callable[[SimulatedMachine], Awaitable[T]],
        topology: str | Path | Topology | None = None,
        *,
        seed: int | None = None,
        faults: Plannable | None = None,
        limit_s: float = LIMIT_S,
        keep: bool = False,
    ) -> Simulation[T]:
        """Run `main(machine)` in virtual time; what is not given is the test's. See `hmmnet.simulate`."""
        case = self._case
        chosen = case.seed if seed is None else seed
        plan = case.plan if faults is None else as_plan(faults)
        trace = Told(case.story, keep=keep)

        async def inside() -> tuple[T, float]:
            async with simulated(topology or case.topology, trace=trace, seed=chosen) as machine:
                with _told(case, machine, plan):
                    value = await main(machine)
            return value, trio.current_time()

        value, virtual_s = run_virtual(inside, seed=chosen, limit_s=limit_s)
        return Simulation(value, chosen, trace.digest, trace.count, virtual_s, trace.lines)
