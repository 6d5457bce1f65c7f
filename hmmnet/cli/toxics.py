"""The words of ``hmmnet fault add TARGET NAME=VALUE...``: what each toxic comes down to on a machine of real processes.

TARGET is a device, a way (``gpu0<->host``, ``gpu0->host``, ``host->gpu0``) or a link of the topology, by its name or, where it joins two
devices, by them (``gpu0<->gpu1``: every link between the two).
Latency and bandwidth are those of links: of a way the device's own, at which its routes to the host's memories begin; of a device all that
end at it. So they concern whatever crosses such a link, and nothing that goes another way. (The fault ``delay`` has messages themselves
late, in real time, those of the protocol too.) Loss and the like happen to messages.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from hmmnet.errors import HmmnetError, WrongUse
from hmmnet.faults.catalogue import CONTROLS, TARGETS
from hmmnet.faults.messages import HOST, Way, is_way
from hmmnet.topology.problems import did_you_mean
from hmmnet.units import show_time

CHANCES = ("loss", "duplicate", "reorder", "corrupt")
"""Toxics whose value is the part of the messages that suffer; each is a kind of the catalogue, too."""
TOXICS = ("latency", "jitter", "bandwidth", *CHANCES)
COUNTS = ("times", "interval")
WITH = (*COUNTS, "after", "lasts")
"""What may stand beside toxics, and holds for all of them; but bandwidth, which lasts, happens no number of times."""
NAMES_MAX = 12
"""So many names a message lists."""


@dataclass(frozen=True)
class Sights:
    """What a machine has, as its report says: devices, links with their two ends, how each device that is lost was; its clock's rate."""

    devices: tuple[str, ...]
    links: Mapping[str, frozenset[str]]
    lost: Mapping[str, str] = field(default_factory=dict)
    rate: float = 1.0

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Sights:
        """From a machine's report."""
        devices = report["devices"]
        links = {row["link"]: frozenset((row["source"], row["target"])) for row in report["links"]}
        lost = {name: row["last_loss"] for name, row in devices.items() if row["state"] == "lost"}
        return cls(tuple(devices), links, lost, report["rate"])

    def matching(self, pattern: str) -> tuple[str, ...]:
        """Devices whose names match. Raises HmmnetError when none does."""
        found = tuple(name for name in self.devices if fnmatchcase(name, pattern))
        if not found and self.is_link(pattern):
            raise WrongUse(
                f"{pattern} is a link, where a device is wanted: {', '.join(self.devices)}; `hmmnet fault partition` takes links"
            )
        if not found:
            known = [*self.devices, *self.links]
            guess = did_you_mean(pattern, known)
            there = "target is a device, DEVICE<->host or a link: " + ", ".join(known[:NAMES_MAX]) + (", ..." if known[NAMES_MAX:] else "")
            raise WrongUse(f'nothing here is called "{pattern}"; ' + (f"{guess} A {there}" if guess else f"a {there}"))
        return found

    def is_link(self, pattern: str) -> bool:
        """Whether a target is links."""
        return any(fnmatchcase(name, pattern) for name in self.links)

    def running(self, pattern: str, verb: str = "") -> tuple[str, ...]:
        """Of the devices whose names match, those that are not lost. Raises HmmnetError when none does, or all are: `verb` is what is to be
        done once one is started again.
        """
        matching = self.matching(pattern)
        running = tuple(name for name in matching if name not in self.lost)
        if not running:
            then = f"; do that first, then {verb} it" if verb else ""
            raise HmmnetError("\n".join(f"{name} does not run: {self.lost[name]}; {again(name)}{then}" for name in matching))
        return running

    def lost_by(self, faults: Sequence[Mapping[str, Any]]) -> list[str]:
        """Devices that are lost, and that one of `faults` was on."""
        named = [one.get("on", "") for one in faults]
        patterns = [Way.parse(on).device if is_way(on) else on for on in named]
        return [name for name in self.devices if name in self.lost and any(fnmatchcase(name, pattern) for pattern in patterns)]

    def between(self, target: str) -> tuple[str, ...]:
        """The links that ``gpu0<->gpu1`` means, all of them; any other target as it is, alone. Raises HmmnetError where none joins the two,
        and for one way.
        """
        ends = _TWO.fullmatch(target)
        if ends is None or "host" in ends.groups() or not {ends["a"], ends["b"]} <= set(self.devices):
            return (target,)
        both = frozenset((ends["a"], ends["b"]))
        found = [name for name, joined in self.links.items() if joined == both]
        if not found:
            known = ", ".join(name for name, joined in self.links.items() if joined & both)
            raise WrongUse(f"no link joins {ends['a']} and {ends['b']} alone; those at either are {known}")
        if ends["arrow"] != "<->":
            do = "joins" if len(found) == 1 else "join"
            same = "is what it is" if len(found) == 1 else "are what they are"
            raise WrongUse(
                f"{', '.join(found)} {do} {ends['a']} and {ends['b']}, and {same} in both directions; write {ends['a']}<->{ends['b']}"
            )
        return tuple(found)

    def links_meant(self, target: str) -> tuple[str, ...]:
        """The links that a target is, each to have a fault of its own; none where it is a device or a way. Raises HmmnetError."""
        return tuple(link for link in self.between(target) if not is_way(link) and self.is_link(link))

    def links_of(self, pattern: str) -> list[str]:
        """The links that end at devices whose names match."""
        devices = set(self.matching(pattern))
        return [name for name, ends in self.links.items() if ends & devices]


