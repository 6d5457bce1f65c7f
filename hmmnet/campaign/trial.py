"""One program: work and faults at once, then everything is healed, and must be well."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import trio

from hmmnet.faults import Controls, MessageFault, Plan, Way
from hmmnet.faults.injector import Fired, PointFault
from hmmnet.faults.points import HOSTS_OWN, Action
from hmmnet.sim import Trace, run_virtual, simulated
from hmmnet.sim.run import SimulationStuck
from hmmnet.wire.exchange import LEASE_S

from . import commands, leaving, operations
from .audit import Auditor
from .crew import AtomicProcess, Crew, Outcome, Violation
from .demands import books, converge, last_check, restart
from .machines import topology_of
from .program import Harm, Hit, Program
from .regions import WORD_BYTES, WORDS_PER_PAGE
from .waits import Watchdog

LIMIT_S = 900.0
"""Virtual seconds for one program: the watchdog sees sooner that nothing moves."""
CGROUP = "campaign"
RELEASE_S = 0.01
MEND_S = 0.3
"""Virtual seconds until a device that crashed or hangs at a protocol point is seen to: shorter than a lease."""
LETHAL = frozenset({"crash", "hang"})
GIVES_UP = frozenset({"device.before_ack"})
"""Points at which a device that fails is given up by the host: who does not let go of pages is not to be trusted with any."""
BYE = "session.bye"
"""The point that is reached when everything else is over."""
STEPS = (commands, leaving, operations)
"""Where the steps of a program are: each of those modules offers its own when it is imported."""


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
            verdict.violations.append(Violation("progress", str(stuck)))
        except Exception as error:  # noqa: BLE001 - whatever our code raises here is what is looked for: a violation, and the next seed is run
            verdict.violations.append(Violation.crash(error))
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
    async with simulated(topology_of(program.machine), trace=trace, seed=program.seed) as machine:
        if program.limit_pages:
            await machine.create_cgroup(CGROUP, program.limit_pages * WORDS_PER_PAGE * WORD_BYTES)
        process = cast(AtomicProcess, await machine.create_process(cgroup=CGROUP if program.limit_pages else ""))
        crew = Crew(machine, process, program, outcome, trace)
        auditor = Auditor(crew)
        await crew.lay_out()
        machine.injector.on_fired = partial(_fired, crew)
        _watch(crew, count=count)
        for text in program.faults:
            for fault in Plan.parse(text).faults:
                machine.add_fault(fault)
        async with trio.open_nursery() as nursery:
            watchdog = Watchdog(crew)
            nursery.start_soon(watchdog.run)
            for hit in program.hits:
                _arm(crew, hit, machine.nursery if hit.point == BYE else nursery)
            await _work(crew, auditor)
            if count:
                outcome.reached.update({**machine.injector.reached, **crew.messages})
            await _heal(crew)
            await converge(crew)
            await last_check(crew)
            auditor.full(quiet=True)
            await process.exit()
            for region in crew.regions:
                if region.file is not None:
                    await region.file.close()
            await converge(crew)
            await books(crew, auditor)
            nursery.cancel_scope.cancel()
        outcome.faults.update(machine.network.fired)


def _watch(crew: Crew, *, count: bool) -> None:
    """Messages are counted where somebody wants that, and awaited where one is to cost a device its life."""
    awaited = [harm for harm in crew.program.harms if harm.message]
    for harm in awaited:
        crew.await_message(harm.message, harm.at)
    if awaited or count:
        crew.machine.network.watch = crew.message_sent
    if count:
        crew.machine.injector.record()


# --- work and harm ----------------------------------------------------------------------------------------------------------------


async def _work(crew: Crew, auditor: Auditor) -> None:
    """All actors, each step after step, and the nemesis."""
    program = crew.program

    async def act(actor: int) -> None:
        for step in program.steps:
            if step.actor == actor:
                await operations.do(crew, step)
                auditor.after(step)

    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(_harm, crew, scope)
        async with trio.open_nursery() as acting:
            for actor in range(program.actors):
                acting.start_soon(act, actor)
        scope.cancel()


async def _harm(crew: Crew, scope: trio.CancelScope) -> None:
    with scope:
        async with trio.open_nursery() as nursery:
            for harm in crew.program.harms:
                nursery.start_soon(_one_harm, crew, harm)


async def _one_harm(crew: Crew, harm: Harm) -> None:
    """Once so many operations have ended."""
    machine = crew.machine
    device = machine.device_names[harm.device % len(machine.device_names)]
    if harm.message:
        device = await crew.sender(harm.message, harm.at)
    elif harm.kind == "message":
        await crew.sent(harm.at)
    else:
        await crew.ended(harm.at)
    crew.harm_begins(harm.kind)
    crew.note(f"harm {harm.kind} {device} {harm.seconds:g} s")
    try:
        if harm.kind in {"death", "message"}:
            if device in machine.running:
                await machine.kill_device(device)
            await trio.sleep(harm.seconds)
            await restart(crew, device)
        elif harm.kind == "hang":
            if device in machine.running:
                await machine.hang_device(device)
            await trio.sleep(harm.seconds)
            await machine.resume_device(device)
        else:
            cut = machine.network.add(MessageFault("partition", Way(device)))
            await trio.sleep(harm.seconds)
            machine.network.discard(cut)
    finally:
        crew.harm_ends()


# --- protocol points --------------------------------------------------------------------------------------------------------------


def _arm(crew: Crew, hit: Hit, nursery: trio.Nursery) -> None:
    """It will happen at its point; what is stopped there goes on after a while."""
    controls = Controls(nth=hit.nth) if hit.nth else Controls(probability=hit.probability)
    delay_s = hit.seconds if hit.action == "delay" else 0.0
    names = crew.machine.device_names
    node = names[hit.nth % len(names)] if hit.action in LETHAL and hit.point.startswith(HOSTS_OWN) else ""
    fault = PointFault(hit.point, cast(Action, hit.action), controls=controls, delay_s=delay_s, node=node)
    number = crew.machine.injector.add(fault)
    if hit.action == "pause":
        nursery.start_soon(_release, crew, number, hit.seconds)


async def _release(crew: Crew, number: int, seconds: float) -> None:
    """Who is paused goes on after so many virtual seconds."""
    injector = crew.machine.injector
    while True:
        await trio.sleep(max(seconds, RELEASE_S))
        if number not in injector.active:
            return
        injector.release(number)


def _fired(crew: Crew, fired: Fired) -> None:
    """Something happened at a point."""
    kind = f"{fired.action} at {fired.where.point}"
    victim = fired.node or fired.where.device
    crew.note(f"fault {kind} {victim}")
    if fired.action in LETHAL:
        crew.harm_begins(kind)
        crew.down.append(victim)
        crew.machine.nursery.start_soon(_mend_soon, crew)
    elif fired.action == "fail" and fired.where.point in GIVES_UP:
        crew.harm_begins(kind)
        crew.machine.nursery.start_soon(_mend_given_up, crew, victim)
    else:
        crew.outcome.faults[kind] += 1
        crew.failures += fired.action == "fail"


async def _mend_given_up(crew: Crew, device: str) -> None:
    """The host has given it up; once it has heard of that it ends, and is started again."""
    with trio.move_on_after(LEASE_S):
        await crew.machine.device_ended(device)
    await restart(crew, device)
    crew.harm_ends()


async def _mend_soon(crew: Crew) -> None:
    await trio.sleep(MEND_S)
    await _mend_nodes(crew)


async def _mend_nodes(crew: Crew) -> None:
    """Who hangs goes on; who has crashed is started again."""
    while crew.down:
        device = crew.down.pop()
        if device in crew.machine.running:
            await crew.machine.resume_device(device)
        else:
            await restart(crew, device)
        crew.harm_ends()


async def _heal(crew: Crew) -> None:
    crew.note("all faults end")
    crew.machine.carrier.heal()
    crew.machine.network.heal()
    crew.machine.injector.heal(but=BYE)
    await _mend_nodes(crew)
