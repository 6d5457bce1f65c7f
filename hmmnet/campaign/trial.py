"""One program: work and faults at once, then everything is healed, and must be well."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import trio

from hmmnet.sim import SimulatedMachine, Trace, run_virtual, simulated
from hmmnet.sim.run import SimulationStuck
from hmmnet.sleeping import sleep
from hmmnet.wire.exchange import HEARTBEAT_S, LEASE_S

from .audit import Auditor
from .crew import AtomicProcess, Crew, Outcome, Violation
from .demands import books, converge, last_check
from .machines import topology_of
from .nemesis import Nemesis, all_faults
from .program import Program
from .regions import WORD_BYTES, WORDS_PER_PAGE
from .steps import do
from .victims import Victim, victims_of
from .waits import Watchdog

LIMIT_S = 900.0
"""Virtual seconds for one program: the watchdog sees sooner that nothing moves."""
BURIED_S = LEASE_S + 2 * HEARTBEAT_S
"""Virtual seconds after which devices whose host has crashed have let go of everything: there is no more that can be looked at then."""
CGROUP = "campaign"


@dataclass
class Verdict:
    """What became of one program."""

    program: Program
    outcome: Outcome = field(default_factory=Outcome)
    digest: str = ""
    lines: list[str] = field(default_factory=list)
    """The trace, if it was to be kept."""

    @property
    def violations(self) -> list[Violation]:
        """What must not be."""
        return self.outcome.violations


def run_program(program: Program, *, trace: Trace | None = None, count: bool = False) -> Verdict:
    """Run it. Raises nothing for what goes wrong in it: that is a violation. `count`: what it reaches (`Outcome.reached`)."""
    verdict = Verdict(program)
    if trace is None and any(harm.kind == "message" and not harm.message for harm in program.harms):
        trace = Trace()  # which counts messages
    with _quietly():
        try:
            run_virtual(_trial, program, verdict.outcome, trace, count, seed=program.seed, limit_s=LIMIT_S)
        except SimulationStuck as stuck:
            verdict.violations.append(Violation("progress", str(stuck), 0 if trace is None else trace.count))
        except Exception as error:  # noqa: BLE001 - whatever our code raises here is what is looked for: a violation, and the next seed is run
            verdict.violations.append(Violation.crash(error, 0 if trace is None else trace.count))
    if trace is not None:
        verdict.digest, verdict.lines = trace.digest, trace.lines
    return verdict


@contextmanager
def _quietly() -> Iterator[None]:
    """Warnings of devices that are harmed are what is expected here."""
    logger = logging.getLogger("hmmnet")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


async def _trial(program: Program, outcome: Outcome, trace: Trace | None, count: bool) -> None:
    with outcome.seeing_crashes(trace):
        async with simulated(topology_of(program.machine), trace=trace, seed=program.seed) as machine:
            await _suffer(machine, program, outcome, trace, count)


async def _suffer(machine: SimulatedMachine, program: Program, outcome: Outcome, trace: Trace | None, count: bool) -> None:
    """The life of one machine."""
    if program.limit_pages:
        await machine.create_cgroup(CGROUP, program.limit_pages * WORDS_PER_PAGE * WORD_BYTES)
    process = cast(AtomicProcess, await machine.create_process(cgroup=CGROUP if program.limit_pages else ""))
    crew = Crew(machine, process, program, outcome, trace)
    victims = await victims_of(crew, program.victims, all_faults(program) if program.victims else [])
    await crew.lay_out()
    nemesis = Nemesis(crew)
    _watch(crew, count=count)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Watchdog(crew).run)
            nemesis.begin(nursery)
            await _live(crew, nemesis, victims, count)
            nursery.cancel_scope.cancel()
    finally:
        outcome.faults.update({kind: fired for kind, fired in machine.carrier.fired().items() if fired})


def _watch(crew: Crew, *, count: bool) -> None:
    """Messages are counted where somebody wants that, and awaited where one is to cost a device its life."""
    awaited = [harm for harm in crew.program.harms if harm.message]
    for harm in awaited:
        crew.await_message(harm.message, harm.at)
    if awaited or count:
        crew.machine.network.watch = crew.message_sent
    if count:
        crew.machine.injector.record()


async def _live(crew: Crew, nemesis: Nemesis, victims: Sequence[Victim], count: bool) -> None:
    """Work and faults, until everything is healed, and looked at."""
    auditor = Auditor(crew)
    async with trio.open_nursery() as suffering:
        for victim in victims:
            suffering.start_soon(victim.work)
        await _work(crew, nemesis, auditor)
        for victim in victims:
            victim.over = True
        if count:
            crew.outcome.reached.update({**crew.machine.injector.reached, **crew.messages})
        await nemesis.heal()
    if crew.machine.host_crashed:
        await sleep(BURIED_S)
        auditor.full(quiet=True)
        return
    await converge(crew)
    await last_check(crew)
    auditor.full(quiet=True)
    for victim in victims:
        await victim.process.exit()
    await crew.process.exit()
    for region in crew.regions:
        if region.file is not None:
            await region.file.close()
    await converge(crew)
    await books(crew, auditor)


async def _work(crew: Crew, nemesis: Nemesis, auditor: Auditor) -> None:
    """All actors, each step after step, and the nemesis."""
    program = crew.program

    async def act(actor: int) -> None:
        for step in program.steps:
            if step.actor == actor:
                await do(crew, step)
                auditor.after(step)

    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(nemesis.work, scope)
        async with trio.open_nursery() as acting:
            for actor in range(program.actors):
                acting.start_soon(act, actor)
        scope.cancel()
