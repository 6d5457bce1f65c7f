"""Faults of devices: their fault buffers, their replays, and accesses that fight for pages."""

from __future__ import annotations

from typing import Any

from .effects import DeviceEffect, HostEffect
from .kinds import EACH, Kind, Parameter
from .stepping import at_points


def _choice(point: str) -> Any:
    return lambda fault: [at_points(fault, point, "fail")]


def _deed(deed: str, point: str) -> Any:
    return lambda fault: [HostEffect(deed, point, fault.on, fault.process, fault.start, fault.end, fault.controls, fault.settings)]


NO_COUNTERS = "devices here have no access counters: policies act on faults"
SAME = "results as without it; it takes longer"
KINDS = (
    Kind(
        "buffer.overflow",
        "device",
        "the fault buffer holds few entries",
        SAME,
        lambda fault: [DeviceEffect("buffer", fault.on, fault.settings)],
        parameters=(Parameter("entries", "count", "what fits", 4),),
    ),
    Kind("fault.duplicate", "device", "faults that were serviced are reported again", SAME, _choice("device.duplicate")),
    Kind(
        "fault.stale",
        "device",
        "a fault is fetched late: its page may be unmapped, or there, by then",
        SAME,
        lambda fault: [at_points(fault, "device.fetch", "delay", delay_s=fault.settings["latency"])],
        parameters=(Parameter("latency", "time", "how late", 0.005),),
    ),
    Kind("replay.lost", "device", "a replay is lost: the accesses fault again after a timeout", SAME + EACH, _choice("device.replay_lost")),
    Kind(
        "fault.unserviceable",
        "device",
        "a fault cannot be serviced",
        "the job ends with the address; the device goes on",
        _choice("device.unserviceable"),
    ),
    Kind(
        "counter.flood",
        "device",
        "access counters interrupt without end",
        SAME,
        lambda _: [],
        not_in={"sim": NO_COUNTERS, "real": NO_COUNTERS},
    ),
    Kind("pingpong", "device", "a CPU touches what has just moved to a device", SAME, _deed("touch", "migrate.after")),
    Kind(
        "alternate",
        "device",
        "another device wants what has just moved to one",
        SAME,
        _deed("prefetch", "migrate.after"),
        parameters=(Parameter("to", "text", "the other device"),),
    ),
    Kind(
        "prefetch.race",
        "device",
        "a prefetch of the same range runs beside a fault's migration",
        SAME,
        _deed("prefetch", "migrate.before_collect"),
    ),
    Kind("thrash", "device", "what has just moved to a device is sent home", SAME, _deed("home", "migrate.after")),
)
