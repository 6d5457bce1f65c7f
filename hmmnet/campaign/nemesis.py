"""Who breaks a machine while actors work: the faults, harms and hits of a program, when each is due; and who mends what they leave behind.

Whatever happens is told to the crew as what it may cost (`recipes`): a *harm* while a device may be lost, a *failure* where operations
may be refused; of a fault that costs only time nobody is told, so that nothing is excused by it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import ClassVar, cast

import trio

from hmmnet.faults import KINDS, Controls, MessageFault, Plan, Way
from hmmnet.faults.effects import InVain
from hmmnet.faults.injector import HOST, Fired, PointFault
from hmmnet.faults.kinds import Fault
from hmmnet.faults.messages import Channel
from hmmnet.faults.points import HOSTS_OWN, Action
from hmmnet.faults.targets import target_mistakes
from hmmnet.sleeping import sleep
from hmmnet.wire.exchange import LEASE_S

from .crew import Crew
from .demands import restart
from .excuses import Harm as Suffered
from .program import Harm, Hit, Planned, Program
from .recipes import TIME, cost_of
from .words import UNREADABLE

RELEASE_S = 0.01
MEND_S = 0.3
"""Virtual seconds until a device that crashed or hangs at a protocol point is seen to: shorter than a lease."""
LETHAL = frozenset({"crash", "hang"})
GIVES_UP = frozenset({"device.before_ack"})
"""Points at which a device that fails is given up by the host: who does not let go of pages is not to be trusted with any."""
BYE = "session.bye"
"""The point that is reached when everything else is over."""
LEAVING = frozenset({"crash", "bounce", "restart.kept", "unplug", "unload"})
"""Kinds that cost a device its life as they begin."""
SILENCING = frozenset({"partition", "hold", "hang", "invalidate.silent"})
"""Kinds that may cost a device its life for as long as they act."""


class Nemesis:
    """See the module. Made before anything begins; `heal` ends it."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._machine = crew.machine
        self._silencing: dict[int, tuple[Fault, list[Suffered]]] = {}
        """Faults that act now, by number, each a harm."""
        self._down: list[tuple[str, list[Suffered], float]] = []
        """Devices that crashed or hang at a protocol point, until somebody sees to them; not before then."""
        self._lasting: dict[int, float] = {}
        """How long they do, where it is longer than `MEND_S`, by the number of the fault; for a program that ends earlier, too."""
        crew.machine.injector.on_fired = self._fired
        crew.machine.network.on_fired = self._message_fired
        crew.machine.carrier.told.append(self._told)

    def begin(self, nursery: trio.Nursery) -> None:
        """Faults that are there from the beginning, and what waits at protocol points; `nursery` is that of the run."""
        for text in self._crew.program.faults:
            self._add(text)
        for hit in self._crew.program.hits:
            self._arm(hit, self._machine.nursery if hit.point == BYE else nursery)

    async def work(self, scope: trio.CancelScope) -> None:
        """What is due later, until all of it was, or `scope` is cancelled."""
        with scope:
            async with trio.open_nursery() as nursery:
                for planned in self._crew.program.planned:
                    nursery.start_soon(self._later, planned)
                for harm in self._crew.program.harms:
                    nursery.start_soon(self._harm, harm)

    async def heal(self) -> None:
        """All faults end, those that outlast a lease when they were to; who crashed or hangs is seen to."""
        left_s = max((until_s for _, _, until_s in self._down), default=0.0) - trio.current_time()
        if left_s > 0.0:
            await sleep(left_s)
        self._crew.note("all faults end")
        self._machine.carrier.heal()
        self._machine.network.heal()
        self._machine.injector.heal(but=BYE)
        await self._mend_nodes(math.inf)

    # --- faults of the catalogue ----------------------------------------------------------------------------------------------

    async def _later(self, planned: Planned) -> None:
        await self._crew.ended(planned.at)
        self._add(planned.fault)

    def _add(self, text: str) -> None:
        """What is on something that this machine has not does nothing: a program with parts left out is a program."""
        for fault in faults_in(text):
            mistakes = target_mistakes(fault, self._machine.topology, "sim")
            if mistakes:
                self._crew.note(f"{fault} does nothing: {'; '.join(mistakes)}")
            else:
                self._add_now(fault)

    def _add_now(self, fault: Fault) -> None:
        try:
            self._machine.add_fault(fault)
        except InVain as error:
            self._crew.note(f"{fault} does nothing: {error}")

    def _told(self, number: int, fault: Fault | None) -> None:
        """A fault begins, or has ended."""
        if fault is None:
            self._crew.excuses.outage_ends(number, trio.current_time())
            ended, harms = self._silencing.pop(number, (None, []))
            if ended is not None:
                self._machine.nursery.start_soon(self._see_to, harms, self._meant(ended), LEASE_S)
            return
        kind = fault.kind.name
        self._crew.note(f"fault {number} begins: {fault}")
        if kind in LEAVING:
            devices = self._meant(fault)
            self._machine.nursery.start_soon(
                self._see_to, self._crew.harm_begins(devices), devices, max(MEND_S, fault.settings.get("down", 0.0))
            )
        elif kind in SILENCING:
            self._silencing[number] = (fault, self._crew.harm_begins(self._meant(fault)))
        elif kind == "link.down":
            self._crew.excuses.outage_begins(number, fault.on, trio.current_time())

    def _meant(self, fault: Fault) -> list[str]:
        """The devices that a fault is on; of one of the host all."""
        pattern = Way.parse(fault.on).device if fault.kind.on == "way" else fault.on
        return [name for name in self._machine.device_names if pattern == HOST or fnmatchcase(name, pattern)]

    async def _see_to(self, harms: Sequence[Suffered], devices: Sequence[str], seconds: float) -> None:
        """A harm is over after so many virtual seconds: who does not run is started again."""
        await sleep(seconds)
        for device in devices:
            await restart(self._crew, device)
        self._crew.harm_ends(harms)

    def _message_fired(self, fault: MessageFault, device: str, channel: Channel) -> None:
        """Something happened to a message: what nobody can read is answered with an error, or ends its session."""
        if fault.kind in UNREADABLE and channel == "control":
            self._machine.nursery.start_soon(self._mend_given_up, self._crew.harm_begins([device]), device)

    # --- harms ----------------------------------------------------------------------------------------------------------------

    async def _harm(self, harm: Harm) -> None:
        """Once so many operations have ended."""
        crew, machine = self._crew, self._machine
        device = machine.device_names[harm.device % len(machine.device_names)]
        if harm.message:
            device = await crew.sender(harm.message, harm.at)
        elif harm.kind == "message":
            await crew.sent(harm.at)
        else:
            await crew.ended(harm.at)
        suffered = crew.harm_begins([device], harm.kind)
        crew.note(f"harm {harm.kind} {device} {harm.seconds:g} s")
        try:
            await self._harms[harm.kind](self, device, harm.seconds)
        finally:
            crew.harm_ends(suffered)

    async def _death(self, device: str, seconds: float) -> None:
        if device in self._machine.running:
            await self._machine.kill_device(device)
        await sleep(seconds)
        await restart(self._crew, device)

    async def _hang(self, device: str, seconds: float) -> None:
        if device in self._machine.running:
            await self._machine.hang_device(device)
        await sleep(seconds)
        await self._machine.resume_device(device)

    async def _partition(self, device: str, seconds: float) -> None:
        cut = self._machine.network.add(MessageFault("partition", Way(device)))
        await sleep(seconds)
        self._machine.network.discard(cut)

    _harms: ClassVar[dict[str, Callable[[Nemesis, str, float], Awaitable[None]]]] = {
        "death": _death,
        "message": _death,
        "hang": _hang,
        "partition": _partition,
    }

    # --- protocol points ------------------------------------------------------------------------------------------------------

    def _arm(self, hit: Hit, nursery: trio.Nursery) -> None:
        """It will happen at its point; what is stopped there goes on after a while."""
        controls = Controls(nth=hit.nth) if hit.nth else Controls(probability=hit.probability)
        delay_s = hit.seconds if hit.action == "delay" else 0.0
        names = self._machine.device_names
        node = names[hit.nth % len(names)] if hit.action in LETHAL and hit.point.startswith(HOSTS_OWN) else ""
        fault = PointFault(hit.point, cast(Action, hit.action), controls=controls, delay_s=delay_s, node=node)
        number = self._machine.injector.add(fault)
        if hit.seconds > MEND_S:
            self._lasting[number] = hit.seconds
        if hit.action == "pause":
            nursery.start_soon(self._release, number, hit.seconds)

    async def _release(self, number: int, seconds: float) -> None:
        """Who is paused goes on after so many virtual seconds."""
        injector = self._machine.injector
        while True:
            await sleep(max(seconds, RELEASE_S))
            if number not in injector.active:
                return
            injector.release(number)

    def _fired(self, fired: Fired) -> None:
        """Something happened at a point: of a hit, which is counted here, or of a fault of the catalogue, which counts itself."""
        crew, victim = self._crew, fired.node or fired.where.device
        what = f"{fired.action} at {fired.where.point}"
        counted = "" if fired.kind in KINDS or fired.action == "call" else what
        crew.note(f"fault {what} {victim}")
        if fired.action in LETHAL:
            seconds = self._lasting.get(fired.number, MEND_S)
            until_s = trio.current_time() + seconds if seconds > MEND_S else 0.0
            self._down.append((victim, crew.harm_begins([victim], counted), until_s))
            self._machine.nursery.start_soon(self._mend_soon, seconds)
        elif fired.action == "fail" and fired.where.point in GIVES_UP:
            self._machine.nursery.start_soon(self._mend_given_up, crew.harm_begins([victim], counted), victim)
        else:
            if counted:
                crew.outcome.faults[counted] += 1
            if fired.action == "fail" and (fired.kind not in KINDS or cost_of(fired.kind) != TIME):
                crew.excuses.failed(fired.where, trio.current_time())

    async def _mend_given_up(self, harms: Sequence[Suffered], device: str) -> None:
        """The host gives it up; once it has heard of that it ends, and is started again."""
        with trio.move_on_after(LEASE_S):
            await self._machine.device_ended(device)
        await restart(self._crew, device)
        self._crew.harm_ends(harms)

    async def _mend_soon(self, seconds: float) -> None:
        await sleep(seconds)
        await self._mend_nodes(trio.current_time())

    async def _mend_nodes(self, by_s: float) -> None:
        """Who hangs goes on, who has crashed is started again: those whose time is over `by_s`."""
        due = [down for down in self._down if down[2] <= by_s]
        self._down = [down for down in self._down if down[2] > by_s]
        while due:
            device, harms, _ = due.pop()
            if device in self._machine.running:
                await self._machine.resume_device(device)
            else:
                await restart(self._crew, device)
            self._crew.harm_ends(harms)


@lru_cache(maxsize=256)
def faults_in(text: str) -> tuple[Fault, ...]:
    """The faults of an entry of a program, which is looked at more than once. Raises PlanError."""
    return tuple(cast(Fault, fault) for fault in Plan.parse(text).faults)


def all_faults(program: Program) -> list[Fault]:
    """Every fault of the catalogue that a program has, at whatever time. Raises PlanError."""
    return [fault for text in (*program.faults, *(planned.fault for planned in program.planned)) for fault in faults_in(text)]
