"""Injectors: what is to happen at the protocol points (`points.py`) of one machine, and the hooks through which it does.

Host and devices ask their `Points` at each boundary::

    if points.armed:
        await points.at("migrate.before_copy", device=link.name, process=space.number, start=start, pages=count)
    ...
    if points.armed and points.fails("device.alloc.large"):
        return None

`armed` is false while nobody wants anything of this node, so that a boundary costs one attribute test. An `Injector` holds what is to
happen; each node (the host, each device) has its own `Points` of one. In the simulated world one injector serves the whole machine; a real
process has its own, and hears over its session what to do. There is nothing global: two machines in one process know nothing of each other.

What can happen at a point is in its `actions`: it takes longer (``delay``), waits until it is released (``pause``), fails with an error
that really happens there (``fail``), costs a node its life (``crash``) or its voice (``hang``), or calls a test (``call``).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from random import Random

import trio

from hmmnet.errors import HmmnetError, PeerLost, WrongUse
from hmmnet.sleeping import sleep

from .controls import Chance, Controls, Tally
from .points import ACTIONS, HOSTS_OWN, POINTS, Action, Point, Where, injected, matching

HOST = "host"
"""The host's name as a node."""
LETHAL = ("crash", "hang")
"""Actions that happen to a node: the one that is named, or the device concerned; the host's own points concern none."""
FIRED_MAX = 100_000
"""Records of faults that fired: a campaign reads them after each seed; a machine that runs for days keeps the last."""

Called = Callable[[Where], Awaitable[None] | None]
OnNode = Callable[[str, str], None]
"""(``crash`` or ``hang``, node): what a world does to a node."""


class Unfit(HmmnetError):
    """What a fault at a point cannot be; `parameter` is the name of the one that does not fit."""

    def __init__(self, parameter: str, why: str) -> None:
        self.parameter = parameter
        self.why = why
        super().__init__(why)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.parameter, self.why))


@dataclass(frozen=True)
class PointFault:
    """What happens at which points, to whom, how often. Raises HmmnetError for what cannot be.

    `point` is a name or a pattern of names. `device` is a pattern of device names; `process` a pid (0: any); [`start`, `end`) addresses
    that must be touched; `event` an event of the notifier. `node` is who crashes or hangs (default: the device concerned). `delay_s` and
    `jitter_s` are emulated seconds. `would` tells whether `call` would do anything there. `kind` is what records call it.
    """

    point: str
    action: Action
    device: str = "*"
    process: int = 0
    start: int = 0
    end: int = 0
    event: str = ""
    controls: Controls = field(default_factory=Controls)
    delay_s: float = 0.0
    jitter_s: float = 0.0
    node: str = ""
    call: Called | None = None
    would: Callable[[Where], bool] | None = None
    kind: str = ""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise WrongUse(f'no action is called "{self.action}"; there are {", ".join(ACTIONS)}')
        found = matching(self.point)
        if not any(self.action in point.actions for point in found):
            able = sorted({action for point in found for action in point.actions})
            raise Unfit("point", f'nothing can {self.action} at "{self.point}"; there is {", ".join(able)}')
        if self.action in LETHAL:
            self._check_node([point for point in found if self.action in point.actions])
        if (self.call is None) is (self.action == "call"):
            raise WrongUse('a function goes with the action "call", and only with that')
        if self.delay_s < 0 or self.jitter_s < 0 or not math.isfinite(self.delay_s + self.jitter_s):
            wrong = "jitter" if 0 <= self.delay_s < math.inf else "latency"
            raise Unfit(wrong, f"a delay of {self.delay_s:g} s with a jitter of {self.jitter_s:g} s cannot be")

    def _check_node(self, found: Sequence[Point]) -> None:
        """Somebody has to be meant, or nobody could die when the point is reached, in the middle of other work."""
        if self.node == HOST:
            raise Unfit("node", f"no host can {self.action} alone, at a point; a device can: node=gpu0")
        if not self.node and all(point.name.startswith(HOSTS_OWN) for point in found):
            raise Unfit("point", f'"{self.point}" concerns no device; say which node is to {self.action}, such as node=gpu0')

    def may_concern(self, point: str, node: str, device: str) -> bool:
        """Whether it may happen when `node` is at `point`, in what concerns `device`."""
        return (
            self.action in POINTS[point].actions
            and (self.action not in LETHAL or (self.node or device or node) != HOST)
            and (point == self.point or fnmatchcase(point, self.point))
            and (self.device == "*" or fnmatchcase(device, self.device))
        )

    def concerns(self, where: Where) -> bool:
        """Whether it may happen there."""
        return self.may_concern(where.point, where.node, where.device) and self.touches(where)

    def touches(self, where: Where) -> bool:
        """Whether process, event and addresses are those that are meant, and there is something to do."""
        return (
            self.process in (0, where.process)
            and self.event in ("", where.event)
            and (self.end <= self.start or (where.address < self.end and self.start < where.address_end))
            and (self.would is None or self.would(where))
        )


