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
ON_EVERY_REGION = frozenset({"migrate", "home", "advise", "lock"})
"""Kinds of steps whose `region` counts the lanes and the counters, too."""
REGION_KINDS = ("anon", "shared", "file", "huge")
VICTIM_PID_FIRST = 1001
"""The actors' process is the first of a machine, the victims are the next ones."""
VICTIM_ADDRESS = 0x20_0000_0000
VICTIM_BYTES = 4 * 4096
"""Where the memory of each victim is: faults can name it."""
HARM_KINDS = ("death", "partition", "hang", "message")
DEATH = "death"
"""Of a message: its device dies when it is sent."""
UNREADABLE = ("truncate", "garbage", "old_version")
"""What makes a message one that nobody can read: it is answered with an error, or ends its session, and with that its device."""
CONTROL_FAULTS = ("loss", "delay", "duplicate", "reorder", *UNREADABLE, DEATH)
BULK_FAULTS = ("loss", "delay", "duplicate", "reorder", "truncate", "garbage", "corrupt", DEATH)
CONTROL = (*(kind.__name__ for kind in get_args(Body)), *(kind.name for kind in Kind if kind not in WITH_BODY))
"""Every message of a session."""


def places() -> dict[str, tuple[str, ...]]:
    """Every place, in order, with what could happen there if it applied."""
    found = {point.name: point.actions for point in POINTS.values()}
    found |= dict.fromkeys(CONTROL, CONTROL_FAULTS)
    return found | dict.fromkeys(BULK_WAYS, BULK_FAULTS)
