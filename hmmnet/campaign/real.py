"""The same work and the same checkers on real processes: rounds of SIGKILL, SIGSTOP and bad cables, over ZeroMQ and the kernel's own TCP.

A *batch* is one machine: actors work without a pause, while round after round one device is harmed, and mended again. Then everything is
healed and must be well: every word that was acknowledged is there (or its only copy died, and that was said), every device serves, the
books are in order, and when the machine is gone no process is left.

Chance decides what is done, as in simulation; when it happens is the computer's doing, so a batch can be repeated and need not repeat.
What is found is the history's verdict, whatever the timing. What crashes in a device's process is found in its log, and in how the process
ended: somebody may have been told of it who did not listen any more, or nobody. Both are looked at when the last process has ended, since
one may crash after its goodbye.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain, count, cycle, islice
from random import Random
from typing import Any, ClassVar, cast

import msgspec
import trio

from hmmnet.cable import Cable, Impairment
from hmmnet.errors import KernelError
from hmmnet.launcher.directory import process_started
from hmmnet.machine import LaunchedMachine, LaunchKind, launch
from hmmnet.observe.logs import last_lines, tracebacks
from hmmnet.sim import SimulatedMachine

from .audit import Auditor
from .crew import VIOLATIONS_MAX, AtomicProcess, Crew, Outcome, Violation
from .demands import books, converge, last_check
from .draw import draw
from .machines import topology_of
from .program import Program
from .steps import do

ROUNDS = 25
"""Of one batch."""
OPERATIONS = 400
"""That a batch's actors know; they begin again when they are through."""
BATCH_S = 300.0
"""Real seconds for a batch; half a minute is usual."""
GONE_S = 5.0
"""Real seconds for the processes of a machine to be gone when it is left."""
ENDS = frozenset({0, 1, -signal.SIGKILL})
"""Exit codes of devices that are no crashes: after a goodbye, without a host, and of those that were killed, in a round or at the end."""
LAST_LINES = 3
"""Of a traceback, and of the log of a device that ended otherwise."""
PAUSE_S = 0.02
"""Between two rounds, for work to get going again."""


@dataclass
class Summary:
    """What all rounds came to so far."""

    seeds: int = 0
    """Machines that were begun, each with a seed of its own."""
    rounds: int = 0
    """Harms that were done and mended."""
    operations: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    lost_pages: int = 0
    """How often a page was found to have died with the only device that had it."""
    violations: list[dict[str, Any]] = field(default_factory=list)
    processes_left: int = 0
    began_s: float = field(default_factory=time.perf_counter)

    def add(self, seed: int, outcome: Outcome) -> None:
        """What became of one machine, or of as much of its life as there was."""
        self.operations += outcome.operations
        self.lost_pages += outcome.lost
        self.faults.update(outcome.faults)
        self.violations += [{"seed": seed, "checker": one.checker, "what": one.what} for one in outcome.violations]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "seeds": self.seeds,
            "rounds": self.rounds,
            "operations": self.operations,
            "faults": dict(sorted(self.faults.items())),
            "lost_pages": self.lost_pages,
            "violations": self.violations,
            "processes_left": self.processes_left,
            "seconds": round(time.perf_counter() - self.began_s, 3),
        }


