"""The faults of a machine, or of one process of it: their numbers, their times, and who carries their effects out.

`Carrier.begin` has a function for each type of effect that its world can do, `Carrier.counted` for those that happen as often as controls
say; what they lack is somebody else's (a device's, in another process, that is told over its session). All that one fault comes down to
here is counted together: ``times=1`` is once, also where a fault is at two points.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hmmnet.errors import WrongUse
from hmmnet.units import counted

from .catalogue import as_given
from .controls import Tally
from .effects import InVain
from .kinds import Fault, World

log = logging.getLogger("hmmnet.faults")
Undo = Callable[[], None]
OVER_MAX = 1000
"""Faults that are over as they begin, whose deeds, which go on beside everything else, may yet prove to be in vain: the last of them."""


@dataclass(frozen=True)
class AtWork:
    """An effect that goes on: `end` undoes it, `fired` tells how often it has happened. Any other effect happens once, as it begins."""

    end: Undo
    fired: Callable[[], int]
    held: Callable[[], list[str]] = list
    """Who waits by it, and for nothing else, in words."""

    def __call__(self) -> None:
        """End it."""
        self.end()


def times_fired(undo: Undo) -> int:
    """How often the effect that `undo` ends has happened."""
    return undo.fired() if isinstance(undo, AtWork) else 1


@dataclass(eq=False)
class Carried:
    """A fault that was added: whether it has begun, and what ends it."""

    number: int
    fault: Fault
    undos: list[Undo] = field(default_factory=list)
    begun: bool = False
    ended: bool = False

    @property
    def fired(self) -> int:
        """How often it has happened, here."""
        return sum(map(times_fired, self.undos)) if self.begun else 0


class Carrier:
    """See the module. `start` runs a function as a task; `sleep` is emulated. `in_vain` says why a fault that begins now would happen to
    nobody; empty when it would not.
    """

    def __init__(
        self,
        world: World,
        begin: Mapping[type, Callable[[Any], Undo]],
        start: Callable[..., None],
        sleep: Callable[[float], Awaitable[None]],
        *,
        counted: Mapping[type, Callable[[Any, Tally], Undo]],
        in_vain: Callable[[Fault], str] = lambda _: "",
    ) -> None:
        self.world = world
        self.told: list[Callable[[int, Fault | None], None]] = []
        """Called with each fault that begins, and with None when it ends."""
        self._begin = dict(begin)
        self._counted = dict(counted)
        self._in_vain = in_vain
        self._start = start
        self._sleep = sleep
        self._numbers = itertools.count(1)
        self._carried: dict[int, Carried] = {}
        self._past: Counter[str] = Counter()
        self._over: deque[Carried] = deque()
        self._elsewhere: dict[tuple[int, str], int] = {}
        self._names: dict[int, str] = {}

    def add(self, fault: Fault, number: int | None = None) -> int:
        """A fault begins (or will); its number. Raises HmmnetError when this world cannot do it, or nothing is called so."""
        fault.kind.check_world(self.world)
        carried = Carried(next(self._numbers) if number is None else number, fault)
        self._carried[carried.number] = carried
        self._names[carried.number] = fault.kind.name
        if fault.after_s or fault.lasts_s:
            self._start(self._timed, carried)
        else:
            try:
                self._enter(carried)
            except InVain as error:
                raise InVain(f"fault {fault.kind.name}: {error}") from None
        return carried.number

    def _enter(self, carried: Carried) -> None:
        """Raises InVain, before anybody is told, when it would happen to nobody."""
        if why := self._in_vain(carried.fault):
            self.remove(carried.number)
            raise InVain(why)
        carried.begun = True
        try:
            self._tell(carried.number, carried.fault)  # before what happens: somebody wants to know why it does
            tally = Tally()
            for effect in carried.fault.effects:
                begin, counted = self._begin.get(type(effect)), self._counted.get(type(effect))
                if counted is not None:
                    carried.undos.append(counted(effect, tally))
                elif begin is not None:
                    carried.undos.append(begin(effect))
        except BaseException:
            self.remove(carried.number)
            raise
        if carried.fault.kind.once:
            del self._carried[carried.number]
            self._over.append(carried)
            if len(self._over) > OVER_MAX:
                self._count(self._over.popleft())

    async def _timed(self, carried: Carried) -> None:
        if carried.fault.after_s:
            await self._sleep(carried.fault.after_s)
        if carried.ended:
            return
        try:
            self._enter(carried)
        except InVain as error:
            log.warning("fault %d (%s) did not happen: %s", carried.number, carried.fault, error)
            return
        if carried.fault.lasts_s and not carried.fault.kind.once:
            await self._sleep(carried.fault.lasts_s)
            if not carried.ended:
                self.remove(carried.number)

    def remove(self, number: int) -> None:
        """A fault ends. Raises HmmnetError when there is none of that number."""
        carried = self._carried.pop(number, None)
        if carried is None:
            there = f"the numbers are {', '.join(map(str, self._carried))}" if self._carried else "there is no fault"
            raise WrongUse(f"no fault has number {number}; {there}")
        carried.ended = True
        self._count(carried)
        for undo in reversed(carried.undos):
            undo()
        if carried.begun:
            self._tell(number, None)

    def _count(self, carried: Carried) -> None:
        """It happens no more."""
        self._past[carried.fault.kind.name] += carried.fired

    def _tell(self, number: int, fault: Fault | None) -> None:
        for tell in self.told:
            tell(number, fault)

    def heal(self) -> None:
        """All faults end."""
        for number in list(self._carried):
            self.remove(number)

    def heard(self, number: int, node: str, fired: int) -> None:
        """Fault `number` has happened so often at another node."""
        self._elsewhere[number, node] = fired

    def fired(self) -> dict[str, int]:
        """How often faults have happened, by kind: every kind that was ever added, also those that never did."""
        total = Counter(dict.fromkeys(self._names.values(), 0))
        total.update(self._past)
        for carried in (*self._carried.values(), *self._over):
            total[carried.fault.kind.name] += carried.fired
        for (number, _), count in self._elsewhere.items():
            total[self._names.get(number, "")] += count
        total.pop("", None)
        return dict(total)

    def counts(self) -> dict[int, int]:
        """How often each fault that acts now has happened, here."""
        return {number: carried.fired for number, carried in self._carried.items() if carried.begun}

    def told_now(self) -> list[str]:
        """The faults that act now, in words, and who is held by each: for whom nothing moves any more."""
        lines: list[str] = []
        for number, one in self._carried.items():
            held = [what for undo in one.undos if isinstance(undo, AtWork) for what in undo.held()]
            if held:
                lines.append(f"fault {number} ({one.fault}) holds {', '.join(held)}, until it ends: remove_fault({number})")
            elif one.fired:
                lines.append(f"fault {number} ({one.fault}) is there, and has happened {counted(one.fired, 'time')}")
        return lines

    @property
    def at_work(self) -> Iterator[Undo]:
        """What ends each effect of the faults that act now."""
        for carried in self._carried.values():
            if carried.begun:
                yield from carried.undos

    @property
    def active(self) -> dict[int, Fault]:
        """The faults that are, or will be, by number."""
        return {number: carried.fault for number, carried in self._carried.items()}

    @property
    def begun(self) -> dict[int, Fault]:
        """The faults that act now, by number."""
        return {number: carried.fault for number, carried in self._carried.items() if carried.begun}

    def as_json(self) -> list[dict[str, Any]]:
        """Plain data: number, whether it has begun, how often it has happened, at any node, and what makes it again."""
        elsewhere = Counter[int]()
        for (number, _), count in self._elsewhere.items():
            elsewhere[number] += count
        return [
            {"number": number, "begun": one.begun, "fired": one.fired + elsewhere[number], "fault": as_given(one.fault)}
            for number, one in self._carried.items()
        ]
