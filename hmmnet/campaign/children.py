"""Steps that fork: what children see, what they do, and how they end."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import numpy as np
import trio

from hmmnet.errors import BusError, KernelError, PeerLost, ProtocolError, RemoteError, SegmentationFault
from hmmnet.program import Process

from .crew import Crew
from .history import Words
from .operations import device_of, launched, operation, region_of
from .program import Step
from .regions import READ, WORD_BYTES


@operation("fork")
async def fork(crew: Crew, step: Step, who: str) -> None:
    """A child sees what was there when it was made, changes its own memory only, and ends; or ends, or is killed, in the middle of it."""
    region = region_of(crew, step)
    first, count = region.words(step.page, step.word, max(step.count, 8))
    look = region.look(first, count)
    mark = region.history.load_begins(first, count)
    address, rights = region.address(first), region.may(look, READ)
    spent = False
    try:
        child = await crew.process.fork()
        ended = crew.clock.tick()
        try:
            if step.choice in ENDS:
                await _killed(crew, step, child, address, count)
                return
            if not region.is_private:
                await crew.cpu_load(who, region, first, count, child)
                return
            got = await _child_sees(crew, step, child, address, count)
            if got is not None and region.stayed(look) and rights:
                spent = True
                wrong = region.history.load_ends(mark, got, ended)
                if wrong is not None:
                    crew.complain(
                        "history", f"{who}: the child's word {wrong.word} of region {region.number} is 0x{wrong.value:x}, which {wrong.why}"
                    )
            if got is not None:
                await _child_writes(crew, step, child, address, count, who)
        finally:
            await child.exit()
    finally:
        if not spent:
            region.history.load_fails(mark)


async def _child_sees(crew: Crew, step: Step, child: Process, address: int, count: int) -> Words | None:
    """What it loads; None where it has no right, or the page is lost."""
    began_s = trio.current_time()
    try:
        if step.choice == "device":
            seen = await launched(child, device_of(crew, step), "peek", a=address, n=count)
            return np.frombuffer(seen["words"], np.uint64)
        return np.frombuffer(await child.read(address, count * WORD_BYTES), np.uint64)
    except SegmentationFault:
        return None
    except BusError as error:
        if not crew.is_lost(error, began_s):
            raise
        return None


async def _child_writes(crew: Crew, step: Step, child: Process, address: int, count: int, who: str) -> None:
    """It sees its own store; if the parent saw it, the parent's next load tells."""
    mine, began_s = crew.values(step.serial, 0, count), trio.current_time()
    try:
        await child.write(address, mine.tobytes())
        if not (np.frombuffer(await child.read(address, count * WORD_BYTES), np.uint64) == mine).all():
            crew.complain("history", f"{who}: the child does not load what it stored at 0x{address:x}")
    except SegmentationFault:
        return  # it has inherited a page without the right
    except BusError as error:
        if not crew.is_lost(error, began_s):
            raise


ENDS: dict[str, Callable[[Process], Awaitable[None]]] = {
    "kill": lambda child: child.exit(),
    "sigkill": lambda child: child.kill(),
    "reaped": lambda child: child.kill(out_of_memory=True),
}
"""How a child may end while it works."""


async def _killed(crew: Crew, step: Step, child: Process, address: int, count: int) -> None:
    """It ends while it works, which may end with any error then; what crashes is told elsewhere (`Outcome.seeing_crashes`, logs)."""

    async def work() -> None:
        with contextlib.suppress(KernelError, SegmentationFault, BusError, PeerLost, ProtocolError, RemoteError):
            await launched(child, device_of(crew, step), "peek", a=address, n=count)
            await child.read(address, count * WORD_BYTES)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        for _ in range(step.word % 40):
            await trio.lowlevel.checkpoint()
        await ENDS[step.choice](child)