async def run_rounds(
    seed: int, rounds: int, *, cables: bool = False, summary: Summary | None = None, on_batch: Callable[[Summary], None] = lambda _: None
) -> Summary:
    """Run `rounds` rounds on as many machines as that takes. With `cables` this process stands in a network namespace of its own already.

    `summary` is filled as it goes. Raises HmmnetError when a machine cannot be started.
    """
    summary = Summary() if summary is None else summary
    for batch in range(-(-rounds // ROUNDS)):
        outcome = Outcome()
        summary.seeds += 1
        try:
            await _batch(seed + batch, min(ROUNDS, rounds - batch * ROUNDS), "cable" if cables else "ring", outcome, summary)
        finally:
            summary.add(seed + batch, outcome)
        on_batch(summary)
    return summary


class _Unfaulted:
    """Stands where a simulated machine has its injected faults: a real one has none beside what is done to its processes and cables."""

    fired: ClassVar[Counter[str]] = Counter()

    def heal(self, but: str = "") -> None:
        """Nothing is to be healed."""


class _AsSimulated:
    """A launched machine with the few further methods that the checkers know of simulated ones."""

    network = _Unfaulted()
    injector = _Unfaulted()

    def __init__(self, machine: LaunchedMachine) -> None:
        self._machine = machine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._machine, name)

    @property
    def all_ready(self) -> bool:
        """See `SimulatedMachine.all_ready`."""
        return self._machine.host.all_ready

    def left_over(self) -> list[str]:
        """See `SimulatedMachine.left_over`: of the host's books; devices are other processes."""
        return self._machine.host.left_over()

    host_crashed = False
    """That is no fault which real processes can have."""
    settled = False
    """Nobody here sees what is on its way between processes: time has to tell."""

    def audit(self, *, quiet: bool) -> list[str]:
        """See `SimulatedMachine.audit`: of the host's books; devices are other processes, and are asked at the end."""
        return self._machine.host.audit(quiet=quiet)

    def audit_changes(self) -> list[str]:
        """See `SimulatedMachine.audit_changes`: of the host's books, as `audit`."""
        return self._machine.host.audit_changes()

    async def resume_device(self, name: str) -> None:
        """See `SimulatedMachine.resume_device`."""
        self._machine.resume_device(name)


async def _batch(seed: int, rounds: int, transport: LaunchKind, outcome: Outcome, summary: Summary) -> None:
    """One machine from its start until no process of it is left."""
    program = msgspec.structs.replace(draw(seed, "none", OPERATIONS), limit_pages=0)
    processes: Mapping[int, int] = {}
    try:
        with trio.fail_after(BATCH_S), outcome.seeing_crashes():
            async with launch(topology_of(program.machine), rate=1.0, transport=transport) as machine:
                processes = machine.processes
                machine.when_ended(lambda: outcome.violations.extend(_crashes(machine)))
                await _live(machine, program, rounds, outcome, summary)
    except trio.TooSlowError:
        outcome.violations.append(Violation("progress", f"no end within {BATCH_S:g} s"))
    except Exception as error:  # noqa: BLE001 - as in `run_program`
        outcome.violations.append(Violation.crash(error))
    left = await _left(processes)
    if left:
        summary.processes_left += len(left)
        outcome.violations.append(Violation("processes", f"{len(left)} processes are left behind: {', '.join(map(str, left))}"))


def _crashes(machine: LaunchedMachine) -> list[Violation]:
    """What crashed in devices' processes, all of which have ended, as their logs and their ends tell."""
    logs = machine.directory.logs
    told = chain(
        tracebacks(logs, machine.device_names, ended=True, rows=LAST_LINES),
        (
            f"{end.name} (process {end.pid}) {end.how}; its log ends: {' | '.join(last_lines(logs, end.name, end.pid, LAST_LINES))}"
            for end in machine.exits
            if end.status not in ENDS
        ),
    )
    return [Violation("crash", what) for what in islice(told, VIOLATIONS_MAX)]


async def _live(machine: LaunchedMachine, program: Program, rounds: int, outcome: Outcome, summary: Summary) -> None:
    """The life of one machine."""
    process = cast(AtomicProcess, await machine.create_process())
    crew = Crew(cast(SimulatedMachine, _AsSimulated(machine)), process, program, outcome, None)
    auditor = Auditor(crew)
    await crew.lay_out()
    enough = trio.Event()
    async with trio.open_nursery() as nursery:
        for actor in range(program.actors):
            nursery.start_soon(_act, crew, actor, enough)
        await _nemesis(machine, crew, Random(f"real {program.seed}"), rounds, summary)  # noqa: S311 - chance, not secrecy
        enough.set()  # a step in the middle of which it ended could leave a hole where it maps again what it has unmapped
    machine.cables.repair()
    await converge(crew)
    await last_check(crew)
    auditor.full(quiet=True)
    for complaint in (await machine.check())["complaints"]:
        crew.complain("invariants", complaint)
    await process.exit()
    for region in crew.regions:
        if region.file is not None:
            await region.file.close()
    await converge(crew)
    await books(crew, auditor)


async def _act(crew: Crew, actor: int, enough: trio.Event) -> None:
    """Step after step, until it is `enough`; each time with serials of its own, so that every stored value stands for one store."""
    serials = count(1 + actor, crew.program.actors)
    own = [step for step in crew.program.steps if step.actor == actor]
    for step in cycle(own):
        if enough.is_set():
            return
        await do(crew, msgspec.structs.replace(step, serial=next(serials)))
        await trio.lowlevel.checkpoint()


async def _nemesis(machine: LaunchedMachine, crew: Crew, random: Random, rounds: int, summary: Summary) -> None:
    """Round after round, one harm to one device, until it is mended; each is counted when it is over."""
    harms = [_kill, _kill, _stop] + ([_cut, _cut, _impair, _reset] if machine.cables else [])
    for _ in range(rounds):
        await trio.sleep(random.uniform(0.0, PAUSE_S))
        device = random.choice(machine.device_names)
        harm = random.choice(harms)
        began = crew.outcome.operations
        kind = await harm(machine, crew, device, random)
        crew.outcome.faults[kind] += 1
        summary.rounds += 1
        with trio.move_on_after(1.0):
            await crew.ended(began + 1)


async def _harmed(crew: Crew, device: str, kind: str, mend: Callable[[], Awaitable[None]]) -> str:
    """Something is wrong with a device until `mend` returns."""
    harm = crew.harm_begins([device])
    try:
        await mend()
    finally:
        crew.harm_ends(harm)
    return kind


async def _kill(machine: LaunchedMachine, crew: Crew, device: str, random: Random) -> str:
    async def die_and_return() -> None:
        if device in machine.running:
            await machine.kill_device(device)
        await trio.sleep(random.choice((0.0, 0.01, 0.1)))
        await _start(machine, device)

    return await _harmed(crew, device, "kill", die_and_return)


async def _stop(machine: LaunchedMachine, crew: Crew, device: str, random: Random) -> str:
    """SIGSTOP: mostly shorter than a lease; now and then longer, and then the device is found dead or fenced when it wakes up."""
    seconds = random.choice((0.05, 0.2, 0.5, 2.5))

    async def sleep_and_wake() -> None:
        try:
            if device in machine.running:
                machine.pause_device(device)
                await trio.sleep(seconds)
            if device in machine.running:  # one that was given up may have been ended meanwhile
                machine.resume_device(device)
        except KernelError:  # or has ended just now, which is about to be heard
            await machine.kill_device(device)
        await _start(machine, device)

    return await _harmed(crew, device, f"stop {'longer' if seconds > 2 else 'shorter'} than the lease", sleep_and_wake)


async def _start(machine: LaunchedMachine, device: str) -> None:
    if device not in machine.running:
        await machine.start_device(device)


async def _cut(machine: LaunchedMachine, crew: Crew, device: str, random: Random) -> str:
    """A cable that passes nothing, in one direction or both."""
    down, way = Impairment(down=True), random.choice(("both ways", "to the device", "to the host"))

    async def cut() -> None:
        cable = machine.cables[device]
        cable.impair(
            to_device=down if way != "to the host" else Impairment(),
            to_host=down if way != "to the device" else Impairment(),
        )
        await trio.sleep(random.choice((0.05, 0.3, 3.0)))
        cable.repair()

    return await _harmed(crew, device, f"cut {way}", cut)


BAD: dict[str, Impairment] = {
    "drops": Impairment(loss=0.05),
    "delay": Impairment(latency_s=0.005, jitter_s=0.01),
    "reordering": Impairment(reorder=0.2),
    "duplicates": Impairment(duplicate=0.3),
    "rate limit": Impairment(rate_bytes_per_s=2e6),
}


async def _impair(machine: LaunchedMachine, crew: Crew, device: str, random: Random) -> str:
    """A cable that is bad for a while: it must not cost more than time."""
    kind = random.choice(list(BAD))

    async def bear() -> None:
        cable: Cable = machine.cables[device]
        cable.impair(BAD[kind])
        await trio.sleep(random.uniform(0.1, 0.5))
        cable.repair()

    return await _harmed(crew, device, kind, bear)


async def _reset(machine: LaunchedMachine, crew: Crew, device: str, random: Random) -> str:
    """Its connections are reset, each at the next packet."""

    async def reset() -> None:
        seconds = random.choice((0.01, 0.1))
        machine.cables[device].reset(seconds)
        await trio.sleep(seconds)

    return await _harmed(crew, device, "reset", reset)


async def _left(processes: Mapping[int, int]) -> list[int]:
    """Those of `processes` (pid to start) that are still there some time after their machine has gone."""
    with trio.move_on_after(GONE_S):
        while any(map(_runs, processes, processes.values())):  # noqa: ASYNC110 - nobody tells of the end of somebody else's children
            await trio.sleep(0.05)
    return [pid for pid, started in processes.items() if _runs(pid, started)]


def _runs(pid: int, started: int) -> bool:
    """Whether it is there, and no later process with its number."""
    return started > 0 and process_started(pid) == started
