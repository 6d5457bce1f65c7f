"""Faults on the notifier's way: invalidations and acknowledgements that are lost, late, twice, refused, too wide, or nested."""

from __future__ import annotations

from typing import Any

from .effects import HostEffect
from .kinds import EACH, Fault, Kind, Parameter
from .messages import MessageFault, Way
from .stepping import EVENT, at_points

SAME = "no stale access, and results as without it"


def _message(kind: str, message: str, *, to_device: bool) -> Any:
    def makes(fault: Fault) -> list[MessageFault]:
        way = Way(fault.on, to_device, not to_device, "control")
        latency, jitter = fault.settings.get("latency", 0.0), fault.settings.get("jitter", 0.0)
        made = MessageFault(kind, way, fault.controls, latency, jitter, message=message)
        return [made.narrowed_as(fault.process, fault.start, fault.end)]

    return makes


def _choice(point: str) -> Any:
    return lambda fault: [at_points(fault, point, "fail")]


def _host(deed: str, point: str) -> Any:
    return lambda fault: [
        HostEffect(deed, point, fault.on, fault.process, fault.start, fault.end, fault.controls, {"event": fault.settings.get("event", "")})
    ]


LATENCY = Parameter("latency", "time", "how late", 0.005)
JITTER = Parameter("jitter", "time", "at most so much more", 0.0)
KINDS = (
    Kind(
        "invalidate.lost",
        "notifier",
        "an invalidation is lost on its way",
        "it is repeated; " + SAME + "; if each is, as by default until the fault ends: as if the device never said that it has let go",
        _message("loss", "Invalidate", to_device=True),
    ),
    Kind(
        "invalidate.late",
        "notifier",
        "an invalidation arrives late, and what follows it too",
        SAME,
        _message("delay", "Invalidate", to_device=True),
        parameters=(LATENCY, JITTER),
    ),
    Kind(
        "invalidate.duplicate",
        "notifier",
        "an invalidation arrives twice",
        SAME,
        _message("duplicate", "Invalidate", to_device=True),
    ),
    Kind(
        "invalidate.reorder",
        "notifier",
        "what was sent behind an invalidation arrives first",
        SAME,
        _message("reorder", "Invalidate", to_device=True),
        parameters=(LATENCY, JITTER),
    ),
    Kind(
        "ack.lost",
        "notifier",
        "an acknowledgement is lost",
        "it is repeated; " + SAME + EACH,
        _message("loss", "Done", to_device=False),
    ),
    Kind(
        "invalidate.slow",
        "notifier",
        "a device takes its time to let go",
        SAME + "; beyond the invalidation timeout the device is lost",
        lambda fault: [
            at_points(fault, "device.before_ack", "delay", delay_s=fault.settings["latency"], jitter_s=fault.settings["jitter"])
        ],
        parameters=(LATENCY, JITTER, EVENT),
    ),
    Kind(
        "invalidate.silent",
        "notifier",
        "a device never says that it has let go, though it lives",
        "the CPU goes on after the invalidation timeout and the lease; the device is lost",
        lambda fault: [at_points(fault, "device.before_ack", "pause")],
        parameters=(EVENT,),
    ),
    Kind(
        "invalidate.refused",
        "notifier",
        "a device refuses to let go (non-blocking callback)",
        "the device is lost: it breaks its promise",
        lambda fault: [at_points(fault, "device.before_ack", "fail")],
        parameters=(EVENT,),
    ),
    Kind("invalidate.wrong_owner", "notifier", "a device is told of a migration of its own", SAME, _choice("hub.wrong_owner")),
    Kind(
        "invalidate.wide",
        "notifier",
        "an event covers pages around its range, half outside",
        SAME,
        _choice("hub.wide"),
        parameters=(EVENT,),
    ),
    Kind(
        "invalidate.nested",
        "notifier",
        "a second event of the same range begins inside the first",
        SAME,
        _host("nested", "hub.after_callbacks"),
    ),
    Kind(
        "release.during_fault",
        "notifier",
        "the process exits while a device faults on its memory",
        "the job ends; nothing leaks",
        _host("exit", "retry.between_faults"),
    ),
)
