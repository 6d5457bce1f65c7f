"""Who may use which link, and how fast: max-min fair sharing between the transfers that are under way. Pure; the caller owns time.

Max-min fair means: no flow could get more without taking from one that has no more than it. It is found by progressive filling: all flows
grow together until a link is full; its flows are fixed at that share; the rest grow on (Bertsekas and Gallager, *Data Networks*, 6.5).
Real interconnects approach this by arbitrating packet by packet; we do it a chunk at a time, and recompute when flows come and go.

A flow asks for a grant for each chunk it sends. The grants ride on what is sent anyway, so arbitration costs no message. What is too short
for a flow takes turns instead (`singles`); a flow that opens meanwhile begins behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from hmmnet.errors import Unreachable
from hmmnet.topology.model import Topology
from hmmnet.topology.routes import Routes

from .link import Link, LinkReport
from .pace import Grant, Schedule
from .turns import Start, Turns


class Flow(Schedule):
    """One transfer on its way. Made by `Arbiter.open_flow`; must be closed.

    Two times run along. `last` says when the next chunk may leave; it skips what a late sender cannot catch up with. `_carried_s` does not
    skip: it is when the links of the *model* are done with what was granted, whatever became of it here. Reports measure lateness by it.

    When a link on its way goes down, a flow goes on over other links; while there are none it is `stalled`. What has left is through.
    """

    def __init__(self, arbiter: Arbiter, source: str, target: str, links: tuple[Link, ...], start_s: float, *, empty: bool = False) -> None:
        self.source = source
        self.target = target
        self.links = links
        self._empty = empty
        self._late: dict[tuple[Link, int], float] = {}
        """What faults add to it on each link, by their numbers."""
        super().__init__(start_s, float("inf"), self._takes_s())
        self._arbiter = arbiter
        self._carried_s = start_s
        self._ahead = 0.0
        """Bytes that were granted, and that the model has not carried yet at `_carried_s`."""
        self._bytes = 0
        """Granted on these links."""
        self._leg_s = start_s
        """Since when it is on these links."""
        self.open = True
        """Until it is closed."""

    def grant(self, nbytes: int, now_s: float, catch_up_s: float = 0.0) -> Grant:
        """When the next `nbytes` may go. A sender that is late may make up for `catch_up_s` (see `pace`)."""
        self._ahead += nbytes
        self._bytes += nbytes
        return super().grant(nbytes, now_s, catch_up_s)

    def _takes_s(self) -> float:
        """The latency of its links, with what faults add: of each that is asked once."""
        takes_s = 0.0
        for link in self.links:
            takes_s += link.latency_s
            for number, late_s in () if self._empty else link.late:
                added_s = self._late.get((link, number))
                if added_s is None:
                    added_s = self._late[link, number] = late_s()
                takes_s += added_s
        return takes_s

    def look_at_latency(self, now_s: float) -> None:
        """Its links may take longer than they did, or less (called by the arbiter)."""
        latency_s = self._takes_s()
        if latency_s != self.latency_s:
            self._change_latency(latency_s, now_s)

    def change_rate(self, bytes_per_s: float, now_s: float) -> None:
        """Go on at another rate (called by the arbiter)."""
        self._carry(now_s)
        super().change_rate(bytes_per_s, now_s)

    def begin_at(self, start_s: float) -> None:
        """See `Schedule` (called by the arbiter)."""
        self._carried_s += start_s - self.start_s
        if self._leg_s == self.start_s:
            self._leg_s = start_s
        super().begin_at(start_s)

    def _carry(self, now_s: float) -> None:
        if self._ahead:
            carried = min(self._ahead, max(now_s - self._carried_s, 0.0) * self.bytes_per_s)
            self._ahead -= carried
            self._carried_s += carried / self.bytes_per_s

    def change_links(self, links: tuple[Link, ...], now_s: float) -> None:
        """Go on over other links; without any, wait for some (called by the arbiter). What was carried stays with those that did."""
        if self.stalled and not links:
            return  # it waits still, since when it did
        if waited := self.stalled:
            self._carried_s = max(self._carried_s, now_s)
            self._put_off(now_s)
        else:
            self._carry(now_s)
            self._record(int(self._bytes - self._ahead), now_s, now_s)
            self._bytes = math.ceil(self._ahead)
        self.links = links
        self.stalled = not links
        if links:
            self.look_at_latency(now_s)
        self._leg_s = now_s
        if waited or self.stalled:
            self._tell()

    @property
    def there_s(self) -> float:
        """See `Pacer`; nobody knows while something waits for a link to leave by: infinite."""
        return math.inf if self.stalled and self._waits else max(self.last.arrive_s, self._old_way_s)

    @property
    def _waits(self) -> bool:
        """Whether the last that was granted had not left when it came to these links, or lost its own."""
        return self.last.start_s > self._leg_s and self.last.arrive_s > -math.inf

    def _put_off(self, now_s: float) -> None:
        """It was stalled until now: what has not left, and other chunks may be before the last, is later by what it would have gone on."""
        start_s, finish_s, arrive_s = self.last
        if self._waits:
            late_s = max(now_s - max(self._leg_s, self.start_s), 0.0)
            self.last = Grant(start_s + late_s, finish_s + late_s, arrive_s + late_s)
        else:
            self.last = Grant(start_s, max(finish_s, now_s), arrive_s)

    def _record(self, nbytes: int, due_s: float, now_s: float) -> None:
        for link in self.links if nbytes else ():
            link.record(nbytes, self._leg_s, due_s, now_s)

    @property
    def granted(self) -> bool:
        """Whether anything was granted on the links that it is on."""
        return self._bytes > 0

    @property
    def due_s(self) -> float:
        """When everything granted so far is there, at the present rate, on the model's links."""
        return self._carried_s + self._ahead / self.bytes_per_s + self.latency_s

    def close(self, now_s: float) -> None:
        """Everything has arrived (or never will): the links are free for others. Closing twice does nothing."""
        if not self.open:
            return
        self.open = False
        self._arbiter.closed(self, now_s)
        self._record(self._bytes, self.due_s, now_s)


