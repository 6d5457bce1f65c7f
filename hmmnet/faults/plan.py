"""Plans: lists of faults, as a TOML file or made in Python.

[[fault]]
kind = "loss"              # a name in FAULTS
on = "gpu*<->host"         # who and which direction; default: everybody, both
channel = "control"        # or "bulk"; default: any
probability = 0.05         # and interval, times, space, nth: see Controls
latency = "5 ms"           # of delay and reorder
jitter = "1 ms"
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from hmmnet.errors import HmmnetError
from hmmnet.units import parse_time

from .controls import Controls
from .messages import Channel, MessageFault, Way


class _Entry(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One ``[[fault]]``."""

    kind: str
    on: str = "*<->host"
    channel: Channel = "any"
    probability: float = 1.0
    interval: int = 1
    times: int = -1
    space: int = 0
    nth: int = 0
    latency: str = "0 s"
    jitter: str = "0 s"


class _File(msgspec.Struct, forbid_unknown_fields=True):
    fault: list[dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """Faults that act together."""

    faults: Sequence[MessageFault] = ()

    @classmethod
    def parse(cls, text: str, file: str = "plan.toml") -> Plan:
        """The plan in `text`. Raises HmmnetError that names every fault of the file that cannot be used, and why."""
        try:
            entries = msgspec.convert(tomllib.loads(text), _File).fault
        except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
            raise HmmnetError(f"{file}: {error}") from None
        faults, mistakes = [], []
        for number, entry in enumerate(entries, 1):
            try:
                faults.append(_fault(msgspec.convert(entry, _Entry)))
            except (msgspec.ValidationError, HmmnetError, ValueError) as error:
                mistakes.append(f"{file}: fault {number}: {error}")
        if mistakes:
            raise HmmnetError("\n".join(mistakes))
        return cls(faults)

    def as_toml(self) -> str:
        """A file that `parse` reads as this plan."""
        return "\n".join(_as_toml(fault) for fault in self.faults)


def _fault(entry: _Entry) -> MessageFault:
    controls = Controls(entry.probability, entry.interval, entry.times, entry.space, entry.nth)
    way = Way.parse(entry.on, entry.channel)
    return MessageFault(entry.kind, way, controls, parse_time(entry.latency), parse_time(entry.jitter))


def _as_toml(fault: MessageFault) -> str:
    arrow = "<->" if fault.way.to_device and fault.way.to_host else "->" if fault.way.to_host else "<-"
    lines = ["[[fault]]", f'kind = "{fault.kind}"', f'on = "{fault.way.device}{arrow}host"']
    if fault.way.channel != "any":
        lines.append(f'channel = "{fault.way.channel}"')
    for name in Controls.__dataclass_fields__:
        value = getattr(fault.controls, name)
        if value != Controls.__dataclass_fields__[name].default:
            lines.append(f"{name} = {value!r}")
    for key, seconds in (("latency", fault.latency_s), ("jitter", fault.jitter_s)):
        if seconds:
            lines.append(f'{key} = "{seconds * 1e9:.12g} ns"' if seconds < 1 else f'{key} = "{seconds:.12g} s"')
    return "\n".join(lines) + "\n"
