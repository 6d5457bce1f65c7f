"""Faults at protocol points: any boundary of the registry (`points`) can be made to take longer, wait, fail, or cost a node its life."""

from __future__ import annotations

from typing import Any

from .injector import PointFault
from .kinds import Fault, Kind, Parameter

EVENTS = (
    "unmap",
    "clear",
    "protection_vma",
    "protection_page",
    "soft_dirty",
    "release",
    "migrate",
    "exclusive",
    "invalidate",
)
"""Why the notifier calls (enum mmu_notifier_event), and the one event of v25; a test holds them to the host's."""
POINT = Parameter("point", "point", "a point's name or a pattern of names (see `hmmnet fault points`)")
EVENT = Parameter("event", "choice", "only for this event of the notifier, such as unmap", "", EVENTS)


def at_points(fault: Fault, point: str, action: Any, **more: Any) -> PointFault:
    """The fault's targets and controls at `point`."""
    return PointFault(
        point,
        action,
        fault.on,
        process=fault.process,
        start=fault.start,
        end=fault.end,
        event=str(fault.settings.get("event", "")),
        controls=fault.controls,
        kind=fault.kind.name,
        **more,
    )


def _delay(fault: Fault) -> list[PointFault]:
    settings = fault.settings
    return [at_points(fault, settings["point"], "delay", delay_s=settings["latency"], jitter_s=settings["jitter"])]


def _node(action: str) -> Any:
    return lambda fault: [at_points(fault, fault.settings["point"], action, node=fault.settings["node"])]


NODE = Parameter("node", "text", "who (default: the device concerned)", "")
KINDS = (
    Kind(
        "point.delay",
        "points",
        "a step boundary takes longer",
        "results as without it",
        _delay,
        parameters=(
            POINT,
            EVENT,
            Parameter("latency", "time", "emulated time", 0.001),
            Parameter("jitter", "time", "at most so much more", 0.0),
        ),
    ),
    Kind(
        "point.pause",
        "points",
        "whoever comes to a step boundary waits until the fault is released or removed",
        "results as without it; longer than a lease or a deadline of the protocol, the device is lost",
        lambda fault: [at_points(fault, fault.settings["point"], "pause")],
        parameters=(POINT, EVENT),
    ),
    Kind(
        "point.fail",
        "points",
        "a step fails with the error that is really met there",
        "an errno or a signal, nothing moved, nothing leaked",
        lambda fault: [at_points(fault, fault.settings["point"], "fail")],
        parameters=(POINT, EVENT),
    ),
    Kind(
        "point.crash",
        "points",
        "a node dies at a step boundary",
        "pages in transit are back; what was only on the dead device is SIGBUS",
        _node("crash"),
        parameters=(POINT, EVENT, NODE),
    ),
    Kind(
        "point.hang",
        "points",
        "a node hangs at a step boundary (SIGSTOP)",
        "nobody waits longer than its lease; then as if it had died",
        _node("hang"),
        parameters=(POINT, EVENT, NODE),
    ),
)
