"""What happens to messages on their way between the host and its devices: faults, drawn from a seed.

Each wire of a device leads through here: in a simulated machine at the device's end, between real processes at the host's. Without faults
a message is there at once (time on links is the fabric's business); with faults it may be gone, late, twice or damaged. What is late is
delivered by `run`.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import get_args

import trio

from hmmnet.errors import ProtocolError
from hmmnet.sleeping import Bell
from hmmnet.units import counted
from hmmnet.wire.codec import WITH_BODY, decode_body, decode_header
from hmmnet.wire.messages import Body, Invalidate

from .controls import Chance, Tally
from .messages import Channel, Delivery, MessageFault, Parts

Deliver = Callable[[Parts], object]
ProcessOf = Callable[[int], int]
"""The process whose context has that number; 0 when there is none."""
BULK_WAYS = ("bulk to host", "bulk to device")
"""What `Network.watch` is told of chunks and their acknowledgements."""
BODIES = frozenset(body.__name__ for body in get_args(Body))
"""Types of messages: each stands in it by name."""
WIRES_MAX = 4096
"""Ways of messages that are remembered: those of many more devices than a machine may have."""


def _nobody(_: int) -> int:
    return 0


@dataclass(eq=False)
class Active:
    """A fault at work."""

    number: int
    fault: MessageFault
    chance: Chance
    waiting: list[tuple[Deliver, Parts]] = field(default_factory=list)
    """What ``hold`` holds."""
    tag: bytes = field(init=False)
    """What stands in every message that is meant: to be looked for first."""

    def __post_init__(self) -> None:
        self.tag = self.fault.message.encode() if self.fault.message in BODIES else b""

    def concerns(self, channel: Channel, parts: Parts, process_of: ProcessOf) -> bool:
        """Whether it may happen to that message, which goes its way."""
        wanted = self.fault.message
        if wanted and not (self.tag in parts[-1] and wanted == type_of(parts, channel)):
            return False
        return not self.fault.narrowed or self._touches(parts, process_of)

    def _touches(self, parts: Parts, process_of: ProcessOf) -> bool:
        told = decode_body(parts[-1])
        assert isinstance(told, Invalidate), "no other message can be narrowed"
        return self.fault.touches(process_of(told.context), told.start, told.end)

    def end(self) -> None:
        """It is over."""
        for deliver, parts in self.waiting:
            deliver(parts)


def type_of(parts: Parts, channel: Channel) -> str:
    """The type of a control message, or of a frame that carries none (``BEAT``, ``BYE`` ...); a dash for what is neither."""
    if channel == "bulk":
        return "-"
    try:
        kind = decode_header(parts[-1])[0]
        return type(decode_body(parts[-1])).__name__ if kind in WITH_BODY else kind.name
    except ProtocolError:
        return "-"


class Wire:
    """One way that messages go: those of `device` on one channel, in one direction. Called with a message, and with what puts it down where
    it goes.
    """

    __slots__ = ("_network", "channel", "device", "free", "matching", "quiet_until_s", "to_device")

    def __init__(self, network: Network, device: str, channel: Channel, *, to_device: bool) -> None:
        self.device = device
        self.channel = channel
        self.to_device = to_device
        self.free = False
        """Whether it is known that nothing can happen here to a message, which may go past this, and that nobody watches."""
        self.matching: list[Active] | None = None
        """Which faults may concern what goes here; None until the next message wants to know."""
        self.quiet_until_s = 0.0
        """What is sent before waits for what is late."""
        self._network = network

    def __call__(self, parts: Parts, deliver: Deliver) -> None:
        """A message is on its way; `deliver` puts it down where it goes."""
        network = self._network
        if network.watch is not None:
            kind = BULK_WAYS[self.to_device] if self.channel == "bulk" else type_of(parts, self.channel)
            network.watch(self.device, kind)
        if self.matching is None:
            self.matching = network.matching(self)
        if self.matching or self.quiet_until_s or network.holds(self.device):
            network.send(self, self.matching, parts, deliver)
        else:
            self.free = network.watch is None
            deliver(parts)

    def look(self) -> None:
        """What can happen here has changed."""
        self.free = False
        self.matching = None


@dataclass
class Network:
    """The faults of all wires. `fired` counts them by kind; `told` hears of each, with its time."""

    random: Random
    told: Callable[[float, str], None] | None = None
    active: dict[int, Active] = field(default_factory=dict)
    fired: Counter[str] = field(default_factory=Counter)
    on_fired: Callable[[MessageFault, str, Channel], None] | None = None
    """Told of each fault that happens to a message: to a message of which device, on which channel."""
    process_of: ProcessOf = _nobody
    """Whose contexts are: a host's."""

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)
        self._order = itertools.count()
        self._late: list[tuple[float, int, Deliver, Parts]] = []
        self._bell = Bell()
        """Wakes `run`: something is late."""
        self._held: dict[str, list[tuple[Deliver, Parts]]] = {}
        self.idle = True
        """Whether nothing happens to messages, and none is late: asked with each."""
        self._wires: dict[tuple[str, Channel, bool], Wire] = {}
        self._watch: Callable[[str, str], None] | None = None

    @property
    def watch(self) -> Callable[[str, str], None] | None:
        """Told of each message before anything happens to it: its device, and its type or, on the bulk channel, its way."""
        return self._watch

    @watch.setter
    def watch(self, told: Callable[[str, str], None] | None) -> None:
        self._watch = told
        self._changed()

    def add(self, fault: MessageFault, tally: Tally | None = None) -> int:
        """A fault begins; its number. `tally`: what it is counted with."""
        number = next(self._numbers)
        self.active[number] = Active(number, fault, Chance(fault.controls, self.random, tally))
        self._changed()
        return number

    def remove(self, number: int) -> None:
        """A fault ends."""
        active = self.active.pop(number)
        self._changed()
        active.end()

    def count(self, number: int) -> int:
        """How often a fault has happened; 0 when it is over."""
        active = self.active.get(number)
        return 0 if active is None else active.chance.fired

    def held(self, number: int) -> list[str]:
        """What waits until fault `number` ends."""
        active = self.active.get(number)
        return [counted(len(active.waiting), "message")] if active is not None and active.waiting else []

    def silent(self) -> list[str]:
        """Devices that are not heard, as they or the host hang, and what waits meanwhile, in words."""
        return [
            f"{device} is not heard, and hears nothing: {counted(len(held), 'message')} on the way" for device, held in self._held.items()
        ]

    def discard(self, number: int) -> None:
        """A fault ends, if it has not."""
        if number in self.active:
            self.remove(number)

    def heal(self) -> None:
        """All faults end, and what was held arrives. What is late stays late."""
        for number in list(self.active):
            self.remove(number)
        for device in list(self._held):
            self.release(device)

    def hold(self, device: str) -> None:
        """From now on what is sent to or by `device` waits on its way."""
        self._held.setdefault(device, [])
        self._changed()

    def release(self, device: str, *, lost: bool = False) -> None:
        """What has waited arrives, in its order; or is `lost`."""
        held = self._held.pop(device, [])
        self._changed()
        for deliver, parts in held:
            if not lost:
                deliver(parts)

    def wire(self, device: str, channel: Channel, *, to_device: bool) -> Wire:
        """The way of those messages: always the same, for the same (of `WIRES_MAX`: strangers may call themselves anything)."""
        way = (device, channel, to_device)
        found = self._wires.get(way)
        if found is None:
            found = Wire(self, device, channel, to_device=to_device)
            if len(self._wires) < WIRES_MAX:
                self._wires[way] = found
        return found

    def sent(self, device: str, channel: Channel, parts: Parts, deliver: Deliver, *, to_device: bool) -> None:
        """A message is on its way; `deliver` puts it down where it goes."""
        self.wire(device, channel, to_device=to_device)(parts, deliver)

    def matching(self, wire: Wire) -> list[Active]:
        """The faults that may happen to messages there."""
        return [one for one in self.active.values() if one.fault.way.matches(wire.device, wire.channel, to_device=wire.to_device)]

    def holds(self, device: str) -> bool:
        """Whether its messages wait on their way."""
        return device in self._held

    def send(self, wire: Wire, matching: list[Active], parts: Parts, deliver: Deliver) -> None:
        """Send a message to which something may happen: `matching`, or it waits for others that went that way."""
        deliveries: list[Delivery] | None = None
        if wire.quiet_until_s or wire.device in self._held:
            deliveries = [(self._quiet_s(wire), parts)]
        for active in matching:
            if active.concerns(wire.channel, parts, self.process_of) and active.chance.fires(sum(map(len, parts))):
                deliveries = self._happens(active, wire, parts, deliver, [(0.0, parts)] if deliveries is None else deliveries)
        if deliveries is None:  # as mostly
            deliver(parts)
            return
        now_s, arrives = trio.current_time(), self._arriving(wire.device, deliver)
        for late_s, given in deliveries:
            if late_s <= 0:
                arrives(given)
            else:
                heapq.heappush(self._late, (now_s + late_s, next(self._order), arrives, given))
                self.idle = False
                self._bell.ring()

    def _quiet_s(self, wire: Wire) -> float:
        """How long what is sent there now waits for what is late."""
        quiet_s = wire.quiet_until_s - trio.current_time()
        if quiet_s <= 0:
            wire.quiet_until_s = 0.0  # nothing is late there any more
        return max(0.0, quiet_s)

    def _happens(self, active: Active, wire: Wire, parts: Parts, deliver: Deliver, deliveries: list[Delivery]) -> list[Delivery]:
        """A fault happens to the message `parts`, of which `deliveries` were to arrive; what arrives now."""
        kind, now_s = active.fault.kind, trio.current_time()
        deliveries = active.fault.apply(deliveries, self.random)
        self.fired[kind] += 1
        if self.on_fired is not None:
            self.on_fired(active.fault, wire.device, wire.channel)
        if self.told is not None:
            self.told(now_s, f"fault {kind} {wire.device} {wire.channel} {'in' if wire.to_device else 'out'}")
        if kind == "delay" and deliveries:
            wire.quiet_until_s = now_s + deliveries[-1][0]
        if kind == "hold":
            active.waiting.append((deliver, parts))
        return deliveries

    def _arriving(self, device: str, deliver: Deliver) -> Deliver:
        """`deliver`, unless the device's messages are held by then."""

        def arrive(parts: Parts) -> None:
            held = self._held.get(device)
            if held is None:
                deliver(parts)
            else:
                held.append((deliver, parts))

        return arrive

    def _look(self) -> None:
        """A message that was late is not any more: is anything left?"""
        self.idle = not (self.active or self._late or self._held)

    def _changed(self) -> None:
        """What can happen to messages has."""
        self._look()
        for wire in self._wires.values():
            wire.look()

    async def run(self) -> None:
        """Deliver what is late, until cancelled."""
        while True:
            await (self._bell.heard_by(self._late[0][0]) if self._late else self._bell.heard())
            while self._late and self._late[0][0] <= trio.current_time():
                _, _, deliver, parts = heapq.heappop(self._late)
                self._look()
                deliver(parts)
