"""How each kind of the catalogue is drawn: its parameters and how often it happens, and what it may cost; the standard campaign's table.

A kind without a recipe has a reason in `NOT_DRAWN`: a test holds both to the registry (`hmmnet.faults.KINDS`). What a fault may cost is the
oracle of the checkers: `TIME` excuses nothing, `ERRORS` excuses operations that are refused, `DEVICE` that a device is lost and with it
pages whose only copy it had. Kinds that end or change a process concern a *victim* (`victims`): a process that is there for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from hmmnet.faults import KINDS, fault
from hmmnet.faults.effects import told_at
from hmmnet.faults.kinds import Fault
from hmmnet.faults.points import HOSTS_OWN, POINTS, Point
from hmmnet.faults.process_events import ADVICE

from .words import VICTIM_ADDRESS, VICTIM_BYTES, VICTIM_PID_FIRST

Cost = Literal["time", "errors", "device"]
Settings = Callable[[Random], dict[str, Any]]
TIME: Cost = "time"
ERRORS: Cost = "errors"
DEVICE: Cost = "device"


@dataclass(frozen=True)
class Recipe:
    """`settings` makes controls and parameters. `ends`: it is removed after one of those virtual seconds, wherever it began; empty: when
    everything is healed, or it is over at once.
    """

    settings: Settings
    cost: Cost = TIME
    ends: tuple[float, ...] = ()
    victim: bool = False

    def draw(self, random: Random, name: str, devices: int, victim: int) -> Fault:
        """One fault of the kind `name` on a machine of so many devices; `victim` is the number of the process that it may concern."""
        given = self.settings(random)
        given.setdefault("on", _target(random, name, devices))
        if self.ends:
            given["lasts"] = random.choice(self.ends)
        if self.victim:
            given["process"] = VICTIM_PID_FIRST + victim
        if "node" in given:
            given["node"] = f"dev{random.randrange(devices)}"
        if name == "alternate":
            given["to"] = f"dev{random.randrange(devices)}"
            if given["to"] == given["on"]:
                given["on"] = "*"
        made = fault(name, **given)
        return made if made.on == "*" or not made.not_narrowed_by("device") else fault(name, **given | {"on": "*"})


def _target(random: Random, name: str, devices: int) -> str:
    """Whom it is on, of what its kind is for."""
    one, on = f"dev{random.randrange(devices)}", KINDS[name].on
    ways = (f"{one}<->host", f"{one}->host", f"host->{one}")
    if on == "way":
        return random.choice(("*<->host", *ways))
    if on == "link":
        targets: tuple[str, ...] = ("*", f"*{one}", *(ways if name in {"link.slow", "link.latency"} else ()))
        return random.choice(targets)
    if on == "node" and name != "reset":
        return one
    return random.choice(("*", one))


# --- settings ---------------------------------------------------------------------------------------------------------------------


def some(most: float, **ranges: tuple[float, float] | tuple[str, ...]) -> Settings:
    """It happens with a probability of at most `most`, or a few times, or at one occurrence; `ranges` are parameters: numbers or words."""

    def settings(random: Random) -> dict[str, Any]:
        return {**_controls(random, most), **_chosen(random, ranges)}

    return settings


def given(**ranges: tuple[float, float] | tuple[str, ...]) -> Settings:
    """It is there while it lasts."""
    return lambda random: _chosen(random, ranges)


def counted(name: str, *counts: int) -> Settings:
    """One parameter that is a whole number."""
    return lambda random: {name: random.choice(counts)}


def once(most: int, **ranges: tuple[float, float] | tuple[str, ...]) -> Settings:
    """It happens at one of the first so many occurrences."""
    return lambda random: {"nth": random.randint(1, most), **_chosen(random, ranges)}


def _controls(random: Random, most: float) -> dict[str, Any]:
    style, probability = random.random(), round(random.uniform(most / 50, most), 4)
    if style < 0.6:
        return {"probability": probability}
    if style < 0.8:
        return {"nth": random.randint(1, 30)}
    return {"probability": min(1.0, 3 * probability), "times": random.randint(1, 4), "interval": random.choice((1, 2, 3))}


def _chosen(random: Random, ranges: dict[str, Any]) -> dict[str, Any]:
    return {
        name: random.choice(choices) if isinstance(choices[0], str) else round(random.uniform(*choices), 6) or 1e-6
        for name, choices in ranges.items()
    }


def _message(most: float, **ranges: Any) -> Settings:
    """Of messages: any, control messages of one type, or chunks."""
    return some(most, **{"channel": ("any", "control", "bulk")} | ranges)


def _point(action: str, most: float, **ranges: tuple[float, float]) -> Settings:
    """At a protocol point that is reached while a machine runs; who dies at a point of the host's own is named later (`Recipe.draw`)."""
    able = [point.name for point in INSIDE if action in point.actions]
    lethal = action in {"crash", "hang"}

    def settings(random: Random) -> dict[str, Any]:
        point = random.choice(able)
        made = {"point": point, **({"nth": random.randint(1, 12)} if lethal else _controls(random, most)), **_chosen(random, ranges)}
        return made | ({"node": "", "on": "*"} if lethal and point.startswith(HOSTS_OWN) else {})

    return settings


