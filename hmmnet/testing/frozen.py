"""A simulated machine for tests that do not await: its world stands still unless a call is under way.

The machine runs in a thread of its own, in virtual time. A call wakes the thread, which runs the world until the call is over and then
waits for the next one *without* giving the world a chance to go on: no heartbeat, no timer. So virtual time passes in calls only, the order
of calls is all that reaches the world from outside, and one seed is one run here too, however long a test thinks or a debugger stops.

Calls follow each other, also those of several threads: what is to happen at the same time is an asynchronous function for ``run``.
"""

from __future__ import annotations

import queue
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, TypeVar

import outcome
import trio

from hmmnet.blocking import Blocking, BlockingMachine, only_error
from hmmnet.errors import HmmnetError
from hmmnet.faults import Plannable
from hmmnet.program import documented_by
from hmmnet.sim import SimulatedMachine, run_virtual
from hmmnet.sim.clock import JumpClock
from hmmnet.sim.run import SimulationStuck

CALL_LIMIT_S = 600.0
"""Virtual seconds of one call: far more than any lease or timeout, so what takes longer waits for what never comes."""

R = TypeVar("R")
Job = Callable[[], Awaitable[None]]


class Frozen(Blocking[SimulatedMachine]):
    """See the module. `seed` is what the schedule of the world is drawn from."""

    def __init__(self, make: Callable[[], AbstractAsyncContextManager[SimulatedMachine]], seed: int) -> None:
        super().__init__(make)
        self._seed = seed
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    def _leave(self) -> None:
        """As a call, and not as a word from outside: that would wake a task while the world ends, at a moment that is nobody's seed's."""
        self._jobs.put(None)

    def call(self, function: Callable[..., Awaitable[R]], *args: Any, **kwargs: Any) -> R:
        """See `Blocking.call`. Raises SimulationStuck when the call is not over after `CALL_LIMIT_S` virtual seconds."""
        if not self._thread.is_alive():
            raise HmmnetError("the machine has ended")
        result: queue.SimpleQueue[outcome.Outcome[R]] = queue.SimpleQueue()
        scope = trio.CancelScope()

        async def work() -> None:
            given: outcome.Outcome[R] = outcome.Error(HmmnetError("the machine was ended while this call waited"))
            name = getattr(function, "__name__", "the call")
            with scope:
                given = await outcome.acapture(_limited, name, function, args, kwargs)
            result.put(given)

        self._jobs.put(work)
        try:
            return result.get().unwrap()
        except KeyboardInterrupt:
            assert self._token is not None, "start() comes first"
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(scope.cancel)
            raise

    def _run(self) -> None:
        self._outcome = outcome.capture(run_virtual, self._main, seed=self._seed, limit_s=float("inf"))
        if isinstance(self._outcome, outcome.Error):
            self._started.put(self._outcome)  # heard if it was the start that failed

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with only_error():
            async with self._make() as machine:
                self._started.put(outcome.Value(machine))
                while (job := self._jobs.get()) is not None:
                    await job()


async def _limited(name: str, function: Callable[..., Awaitable[R]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, JumpClock), "run_virtual has it"
    clock.limit_s = trio.current_time() + CALL_LIMIT_S
    with trio.move_on_after(CALL_LIMIT_S):
        return await function(*args, **kwargs)
    what = f"{name} is not over after {CALL_LIMIT_S:g} virtual seconds: it waits for what never comes"
    raise SimulationStuck("\n  ".join([what, *clock.told]))


@documented_by(SimulatedMachine)
class FrozenMachine(BlockingMachine):
    """A `hmmnet.sim.SimulatedMachine` whose methods block, and whose world stands still between them."""

    def __init__(self, machine: SimulatedMachine, world: Frozen) -> None:
        super().__init__(machine, world)
        self.name = machine.name
        self.topology = machine.topology
        self._simulated = machine

    @property
    def rate(self) -> float:
        """See `SimulatedMachine.rate`."""
        return self._simulated.rate

    def set_rate(self, rate: float) -> None:
        """See `SimulatedMachine.set_rate`."""
        self._loop.ask(lambda: self._simulated.set_rate(rate))

    @property
    def running(self) -> tuple[str, ...]:
        """See `SimulatedMachine.running`."""
        return self._loop.ask(lambda: self._simulated.running)

    def start_device(self, name: str) -> None:
        """See `SimulatedMachine.start_device`."""
        self._loop.call(self._simulated.start_device, name)

    def kill_device(self, name: str) -> None:
        """See `SimulatedMachine.kill_device`."""
        self._loop.call(self._simulated.kill_device, name)

    def sleep(self, seconds: float) -> None:
        """Let virtual time pass."""
        self._loop.call(trio.sleep, seconds)

    def hang_device(self, name: str) -> None:
        """See `SimulatedMachine.hang_device`."""
        self._loop.call(self._simulated.hang_device, name)

    def resume_device(self, name: str) -> None:
        """See `SimulatedMachine.resume_device`."""
        self._loop.call(self._simulated.resume_device, name)

    def ask(self, function: Callable[[SimulatedMachine], R]) -> R:
        """What a plain function answers when it is called with the machine inside: for everything that does not wait."""
        return self._loop.ask(lambda: function(self._simulated))

    def add_fault(self, fault: Plannable, **given: Any) -> int:
        """See `SimulatedMachine.add_fault`."""
        return self._loop.ask(lambda: self._simulated.add_fault(fault, **given))

    def remove_fault(self, number: int) -> None:
        """A fault ends."""
        self._loop.ask(lambda: self._simulated.remove_fault(number))

    def list_faults(self) -> list[dict[str, Any]]:
        """See `SimulatedMachine.list_faults`."""
        return self._loop.ask(self._simulated.list_faults)

    def heal(self) -> None:
        """All faults end."""
        self._loop.ask(self._simulated.heal)

    def faults_fired(self) -> dict[str, int]:
        """How often each kind of fault that was ever added has happened so far."""
        return self._loop.ask(self._simulated.carrier.fired)
