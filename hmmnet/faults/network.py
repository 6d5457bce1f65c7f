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

import trio

from hmmnet.errors import ProtocolError
from hmmnet.sleeping import Bell
from hmmnet.wire.codec import WITH_BODY, decode_body, decode_header

from .controls import Chance, Tally
from .messages import Channel, Delivery, MessageFault, Parts

Deliver = Callable[[Parts], object]
BULK_WAYS = ("bulk to host", "bulk to device")
"""What `Network.watch` is told of chunks and their acknowledgements."""


@dataclass(eq=False)
class Active:
    """A fault at work."""

    number: int
    fault: MessageFault
    chance: Chance
    waiting: list[tuple[Deliver, Parts]] = field(default_factory=list)
    """What ``hold`` holds."""

    def concerns(self, channel: Channel, parts: Parts) -> bool:
        """Whether it may happen to that message, which goes its way."""
        wanted = self.fault.message
        return not wanted or wanted == type_of(parts, channel)

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


@dataclass
class Network:
    """The faults of all wires. `fired` counts them by kind; `told` hears of each, with its time."""

    random: Random
    told: Callable[[float, str], None] | None = None
    active: dict[int, Active] = field(default_factory=dict)
    fired: Counter[str] = field(default_factory=Counter)
    on_fired: Callable[[MessageFault, str, Channel], None] | None = None
    """Told of each fault that happens to a message: to a message of which device, on which channel."""
    watch: Callable[[str, str], None] | None = None
    """Told of each message before anything happens to it: its device, and its type or, on the bulk channel, its way."""

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)
        self._order = itertools.count()
        self._late: list[tuple[float, int, Deliver, Parts]] = []
        self._bell = Bell()
        """Wakes `run`: something is late."""
        self._quiet_until: dict[tuple[str, Channel, bool], float] = {}
        self._held: dict[str, list[tuple[Deliver, Parts]]] = {}
        self.idle = True
        """Whether nothing happens to messages, and none is late: asked with each."""
        self._matching: dict[tuple[str, Channel, bool], list[Active]] = {}
        """Which faults may concern messages that go that way; made when the first does."""

    def add(self, fault: MessageFault, tally: Tally | None = None) -> int:
        """A fault begins; its number. `tally`: what it is counted with."""
        number = next(self._numbers)
        self.active[number] = Active(number, fault, Chance(fault.controls, self.random, tally))
        self._matching.clear()
        self.idle = False
        return number

    def remove(self, number: int) -> None:
        """A fault ends."""
        active = self.active.pop(number)
        self._look()
        self._matching.clear()
        active.end()

    def count(self, number: int) -> int:
        """How often a fault has happened; 0 when it is over."""
        active = self.active.get(number)
        return 0 if active is None else active.chance.fired

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
        self.idle = False

    def release(self, device: str, *, lost: bool = False) -> None:
        """What has waited arrives, in its order; or is `lost`."""
        held = self._held.pop(device, [])
        self._look()
        for deliver, parts in held:
            if not lost:
                deliver(parts)

    def sent(self, device: str, channel: Channel, parts: Parts, deliver: Deliver, *, to_device: bool) -> None:
        """A message is on its way; `deliver` puts it down where it goes."""
        if self.watch is not None:
            self.watch(device, BULK_WAYS[to_device] if channel == "bulk" else type_of(parts, channel))
        if self.active or self._held or self._quiet_until:
            way = (device, channel, to_device)
            matching = self._matching.get(way)
            if matching is None:
                matching = self._matching[way] = [
                    one for one in self.active.values() if one.fault.way.matches(device, channel, to_device=to_device)
                ]
            if matching or device in self._held or way in self._quiet_until:
                self._send(way, matching, parts, deliver)
                return
        deliver(parts)

    def _send(self, way: tuple[str, Channel, bool], matching: list[Active], parts: Parts, deliver: Deliver) -> None:
        """`sent`, where something may happen to the message: `matching`, or it waits for others that went that way."""
        device, channel, to_device = way
        now_s = trio.current_time()
        quiet_s = self._quiet_until.get(way, 0.0) - now_s
        if quiet_s <= 0:
            self._quiet_until.pop(way, None)  # nothing is late there any more
        deliveries: list[Delivery] = [(max(0.0, quiet_s), parts)]
        for active in [one for one in matching if one.concerns(channel, parts)]:
            if active.chance.fires(sum(map(len, parts))):
                deliveries = active.fault.apply(deliveries, self.random)
                self.fired[active.fault.kind] += 1
                if self.on_fired is not None:
                    self.on_fired(active.fault, device, channel)
                if self.told is not None:
                    self.told(now_s, f"fault {active.fault.kind} {device} {channel} {'in' if to_device else 'out'}")
                if active.fault.kind == "delay" and deliveries:
                    self._quiet_until[way] = now_s + deliveries[-1][0]
                if active.fault.kind == "hold":
                    active.waiting.append((deliver, parts))
        arrives = self._arriving(device, deliver)
        for late_s, given in deliveries:
            if late_s <= 0:
                arrives(given)
            else:
                heapq.heappush(self._late, (now_s + late_s, next(self._order), arrives, given))
                self.idle = False
                self._bell.ring()

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
        """Something is over: is anything left?"""
        self.idle = not (self.active or self._late or self._held)

    async def run(self) -> None:
        """Deliver what is late, until cancelled."""
        while True:
            await (self._bell.heard_by(self._late[0][0]) if self._late else self._bell.heard())
            while self._late and self._late[0][0] <= trio.current_time():
                _, _, deliver, parts = heapq.heappop(self._late)
                self._look()
                deliver(parts)