def _deed(most: float, **ranges: tuple[str, ...]) -> Settings:
    """What happens to a process at a point of the host, or at once."""
    points = ["", *(point.name for point in INSIDE if point.side == "host" and point.waits)]

    def settings(random: Random) -> dict[str, Any]:
        point = random.choice(points)
        return {"point": point, "on": "*", **(_controls(random, most) if point else {}), **_chosen(random, ranges)}

    return settings


def _change(most: float, **ranges: tuple[str, ...]) -> Settings:
    """A deed that is done to addresses: at once, or at a point that tells none, to some of the victim's."""
    deed = _deed(most, **ranges)

    def settings(random: Random) -> dict[str, Any]:
        made, some_pages = deed(random), _pages(random, random.choice((1, 1, 2, VICTIM_PAGES)))
        return made if made["point"] and "range" in told_at(made["point"], "call") else made | {"range": some_pages}

    return settings


def _broken(random: Random) -> dict[str, Any]:
    return {"range": _pages(random, 1), "on": "*"}


def _pages(random: Random, pages: int) -> str:
    """So many of a victim."""
    first = random.randrange(VICTIM_PAGES - pages + 1)
    return f"0x{VICTIM_ADDRESS + first * 4096:x}+{pages * 4096}"


VICTIM_PAGES = VICTIM_BYTES // 4096
ADVISED: tuple[str, ...] = (*("DONTNEED",) * 4, *(one for one in ADVICE if one not in {"REMOVE", "COLLAPSE"}))
"""Of a victim, whose few private pages are neither a file's nor a huge page."""
INSIDE: tuple[Point, ...] = tuple(
    point for point in POINTS.values() if not point.name.startswith(("session.", "device.hello", "device.welcome"))
)
"""Points that are reached while a machine runs."""
BRIEF = (0.001, 0.02, 0.3)
"""Virtual seconds that nobody takes for a death."""
CUT = (0.01, 0.3, 1.0, 6.0)
"""Shorter and longer than a lease."""
LATE: dict[str, Any] = {"latency": (0.0, 0.01), "jitter": (0.0, 0.02)}
COPIES: dict[str, Any] = {"direction": ("both", "to_device", "to_host")}
SHAPES: dict[str, Any] = {"shape": ("bit", "burst", "swap")}
EVENTS: dict[str, Any] = {"event": ("", "", "unmap", "migrate")}

