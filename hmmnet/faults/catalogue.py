"""The catalogue: every kind of fault by name, and how one is made from what a file, a command line or a test says.

Mistakes are found here, all of them, before anything is done: kinds and parameters that there are not (with what was probably meant),
values that are wrong, targets that nothing can be, and what the world at hand cannot do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeAlias

from hmmnet.errors import HmmnetError, WrongUse
from hmmnet.topology.problems import did_you_mean
from hmmnet.units import parse_size, show_time

from . import allocation, clocks, copying, device_faults, memory_errors, nodes, notifier, process_events, stepping, wires
from .controls import Controls
from .effects import does_nothing
from .injector import Unfit
from .kinds import Fault, Kind, Parameter
from .messages import HOST, Way, is_way
from .points import NARROWING

Mistake: TypeAlias = tuple[str, str]
"""A field, or nothing when it is the whole, and what is wrong with it."""
KINDS: dict[str, Kind] = {
    kind.name: kind
    for family in (wires, copying, allocation, memory_errors, notifier, stepping, device_faults, process_events, nodes, clocks)
    for kind in family.KINDS
}
"""Every kind by name."""

CONTROLS: dict[str, Parameter] = {
    "probability": Parameter("probability", "number", "of each occurrence, 0 to 1", 1.0),
    "interval": Parameter("interval", "count", "at most every so-manyth occurrence", 1),
    "times": Parameter("times", "text", "at most so often; -1: without end", -1),
    "space": Parameter("space", "size", "not before so many bytes (or occurrences) have passed", 0),
    "nth": Parameter("nth", "count", "the one occurrence that fails", 0),
}
"""The kernel's controls (see `Controls`), which every kind has that happens now and then (`Kind.controlled`)."""
TARGETS: dict[str, Parameter] = {
    "on": Parameter("on", "text", "devices, messages, links or nodes, by pattern", ""),
    "process": Parameter("process", "count", "only this process (0: any), where it is told whose", 0),
    "range": Parameter("range", "text", "only these addresses, such as 0x7f0000000000+64KiB", ""),
    "after": Parameter("after", "time", "begins so long after it was added (emulated)", 0.0),
    "lasts": Parameter("lasts", "time", "ends so long after it began (0: when it is removed)", 0.0),
}
"""Whom it concerns and when, which every kind has."""
COUNTED = (
    "one simulated machine counts once for all; of real processes the host and each device count for themselves: times=1 is once in each"
)
"""How the controls count."""
DOWN_S_MAX = 3600.0
"""Emulated seconds that a device may stay away before it starts again: what is over once it has begun stands in no list of faults."""
LANES = 16
"""Of a link's, as `link.lanes` counts."""
_EVERYBODY = {"way": "*<->host", "nothing": ""}
_RANGE = re.compile(r"\s*(0x[0-9a-fA-F]+|[0-9]+)\s*\+\s*(.+?)\s*")


def kind_named(name: str) -> Kind:
    """The kind called `name`. Raises HmmnetError."""
    found = KINDS.get(name)
    if found is None:
        raise WrongUse(f'no fault is called "{name}"; {did_you_mean(name, KINDS, "`hmmnet fault kinds` lists them")}')
    return found


def fault(kind: str, on: str = "", **given: Any) -> Fault:
    """One fault: ``fault("copy.corrupt", "gpu0", probability=0.1, direction="to_host")``. Raises HmmnetError with every mistake."""
    made, found = checked(kind, {"on": on, **given} if on else given)
    if made is None:
        raise WrongUse(f"fault {kind}: " + "; ".join(f"{field}: {cause}" if field else cause for field, cause in found))
    return made


def checked(kind: str, given: Mapping[str, Any]) -> tuple[Fault | None, list[Mistake]]:
    """The fault that is described so, unless something is wrong with it; and everything that is."""
    try:
        found = kind_named(kind)
    except HmmnetError as error:
        return None, [("kind", str(error))]
    known, read = _known(kind), dict[str, Any]()
    mistakes: list[Mistake] = []
    for name, value in given.items():
        if name not in known:
            mistakes.append((name, f"there is no such parameter; {did_you_mean(name, known, 'it has ' + ', '.join(known))}"))
            continue
        try:
            read[name] = _read(known[name], value)
        except ValueError as error:
            mistakes.append((name, str(error)))
    mistakes += [(one.name, f"missing: {one.what}") for one in found.parameters if one.default is None and one.name not in given]
    at_point = bool(given.get("point"))
    wrong = _amiss(found, read, at_point=at_point) + _uncontrolled(found, read, at_point=at_point)
    mistakes += wrong or _idle(found, read, at_point=at_point)
    if mistakes:
        return None, mistakes
    try:
        made = _made(found, read)
    except Unfit as error:
        return None, [(error.parameter if found.parameter(error.parameter) else "", str(error))]
    except HmmnetError as error:
        return None, [("", str(error))]
    wide = _not_narrowed(made)
    return (None, wide) if wide else (made, [])


