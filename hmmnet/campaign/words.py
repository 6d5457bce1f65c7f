"""The words of programs: kinds of steps, regions and harms, and the places at which something can be broken.

Below everything else of a campaign: what reads a program from a file, what runs it, and what sweeps all have the same words from here.
"""

from __future__ import annotations

from typing import get_args

from hmmnet.faults.network import BULK_WAYS
from hmmnet.faults.points import POINTS
from hmmnet.wire.codec import WITH_BODY, Kind
from hmmnet.wire.messages import Body

STEP_KINDS = (
    "load",
    "store",
    "add",
    "device_load",
    "device_gather",
    "device_store",
    "device_add",
    "compute",
    "lane_store",
    "reduce",
    "walk",
    "migrate",
    "home",
    "advise",
    "drop",
    "protect",
    "move",
    "unmap",
    "lock",
    "pin",
    "file_read",
    "file_write",
    "fork",
    "unknown_job",
    "cancelled_job",
    "populate",
    "report",
    "command",
    "migrate_large",
    "bounce",
    "unload",
    "unplug",
    "cancelled",
    "resize",
    "inherit",
    "let_free",
    "poison",
    "hugetlb",
    "soft_dirty",
    "truncate",
    "private_file",
    "device_pages",
    "user_fault",
    "stranger",
    "oom",
    "tree",
    "words",
    "look",
)
"""Of steps: `operations.OPERATIONS` has a function for each."""
ADVICE = ("PAGEOUT", "COLD", "WILLNEED", "HUGEPAGE", "NOHUGEPAGE", "POPULATE_WRITE", "POPULATE_READ", "COLLAPSE", "RANDOM", "MERGEABLE")
CHOICES: dict[str, tuple[str, ...]] = {
    "device_load": ("demand", "remote"),
    "device_gather": ("demand", "remote"),
    "device_store": ("demand", "remote"),
    "device_add": ("demand", "remote"),
    "compute": ("demand", "remote"),
    "reduce": ("demand", "remote"),
    "walk": ("demand", "remote"),
    "migrate": ("", "", "whole"),
    "advise": ADVICE,
    "protect": ("r", "none", "rw", "rw"),
    "pin": ("", "longterm", "plain", "fork"),
    "fork": ("", "device", "kill", "sigkill", "reaped"),
    "command": ("read", "read_unlocked", "write", "migrate_to_dev", "migrate_to_sys", "snapshot", "exclusive", "check_exclusive"),
    "cancelled_job": ("demand", "remote"),
    "cancelled": ("", "home", "load", "store"),
    "populate": ("", "HUGEPAGE", "NOHUGEPAGE"),
    "resize": ("grow", "shrink", "dontunmap"),
    "inherit": ("", "device"),
    "let_free": ("", "PAGEOUT", "COLD"),
    "hugetlb": ("demand", "remote"),
    "truncate": ("demand", "remote"),
    "private_file": ("demand", "remote"),
    "device_pages": ("demand", "remote"),
    "user_fault": ("cpu", "device"),
    "stranger": ("demand", "remote"),
    "oom": ("demand", "remote"),
    "tree": ("demand", "remote"),
    "words": ("demand", "remote"),
}
"""Ways of a step, by kind, each as often as it is drawn; other kinds have one way only."""
NOT_DRAWN_CHOICES = {"home": ("whole",)}
"""What only scenarios choose, beside those."""
ON_EVERY_REGION = frozenset({"migrate", "home", "advise", "lock"})
"""Kinds of steps whose `region` counts the lanes and the counters, too."""
REGION_KINDS = ("anon", "shared", "file", "huge")
HUGE_SPREAD = (0, 1, 2, 255, 256, 510, 511)
"""Which pages of a huge page are used: both ends and the middle."""
VICTIM_PID_FIRST = 1001
"""The actors' process is the first of a machine, the victims are the next ones."""
VICTIM_ADDRESS = 0x20_0000_0000
VICTIM_BYTES = 4 * 4096
"""Where the memory of each victim is: faults can name it."""
HARM_KINDS = ("death", "partition", "hang", "message")
FREEZE = "freeze"
"""At a point: a hang that outlasts the lease of the device."""
DEATH = "death"
"""Of a message: its device dies when it is sent."""
UNREADABLE = ("truncate", "garbage", "old_version")
"""What makes a message one that nobody can read: it is answered with an error, or ends its session, and with that its device."""
CONTROL_FAULTS = ("loss", "delay", "duplicate", "reorder", *UNREADABLE, DEATH)
BULK_FAULTS = ("loss", "delay", "duplicate", "reorder", "truncate", "garbage", "corrupt", DEATH)
CONTROL = (*(kind.__name__ for kind in get_args(Body)), *(kind.name for kind in Kind if kind not in WITH_BODY))
"""Every message of a session."""


def _with_freeze(actions: tuple[str, ...]) -> tuple[str, ...]:
    """Who can hang for a moment can hang for long."""
    behind = actions.index("hang") + 1 if "hang" in actions else 0
    return (*actions[:behind], FREEZE, *actions[behind:]) if behind else actions


def places() -> dict[str, tuple[str, ...]]:
    """Every place, in order, with what could happen there if it applied."""
    found = {point.name: _with_freeze(point.actions) for point in POINTS.values()}
    found |= dict.fromkeys(CONTROL, CONTROL_FAULTS)
    return found | dict.fromkeys(BULK_WAYS, BULK_FAULTS)


def choices_of(kind: str) -> tuple[str, ...]:
    """Every way of a step of that kind; ``""`` is the usual one."""
    return "", *CHOICES.get(kind, ()), *NOT_DRAWN_CHOICES.get(kind, ())