@dataclass(frozen=True)
class Fired:
    """A fault happened: emulated time, its number, its kind, its action, where. `node` is who crashed or hangs, if that was said."""

    at_s: float
    number: int
    kind: str
    action: str
    where: Where
    node: str = ""

    @property
    def line(self) -> str:
        """As it stands in a trace; the first page's number is hexadecimal, as everywhere."""
        about = {name: value for name, value in self.where.as_json().items() if name != "point"}
        where = " ".join(f"{name}=0x{value:x}" if name == "start" else f"{name}={value}" for name, value in about.items())
        return f"fault {self.action} {self.where.point} {where}"


@dataclass(eq=False)
class _Active:
    number: int
    fault: PointFault
    chance: Chance
    released: trio.Event = field(default_factory=trio.Event)
    paused: list[Where] = field(default_factory=list)
    """Who waits for that, where."""


class Injector:
    """What is to happen at the points of one machine, or of one process of it.

    `random` is where chance comes from; `now` and `sleep` are emulated time; `on_node` does what ``crash`` and ``hang`` ask for.
    """

    def __init__(
        self,
        random: Random | None = None,
        *,
        now: Callable[[], float] = trio.current_time,
        sleep: Callable[[float], Awaitable[None]] = sleep,
        on_node: OnNode | None = None,
    ) -> None:
        self.random = random or Random(0)  # noqa: S311 - chance, not secrecy
        self.now = now
        self.sleep = sleep
        self.on_node = on_node
        self.on_fired: Callable[[Fired], None] | None = None
        """Told of each fault that fires: a trace."""
        self.reached: Counter[str] = Counter()
        """How often each point was reached, while anything was armed."""
        self.fired: deque[Fired] = deque(maxlen=FIRED_MAX)
        self._active: dict[int, _Active] = {}
        self._numbers = itertools.count(1)
        self._nodes: list[Points] = []
        self._recording = False
        self.stopped: dict[str, trio.Event] = {}
        """Nodes that hang, and what wakes them."""
        self._failed: dict[str, Where] = {}
        """By point where code cannot wait: what failed there last."""
        self.awaited: dict[str, list[_Active]] = {}
        """By point: what may happen there, to somebody. At most points nothing may, and one look here says so."""
        self._candidates: dict[tuple[str, str, str], list[_Active]] = {}
        """By (point, node, device): what may happen there; made when that is reached, and forgotten when anything begins or ends."""

    def points_of(self, name: str) -> Points:
        """The points of a node: ``host``, or a device's name."""
        made = Points(self, name)
        self._nodes.append(made)
        self._arm()
        return made

    def record(self, on: bool = True) -> None:
        """Count which points are `reached`, also while there is no fault."""
        self._recording = on
        self._arm()

    def add(self, fault: PointFault, number: int | None = None, *, tally: Tally | None = None) -> int:
        """From now on that happens; its number. `tally`: what it is counted with."""
        number = next(self._numbers) if number is None else number
        if number in self._active:
            self.remove(number)
        active = self._active[number] = _Active(number, fault, Chance(fault.controls, self.random, tally))
        for point in matching(fault.point):
            if fault.action in point.actions:
                self.awaited.setdefault(point.name, []).append(active)
        self._arm()
        return number

    def remove(self, number: int) -> None:
        """It does not happen any more; whoever was paused by it goes on."""
        active = self._active.pop(number, None)
        if active is not None:
            active.released.set()
            left = {point: [other for other in some if other is not active] for point, some in self.awaited.items()}
            self.awaited = {point: some for point, some in left.items() if some}
        self._arm()

    def release(self, number: int) -> None:
        """Whoever is paused by that fault goes on; the next to come is paused again."""
        active = self._active.get(number)
        if active is None:
            raise WrongUse(f"no fault has number {number}")
        active.released.set()
        active.released = trio.Event()

    def heal(self, but: str = "") -> None:
        """Nothing happens any more, and nobody is paused; only faults at the point `but` stay."""
        for number, active in list(self._active.items()):
            if active.fault.point != but:
                self.remove(number)
        for name in list(self.stopped):
            self.resume(name)

    def stop(self, node: str) -> None:
        """A node hangs: it gets no further than its next point."""
        self.stopped.setdefault(node, trio.Event())
        self._arm()

    def resume(self, node: str) -> None:
        """It goes on."""
        stopped = self.stopped.pop(node, None)
        if stopped is not None:
            stopped.set()
        self._arm()

    @property
    def active(self) -> dict[int, PointFault]:
        """What may happen now, by number."""
        return {number: active.fault for number, active in self._active.items()}

    def count(self, number: int) -> int:
        """How often fault `number` has happened; 0 when it is over."""
        active = self._active.get(number)
        return 0 if active is None else active.chance.fired

    def held(self, number: int) -> list[str]:
        """Who is paused by fault `number`, and where."""
        active = self._active.get(number)
        return [] if active is None else [str(where) for where in active.paused]

    def _arm(self) -> None:
        self._candidates.clear()
        armed = self._recording or bool(self._active)
        for points in self._nodes:
            points.armed = armed or points.node in self.stopped

    # --- at a point -----------------------------------------------------------------------------------------------------------

    def wants(self, name: str) -> bool:
        """Whether a fault may happen at the point `name`, or somebody counts how often it is reached."""
        return self._recording or name in self.awaited

    def passes(self, point: str, node: str, device: str) -> bool:
        """Whether nothing can happen there, as is mostly so: then it is passed, and counted."""
        if node in self.stopped:
            return False
        if point in self.awaited:
            found = self._candidates.get((point, node, device))
            if self._may_happen(point, node, device) if found is None else found:
                return False
        self.reached[point] += 1
        return True

    def _may_happen(self, point: str, node: str, device: str) -> list[_Active]:
        found = self._candidates.get((point, node, device))
        if found is None:
            found = [active for active in self.awaited.get(point, ()) if active.fault.may_concern(point, node, device)]
            self._candidates[point, node, device] = found
        return found

    def _firing(self, where: Where) -> Iterable[tuple[_Active, Where]]:
        """What happens there now; with the place goes which time it is."""
        self.reached[where.point] += 1
        candidates = self._may_happen(where.point, where.node, where.device)
        if not candidates:
            return
        occurrence = self.reached[where.point]
        where = Where(where.point, where.node, where.device, where.process, where.start, where.pages, where.event, occurrence)
        for active in candidates:
            if active.fault.touches(where) and active.chance.fires():
                fault = active.fault
                fired = Fired(self.now(), active.number, fault.kind or f"{fault.action} {where.point}", fault.action, where, fault.node)
                self.fired.append(fired)
                if self.on_fired is not None:
                    self.on_fired(fired)
                yield active, where

    async def at(self, where: Where) -> None:
        """A step boundary that may take its time."""
        stopped = self.stopped.get(where.node)
        if stopped is not None:
            await stopped.wait()
        for active, here in self._firing(where):
            fault = active.fault
            if fault.action == "delay":
                await self.sleep(fault.delay_s + (self.random.random() * fault.jitter_s if fault.jitter_s else 0.0))
            elif fault.action == "pause":
                active.paused.append(here)
                try:
                    await active.released.wait()
                finally:
                    active.paused.remove(here)
            elif fault.action == "fail":
                if fault.delay_s:
                    await self.sleep(fault.delay_s)
                raise POINTS[where.point].error(here)
            elif fault.action == "call":
                assert fault.call is not None, "checked when it was made"
                result = fault.call(here)
                if result is not None:
                    await result
            else:
                await self._lose(fault, where)

    def fails(self, where: Where) -> bool:
        """A place that cannot wait: whether it fails this time."""
        failed = False
        for active, here in self._firing(where):
            fault = active.fault
            if fault.action == "call":
                assert fault.call is not None, "checked when it was made"
                fault.call(here)
            elif fault.action == "fail":
                self._failed[where.point] = here
                failed = True
            else:
                self._on_node(fault, where)
        return failed

    def why(self, point: str) -> str:
        """What failed last at a point that cannot wait, as the error that follows says it."""
        return injected(self._failed[point])

    async def _lose(self, fault: PointFault, where: Where) -> None:
        node = self._on_node(fault, where)
        if node == where.node and fault.action == "crash":
            await trio.lowlevel.checkpoint()  # its tasks are being cancelled: nothing of it goes on
            raise PeerLost(f"{node} has crashed")  # this one is behind a shield
        stopped = self.stopped.get(where.node)
        if stopped is not None:
            await stopped.wait()

    def _on_node(self, fault: PointFault, where: Where) -> str:
        node = fault.node or where.device or where.node
        if self.on_node is None:
            raise WrongUse(f'nobody here can {fault.action} "{node}": this machine was started without a world that does it')
        self.on_node(fault.action, node)
        return node