def _not_narrowed(made: Fault) -> list[Mistake]:
    """Processes, addresses and events to which it cannot be narrowed."""
    found: list[Mistake] = []
    narrow = {"process": made.process, "range": made.end > made.start, "event": made.settings.get("event")}
    for name in NARROWING:  # what it is on is looked at with the machine: `targets`
        why = made.not_narrowed_by(name) if narrow.get(name) else ""
        if why:
            only = made.kind.narrowed_with(name)
            found.append((name, f"{why}; leave it out{f', or give {only}' if only else ''}"))
    return found


def _uncontrolled(kind: Kind, read: Mapping[str, Any], *, at_point: bool) -> list[Mistake]:
    """The controls of what has no occurrences; ``times = 1`` is true of what happens at once."""
    given = [name for name, control in CONTROLS.items() if read.get(name, control.default) != control.default]
    if not given or _controllable(kind, at_point=at_point):
        return []
    why = kind.why_uncontrolled
    if kind.nowhere:
        return [("kind", why)]
    if kind.once or kind.controlled == "with point":
        return [(name, f"{why}; leave it out") for name in given if (name, read[name]) != ("times", 1)]
    return [(name, f"{why}; leave it out, or say after and lasts") for name in given]


def _controllable(kind: Kind, *, at_point: bool) -> bool:
    return kind.controlled == "always" or (at_point and kind.controlled == "with point")


def _amiss(kind: Kind, read: Mapping[str, Any], *, at_point: bool) -> list[Mistake]:
    """What is wrong with values each of which could be read."""
    found: list[Mistake] = []
    for name in CONTROLS:
        try:
            Controls(**({name: read[name]} if name in read else {}))
        except HmmnetError as error:
            found.append((name, str(error).removeprefix(f"{name} ")))
    if _controllable(kind, at_point=at_point) and not read.get("nth"):
        never = [name for name in ("probability", "times") if read.get(name, 1) == 0]
        found += [(name, "0: it never happens; leave the fault out, or say how often") for name in never]
    if read.get("on") and (kind.on == "way" or (kind.on == "link" and is_way(read["on"]))):
        found += [("on", cause) for cause in _wrong_way(kind, read["on"])]
    factor, lanes, entries = read.get("factor", 1.0), read.get("lanes", 1), read.get("entries", 1)
    if kind.name == "clock.skew" and not factor > 0:
        found.append(("factor", f"{factor:g} where more than 0 is wanted"))
    if kind.name == "link.slow" and not 0 < factor <= 1:
        found.append(("factor", f"{factor:g} where a part is wanted, above 0 and at most 1; to take a link away there is link.down"))
    if kind.needs_range and not at_point and not _covers(read.get("range", (0, 0))):
        why = "nothing else says" if kind.parameter("point") is None else "without a point it is done at once, and nothing else says to"
        found.append(("range", f"missing: {why} which addresses, such as 0x7f0000000000+64KiB"))
    if not 0 < lanes <= LANES:
        found.append(("lanes", f"{lanes} where 1 to {LANES} are wanted"))
    if not entries:
        found.append(("entries", "0 where at least 1 is wanted"))
    return found


