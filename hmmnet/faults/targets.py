"""Whom a fault is on: whether a machine has what is called so, and whether the world at hand sees the points that are meant.

Both worlds ask before a fault is added, also one that begins later, so that no fault waits for what never comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from hmmnet.errors import WrongUse
from hmmnet.pages import PAGE_SHIFT
from hmmnet.topology.problems import did_you_mean
from hmmnet.topology.routes import Routes

from .effects import DeviceEffect, Effect, HostEffect, LinkEffect, NodeEffect, told_at
from .injector import HOST, PointFault
from .kinds import Fault, World
from .messages import MessageFault, Way, is_way
from .points import matching
from .process_events import CHANGES

if TYPE_CHECKING:
    from hmmnet.topology.model import Topology

NAMES_MAX = 8
"""So many names a message lists."""


def check_target(fault: Fault, topology: Topology, world: World) -> None:
    """Raises HmmnetError with everything that is wrong with whom `fault` is on."""
    mistakes = target_mistakes(fault, topology, world)
    if mistakes:
        raise WrongUse("\n".join(f"fault {fault.kind.name}: {cause}" for cause in mistakes))


def target_mistakes(fault: Fault, topology: Topology, world: World) -> list[str]:
    """What is wrong with whom `fault` is on, for who says himself which fault it is."""
    return _wrong_targets(fault, topology, world) or list(_never_met(fault))


def _wrong_targets(fault: Fault, topology: Topology, world: World) -> list[str]:
    """What of it nothing of that machine is called, or `world` cannot do there."""
    causes = [cause for effect in fault.effects for cause in (*_unknown(effect, topology), *_out_of_reach(effect, world))]
    return list(dict.fromkeys(causes))


def _never_met(fault: Fault) -> Iterator[str]:
    """What it is narrowed to, or needs, and nobody tells where it would happen: it would wait for ever."""
    on = fault.on or next((effect.device for effect in fault.effects if isinstance(effect, PointFault)), "")
    points = [effect.point for effect in fault.effects if isinstance(effect, PointFault | HostEffect) and effect.point]
    why = "" if fnmatchcase("", on) else fault.not_narrowed_by("device")
    if why and points:
        yield f'on: "{points[0]}" tells no device, so that it would never happen on "{on}"; leave it out'
    elif why:
        yield f'on: {why}, so that "{on}" means nothing; leave it out'
    for effect in fault.effects:
        if not isinstance(effect, HostEffect) or effect.deed not in CHANGES or effect.end > effect.start or not effect.point:
            continue
        if "range" not in told_at(effect.point, "call"):
            yield f'range: missing: "{effect.point}" does not tell which addresses; give some, such as 0x7f0000000000+64KiB'


def _unknown(effect: Effect, topology: Topology) -> Iterator[str]:
    devices = topology.device_names
    if isinstance(effect, LinkEffect):
        yield from _no_links(effect, topology)
    elif isinstance(effect, NodeEffect):
        yield from _named("device", effect.node, [*devices, HOST])
    elif isinstance(effect, MessageFault):
        yield from _named("device", effect.way.device, devices)
    elif isinstance(effect, PointFault | HostEffect | DeviceEffect):
        yield from _named("device", effect.device, devices)
    if isinstance(effect, DeviceEffect) and "pages" in effect.settings:
        yield from _too_many(effect, topology)
    if isinstance(effect, PointFault) and effect.node:
        yield from _named("device", effect.node, devices, "node: ", exact=True)
    if isinstance(effect, HostEffect) and effect.settings.get("to"):
        yield from _named("device", str(effect.settings["to"]), devices, "to: ", exact=True)


def _too_many(effect: DeviceEffect, topology: Topology) -> Iterator[str]:
    """More pages than any of the devices that are meant has."""
    has = {one.name: one.memory_bytes >> PAGE_SHIFT for one in topology.devices if fnmatchcase(one.name, effect.device)}
    if has and effect.settings["pages"] > max(has.values()):
        most = max(has, key=has.__getitem__)
        yield f"pages: {effect.settings['pages']} where {most} has {has[most]}; give fewer"


def directions(effect: LinkEffect, topology: Topology) -> frozenset[tuple[str, bool]]:
    """What `effect` is on, each a link by name, and whether from its end a to its end b. Raises HmmnetError when there is none.

    Of a way these are devices' own links: those at which their routes to the host's memories begin, and those from there end.
    """
    wrong = list(_no_links(effect, topology))
    if wrong:
        raise WrongUse("; ".join(wrong))
    if is_way(effect.link):
        return _own_links(Way.parse(effect.link), topology)
    devices = set(topology.device_names)
    return frozenset(
        (link.name, forward)
        for link in topology.links
        if fnmatchcase(link.name, effect.link) and (not effect.peers or {link.a, link.b} <= devices)
        for forward in (True, False)
    )


def _own_links(way: Way, topology: Topology) -> frozenset[tuple[str, bool]]:
    routes, found = Routes(topology), set[tuple[str, bool]]()
    for device in topology.device_names:
        for node in topology.nodes if fnmatchcase(device, way.device) else ():
            out, back = routes.find(device, node.name), routes.find(node.name, device)
            if out and way.to_host:
                found.add((out[0].link.name, out[0].forward))
            if back and way.to_device:
                found.add((back[-1].link.name, back[-1].forward))
    return frozenset(found)


def _no_links(effect: LinkEffect, topology: Topology) -> Iterator[str]:
    if not is_way(effect.link):
        yield from _named("link", effect.link, [link.name for link in topology.links])
        return
    way = Way.parse(effect.link)
    unknown = list(_named("device", way.device, topology.device_names))
    yield from unknown
    if not unknown and not _own_links(way, topology):
        yield f"no links lead from {way.device} to the host's memories"


def _named(what: str, pattern: str, known: Sequence[str], field: str = "", *, exact: bool = False) -> Iterator[str]:
    """What is wrong with a name, or with a pattern of names."""
    if pattern in known or pattern == "*" or (not exact and any(fnmatchcase(name, pattern) for name in known)):
        return
    guess = did_you_mean(pattern, known)
    there = f"there are {', '.join(known[:NAMES_MAX])}{', ...' if len(known) > NAMES_MAX else ''}"
    yield f'{field}no {what} is called "{pattern}"; ' + (f"{guess} {there[0].upper()}{there[1:]}" if guess else there)


def _out_of_reach(effect: Effect, world: World) -> Iterator[str]:
    """What the host does it does at its own points, in every world; and what real processes, which pass their own, cannot."""
    if isinstance(effect, HostEffect) and effect.point and all(point.side == "device" for point in matching(effect.point)):
        yield f'"{effect.point}" is passed in a device\'s own process, where the host cannot act; give a point of the host'
    if world != "real":
        return
    other = isinstance(effect, PointFault) and effect.node not in ("", effect.device)
    if isinstance(effect, PointFault) and other and all(point.side == "device" for point in matching(effect.point)):
        yield f'"{effect.point}" is passed in a device\'s own process, which can {effect.action} nobody else; say on={effect.node}'
