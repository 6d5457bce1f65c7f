"""What faults do at the host: to links, to memory, and, as processes and other devices would, at the wrong moment.

A point may be reached with locks held, so what a fault does there runs beside it, as a task: as a real process would, and one at a time.
It gives up when what it wanted to do cannot be done any more (the process has ended, the device is gone).
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from random import Random
from typing import Any, Protocol

import msgspec

from hmmnet.errors import HmmnetError, ProtocolError, WrongUse
from hmmnet.fabric.arbiter import LinkChange
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.faults.carry import AtWork, Carrier, Undo
from hmmnet.faults.catalogue import as_given
from hmmnet.faults.controls import Chance, Tally
from hmmnet.faults.effects import HostEffect, LinkEffect, NodeEffect, told_at
from hmmnet.faults.injector import HOST, Injector, PointFault
from hmmnet.faults.kinds import Fault
from hmmnet.faults.messages import MessageFault
from hmmnet.faults.network import Network
from hmmnet.faults.points import Where
from hmmnet.faults.targets import directions
from hmmnet.pages import PAGE_SHIFT
from hmmnet.topology import Topology
from hmmnet.wire.messages import Inject
from hmmnet.wire.session import Session

from .deeds import DEEDS, TO_PROCESSES, Doer, do, in_vain, pages_of
from .device import Device
from .interconnect import Interconnect
from .link import SessionLink

log = logging.getLogger("hmmnet.host")


def own_injector(clock: EmulatedClock, seed: int) -> Injector:
    """What is to happen at the points of a host in a process of its own; `seed` is what its chances are drawn from."""

    async def sleep(seconds: float) -> None:
        await clock.sleep_until(clock.now() + seconds)

    return Injector(Random(f"{seed} host"), now=clock.now, sleep=sleep)  # noqa: S311 - chance, not secrecy


class Suffering(Doer, Protocol):
    """What faults need of a host."""

    on_restart: Callable[[str, float], None] | None
    """Starts a device's process again, so many seconds later, where somebody can."""

    @property
    def topology(self) -> Topology:
        """The machine's."""
        ...

    @property
    def clock(self) -> EmulatedClock:
        """The machine's."""
        ...

    @property
    def links(self) -> Mapping[int, SessionLink]:
        """The living devices, by zone."""
        ...

    @property
    def devices(self) -> Mapping[str, Device]:
        """By name."""
        ...

    @property
    def network(self) -> Network:
        """Faults of messages."""
        ...

    @property
    def interconnect(self) -> Interconnect:
        """Links and their flows."""
        ...

    def spawn(self, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Run it beside everything else."""
        ...


class Injection:
    """Carries out effects at `host`; `injector` is that of its points."""

    def __init__(self, host: Suffering, injector: Injector) -> None:
        self._host = host
        self._injector = injector
        self._links = 0
        self._revived: dict[str, float] = {}
        self._carrier: Carrier

    def carrier(self, clock: EmulatedClock) -> Carrier:
        """Carries out what real processes can do; devices are told of each fault, and do their part."""

        async def sleep(seconds: float) -> None:
            await clock.sleep_until(clock.now() + seconds)

        self._injector.on_node = self._on_node
        made = Carrier(
            "real",
            {HostEffect: self.deed, NodeEffect: self._to_nodes},
            self._host.spawn,
            sleep,
            counted={PointFault: self._at_points, MessageFault: self._on_wires, LinkEffect: self.link},
            in_vain=self._in_vain,
        )
        made.told.append(self._tell)
        self._carrier = made
        return made

    def _in_vain(self, fault: Fault) -> str:
        """Why a fault that begins now would happen to nobody; empty when it would not."""
        meant = [name for name in self._host.devices if fnmatchcase(name, fault.needs_running)]
        if meant and not any(self._host.devices[name].life for name in meant):
            return f"{', '.join(meant)}: does not run; `hmmnet fault bounce DEVICE` starts it again, empty"
        return self.nothing_there(fault)

    def nothing_there(self, fault: Fault) -> str:
        """Why what a fault does at once would change nothing at this host; empty when it would."""
        at_once = [effect for effect in fault.effects if isinstance(effect, HostEffect) and not effect.point]
        reasons = [in_vain(self._host, effect, _at_once(effect)) for effect in at_once]
        if not at_once or not all(reasons):
            return ""
        point = ", or at a point" if fault.kind.parameter("point") else ""
        return f"{reasons[0]}; have it begin later, with after=TIME{point}"

    def _tell(self, number: int, fault: Fault | None) -> None:
        packed = b"" if fault is None else msgspec.msgpack.encode(as_given(fault))
        for link in self._host.links.values():
            link.session.note(Inject(number, packed))

    def greet(self, session: Session) -> None:
        """A device has come: it is told of the faults that are."""
        for number, fault in self._carrier.begun.items():
            session.note(Inject(number, msgspec.msgpack.encode(as_given(fault))))

    def heard(self, node: str, message: Inject) -> None:
        """A device says how often a fault has happened there. Raises ProtocolError for what is no count."""
        try:
            told = msgspec.msgpack.decode(message.fault, type=dict[str, int])
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"{node} tells of fault {message.number} what is no count: {error}") from error
        self._carrier.heard(message.number, node, told.get("fired", 0))

    def _at_points(self, fault: PointFault, tally: Tally | None = None) -> AtWork:
        number = self._injector.add(fault, tally=tally)
        return AtWork(partial(self._injector.remove, number), partial(self._injector.count, number))

    def _on_wires(self, fault: MessageFault, tally: Tally) -> Undo:
        """Raises HmmnetError for a name that nothing has."""
        self._devices_called(fault.way.device)
        network = self._host.network
        number = network.add(fault, tally)
        return AtWork(partial(network.discard, number), partial(network.count, number))

    def _devices_called(self, pattern: str) -> list[str]:
        names = [name for name in self._host.devices if fnmatchcase(name, pattern)]
        if not names:
            raise WrongUse(f'no device is called "{pattern}"; there are {", ".join(self._host.devices)}')
        return names

    def _to_nodes(self, effect: NodeEffect) -> Undo:
        """Raises HmmnetError for a name that nothing has, and for what is no process of this computer."""
        if effect.node == HOST:
            raise WrongUse("the host runs inside the program, or holds this very session: end its process instead")
        names = self._devices_called(effect.node)
        if effect.deed in ("bounce", "revive"):
            return self._revive(names, effect)
        lives = [life for name in names if (life := self._host.devices[name].life) is not None]
        for name in names:
            self._signal(name, {"hang": signal.SIGSTOP, "unload": signal.SIGTERM}.get(effect.deed, signal.SIGKILL))
        return partial(self._resume, [life.pid for life in lives]) if effect.deed == "hang" else _nothing

    def _revive(self, names: Sequence[str], effect: NodeEffect) -> Undo:
        """Devices end, now or when another fault ends them, and start again. Raises HmmnetError when nobody starts them."""
        restart, down_s = self._host.on_restart, float(effect.settings["down"])
        if restart is None:
            raise WrongUse(f"whoever started this machine does not start devices again: {effect.deed} needs hmmnet up, or hmmnet.launch")
        if effect.deed == "bounce":
            for name in names:
                if not self._host.devices[name].lives:
                    raise HmmnetError(f'device "{name}" has not started yet; `hmmnet ps` tells when it is ready')
            for name in names:  # one that has ended already starts again, too
                self._signal(name, signal.SIGKILL)
                restart(name, down_s)
            return _nothing
        self._revived.update(dict.fromkeys(names, down_s))

        def undo() -> None:
            for name in names:
                self._revived.pop(name, None)

        return AtWork(undo, lambda: 0)

    def device_lost(self, name: str) -> None:
        """A device has ended: if a fault wants that, it starts again."""
        if name in self._revived and self._host.on_restart is not None:
            self._host.on_restart(name, self._revived[name])

    def _signal(self, name: str, number: signal.Signals) -> None:
        life = self._host.devices[name].life
        if life is not None and life.pid > 1:
            with suppress(ProcessLookupError):
                os.kill(life.pid, number)

    def _resume(self, pids: Sequence[int]) -> None:
        """They go on, also those that were silent for too long and are lost: they find out, and end."""
        for pid in pids:
            if pid > 1:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _on_node(self, action: str, name: str) -> None:
        if name in self._host.devices:
            self._signal(name, signal.SIGKILL if action == "crash" else signal.SIGSTOP)

    def link(self, effect: LinkEffect, tally: Tally) -> Undo:
        """Change links; what undoes it. Raises HmmnetError when no link is called so.

        What makes transfers late is counted for each transfer that it makes late; any other change of a link happens once.
        """
        clock, arbiter, random = self._host.clock, self._host.interconnect.arbiter, self._injector.random
        chance = Chance(effect.controls, random, tally)

        def late_s() -> float:
            return effect.latency_s + random.random() * effect.jitter_s if chance.fires() else 0.0

        lasting = not (effect.latency_s or effect.jitter_s)
        meant = directions(effect, self._host.topology)
        self._links += 1
        number = self._links
        arbiter.change(number, LinkChange(meant, effect.factor, None if lasting else late_s, effect.down), clock.now())

        def undo() -> None:
            arbiter.change(number, None, clock.now())

        return undo if lasting else AtWork(undo, lambda: chance.fired)

    def deed(self, effect: HostEffect) -> Undo:
        """Do something at once, or at points, where it would change anything; what ends that. Raises HmmnetError."""
        if effect.deed not in DEEDS and effect.deed not in TO_PROCESSES:
            raise HmmnetError(f'the host has no deed "{effect.deed}"')

        running, done = False, 0

        async def guarded(where: Where) -> None:
            nonlocal running, done
            try:
                await do(self._host, effect, where)
            except HmmnetError as error:
                done -= 1
                say = log.info if effect.point else log.warning
                say("a fault did not happen: it could not %s: %s", effect.deed, error)
            finally:
                running = False

        def at(where: Where) -> None:
            nonlocal running, done
            running = True
            done += 1
            self._host.spawn(guarded, where)

        if not effect.point:
            at(_at_once(effect))
            return AtWork(_nothing, lambda: done)
        told = told_at(effect.point, "call")  # where nobody is named, it is done whoever is there
        start, end = (effect.start, effect.end) if "range" in told else (0, 0)
        point = PointFault(
            effect.point,
            "call",
            effect.device,
            effect.process if "process" in told else 0,
            start,
            end,
            str(effect.settings.get("event", "")),
            effect.controls,
            call=at,
            would=lambda where: not running and not in_vain(self._host, effect, where),  # what it does reaches points, too
            kind=effect.deed,
        )
        return AtWork(self._at_points(point).end, lambda: done)


def _at_once(effect: HostEffect) -> Where:
    """Where something is done that is done at no point."""
    return Where("", HOST, process=effect.process, start=effect.start >> PAGE_SHIFT, pages=pages_of(effect))


def _nothing() -> None:
    """What is done is done."""
