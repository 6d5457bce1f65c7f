"""Scenarios for sweeps: programs written by hand, short, in which every protocol point is reached by what it is for.

A sweep runs a scenario hundreds of times with one fault in another place each time, so each scenario does every thing once or twice.
"""

from __future__ import annotations

from typing import Any

from hmmnet.errors import WrongUse
from hmmnet.faults import Controls, MessageFault, Plan, Way
from hmmnet.topology.problems import closest

from .program import Harm, Hit, Layout, Program, Step

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
SMALL_MACHINE = MACHINE.replace('memory = "4 MiB"', 'memory = "12 KiB"')
"""Each device has three pages."""
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
RESTARTS = _steps(
    ("store", ANON, 0, 600),
    ("device_load", ANON, 0, 600, 1, "remote"),
    ("migrate", PAGES_ANON, 0, 2, 0),
    ("bounce", 0, 0, 1, 1),
    ("device_load", ANON, 0, 600, 1, "remote"),
    ("home", PAGES_ANON, 0, 2),
    ("device_load", ANON, 0, 8, 0, "demand"),
    ("unplug", 0, 0, 1, 0),
    ("device_store", ANON, 0, 8, 0, "remote"),
    ("unload", 0, 0, 1, 1),
    ("device_load", ANON, 2, 8, 1, "remote"),
    ("report",),
    ("load", ANON, 0, 600),
)
"""Devices leave and come back. None has an only copy when it does, so what is lost is lost by the fault."""
JOBS = _steps(
    ("lane_store", 0, 0, 200),
    ("store", ANON, 0, 600),
    ("unknown_job", ANON, 0, 1, 0),
    ("cancelled_job", ANON, 0, 600, 0, "demand"),
    ("cancelled_job", ANON, 2, 600, 1, "demand"),
    ("walk", 0, 0, 1, 0, "demand"),
    ("walk", 0, 0, 1, 1, "remote"),
    ("reduce", 0, 0, 1, 1, "demand"),
    ("device_gather", ANON, 0, 600, 1, "remote"),
    ("device_gather", ANON, 0, 600, 0, "demand"),
    ("compute", 0, 0, 1, 1, "remote"),
    ("device_add", 0, 0, 1, 1, "remote"),
    ("load", ANON, 0, 600),
)
FILES = _steps(
    ("file_write", FILE, 0, 600),
    ("store", FILE, 0, 8),
    ("device_load", FILE, 0, 600, 0, "demand"),
    ("device_store", FILE, 1, 8, 1, "demand"),
    ("migrate", FILE + 1, 0, 2, 0),
    ("file_read", FILE, 0, 600),
    ("drop", FILE, 1, 1),
    ("device_load", FILE, 1, 8, 1, "remote"),
    ("unmap", FILE, 0, 1),
    ("device_store", FILE, 0, 8, 0, "remote"),
    ("store", SHARED, 0, 600),
    ("device_store", SHARED, 0, 8, 0, "demand"),
    ("migrate", SHARED + 1, 0, 2, 1),
    ("fork", SHARED, 0, 8, 0, "device"),
    ("advise", SHARED + 1, 0, 1, 0, "PAGEOUT"),
    ("load", SHARED, 0, 600),
    ("load", FILE, 0, 600),
)
EXCLUSIVE = _steps(
    ("store", ANON, 0, 600),
    ("store", ANON, 2, 8),
    ("command", ANON, 0, 2, 1, "exclusive"),
    ("load", ANON, 0, 1),
    ("command", ANON, 0, 2, 1, "exclusive"),
    ("fork", ANON, 0, 8, 0, ""),
    ("command", ANON, 0, 2, 1, "exclusive"),
    ("protect", ANON, 0, 2, 0, "r"),
    ("command", ANON, 0, 2, 1, "snapshot"),
    ("protect", ANON, 0, 2, 0, "rw"),
    ("command", ANON, 0, 2, 1, "exclusive"),
    ("device_store", ANON, 0, 8, 0, "demand"),
    ("home", PAGES_ANON, 0, 4),
    ("command", ANON, 2, 1, 1, "migrate_to_dev"),
    ("command", ANON, 2, 1, 1, "migrate_to_sys"),
    ("command", ANON, 0, 4, 1, "read"),
    ("load", ANON, 0, 600),
)
SMALL = _steps(
    ("store", ANON, 0, 600),
    ("store", ANON, 2, 600),
    ("device_load", ANON, 0, 8, 0, "demand"),
    ("device_load", ANON, 2, 8, 0, "demand"),
    ("device_store", SHARED, 0, 8, 0, "demand"),
    ("migrate", PAGES_ANON, 0, 4, 1),
    ("device_store", ANON, 1, 8, 0, "demand"),
    ("migrate", PAGES_ANON, 0, 4, 0),
    ("load", ANON, 0, 600),
    ("load", ANON, 2, 600),
)
ORDER = _steps(
    ("store", ANON, 0, 600),
    ("store", ANON, 2, 600),
    ("migrate", PAGES_ANON, 3, 1, 0),
    ("migrate", PAGES_ANON, 1, 1, 0),
    ("migrate", PAGES_ANON, 0, 1, 0),
    ("migrate", PAGES_ANON, 2, 1, 0),
    ("unplug", 0, 0, 1, 0),
    ("load", ANON, 0, 600),
    ("load", ANON, 2, 600),
)
"""Pages come to a device one by one, and leave it by their frames."""
DROPPED = _steps(
    ("migrate", PAGES_ANON, 0, 4, 0, "", 0),
    ("device_load", SHARED, 0, 8, 1, "remote", 1),
    ("drop", ANON, 0, 2, 0, "", 1),
    ("device_load", ANON, 0, 8, 0, "demand", 0),
)
"""Pages are given up when they have arrived at a device, and before it has heard that they have."""
STALE = _steps(
    ("device_load", ANON, 0, 8, 0, "remote", 0),
    ("device_load", SHARED, 0, 8, 1, "remote", 1),
    ("drop", ANON, 0, 2, 0, "", 1),
)
"""Pages are read for a device that has let go of them, and before they change."""
DEPARTED = _steps(
    ("store", ANON, 0, 600, 0, "", 0),
    ("migrate", PAGES_ANON, 0, 1, 0, "", 0),
    ("protect", ANON, 0, 1, 0, "r", 0),
    ("protect", ANON, 0, 1, 0, "rw", 0),
    ("device_load", ANON, 0, 8, 0, "remote", 0),
    ("device_load", SHARED, 0, 8, 1, "remote", 1),
    ("load", ANON, 0, 8, 0, "", 1),
    ("device_load", SHARED, 0, 8, 1, "remote", 1),
)
"""A page leaves a device that has just been told that it has it, and has not mapped it yet."""
WRITTEN = _steps(
    ("device_store", ANON, 0, 8, 0, "remote", 0),
    ("device_load", SHARED, 0, 8, 1, "remote", 1),
    ("migrate", PAGES_ANON, 0, 1, 0, "", 1),
    ("device_store", ANON, 0, 8, 0, "remote", 0),
    ("load", ANON, 0, 8, 0, "", 0),
)
"""A page that a device writes over the link comes to it; it has been copied when the device is about to write it again."""
TURNS = _steps(
    ("device_store", ANON, 0, 8, 0, "remote", 0),
    ("device_load", SHARED, 0, 8, 1, "remote", 1),
    ("migrate", PAGES_ANON, 0, 1, 0, "", 1),
    ("device_load", ANON, 0, 8, 0, "remote", 0),
    ("load", ANON, 0, 8, 0, "", 0),
)
"""A device is about to map a page over its link when the page is to come to it: it has to do one thing after the other."""
LATE = _steps(
    ("store", ANON, 0, 600),
    ("store", ANON, 2, 600),
    ("migrate", PAGES_ANON, 0, 3, 0),
    ("migrate", HUGE + 1, 0, 3, 0),
    ("device_load", HUGE, 0, 600, 0, "demand"),
    ("load", HUGE, 0, 600),
    ("load", ANON, 0, 600),
)
"""The data of a migration that was refused arrive when its frames have been given to pages that are all zeros."""
STALLED = _steps(
    ("store", HUGE, 0, 600),
    ("migrate", HUGE + 1, 0, 1, 0, "whole"),
    ("home", HUGE + 1, 0, 7, 0, "whole"),
    ("load", HUGE, 0, 600),
)
"""A copy engine stands still, on the way home, for longer than the host waits before it asks."""
OLDEN = tuple(step for step in TOUR if step.choice != "exclusive")


