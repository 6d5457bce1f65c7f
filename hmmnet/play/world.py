"""The machine that scripts are played on: a host and one dmirror device process for each unit of the recorder's virtual machine.

Scripts run one after the other, each in a process of its own, on one machine; like the recorder's kernel it is not rebooted in between, so
whatever a script leaves behind shows in the next. Only when an operation fails as no kernel does, or hangs, is the machine replaced.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

from hmmnet.errors import HmmnetError, KernelError
from hmmnet.program import Process
from hmmnet.topology.model import Personality

from .compare import Outcome, Tally
from .grammar import Step
from .player import MachineBroken, play, prepare
from .script import Script

if TYPE_CHECKING:
    from hmmnet.machine import LaunchedMachine
    from hmmnet.sim import SimulatedMachine

TOPOLOGY = "dmirror-4"
"""Units 0 and 1 private, 2 and 3 coherent, as test_hmm has them."""
RATE = 1.0
"""Emulated seconds for a real second: what is compared are answers, not times, so nothing is measured and nothing is slowed down."""


class World(Protocol):
    """A running machine: processes, and devices by unit number."""

    async def create_process(self) -> Process:
        """A new, empty process."""
        ...

    def device_of_unit(self, unit: int) -> str:
        """The device that has a unit number. Raises KernelError(ENOENT)."""
        ...


Launch = Callable[[], AbstractAsyncContextManager[World]]


class UnitWorld:
    """A machine whose devices are known by their unit numbers."""

    def __init__(self, machine: LaunchedMachine | SimulatedMachine) -> None:
        self.machine = machine
        """What it runs on."""
        self._units = {spec.unit: spec.name for spec in machine.topology.devices if spec.unit is not None}

    async def create_process(self) -> Process:
        """A new process of the machine."""
        return await self.machine.create_process()

    def device_of_unit(self, unit: int) -> str:
        """The device with this unit number in the topology."""
        if unit not in self._units:
            raise KernelError(errno.ENOENT, "open", f"no device has unit {unit}; this machine has units {sorted(self._units)}")
        return self._units[unit]


@asynccontextmanager
async def real_world(personality: Personality = "today", seed: int = 0) -> AsyncIterator[UnitWorld]:
    """Launch the machine while the block runs."""
    from hmmnet.machine import launch

    async with launch(TOPOLOGY, rate=RATE, personality=personality, seed=seed) as machine:
        yield UnitWorld(machine)


@asynccontextmanager
async def simulated_world(personality: Personality = "today", seed: int = 0) -> AsyncIterator[UnitWorld]:
    """The machine in this trio run, which is in virtual time, while the block runs."""
    from hmmnet.sim import simulated

    async with simulated(TOPOLOGY, personality=personality, seed=seed) as machine:
        yield UnitWorld(machine)


def launcher(world: str, seed: int = 0) -> Launch:
    """How to launch `world`; `seed` is what chances of faults are drawn from. Raises ValueError."""
    worlds: dict[str, Callable[..., AbstractAsyncContextManager[UnitWorld]]] = {"real": real_world, "sim": simulated_world}
    if world not in worlds:
        raise ValueError(f"world {world!r} is unknown; there are: {', '.join(worlds)}")
    return partial(worlds[world], seed=seed)


def prepare_all(scripts: Iterable[Script]) -> list[tuple[Script, list[Step]]]:
    """Parse every script before the first one runs. Raises ScriptError."""
    return [(script, prepare(script)) for script in scripts]


async def play_all(prepared: Sequence[tuple[Script, list[Step]]], launch: Launch, on_outcome: Callable[[Outcome], None]) -> Tally:
    """Play every script and tell `on_outcome` as each ends."""
    tally = Tally()
    waiting = deque(prepared)
    while waiting:
        async with launch() as world:
            healthy = True
            while waiting and healthy:
                outcome, healthy = await _play_one(world, *waiting.popleft())
                tally.outcomes.append(outcome)
                on_outcome(outcome)
    return tally


async def _play_one(world: World, script: Script, steps: list[Step]) -> tuple[Outcome, bool]:
    try:
        process = await world.create_process()
    except HmmnetError as error:
        raise HmmnetError(f"{script.path}:{script.line}: no process for script {script.name!r}: {error}") from error
    try:
        return await play(script, steps, process, world.device_of_unit), True
    except MachineBroken as broken:
        return broken.outcome, False
