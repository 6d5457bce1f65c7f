"""One program: work and faults at once, then everything is healed, and must be well."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import cast

import numpy as np
import trio

from hmmnet.errors import HmmnetError
from hmmnet.faults import Controls, MessageFault, Plan, Way
from hmmnet.faults.injector import Fired, PointFault
from hmmnet.faults.points import HOSTS_OWN, Action
from hmmnet.sim import Trace, run_virtual, simulated
from hmmnet.sim.run import SimulationStuck
from hmmnet.topology.load import installed_models, parse
from hmmnet.topology.model import Topology
from hmmnet.wire.exchange import LEASE_S

from . import commands, leaving, operations
from .audit import Auditor
from .crew import AtomicProcess, Crew, Outcome, Violation
from .history import Words
from .operations import LANE_WORDS, launched
from .program import Harm, Hit, Program
from .regions import RIGHTS, WORD_BYTES, WORDS_PER_PAGE, Region
from .waits import Watchdog

LIMIT_S = 900.0
"""Virtual seconds for one program: the watchdog sees sooner that nothing moves."""
CALM_S = 0.05
"""Virtual seconds after work without harm, until what is freed late is free."""
CONVERGED_S = 30.0
"""Virtual seconds after the last harm within which everything must be well again: leases, patience and repeats."""
SETTLED_S = 2.5
"""Virtual seconds after which every message that was lost has come again, and who was silent too long has been given up."""
LOOK_S = 0.05
CGROUP = "campaign"
TRIES_MAX = 40
RELEASE_S = 0.01
MEND_S = 0.3
"""Virtual seconds until a device that crashed or hangs at a protocol point is seen to: shorter than a lease."""
LETHAL = frozenset({"crash", "hang"})
GIVES_UP = frozenset({"device.before_ack"})
"""Points at which a device that fails is given up by the host: who does not let go of pages is not to be trusted with any."""
BYE = "session.bye"
"""The point that is reached when everything else is over."""
STEPS = (commands, leaving, operations)
"""Where the steps of a program are."""
STEP_KINDS = frozenset(operations.OPERATIONS)
"""Their kinds: each of those modules has offered its own when it was imported."""
CHECKED_SERIAL = 1 << 24
"""What the last check stores has serials beyond those of all steps."""


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
    line = 0
    with _quietly():
        try:
            run_virtual(_trial, program, verdict.outcome, trace, count, seed=program.seed, limit_s=LIMIT_S)
        except SimulationStuck as stuck:
            verdict.violations.append(Violation("progress", str(stuck), line))
        except Exception as error:  # noqa: BLE001 - whatever our code raises here is what is looked for: a violation, and the next seed is run
            verdict.violations.append(Violation("crash", "; ".join(_leaves(error)), line))
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


def _leaves(error: BaseException) -> list[str]:
    """Each exception by type and text, and by its place where it is none of ours."""
    if isinstance(error, BaseExceptionGroup):
        return [text for one in error.exceptions for text in _leaves(one)]
    frames = [] if isinstance(error, HmmnetError) else traceback.extract_tb(error.__traceback__)[-1:]
    return [f"{type(error).__name__}: {error}" + "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in frames)]


@lru_cache(maxsize=256)
def _topology(text: str) -> Topology:
    return parse(text, models=_models() or None)


@cache
def _models() -> frozenset[str]:
    """Reading what is installed takes longer than starting a machine."""
    return installed_models()


async def _trial(program: Program, outcome: Outcome, trace: Trace | None, count: bool) -> None:
    async with simulated(_topology(program.machine), trace=trace, seed=program.seed) as machine:
        if program.limit_pages:
            await machine.create_cgroup(CGROUP, program.limit_pages * WORDS_PER_PAGE * WORD_BYTES)
        process = cast(AtomicProcess, await machine.create_process(cgroup=CGROUP if program.limit_pages else ""))
        crew = Crew(machine, process, program, outcome, trace)
        auditor = Auditor(crew)
        await _lay_out(crew)
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
            await _converge(crew)
            await _last_check(crew)
            auditor.full(quiet=True)
            await process.exit()
            for region in crew.regions:
                if region.file is not None:
                    await region.file.close()
            await _converge(crew)
            await _books(crew, auditor)
            nursery.cancel_scope.cancel()
        outcome.faults.update(machine.network.fired)


async def _lay_out(crew: Crew) -> None:
    lanes = -(-crew.program.actors * LANE_WORDS // WORDS_PER_PAGE)
    await crew.map_region("lanes", lanes)
    for layout in crew.program.regions:
        await crew.map_region(layout.kind, layout.pages)
    crew.counters = Region(crew.clock, len(crew.regions), "counters", 1, crew.next_base())
    await crew.map_again(crew.counters)


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
            await _restart(crew, device)
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
    await _restart(crew, device)
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
            await _restart(crew, device)
        crew.harm_ends()


async def _restart(crew: Crew, device: str) -> None:
    """Start it if it does not run; one that cannot reach the host ends again, and is started again when all is healed."""
    if device not in crew.machine.running:
        with contextlib.suppress(HmmnetError):
            await crew.machine.start_device(device)


async def _heal(crew: Crew) -> None:
    crew.note("all faults end")
    crew.machine.carrier.heal()
    crew.machine.network.heal()
    crew.machine.injector.heal(but=BYE)
    await _mend_nodes(crew)


# --- what must be well ------------------------------------------------------------------------------------------------------------


async def _converge(crew: Crew) -> None:
    """Wait until every device serves again and nothing is on its way; a violation when that does not come."""
    machine = crew.machine
    if not crew.harmed_ever:
        await trio.sleep(CALM_S)
        crew.calm()
        return
    began_s = trio.current_time()
    deadline_s = began_s + CONVERGED_S
    await trio.sleep(LOOK_S)
    while trio.current_time() < deadline_s:
        for device in machine.device_names:
            await _restart(crew, device)
        now_s = trio.current_time()
        if machine.all_ready and (not crew.in_aftermath(now_s) or (now_s >= began_s + SETTLED_S and machine.settled)):
            crew.calm()
            return
        await trio.sleep(LOOK_S * 4)
    behind = [name for name, figures in (await machine.report())["devices"].items() if figures["state"] != "ready"]
    crew.complain("convergence", f"{CONVERGED_S:g} s after all faults ended {', '.join(behind) or 'nobody'} is not there again")


async def _last_check(crew: Crew) -> None:
    """Every word is there, every device can load and store it, and counters have counted."""
    program = crew.program
    for region in crew.regions:
        await crew.process.mprotect(region.base, region.span_bytes, "rw")
        await crew.process.munlock(region.base, region.span_bytes)
        region.rights[:] = RIGHTS["rw"]
        for page in range(region.pages):
            await _whole_page(crew, region, page)
    region = crew.regions[1]
    for number, device in enumerate(crew.machine.device_names):
        await _device_check(crew, region, device, CHECKED_SERIAL + number)
    crew.note(f"checked {len(program.steps)} steps")


async def _whole_page(crew: Crew, region: Region, page: int) -> None:
    """The CPU loads a page. One that is lost is given up and loaded again; without memory it is left, if the program has little."""
    first, complaints, short = page * WORDS_PER_PAGE, len(crew.outcome.violations), crew.short
    for _ in range(TRIES_MAX):
        if await crew.attempt("the last check", lambda: crew.cpu_load("the last check", region, first, WORDS_PER_PAGE)):
            return
        if len(crew.outcome.violations) > complaints:
            return  # it has been said why
    if crew.short == short:
        crew.complain("convergence", f"page {page} of region {region.number} cannot be loaded after everything is healed")


async def _device_check(crew: Crew, region: Region, device: str, serial: int) -> None:
    """A device stores, the CPU loads; the CPU stores, the device loads."""
    first, count = 8 * crew.machine.device_names.index(device), 4

    async def put(address: int, values: Words) -> None:
        await launched(crew.process, device, "poke", a=address, words=values.tobytes())

    async def fetch(address: int) -> Words:
        return np.frombuffer((await launched(crew.process, device, "peek", a=address, n=count))["words"], np.uint64)

    async def both() -> None:
        await crew.store(who, region, first, crew.values(serial, first, count), put)
        await crew.cpu_load(who, region, first, count)
        await crew.cpu_store(who, region, first, count, serial + 64)
        await crew.load(who, region, first, count, fetch)

    who, complaints, short = f"the last check of {device}", len(crew.outcome.violations), crew.short
    if not await crew.attempt(who, both) and len(crew.outcome.violations) == complaints and crew.short == short:
        crew.complain("convergence", f"{device} cannot be used after everything is healed")


async def _books(crew: Crew, auditor: Auditor) -> None:
    """Leaks, and translations that were used after they were dropped, when nothing runs any more."""
    auditor.full(quiet=True)
    for complaint in crew.machine.left_over():
        crew.complain("leaks", complaint)
    report = await crew.machine.report()
    for name, figures in report["devices"].items():
        if figures["iommu_refused"]:
            crew.complain("iommu", f"{name} used {figures['iommu_refused']} translations that it must not use: {figures['iommu_last']}")
