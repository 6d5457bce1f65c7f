"""Errors of memory: corrected and uncorrectable ones, poison that is consumed, pages that are retired (amdgpu RAS, ECC, hwpoison)."""

from __future__ import annotations

from typing import Any

from .effects import DeviceEffect, Effect, HostEffect
from .kinds import Fault, Kind, Parameter
from .stepping import at_points


def _host(deed: str) -> Any:
    return lambda fault: [HostEffect(deed, "", fault.on, fault.process, fault.start, fault.end, fault.controls, fault.settings)]


def _storm(fault: Fault) -> list[Effect]:
    slow = [at_points(fault, point, "delay", delay_s=fault.settings["latency"]) for point in ("*.mid_copy", "device.job_step")]
    return [*slow, HostEffect("corrected", "migrate.mid_copy", fault.on, controls=fault.controls, settings={"count": 1})]


NO_ROWS = "memory here has no rows: use page.retire"
KINDS = (
    Kind(
        "ecc.corrected",
        "memory",
        "errors that ECC corrects",
        "nothing but a count in the report",
        _host("corrected"),
        parameters=(Parameter("count", "count", "how many", 1),),
        once=True,
    ),
    Kind(
        "ecc.uncorrectable",
        "memory",
        "the memory under a process's pages (process, range) breaks, wherever they live",
        "an access is SIGBUS, a device's EFAULT; the frames are never used again",
        _host("poison"),
        once=True,
        needs_range=True,
    ),
    Kind(
        "ecc.in_flight",
        "memory",
        "the copy engine reads poison: the copy fails",
        "an error for who asked; nothing moved",
        lambda fault: [at_points(fault, point, "fail") for point in ("migrate.mid_copy", "device.mid_copy")],
    ),
    Kind(
        "page.retire",
        "memory",
        "pages of the device's memory that are free are never used again",
        "less memory; results as without it",
        lambda fault: [DeviceEffect("retire", fault.on, fault.settings)],
        parameters=(Parameter("pages", "count", "how many", 16),),
        once=True,
    ),
    Kind(
        "ecc.storm",
        "memory",
        "corrected errors in every chunk and step: interrupts cost time",
        "results as without it; it takes longer",
        _storm,
        parameters=(Parameter("latency", "time", "for each", 0.0001),),
    ),
    Kind(
        "row_remap.pending", "memory", "a row waits to be remapped", "less memory", lambda _: [], not_in={"sim": NO_ROWS, "real": NO_ROWS}
    ),
)