def _made(
    name: str, note: str, steps: tuple[Step, ...], *, machine: str = MACHINE, actors: int = 1, limit_pages: int = 0, **broken: Any
) -> Program:
    return Program(
        seed=1, machine=machine, actors=actors, regions=REGIONS, steps=steps, limit_pages=limit_pages, mix=name, note=note, **broken
    )


def _message(fault: MessageFault) -> str:
    return Plan([fault]).as_toml()


_EVERY = (
    _made("tour", "every kind of work once, in a memory cgroup", TOUR, limit_pages=64),
    _made("mappings", "mappings that change under pages that move", MAPPINGS),
    _made("huge", "huge pages, whole and in pieces", HUGE_PAGES),
    _made("together", "three actors at once", TOGETHER, actors=3),
    _made("coherent", "the tour, one device with coherent memory", TOUR, machine=COHERENT),
    _made("restarts", "devices that restart, are unplugged, are unloaded", RESTARTS),
    _made("jobs", "jobs of all kinds: unknown ones, and ones that are cancelled", JOBS),
    _made("files", "files and shared memory", FILES),
    _made("exclusive", "atomic access of a device, and who takes it away", EXCLUSIVE),
    _made("small", "devices with too little memory", SMALL, machine=SMALL_MACHINE),
    _made(
        "v25", "the tour under the rules of HMM's first version", OLDEN, machine=MACHINE.replace('"swept"', '"swept"\npersonality = "v25"')
    ),
    _made("refusal", "a device that is turned away when it comes back", RESTARTS, hits=(Hit("session.hello", "fail", nth=1),)),
    _made(
        "noise",
        "the tour while messages are lost",
        TOUR,
        faults=(_message(MessageFault("loss", Way(channel="control"), Controls(interval=11))),),
    ),
    _made("given_up", "a device that the host gives up, because it does not let go", TOUR, hits=(Hit("device.before_ack", "fail", nth=6),)),
    _made("order", "pages that come to a device in another order than they lie, and go when it is unplugged", ORDER),
    _made(
        "dropped",
        "pages that are given up while a device is about to map them",
        DROPPED,
        actors=2,
        hits=(Hit("device.migrated", "delay", nth=1, seconds=0.01), Hit("device.job_start", "delay", nth=1, seconds=0.002)),
    ),
    _made(
        "stale",
        "pages that are read for a device in the middle of an invalidation",
        STALE,
        actors=2,
        hits=(
            Hit("retry.after_read_begin", "delay", nth=1, seconds=0.001),
            Hit("hub.after_acks", "delay", nth=1, seconds=0.005),
            Hit("device.before_write", "delay", nth=2, seconds=0.02),
        ),
    ),
    _made(
        "departed",
        "a page that leaves a device which is about to map it",
        DEPARTED,
        actors=2,
        hits=(
            Hit("device.before_write", "delay", nth=1, seconds=0.005),
            Hit("device.after_write", "delay", nth=2, seconds=0.01),
            Hit("device.job_start", "delay", nth=1, seconds=0.001),
            Hit("device.job_start", "delay", nth=3, seconds=0.006),
        ),
    ),
    _made(
        "written",
        "a page that a device writes over its link while it comes there",
        WRITTEN,
        actors=2,
        hits=(
            Hit("device.job_start", "delay", nth=2, seconds=0.002),
            Hit("device.job_start", "delay", nth=2, seconds=0.004),
            Hit("migrate.before_pages", "delay", nth=1, seconds=0.01),
        ),
    ),
    _made(
        "turns",
        "a page that a device is about to map over its link when it is to come there",
        TURNS,
        actors=2,
        hits=(Hit("device.before_write", "delay", nth=1, seconds=0.01), Hit("device.job_start", "delay", nth=2, seconds=0.002)),
    ),
    _made(
        "late",
        "data that arrive when their migration has been given up, and their frames are others'",
        LATE,
        machine=SMALL_MACHINE,
        hits=(Hit("device.copy_in", "fail", nth=1), Hit("device.job_start", "delay", nth=1, seconds=0.1)),
        faults=(_message(MessageFault("delay", Way(channel="bulk"), Controls(times=1), latency_s=0.05)),),
    ),
    _made("stalled", "a copy engine that stands still for a while", STALLED, hits=(Hit("device.mid_copy", "delay", nth=1, seconds=12.0),)),
    _made("silence", "a device that is silent for longer than its lease", TOUR, harms=(Harm(6, "hang", 0, 8.0),)),
)
SCENARIOS = {program.mix: program for program in _EVERY}
"""By name. A sweep compares each run with the scenario alone, so what refuses or loses something by itself is no finding."""


def scenario(name: str) -> list[Program]:
    """The scenario called `name`; all of them for ``all``. Raises WrongUse."""
    if name == "all":
        return list(SCENARIOS.values())
    if name not in SCENARIOS:
        guess = closest(name, SCENARIOS)
        hint = f'; did you mean "{guess}"? There' if guess else "; there"
        there = f'there is no scenario "{name}", nor such a file{hint} are {", ".join(SCENARIOS)}, and all'
        raise WrongUse(f'{there}; "hmmnet replay SEED -o FILE" writes a file')
    return [SCENARIOS[name]]
