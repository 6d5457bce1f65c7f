"""What a seed does, drawn so that seeds differ: each leaves out most of what could happen, so that the rest can go far (swarm testing)."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import msgspec

from hmmnet.errors import WrongUse
from hmmnet.faults import Plan
from hmmnet.topology.problems import did_you_mean

from .program import Harm, Hit, Layout, Planned, Program, Step
from .recipes import FAMILIES, INSIDE, NOT_DRAWN, RECIPES
from .words import CHOICES

OPERATIONS = 200
"""Of one seed."""
DEVICES = 4
"""Of the standard campaign."""
ANY_DEVICES = 0
"""As many as the seed draws, 1 to `DEVICES`."""
DEVICES_MAX = 64
MIXES: dict[str, tuple[str, ...]] = {
    "all": tuple(FAMILIES),
    "none": (),
    "messages": ("loss", "delay", "reorder", "duplicate", "corrupt"),
    "deaths": ("crash", "bounce", "unplug", "unload", "reset"),
    "partitions": ("partition", "hold", "hang"),
    "points": (),
}
"""Which faults may be drawn: families of the catalogue, or kinds. Beside these mixes each family, and each kind, is one by its name.

``deaths`` and ``partitions`` have also devices that die, and wires that are cut, at an operation; ``points`` has hits at protocol points,
each with its own chance.
"""
FAMILY_CHANCE = 0.3
KIND_CHANCE = 0.3
"""Of each family to take part in a seed, and of each kind of a family that does."""
PAGED = frozenset(
    ["migrate", "home", "advise", "drop", "protect", "unmap", "lock", "pin", "command", "cancelled", "populate", "resize", "let_free"]
)
"""Steps whose `count` is of pages."""
PAGE_COUNTS = (1, 1, 2, 4)
WORD_COUNTS = (1, 1, 2, 8, 16, 600)
"""What the `count` of a step is drawn from."""
NO_CHOICE = ("",)
SERIAL_FIRST = 1
WORDS = (0, 1, 5, 500, 511)
"""Of a page, those where steps begin, beside any."""
WIDTHS = [end.bit_length() for end in range(513)]
DEVICE_NUMBERS = 4
"""Steps name devices by numbers below this, which are counted round among those that there are."""

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
    "unknown_job": 0.2,
    "cancelled_job": 0.4,
    "cancelled": 0.6,
    "populate": 0.4,
    "migrate_large": 0.4,
    "resize": 0.4,
    "inherit": 0.3,
    "let_free": 0.3,
    "poison": 0.1,
    "hugetlb": 0.2,
    "soft_dirty": 0.3,
    "truncate": 0.4,
    "private_file": 0.4,
    "device_pages": 0.3,
    "user_fault": 0.4,
    "stranger": 0.4,
    "oom": 0.2,
    "tree": 0.2,
    "words": 0.2,
    "look": 0.1,
}
LEAVING = {"bounce": 0.2, "unload": 0.2, "unplug": 0.2}
"""Steps that cost a device its life: in mixes that have deaths."""
DEADLY_MIXES = frozenset({"all", "deaths"})


def draw(seed: int, mix: str = "all", operations: int = OPERATIONS, devices: int = DEVICES) -> Program:
    """The program of `seed`, with faults of `mix`, on so many devices (`ANY_DEVICES`: drawn). Raises WrongUse: no such mix."""
    families = families_of(mix)
    if not 0 <= devices <= DEVICES_MAX:
        raise WrongUse(f"a campaign has at most {DEVICES_MAX} devices, not {devices}")
    random = Random(f"hmmnet {seed}")  # noqa: S311 - chance, not secrecy
    devices = devices or random.randint(1, DEVICES)
    huge = random.random() < 0.15
    actors = random.randint(2, 6)
    regions = _regions(random, huge=huge)
    made = Program(
        seed=seed,
        machine=_machine(random, devices, huge=huge),
        actors=actors,
        regions=regions,
        steps=_steps(random, mix, actors, operations),
        harms=_harms(random, mix, operations, devices),
        hits=_hits(random) if mix == "points" else (),
        limit_pages=sum(region.pages for region in regions) + random.randint(2, 12) if not huge and random.random() < 0.15 else 0,
        mix=mix,
    )
    return _with_faults(random, made, families, operations, devices)


def families_of(mix: str) -> list[tuple[str, ...]]:
    """The kinds that a mix may draw, in the families that are drawn together. Raises WrongUse when there is no such mix."""
    if mix in RECIPES:
        return [(mix,)]
    if mix in FAMILIES:
        return [FAMILIES[mix]]
    if mix in NOT_DRAWN:
        raise WrongUse(f"{mix} is drawn by no campaign: {NOT_DRAWN[mix]}")
    if mix not in MIXES:
        guess = did_you_mean(mix, [*MIXES, *FAMILIES, *RECIPES])
        there = f"{guess} There" if guess else "there"
        raise WrongUse(f'there is no mix "{mix}"; {there} are {", ".join(MIXES)}, and each family and kind of the catalogue')
    return [FAMILIES.get(name, (name,)) for name in MIXES[mix]]


def _with_faults(random: Random, program: Program, families: list[tuple[str, ...]], operations: int, devices: int) -> Program:
    """Swarm testing: of most families nothing, of the others some kinds, each from the beginning or from some operation on."""
    faults, planned, victims = [], [], 0
    for kinds in families:
        if len(families) > 1 and random.random() >= FAMILY_CHANCE:
            continue
        chosen = [kind for kind in kinds if random.random() < KIND_CHANCE] or [random.choice(kinds)]
        for kind in chosen:
            fault = RECIPES[kind].draw(random, kind, devices, victims)
            victims += RECIPES[kind].victim
            text = Plan([fault]).as_toml()
            if fault.at_once or fault.lasts_s or random.random() < 0.5:
                planned.append(Planned(random.randrange(operations), text))
            else:
                faults.append(text)
    planned.sort(key=lambda one: one.at)
    return msgspec.structs.replace(program, faults=tuple(faults), planned=tuple(planned), victims=victims)


def _regions(random: Random, *, huge: bool) -> tuple[Layout, ...]:
    kinds = ["anon", *random.sample(["anon", "shared", "file"], random.randint(0, 2)), *(["huge"] if huge else [])]
    return tuple(Layout(kind, 7 if kind == "huge" else random.randint(2, 6)) for kind in kinds)


def _machine(random: Random, devices: int, *, huge: bool) -> str:
    """A topology: devices of two models and two kinds of memory, some with less of it than is wanted, some with links of their own."""
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
    for number in range(devices - 1):
        if random.random() < 0.2:
            lines += ["[[link]]", f'a = "dev{number}"', f'b = "dev{number + 1}"', 'bandwidth = "50 GB/s"', 'latency = "500 ns"']
    return "\n".join(lines) + "\n"


def _steps(random: Random, mix: str, actors: int, operations: int) -> tuple[Step, ...]:
    rare = SOMETIMES | (LEAVING if mix in DEADLY_MIXES else {})
    chosen = random.sample(list(rare), random.randint(4, 18))
    often = random.choice((1.0, 2.0, 4.0, 6.0))
    weights = ALWAYS | {kind: rare[kind] * often * random.uniform(0.3, 1.5) / len(chosen) * 4 for kind in chosen}
    kinds = random.choices(list(weights), list(weights.values()), k=operations)
    return tuple([_step(random.getrandbits, kind, actors, serial) for serial, kind in enumerate(kinds, SERIAL_FIRST)])


def _step(bits: Callable[[int], int], kind: str, actors: int, serial: int) -> Step:
    """One step. Each number is `Random.randrange`, from the same draws, in a third of the time: most of what is drawn is steps."""
    counts = PAGE_COUNTS if kind in PAGED else WORD_COUNTS
    choices = CHOICES.get(kind, NO_CHOICE)
    chosen = []
    for end in (actors, 8, 8, 512, len(WORDS) + 1, len(counts), DEVICE_NUMBERS, len(choices)):
        width = WIDTHS[end]
        number = bits(width)
        while number >= end:
            number = bits(width)
        chosen.append(number)
    actor, region, page, anywhere, word, count, device, choice = chosen
    return Step(actor, kind, region, page, (*WORDS, anywhere)[word], counts[count], device, choices[choice], serial)


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


def _harms(random: Random, mix: str, operations: int, devices: int) -> tuple[Harm, ...]:
    """A device that dies and comes back, one that is cut off for longer or shorter than a lease."""
    kinds = {"all": ("death", "partition"), "deaths": ("death",), "partitions": ("partition",)}.get(mix, ())
    found = []
    for kind in kinds:
        for _ in range(random.choice((0, 0, 0, 1, 2))):
            seconds = random.choice((0.0, 0.0005, 0.01)) if kind == "death" else random.choice((0.3, 1.0, 6.0))
            found.append(Harm(random.randrange(operations), kind, random.randrange(devices), seconds))
    return tuple(sorted(found, key=lambda harm: harm.at))
