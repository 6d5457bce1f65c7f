"""What is demanded once all faults have ended: the machine is well again, every word is there, and nothing has leaked.

The same of simulated machines and of real processes (`trial`, `real`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

import numpy as np
import trio

from hmmnet.errors import HmmnetError
from hmmnet.sleeping import sleep

from .audit import Auditor
from .crew import COUNTERS, Crew
from .history import Words
from .operations import launched
from .regions import RIGHTS, WORD_BYTES, WORDS_PER_PAGE, Region

CALM_S = 0.05
"""Virtual seconds after work without harm, until what is freed late is free."""
CONVERGED_S = 30.0
"""Virtual seconds after the last harm within which everything must be well again: leases, patience and repeats."""
SETTLED_S = 2.5
"""Virtual seconds after which every message that was lost has come again, and who was silent too long has been given up."""
LOOK_S = 0.05
TRIES_MAX = 40
CHECKED_SERIAL = 1 << 24
"""What the last check stores has serials beyond those of all steps."""
WORDS_CHECKED = 4
"""Words that the CPU stores then, and that each device does."""


async def restart(crew: Crew, device: str) -> None:
    """Start it if it does not run; one that cannot reach the host ends again, and is started again when all is healed."""
    if device not in crew.machine.running:
        with contextlib.suppress(HmmnetError):
            await crew.machine.start_device(device)


async def converge(crew: Crew) -> None:
    """Wait until every device serves again and nothing is on its way; a violation when that does not come."""
    machine = crew.machine
    if not crew.harmed_ever:
        await sleep(CALM_S)
        crew.calm()
        return
    began_s = trio.current_time()
    deadline_s = began_s + CONVERGED_S
    await sleep(LOOK_S)
    while trio.current_time() < deadline_s:
        if len(running := machine.running) < len(machine.device_names):
            for device in machine.device_names:
                if device not in running:
                    await restart(crew, device)
        now_s = trio.current_time()
        if machine.all_ready and not crew.harms and (not crew.in_aftermath(now_s) or (now_s >= began_s + SETTLED_S and machine.settled)):
            crew.calm()
            return
        await sleep(LOOK_S * 4)
    behind = [name for name, figures in (await machine.report())["devices"].items() if figures["state"] != "ready"]
    crew.complain("convergence", f"{CONVERGED_S:g} s after all faults ended {', '.join(behind) or 'nobody'} is not there again")


async def last_check(crew: Crew) -> None:
    """Every word is there, every device can load and store it, and counters have counted."""
    program = crew.program
    for region in crew.regions:
        await crew.process.mprotect(region.base, region.span_bytes, "rw")
        await crew.process.munlock(region.base, region.span_bytes)
        region.rights[:] = [RIGHTS["rw"]] * region.pages
        for page in range(region.pages):
            await _whole_page(crew, region, page)
    await crew.attempt("the last check", lambda: _counters(crew))
    await _devices(crew, crew.regions[1])
    crew.note(f"checked {len(program.steps)} steps")


async def _counters(crew: Crew) -> None:
    """Counters have counted what ended, and perhaps what failed, unless their page was lost."""
    assert crew.counters is not None, "a region of counters is mapped first"
    values = np.frombuffer(await crew.process.read(crew.counters.base, COUNTERS * WORD_BYTES), np.uint64)
    for number, (counter, value) in enumerate(zip(crew.adds, values.tolist(), strict=True)):
        wrong = counter.is_over(value)
        if wrong and crew.adds_sure:
            crew.complain("history", f"the last check: counter {number}: {wrong}")


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


async def _devices(crew: Crew, region: Region) -> None:
    """The CPU stores words; each device adds them to those that the device before it has stored, and stores that behind them.

    So each must see what the CPU and another device have stored, and be seen; in the end the CPU loads all of it.
    """
    count, before = WORDS_CHECKED, 0
    words = total = crew.values(CHECKED_SERIAL, 0, count)
    await _works(crew, "the CPU", lambda who: crew.cpu_store(who, region, 0, count, CHECKED_SERIAL))
    for number, device in enumerate(crew.machine.device_names, 1):
        if await _works(crew, device, partial(_add, crew, region, device, before, number * count, total + words)):
            before, total = number * count, total + words
    await _works(crew, "the CPU", lambda who: crew.cpu_load(who, region, 0, (len(crew.machine.device_names) + 1) * count))


async def _add(crew: Crew, region: Region, device: str, before: int, out: int, total: Words, who: str) -> None:
    """A device adds the region's first words to those from `before` on, and stores that from word `out` on: `total`, if it sees them."""
    count = len(total)

    async def put(address: int, _: Words) -> None:
        a, b = region.address(before), region.address(0)
        await launched(crew.process, device, "vector_add", a=a, b=b, out=address, n=count, dtype="<u8")

    with crew.deriving(region, 0, out, out, count):
        await crew.store(who, region, out, total, put)


async def _works(crew: Crew, whose: str, work: Callable[[str], Awaitable[None]]) -> bool:
    """Whether it does; when it does not, somebody has to have said why."""
    who, complaints, short = f"the last check of {whose}", len(crew.outcome.violations), crew.short
    done = await crew.attempt(who, lambda: work(who))
    if not done and len(crew.outcome.violations) == complaints and crew.short == short:
        crew.complain("convergence", f"{whose} cannot be used after everything is healed")
    return done


async def books(crew: Crew, auditor: Auditor) -> None:
    """Leaks, and translations that were used after they were dropped, when nothing runs any more."""
    auditor.full(quiet=True)
    for complaint in crew.machine.left_over():
        crew.complain("leaks", complaint)
    report = await crew.machine.report()
    for name, figures in report["devices"].items():
        if figures["iommu_refused"]:
            used = f"{name} used {figures['iommu_refused']} translations that it must not use: {figures['iommu_last']}"
            crew.complain("iommu", used, crew.refusals.get(name))
