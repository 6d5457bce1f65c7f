"""Scenarios for sweeps: programs written by hand, short, in which every protocol point is reached by what it is for.

A sweep runs a scenario hundreds of times with one fault in another place each time, so each scenario does every thing once or twice.
"""

from __future__ import annotations

from hmmnet.errors import HmmnetError

from .program import Layout, Program, Step

MACHINE = """
name = "swept"
[[memory]]
name = "node0"
size = "16 MiB"
[[device]]
name = "dev0"
model = "gpu"
memory = "4 MiB"
[[link]]
a = "node0"
b = "dev0"
bandwidth = "10 GB/s"
latency = "1 us"
[[device]]
name = "dev1"
model = "dmirror"
memory = "4 MiB"
unit = 0
[[link]]
a = "node0"
b = "dev1"
bandwidth = "10 GB/s"
latency = "1 us"
"""
COHERENT = MACHINE.replace('memory = "4 MiB"\nunit', 'memory = "4 MiB"\nkind = "coherent"\nunit')
ANON, SHARED, FILE, HUGE = 0, 1, 2, 3
REGIONS = (Layout("anon", 4), Layout("shared", 2), Layout("file", 2), Layout("huge", 7))


def _steps(*lines: tuple[str | int, ...]) -> tuple[Step, ...]:
    """(kind, region, page, count, device, choice, actor) each, cut short where the rest is the usual."""
    usual: tuple[str | int, ...] = ("", 0, 0, 1, 0, "", 0)
    return tuple(_step(serial, *line, *usual[len(line) :]) for serial, line in enumerate(lines, 1))


def _step(serial: int, *values: str | int) -> Step:
    kind, region, page, count, device, choice, actor = values
    numbers = {"region": int(region), "page": int(page), "count": int(count), "device": int(device)}
    return Step(int(actor), str(kind), word=5, choice=str(choice), serial=serial, **numbers)


PAGES_ANON = ANON + 1
"""Operations on pages count the region of the lanes, too."""
TOUR = _steps(
    ("store", ANON, 0, 600),
    ("store", ANON, 2, 600),
    ("lane_store", 0, 0, 200),
    ("migrate", PAGES_ANON, 0, 4, 0),
    ("load", ANON, 1, 1),
    ("device_store", ANON, 0, 16, 0, "demand"),
    ("device_load", ANON, 3, 16, 0, "remote"),
    ("home", PAGES_ANON, 0, 4),
    ("compute", 0, 0, 1, 0, "demand"),
    ("store", FILE, 0, 8),
    ("file_write", FILE, 1, 8),
    ("device_load", FILE, 0, 600, 0, "demand"),
    ("device_store", SHARED, 0, 8, 0, "demand"),
    ("command", ANON, 0, 2, 1, "write"),
    ("command", ANON, 0, 2, 1, "migrate_to_dev"),
    ("command", ANON, 0, 1, 1, "exclusive"),
    ("load", ANON, 0, 1),
    ("migrate", PAGES_ANON, 0, 4, 1),
    ("fork", ANON, 0, 8, 0, "device"),
    ("add", 0, 0, 1),
    ("device_add", 0, 0, 1, 0, "demand"),
    ("device_add", 0, 0, 1, 1, "demand"),
)
MAPPINGS = _steps(
    ("store", ANON, 0, 600),
    ("migrate", PAGES_ANON, 0, 2, 0),
    ("protect", ANON, 0, 4, 0, "r"),
    ("device_load", ANON, 0, 8, 0, "demand"),
    ("protect", ANON, 0, 4, 0, "rw"),
    ("move", ANON),
    ("device_store", ANON, 0, 8, 0, "demand"),
    ("unmap", ANON, 1, 1),
    ("drop", ANON, 2, 1),
    ("pin", ANON, 0, 1, 0, "longterm"),
    ("fork", ANON, 0, 8, 0, ""),
    ("fork", ANON, 0, 8, 0, "kill"),
    ("lock", PAGES_ANON, 0, 1),
    ("advise", PAGES_ANON, 3, 1, 0, "PAGEOUT"),
    ("load", ANON, 3, 8),
    ("bounce", 0, 0, 1, 0),
    ("device_load", ANON, 0, 8, 0, "demand"),
)
HUGE_PAGES = _steps(
    ("store", HUGE, 0, 600),
    ("store", HUGE, 4, 8),
    ("migrate", HUGE + 1, 0, 1, 0, "whole"),
    ("load", HUGE, 3, 8),
    ("migrate", HUGE + 1, 0, 1, 1, "whole"),
    ("device_store", HUGE, 4, 8, 0, "demand"),
    ("home", HUGE + 1, 0, 7, 0, "whole"),
    ("unmap", HUGE),
    ("store", HUGE, 0, 8),
    ("migrate_large", HUGE, 0, 1, 1),
    ("load", HUGE, 0, 8),
    ("drop", HUGE, 3, 1),
    ("migrate", HUGE + 1, 0, 2, 0),
    ("home", HUGE + 1, 0, 7, 0, "whole"),
    ("populate", 0, 0, 512, 1, "HUGEPAGE"),
    ("fork", HUGE, 0, 8, 0, "device"),
    ("load", HUGE, 0, 600),
)
TOGETHER = _steps(
    ("store", ANON, 0, 600),
    ("device_store", ANON, 0, 8, 0, "demand", 1),
    ("device_store", ANON, 1, 8, 1, "demand", 2),
    ("migrate", PAGES_ANON, 0, 4, 0, "", 1),
    ("migrate", PAGES_ANON, 0, 4, 1, "", 2),
    ("load", ANON, 0, 600),
    ("device_load", ANON, 0, 8, 1, "remote", 1),
    ("fork", ANON, 0, 8, 0, "", 2),
    ("store", ANON, 0, 8),
    ("device_add", 0, 0, 1, 0, "demand", 1),
    ("device_add", 0, 0, 1, 1, "demand", 2),
    ("add",),
)
SCENARIOS: dict[str, Program] = {
    name: Program(seed=1, machine=machine, actors=actors, regions=REGIONS, steps=steps, limit_pages=limit, mix=name)
    for name, machine, actors, steps, limit in (
        ("tour", MACHINE, 1, TOUR, 64),
        ("mappings", MACHINE, 1, MAPPINGS, 0),
        ("huge", MACHINE, 1, HUGE_PAGES, 0),
        ("together", MACHINE, 3, TOGETHER, 0),
        ("coherent", COHERENT, 1, TOUR, 0),
    )
}
"""By name. ``tour`` is in a memory cgroup, so that charges are made."""


def scenario(name: str) -> list[Program]:
    """The scenario called `name`; all of them for ``all``. Raises HmmnetError."""
    if name == "all":
        return list(SCENARIOS.values())
    if name not in SCENARIOS:
        raise HmmnetError(f'there is no scenario "{name}"; there are {", ".join(SCENARIOS)}, and all')
    return [SCENARIOS[name]]