class Points:
    """The points of one node; see the module."""

    __slots__ = ("_device", "_injector", "armed", "node")

    def __init__(self, injector: Injector | None = None, node: str = "") -> None:
        self.armed = False
        """Whether anybody wants to know when a point is reached."""
        self.node = node
        self._device = "" if node == HOST else node
        self._injector = injector

    def passes(self, name: str, device: str | None = None) -> bool:
        """Whether nothing can happen at that point, which is passed then: for boundaries at which to wait costs a task."""
        injector = self._injector
        if not self.armed or injector is None:
            return True
        if name not in injector.awaited and self.node not in injector.stopped:  # `Injector.passes`, without a call, of what mostly is so
            injector.reached[name] += 1
            return True
        return injector.passes(name, self.node, self._device if device is None else device)

    async def at(self, name: str, *, device: str | None = None, process: int = 0, start: int = 0, pages: int = 0, event: str = "") -> None:
        """A step boundary is reached; returns when it is passed.

        For what is said of it see `Where`; `device` is the node itself unless given. Raises what the point's ``fail`` raises.
        """
        injector, concerned = self._injector, self._device if device is None else device
        if injector is None:
            return
        if name not in injector.awaited and self.node not in injector.stopped:  # as in `passes`
            injector.reached[name] += 1
        elif not injector.passes(name, self.node, concerned):
            await injector.at(Where(name, self.node, concerned, process, start, pages, event))

    def fails(self, name: str, *, device: str | None = None, process: int = 0, start: int = 0, pages: int = 0, event: str = "") -> bool:
        """Whether what happens at that point, which cannot wait, fails this time."""
        injector, concerned = self._injector, self._device if device is None else device
        if injector is None:
            return False
        if name not in injector.awaited and self.node not in injector.stopped:  # as in `passes`
            injector.reached[name] += 1
            return False
        if injector.passes(name, self.node, concerned):
            return False
        return injector.fails(Where(name, self.node, concerned, process, start, pages, event))

    def why(self, name: str) -> str:
        """What an error has to say when `fails` has just said that it fails."""
        assert self._injector is not None, "nothing fails where nobody injects faults"
        return self._injector.why(name)

    def wants(self, name: str) -> bool:
        """Whether a fault waits for that very point: for boundaries that are costly to have."""
        return self._injector is not None and self._injector.wants(name)