_TWO = re.compile(r"\s*(?P<a>[^\s<>]+?)\s*(?P<arrow><->|->|<-)\s*(?P<b>[^\s<>]+?)\s*")


def again(device: str) -> str:
    """How a lost device is had again."""
    return f"`hmmnet fault bounce {device}` starts it again, empty"


def waits(made: Mapping[str, Any], sights: Sights) -> str:
    """When, in real time, a device goes that a fault starts again, and for how long it stays away; nothing for any other fault."""
    from hmmnet.faults.catalogue import KINDS

    down = KINDS[made["kind"]].parameter("down")
    if down is None:
        return ""
    after_s = TARGETS["after"].read(made.get("after", 0)) / sights.rate
    down_s = down.read(made.get("down", down.default)) / sights.rate
    told = ([f"begins in {show_time(after_s)}"] if after_s else []) + ([f"away for {show_time(down_s)}"] if down_s else [])
    clock = f"{', '.join(told)} of real time: this machine's clock runs at {sights.rate:.2g} of it"
    return f" ({'; '.join(([clock] if told else []) + ([] if down_s else ['it starts again at once']))})"


def until(made: Mapping[str, Any], number: int) -> str:
    """What ends a fault that goes on, and happens to each, and whether it is to everything; nothing for any other."""
    from hmmnet.faults.catalogue import fault
    from hmmnet.faults.effects import has_occurrences
    from hmmnet.faults.kinds import EACH

    begun = fault(**made)
    if not begun.endless:
        return ""
    verb = next((verb for verb, kinds in UNDONE_BY.items() if made["kind"] in kinds), "")
    mend = f"{verb} {shlex.quote(made['on'])}" if verb and made.get("on") else f"rm {number}"
    each = "to each, " if not verb and any(map(has_occurrences, begun.effects)) else ""
    everything = begun.kind.holds.endswith(EACH) and not made.keys() - {"kind", "on"}
    return f" ({each}until `hmmnet fault {mend}`{': nothing gets through' if everything else ''})"


def is_target(word: str, rest: Sequence[str]) -> bool:
    """Whether `word` begins a line of toxics: it is a way, or toxics follow."""
    return is_way(word) or any(pair.partition("=")[0] in TOXICS for pair in rest)


def way_of(target: str, *, oneway: bool = False) -> Way:
    """The way that a target means; `oneway`: from the device to the host, where it does not say. Raises HmmnetError."""
    if target == HOST:
        raise WrongUse(f"the host is one end of every way; name the device at the other: DEVICE<->{HOST}, where * is each")
    way = Way.parse(target if is_way(target) else f"{target}{'->' if oneway else '<->'}host")
    if oneway and way.to_device and way.to_host:
        raise WrongUse(f'"{target}" is both ways; with --oneway write {way.device}->host or host->{way.device}')
    return way


def pairs_of(words: Sequence[str]) -> dict[str, str]:
    """Toxics and what stands beside them, by name. Raises HmmnetError with every mistake."""
    given: dict[str, str] = {}
    mistakes = []
    for word in words:
        name, sign, value = word.partition("=")
        if not sign:
            mistakes.append(f'"{word}" is no NAME=VALUE')
        elif name not in (*TOXICS, *WITH):
            known = [*TOXICS, *WITH]
            mistakes.append(f'there is no toxic "{name}"; {did_you_mean(name, known, "there are " + ", ".join(known))}')
        elif name in given:
            mistakes.append(f"{name} is given twice")
        else:
            given[name] = value
            mistakes += _wrong(name, value)
    counts = [name for name in COUNTS if name in given]
    if "bandwidth" in given and counts:
        mistakes.append(f"{' and '.join(counts)} cannot stand beside bandwidth: it lasts, and happens no number of times; make two faults")
    if not mistakes and not any(name in TOXICS for name in given):
        mistakes.append(f"what is to happen? Give one of {', '.join(TOXICS)}")
    if mistakes:
        raise WrongUse("; ".join(mistakes))
    return given


