"""What a seed does, drawn so that seeds differ: each leaves out most of what could happen, so that the rest can go far (swarm testing)."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from hmmnet.errors import HmmnetError
from hmmnet.faults import Controls, MessageFault, Plan, Way
from hmmnet.faults.points import POINTS

from .program import Harm, Hit, Layout, Program, Step

OPERATIONS = 200
"""Of one seed."""
DEVICES_MAX = 4
MIXES = ("all", "none", "messages", "deaths", "partitions", "points")
"""Which faults may be drawn: of messages and nodes, none, of messages, devices that die, wires that are cut; at protocol points."""
SERIAL_FIRST = 1

ALWAYS = {"load": 20.0, "store": 16.0, "add": 3.0, "lane_store": 3.0}
"""Cheap, and what everything else is measured with: in every seed, often. The others with their usual weight:"""
SOMETIMES = {
    "device_load": 1.0,
    "device_gather": 0.5,
    "device_store": 1.0,
    "device_add": 0.6,
    "compute": 0.6,
    "reduce": 0.4,
    "walk": 0.3,
    "migrate": 1.5,
    "home": 0.8,
    "advise": 0.8,
    "drop": 0.6,
    "protect": 0.8,
    "move": 0.4,
    "unmap": 0.5,
    "lock": 0.4,
    "pin": 0.5,
    "fork": 0.6,
    "file_read": 0.5,
    "file_write": 0.5,
    "command": 0.8,
    "report": 0.1,
}
CHOICES: dict[str, tuple[str, ...]] = {
    "device_load": ("demand", "remote"),
    "device_gather": ("demand", "remote"),
    "device_store": ("demand", "remote"),
    "device_add": ("demand", "remote"),
    "compute": ("demand", "remote"),
    "reduce": ("demand", "remote"),
    "walk": ("demand", "remote"),
    "migrate": ("", "", "whole"),
    "advise": ("PAGEOUT", "COLD", "WILLNEED", "HUGEPAGE", "NOHUGEPAGE", "POPULATE_WRITE", "COLLAPSE"),
    "protect": ("r", "none", "rw", "rw"),
    "pin": ("", "longterm", "plain"),
    "fork": ("", "device", "kill"),
    "command": ("read", "write", "migrate_to_dev", "migrate_to_sys", "snapshot", "exclusive"),
}


def draw(seed: int, mix: str = "all", operations: int = OPERATIONS) -> Program:
    """The program of `seed`, with faults of `mix`. Raises HmmnetError when there is no such mix."""
    if mix not in MIXES:
        raise HmmnetError(f'there is no mix "{mix}"; there are {", ".join(MIXES)}')
    random = Random(f"hmmnet {seed}")  # noqa: S311 - chance, not secrecy
    devices = random.choice((1, 2, 2, 3, 4, DEVICES_MAX))
    huge = random.random() < 0.15
    actors = random.randint(2, 6)
    regions = _regions(random, huge=huge)
    return Program(
        seed=seed,
        machine=_machine(random, devices, huge=huge),
        actors=actors,
        regions=regions,
        steps=_steps(random, actors, operations),
        faults=_faults(random, mix),
        harms=_harms(random, mix, operations, devices),
        hits=_hits(random) if mix == "points" else (),
        limit_pages=sum(region.pages for region in regions) + random.randint(2, 12) if not huge and random.random() < 0.15 else 0,
        mix=mix,
    )


def _regions(random: Random, *, huge: bool) -> tuple[Layout, ...]:
    kinds = ["anon", *random.sample(["anon", "shared", "file"], random.randint(0, 2)), *(["huge"] if huge else [])]
    return tuple(Layout(kind, 7 if kind == "huge" else random.randint(2, 6)) for kind in kinds)


def _machine(random: Random, devices: int, *, huge: bool) -> str:
    """A topology: a few devices of two models and two kinds of memory, some with less of it than is wanted."""
    lines = ['name = "drawn"', "[[memory]]", 'name = "node0"', f'size = "{32 if huge else 4} MiB"']
    unit = 0
    for number in range(devices):
        model = random.choice(("gpu", "gpu", "dmirror"))
        kind = random.choice(("private", "private", "private", "coherent"))
        size = random.choice((4, 8)) * 1024 if huge else random.choice((32, 128, 512))
        lines += ["[[device]]", f'name = "dev{number}"', f'model = "{model}"', f'memory = "{size} KiB"', f'kind = "{kind}"']
        if model == "dmirror":
            lines.append(f"unit = {unit}")
            unit += 1
        lines += ["[[link]]", 'a = "node0"', f'b = "dev{number}"', f'bandwidth = "{random.choice((1, 10, 50))} GB/s"']
        lines.append(f'latency = "{random.choice((100, 1000, 20000))} ns"')
    return "\n".join(lines) + "\n"


def _steps(random: Random, actors: int, operations: int) -> tuple[Step, ...]:
    chosen = random.sample(list(SOMETIMES), random.randint(4, 12))
    often = random.choice((1.0, 2.0, 4.0))
    weights = ALWAYS | {kind: SOMETIMES[kind] * often * random.uniform(0.3, 1.5) / len(chosen) * 4 for kind in chosen}
    kinds = random.choices(list(weights), list(weights.values()), k=operations)
    return tuple(_step(random, kind, random.randrange(actors), SERIAL_FIRST + number) for number, kind in enumerate(kinds))


def _step(random: Random, kind: str, actor: int, serial: int) -> Step:
    paged = kind in {"migrate", "home", "advise", "drop", "protect", "unmap", "lock", "pin", "command"}
    return Step(
        actor=actor,
        kind=kind,
        region=random.randrange(8),
        page=random.randrange(8),
        word=random.choice((0, 1, 5, 500, 511, random.randrange(512))),
        count=random.choice((1, 1, 2, 4)) if paged else random.choice((1, 1, 2, 8, 16, 600)),
        device=random.randrange(DEVICES_MAX),
        choice=random.choice(CHOICES.get(kind, ("",))),
        serial=serial,
    )


def _faults(random: Random, mix: str) -> tuple[str, ...]:
    if mix not in {"all", "messages"}:
        return ()
    found = [make(random) for make in MESSAGES if random.random() < 0.25]
    return tuple(Plan([fault]).as_toml() for fault in found)


def _some(random: Random, most: float) -> Controls:
    return Controls(probability=round(random.uniform(0.0, most), 4))


def _late(random: Random, kind: str) -> MessageFault:
    latency_s, jitter_s = round(random.uniform(0.0, 0.01), 6), round(random.uniform(0.0, 0.02), 6)
    return MessageFault(kind, Way(), _some(random, 0.3), latency_s, jitter_s)


MESSAGES: tuple[Callable[[Random], MessageFault], ...] = (
    lambda random: MessageFault("loss", Way(), _some(random, 0.03)),
    lambda random: MessageFault("duplicate", Way(), _some(random, 0.3)),
    lambda random: MessageFault("corrupt", Way(channel="bulk"), _some(random, 0.2)),
    lambda random: _late(random, "delay"),
    lambda random: _late(random, "reorder"),
)


def _hits(random: Random) -> tuple[Hit, ...]:
    """At a few protocol points, now and then."""
    found = []
    for point in random.sample(INSIDE, random.randint(1, 5)):
        action = random.choice([action for action in point.actions if action != "call"])
        lethal = action in {"crash", "hang"}
        found.append(
            Hit(
                point.name,
                action,
                nth=random.randint(1, 12) if lethal else 0,
                probability=0.0 if lethal else round(random.uniform(0.02, 0.3), 3),
                seconds=random.choice((1e-6, 1e-4, 0.01)),
            )
        )
    return tuple(found)


INSIDE = [point for point in POINTS.values() if not point.name.startswith(("session.", "device.hello", "device.welcome"))]
"""Points that are reached while a machine runs."""


def _harms(random: Random, mix: str, operations: int, devices: int) -> tuple[Harm, ...]:
    """A device that dies and comes back, one that is cut off for longer or shorter than a lease."""
    kinds = {"all": ("death", "partition"), "deaths": ("death",), "partitions": ("partition",)}.get(mix, ())
    found = []
    for kind in kinds:
        for _ in range(random.choice((0, 0, 0, 1, 2))):
            seconds = random.choice((0.0, 0.0005, 0.01)) if kind == "death" else random.choice((0.3, 1.0, 6.0))
            found.append(Harm(random.randrange(operations), kind, random.randrange(devices), seconds))
    return tuple(sorted(found, key=lambda harm: harm.at))