def _idle(kind: Kind, read: Mapping[str, Any], *, at_point: bool) -> list[Mistake]:
    """Values with which nothing can happen, or others mean nothing; each is right by itself."""
    found: list[Mistake] = []
    others = [name for name, one in CONTROLS.items() if read.get(name, one.default) not in (one.default, *([1] if name == "times" else []))]
    if read.get("nth"):
        why = "nth is the one occurrence at which it happens, whatever else is said; leave one of the two out"
        found += [(name, why) for name in others if name != "nth"]
    at_once = kind.once or (not at_point and getattr(kind.parameter("point"), "default", None) == "")
    if read.get("lasts") and at_once:
        found.append(("lasts", "it happens once, as it begins, and has no end; leave it out"))
    if read.get("down", 0) > DOWN_S_MAX:
        found.append(("down", f"more than {show_time(DOWN_S_MAX)}, which nobody waits for; give less, or have it crash"))
    if kind.name == "alternate" and read.get("to") and read["to"] == read.get("on"):
        found.append(("to", f'"{read["to"]}" is the device that it is on; name another'))
    times = [one for one in (*TARGETS.values(), *kind.parameters) if one.form in ("time", "number")]
    return found + [(one.name, f"{read[one.name]:g} where a finite one is wanted") for one in times if math.isinf(read.get(one.name, 0))]


def _wrong_way(kind: Kind, on: str) -> Iterator[str]:
    try:
        way = Way.parse(_as_way(on))
    except HmmnetError as error:
        yield str(error)
        return
    if kind.name == "link.down" and not (way.to_device and way.to_host):
        yield f'a link is down in both directions; write {way.device}<->{HOST}, or have the messages stop: "partition"'
    if kind.name == "p2p.suspend":
        yield "links from device to device are on no way to the host; leave it out, or name links"


def _covers(addresses: tuple[int, int]) -> bool:
    start, end = addresses
    return end > start


def _as_way(on: str) -> str:
    """A device alone is both ways."""
    return on if is_way(on) else f"{on}<->{HOST}"


@cache
def _known(kind: str) -> dict[str, Parameter]:
    """By name, all that can be said of a fault of that kind."""
    return {**CONTROLS, **TARGETS, **{one.name: one for one in KINDS[kind].parameters}}


def _read(parameter: Parameter, value: Any) -> Any:
    if parameter is CONTROLS["times"]:
        try:
            return _whole(value)
        except (ValueError, TypeError):
            raise ValueError(f"{value!r} where a whole number is wanted") from None
    if parameter is TARGETS["range"]:
        return _range(value)
    return parameter.read(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool | float):
        raise TypeError
    return int(value)


def _range(value: Any) -> tuple[int, int]:
    """(first address, the address behind) of ``ADDRESS+LENGTH``."""
    found = _RANGE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"{value!r} where addresses are wanted, such as 0x7f0000000000+64KiB")
    start = int(found[1], 0)
    length = int(found[2], 0) if found[2].isdigit() else parse_size(re.sub(r"(?<=\d)(?=[A-Za-z])", " ", found[2]))
    if not length:
        raise ValueError(f"{value!r} is empty, and would narrow nothing; give a length above 0, or leave it out")
    return start, start + length


def _made(kind: Kind, read: Mapping[str, Any]) -> Fault:
    """One fault, of what was `_read`. Raises Unfit or HmmnetError for values that do not go together."""
    controls = Controls(**{name: read[name] for name in CONTROLS if name in read})
    settings = {one.name: read.get(one.name, one.default) for one in kind.parameters}
    start, end = read.get("range", (0, 0))
    on = read.get("on") or _EVERYBODY.get(kind.on, "*")
    if kind.on == "way":
        on = Way.parse(_as_way(on)).text
    made = Fault(kind, on, controls, settings, read.get("process", 0), start, end, read.get("after", 0.0), read.get("lasts", 0.0))
    effects = kind.makes(made)  # which is where it shows
    if effects and all(map(does_nothing, effects)):
        much = [one for one in kind.parameters if one.form in ("time", "number", "count")]
        given = " and ".join(f"{one.name} {one.text(settings[one.name])}" for one in much)
        raise Unfit(much[0].name, f"with {given} it does nothing; leave the fault out, or say how much")
    return made


def as_given(one: Fault) -> dict[str, Any]:
    """What makes `one` again: ``fault(**as_given(one))``. Plain data, for messages and files."""
    given: dict[str, Any] = {"kind": one.kind.name, "on": one.on}
    given |= {name: value for name in CONTROLS if (value := getattr(one.controls, name)) != CONTROLS[name].default}
    given |= {p.name: one.settings[p.name] for p in one.kind.parameters if one.settings[p.name] != p.default}
    if one.process:
        given["process"] = one.process
    if one.end > one.start:
        given["range"] = f"0x{one.start:x}+{one.end - one.start}"
    if one.after_s:
        given["after"] = one.after_s
    if one.lasts_s:
        given["lasts"] = one.lasts_s
    return given