Direction: TypeAlias = tuple[str, bool]
"""A link by name, and whether it is crossed from its end a to its end b."""


@dataclass(frozen=True)
class LinkChange:
    """What a fault does to links in some `directions`: a `factor` of their bandwidth is left, they take longer, or are `down` (both ways).

    `late_s` is asked once of each transfer that crosses such a link: how many seconds longer it takes.
    """

    directions: frozenset[Direction]
    factor: float = 1.0
    late_s: Callable[[], float] | None = None
    down: bool = False


class Arbiter:
    """The links of one machine."""

    def __init__(self, topology: Topology) -> None:
        self._routes = Routes(topology)
        self._links: dict[tuple[str, bool], Link] = {}
        for spec in topology.links:
            self._links[spec.name, True] = Link(spec.name, spec.a, spec.b, spec.capacity_bytes_per_s(True), spec.latency_s)
            self._links[spec.name, False] = Link(spec.name, spec.b, spec.a, spec.capacity_bytes_per_s(False), spec.latency_s)
        self._flows: list[Flow] = []
        self._stalled: list[Flow] = []
        self._topology = topology
        self._changes: dict[int, LinkChange] = {}
        self.changed = 0
        """How often links have changed: who keeps routes looks whether they are still good."""
        self.turns = Turns()
        """Who waits on the links without a flow, or for a flow to begin."""

    def change(self, number: int, change: LinkChange | None, now_s: float) -> None:
        """From now on `change` holds under `number`; None: no more.

        Transfers under way keep their way unless a link of it is down; then they take another, or wait for one.
        """
        if change is None:
            self._changes.pop(number, None)
        else:
            self._changes[number] = change
        down: set[str] = set()
        slower: dict[Link | Schedule, float] = {}
        rates = [(flow, flow.bytes_per_s) for flow in (*self._flows, *self._stalled)]
        for spec in self._topology.links:
            for forward in (True, False):
                link = self._links[spec.name, forward]
                held = {number: one for number, one in self._changes.items() if (spec.name, forward) in one.directions}
                capacity = spec.capacity_bytes_per_s(forward) * math.prod(one.factor for one in held.values())
                if capacity != link.capacity_bytes_per_s:
                    slower[link] = link.capacity_bytes_per_s / capacity
                    link.capacity_bytes_per_s = capacity
                link.late = tuple((number, one.late_s) for number, one in held.items() if one.late_s is not None)
                if any(one.down for one in held.values()):
                    down.add(spec.name)
        left = [spec for spec in self._topology.links if spec.name not in down]
        self._routes = Routes(replace(self._topology, links=tuple(left)) if down else self._topology)
        self.changed += 1
        self._reroute(down, now_s)
        for flow in self._flows:
            flow.look_at_latency(now_s)
        if self._flows:
            self._share(now_s)
        self.turns.follow(slower | {flow: before / flow.bytes_per_s for flow, before in rates}, now_s)

    def _reroute(self, down: set[str], now_s: float) -> None:
        """Flows over links that are `down` take others if they can; those that wait go on where they can."""
        broken = [flow for flow in self._flows if any(link.name in down for link in flow.links)]
        for flow in [*broken, *self._stalled]:
            hops = self._routes.find(flow.source, flow.target) or ()
            self._leave(flow)
            flow.change_links(tuple(self._links[hop.link.name, hop.forward] for hop in hops), now_s)
            self._join(flow)

    def _join(self, flow: Flow) -> None:
        (self._stalled if flow.stalled else self._flows).append(flow)
        for link in flow.links:
            link.flows += 1

    def _leave(self, flow: Flow) -> None:
        (self._stalled if flow.stalled else self._flows).remove(flow)
        for link in flow.links:
            link.flows -= 1

    def route(self, source: str, target: str) -> tuple[Link, ...]:
        """The links from `source` to `target`, by name of memory node or device. Raises TopologyError; Unreachable while links are down."""
        hops = self._routes.find(source, target) if self._changes else self._routes.route(source, target)
        if hops is None:
            raise Unreachable(f'no link that works leads from "{source}" to "{target}": links are down')
        return tuple(self._links[hop.link.name, hop.forward] for hop in hops)

    def open_flow(self, source: str, target: str, now_s: float, *, empty: bool = False) -> Flow:
        """A transfer begins; the rates of all flows it meets change. Raises TopologyError when there is no route.

        `empty`: nothing will cross by it; it takes the room of what crosses otherwise.
        """
        links = self.route(source, target)
        flow = Flow(self, source, target, links, max([now_s, *(link.free_s for link in links)]), empty=empty)
        if flow.start_s > now_s and not empty:
            self.turns.add(Start(flow), now_s)
        if links:
            self._join(flow)
            if any(link.flows > 1 for link in links):
                self._share(now_s)
            else:  # it meets nobody, as mostly
                flow.change_rate(min(link.capacity_bytes_per_s for link in links), now_s)
        return flow

    def closed(self, flow: Flow, now_s: float) -> None:
        """`flow` is over (called by it)."""
        if flow.links or flow.stalled:
            self._leave(flow)
            if any(link.flows for link in flow.links):
                self._share(now_s)

    def _share(self, now_s: float) -> None:
        for flow, rate in zip(self._flows, max_min_rates([flow.links for flow in self._flows]), strict=True):
            flow.change_rate(rate, now_s)

    def due(self, by_s: float) -> list[Flow]:
        """Flows that are open, though all that they were granted is there by then."""
        return [flow for flow in self._flows if flow.granted and flow.due_s <= by_s]

    def report(self) -> list[LinkReport]:
        """Both directions of every link, in the order of the topology."""
        return [link.report() for link in self._links.values()]


def max_min_rates(routes: list[tuple[Link, ...]]) -> list[float]:
    """The max-min fair rate of each route, by progressive filling; infinite for a route without links."""
    rates = [float("inf")] * len(routes)
    room: dict[int, float] = {}
    users: dict[int, set[int]] = {}
    for flow, links in enumerate(routes):
        for link in links:
            room[id(link)] = link.capacity_bytes_per_s
            users.setdefault(id(link), set()).add(flow)
    while users:
        tightest = min(users, key=lambda link: room[link] / len(users[link]))
        share = room[tightest] / len(users[tightest])
        for flow in sorted(users[tightest]):
            rates[flow] = share
            _fix(flow, share, dict.fromkeys(id(link) for link in routes[flow]), room, users)
    return rates


def _fix(flow: int, share: float, links: Iterable[int], room: dict[int, float], users: dict[int, set[int]]) -> None:
    """`flow` gets `share`, for good: take it from the room of its links."""
    for link in links:
        room[link] = max(room[link] - share, 0.0)
        users[link].discard(flow)
        if not users[link]:
            del users[link]