def part(value: str) -> float:
    """``5%`` or ``0.05``. Raises ValueError."""
    found = float(value[:-1]) / 100 if value.endswith("%") else float(value)
    if not 0 < found <= 1:
        raise ValueError
    return found


def _wrong(name: str, value: str) -> list[str]:
    if name in (*CHANCES, "bandwidth"):
        try:
            part(value)
        except ValueError:
            return [f"{name}: {value!r} where a part is wanted, such as 5% or 0.05"]
    elif name in ("latency", "jitter"):
        try:
            TARGETS["after"].read(value)
        except ValueError as error:
            return [f"{name}: {error}"]
    else:
        parameter = {**CONTROLS, **TARGETS}[name]
        try:
            int(value) if name == "times" else parameter.read(value)
        except ValueError as error:
            return [f"{name}: {value!r} is no whole number" if name == "times" else f"{name}: {error}"]
    return []


def faults_for(target: str, words: Sequence[str], sights: Sights) -> list[dict[str, Any]]:
    """What makes the faults that a line of toxics means on a machine. Raises HmmnetError with every mistake."""
    given = pairs_of(words)
    beside = {name: value for name, value in given.items() if name in WITH}
    links = sights.links_meant(target)
    if links:
        others = [name for name in given if name in CHANCES]
        if others:
            raise WrongUse(f"{', '.join(others)}: a link has latency, jitter and bandwidth only; messages are those of DEVICE<->host")
        return [made for link in links for made in _on_link(link, given, beside)]
    way = way_of(target)
    sights.matching(way.device)
    meant = [way.text] if is_way(target) else sights.links_of(target)
    made = [one for on in meant for one in _on_link(on, given, beside)]
    chances = [name for name in CHANCES if name in given]
    return made + [{"kind": name, "on": way.text, "probability": part(given[name]), **beside} for name in chances]


def _on_link(on: str, given: Mapping[str, str], beside: dict[str, str]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    if "latency" in given or "jitter" in given:
        times = {"latency": "0 ms"} | {name: given[name] for name in ("latency", "jitter") if name in given}
        made.append({"kind": "link.latency", "on": on, **times, **beside})
    if "bandwidth" in given:
        made.append({"kind": "link.slow", "on": on, "factor": str(part(given["bandwidth"])), **beside})
    return made


def cut(target: str, sights: Sights, *, oneway: bool) -> list[dict[str, Any]]:
    """What makes ``fault partition TARGET``: links are down, or no message passes. Raises HmmnetError."""
    links = sights.links_meant(target)
    if links and oneway:
        raise WrongUse(f"{links[0]} is a link, which is down in both directions; --oneway is for a device")
    if links:
        return [{"kind": "link.down", "on": link} for link in links]
    way = way_of(target, oneway=oneway)
    sights.running(way.device, "partition")
    return [{"kind": "partition", "on": way.text}]


def held(target: str, sights: Sights, *, oneway: bool) -> list[dict[str, Any]]:
    """What makes ``fault hold TARGET``: a device is stopped, so that what it is sent waits; in one direction messages wait."""
    way = way_of(target, oneway=oneway)
    sights.running(way.device, "hold")
    both = way.to_device and way.to_host
    return [{"kind": "hang", "on": way.device} if both else {"kind": "hold", "on": way.text}]


def _meet(target: str, on: str) -> bool:
    """Whether a fault that is on `on` is at `target`: ways of one device meet when they have a direction in common."""
    if not is_way(target) or not is_way(on):
        return (Way.parse(target).device if is_way(target) else target) == (Way.parse(on).device if is_way(on) else on) or target == on
    one, other = Way.parse(target), Way.parse(on)
    return one.device == other.device and ((one.to_device and other.to_device) or (one.to_host and other.to_host))


UNDONE_BY = {"repair": ("partition", "link.down"), "release": ("hold", "hang")}
"""The kinds that a verb ends."""


def ended_by(verb: str, targets: Sequence[str], faults: Sequence[Mapping[str, Any]]) -> list[int]:
    """The numbers of the faults that ``repair`` or ``release`` ends, at any of `targets`. Raises HmmnetError when there is none."""
    found = []
    for one in faults:
        kind, on = one["fault"]["kind"], one["fault"].get("on", "")
        if kind in UNDONE_BY[verb] and any(_meet(target, on) for target in targets):
            found.append(int(one["number"]))
    if not found:
        where, no = ", ".join(targets), " or ".join(UNDONE_BY[verb])
        raise HmmnetError(f"nothing to {verb} at {where}: no {no}; `hmmnet fault ls` shows what there is")
    return found