RECIPES: dict[str, Recipe] = {
    # messages
    "loss": Recipe(_message(0.03)),
    "delay": Recipe(_message(0.3, **LATE)),
    "reorder": Recipe(_message(0.3, **LATE)),
    "duplicate": Recipe(_message(0.3)),
    "corrupt": Recipe(some(0.2, **SHAPES)),
    "truncate": Recipe(_message(0.005), DEVICE),
    "garbage": Recipe(_message(0.005), DEVICE),
    "old_version": Recipe(some(0.005), DEVICE),
    "partition": Recipe(given(channel=("any", "any", "control", "bulk")), DEVICE, CUT),
    "hold": Recipe(given(), DEVICE, CUT),
    # copy engines and links
    "copy.slow": Recipe(some(0.5, **COPIES, latency=(0.0, 0.005))),
    "copy.stall": Recipe(some(0.3, **COPIES), ends=BRIEF),
    "copy.timeout": Recipe(some(0.1, **COPIES, latency=(0.0, 0.5)), ERRORS),
    "copy.error": Recipe(some(0.1, **COPIES), ERRORS),
    "copy.corrupt": Recipe(some(0.2, **COPIES, **SHAPES)),
    "copy.lost": Recipe(some(0.1, **COPIES)),
    "copy.duplicate": Recipe(some(0.3, **COPIES)),
    "copy.reorder": Recipe(some(0.3, **COPIES, jitter=(0.0, 0.01))),
    "link.slow": Recipe(given(factor=(0.001, 0.5)), ends=CUT),
    "link.lanes": Recipe(counted("lanes", 1, 2, 4, 8), ends=CUT),
    "link.latency": Recipe(some(1.0, latency=(0.0, 0.001), jitter=(0.0, 0.002)), ends=CUT),
    "link.down": Recipe(given(), ERRORS, BRIEF),
    "p2p.suspend": Recipe(lambda _: {"on": "*"}, ends=CUT),
    # allocation
    "alloc.device": Recipe(some(0.3), ERRORS),
    "alloc.device_large": Recipe(some(0.5)),
    "alloc.host": Recipe(some(0.03), ERRORS),
    "alloc.host_large": Recipe(some(0.5)),
    "alloc.home": Recipe(some(0.1), ERRORS),
    "alloc.page_cache": Recipe(some(0.1), ERRORS),
    "alloc.cgroup": Recipe(some(0.05), ERRORS),
    # memory
    "ecc.corrected": Recipe(counted("count", 1, 100)),
    "ecc.uncorrectable": Recipe(_broken, victim=True),
    "ecc.in_flight": Recipe(some(0.1), ERRORS),
    "page.retire": Recipe(counted("pages", 1, 4, 8)),
    "ecc.storm": Recipe(some(0.5, latency=(0.0, 0.0005))),
    # notifier
    "invalidate.lost": Recipe(some(0.2)),
    "invalidate.late": Recipe(some(0.5, **LATE)),
    "invalidate.duplicate": Recipe(some(0.5)),
    "invalidate.reorder": Recipe(some(0.5, **LATE)),
    "ack.lost": Recipe(some(0.1)),
    "invalidate.slow": Recipe(some(0.3, **LATE, **EVENTS)),
    "invalidate.silent": Recipe(once(20, **EVENTS), DEVICE, (0.1, 1.0, 9.0)),
    "invalidate.refused": Recipe(once(20, **EVENTS), DEVICE),
    "invalidate.wrong_owner": Recipe(some(0.5)),
    "invalidate.wide": Recipe(some(0.5, **EVENTS)),
    "invalidate.nested": Recipe(some(0.3)),
    "release.during_fault": Recipe(once(3), victim=True),
    # protocol points
    "point.delay": Recipe(_point("delay", 0.5, latency=(0.0, 0.01), jitter=(0.0, 0.01))),
    "point.pause": Recipe(_point("pause", 0.5), ends=BRIEF),
    "point.fail": Recipe(_point("fail", 0.2), ERRORS),
    "point.crash": Recipe(_point("crash", 0.0), DEVICE),
    "point.hang": Recipe(_point("hang", 0.0), DEVICE),
    # devices
    "buffer.overflow": Recipe(counted("entries", 1, 2, 4)),
    "fault.duplicate": Recipe(some(0.5)),
    "fault.stale": Recipe(some(0.5, latency=(0.0, 0.01))),
    "replay.lost": Recipe(some(0.2)),
    "fault.unserviceable": Recipe(some(0.1), ERRORS),
    "pingpong": Recipe(some(0.5)),
    "alternate": Recipe(some(0.5)),
    "prefetch.race": Recipe(some(0.5)),
    "thrash": Recipe(some(0.5)),
    # processes
    **{f"process.{deed}": Recipe(_deed(0.3), victim=True) for deed in ("fork", "exec")},
    **{f"process.{deed}": Recipe(_change(0.3), victim=True) for deed in ("mprotect", "mremap", "munmap")},
    "process.madvise": Recipe(_change(0.3, advice=ADVISED), victim=True),
    **{f"process.{deed}": Recipe(_deed(0.02), victim=True) for deed in ("exit", "kill", "oom")},
    # nodes
    "crash": Recipe(given(), DEVICE),
    "hang": Recipe(lambda random: {"on": "host"} if random.random() < 0.2 else {}, DEVICE, CUT),
    "bounce": Recipe(given(down=(0.0, 0.5)), DEVICE),
    "restart.kept": Recipe(given(down=(0.0, 0.0005)), DEVICE),
    "unplug": Recipe(given(), DEVICE),
    "unload": Recipe(given(), DEVICE),
    "reset": Recipe(lambda random: {"nth": random.randint(1, 12), "down": round(random.uniform(0.0, 0.25), 6)}, DEVICE),
    # clocks
    "clock.jump": Recipe(given(by=(0.0, 5.0)), ends=CUT),
    "clock.skew": Recipe(given(factor=(0.5, 2.0)), ends=CUT),
    "cpu.starve": Recipe(some(0.5, latency=(0.0, 0.002))),
}
"""By kind."""

NOT_DRAWN: dict[str, str] = {
    "host.crash": "with the host every page and every process is gone, and nothing is left to be checked: a test of its own has it",
    **{name: kind.not_in["sim"] for name, kind in KINDS.items() if "sim" in kind.not_in},
}
"""Kinds that no seed draws, and why: those that no simulated machine can do say so themselves."""

ALONE = frozenset({"restart.kept"})
"""Kinds that are drawn as a mix of their own, and not with their family: for all else they are as another, here a bounce."""
FAMILIES: dict[str, tuple[str, ...]] = {
    family: tuple(name for name in RECIPES if KINDS[name].family == family and name not in ALONE)
    for family in dict.fromkeys(KINDS[name].family for name in RECIPES)
}
"""Families of the catalogue: the kinds of each that are drawn."""


def cost_of(kind: str) -> Cost:
    """What a fault of that kind may cost; of one that is drawn by nobody the worst."""
    return RECIPES[kind].cost if kind in RECIPES else DEVICE
