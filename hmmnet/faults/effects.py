"""What faults come down to: the few things that can be done to a machine, whichever world it runs in.

A named fault of the catalogue is a list of effects (`Kind.effects`). Besides faults at points (`injector.PointFault`) and of messages
(`messages.MessageFault`) there are these four. Who carries them out: `hmmnet.host.injection` at the host, `hmmnet.devices.injection` at a
device, and for nodes the world that runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

from hmmnet.errors import WrongUse

from .controls import Controls
from .injector import PointFault
from .messages import TELLING, MessageFault
from .points import NARROWING, Narrowing, matching


class InVain(WrongUse):
    """What a fault would be done to at once is not there: nothing happens."""


@dataclass(frozen=True)
class LinkEffect:
    """Links carry `factor` of what they could, or nothing (`down`); each transfer that `controls` choose takes longer.

    By `latency_s`, and by chance up to `jitter_s` more. `link` is a pattern of names, or a way (``gpu0->host``): see `targets.directions`.
    `peers`: only those from device to device.
    """

    link: str
    factor: float = 1.0
    latency_s: float = 0.0
    jitter_s: float = 0.0
    down: bool = False
    peers: bool = False
    controls: Controls = field(default_factory=Controls)


@dataclass(frozen=True)
class HostEffect:
    """The host does `deed`, at each occurrence of `point` that `controls` choose (empty: at once), to who is concerned there.

    `process` (0: whoever reaches the point) and addresses [`start`, `end`) (empty: what is concerned there) narrow it, as in `PointFault`;
    at a point that tells no process (or no addresses: `told_at`) they are whose deed it is, and what it is done to, whoever is there.
    Raises HmmnetError when no point is called so.
    """

    deed: str
    point: str = ""
    device: str = "*"
    process: int = 0
    start: int = 0
    end: int = 0
    controls: Controls = field(default_factory=Controls)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.point:
            matching(self.point)


@dataclass(frozen=True)
class DeviceEffect:
    """Devices whose names match do `deed`."""

    deed: str
    device: str = "*"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeEffect:
    """Nodes whose names match (``host``: the host) suffer `deed`, at once."""

    deed: str
    node: str = "*"
    settings: Mapping[str, Any] = field(default_factory=dict)


Effect: TypeAlias = PointFault | MessageFault | LinkEffect | HostEffect | DeviceEffect | NodeEffect


STARTING = frozenset({"bounce", "revive"})
"""What has devices start, also those that have ended."""
AT_ADDRESSES = frozenset({"fork", "mprotect", "mremap", "munmap", "madvise", "poison"})
"""What the host does to addresses, or about them: any of its deeds is that of a process."""
NOT_OF_PROCESSES = frozenset({"corrected"})


def narrowed_by(effect: Effect) -> frozenset[Narrowing]:
    """What narrows it: only what it is on, only some processes', only at some addresses, only for one event of the notifier."""
    if isinstance(effect, PointFault):
        return told_at(effect.point, effect.action)
    if isinstance(effect, MessageFault) and effect.message == TELLING:
        return frozenset({"device", "process", "range"})
    if not isinstance(effect, HostEffect) or effect.deed in NOT_OF_PROCESSES:
        return frozenset({"device"})
    its_own: set[Narrowing] = {"process", "range"} if effect.deed in AT_ADDRESSES else {"process"}
    return frozenset(its_own) | (told_at(effect.point, "call") if effect.point else frozenset())


@cache
def told_at(pattern: str, action: str) -> frozenset[Narrowing]:
    """What is told, of what is concerned, at some of the points that are meant."""
    told = {one for point in matching(pattern) if action in point.actions for one in point.tells}
    return frozenset(one for one in NARROWING if one in told)


def why_not_narrowed(effect: Effect) -> str:
    """Why something does not narrow it, which it could be told."""
    if isinstance(effect, PointFault) or (isinstance(effect, HostEffect) and effect.point):
        return f'"{effect.point}" does not tell it'
    if isinstance(effect, MessageFault):
        return f"messages do not tell it, but for {TELLING}"
    if isinstance(effect, HostEffect):
        return "it is done at once, to the whole"
    return f"it happens to a whole {'link' if isinstance(effect, LinkEffect) else 'device or node'}"


def has_occurrences(effect: Effect) -> bool:
    """Whether it happens now and then, so that controls can choose when; what is not so is done at once, or a state that lasts."""
    if isinstance(effect, LinkEffect):
        return bool(effect.latency_s or effect.jitter_s)
    if isinstance(effect, HostEffect):
        return bool(effect.point)
    return isinstance(effect, PointFault | MessageFault)


def does_nothing(effect: Effect) -> bool:
    """Whether all is as without it, wherever and how often it happens."""
    if isinstance(effect, LinkEffect):
        return effect.factor == 1 and not (effect.down or effect.latency_s or effect.jitter_s)
    if isinstance(effect, PointFault):
        return effect.action == "delay" and not (effect.delay_s or effect.jitter_s)
    if isinstance(effect, MessageFault):
        return effect.kind in ("delay", "reorder") and not (effect.latency_s or effect.jitter_s)
    return effect.settings.items() >= _NOTHING.get(effect.deed, {"": ""}).items()


_NOTHING: dict[str, dict[str, float]] = {
    "clock": {"jump": 0, "skew": 1},
    "corrected": {"count": 0},
    "disk": {"latency": 0},
    "retire": {"pages": 0},
}
"""Settings with which deeds of hosts and devices change nothing."""
