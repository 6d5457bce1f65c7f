"""Faults of a computer: clocks that jump or run wrong, slow disks, starved processes."""

from __future__ import annotations

from .effects import DeviceEffect, Effect
from .kinds import Fault, Kind, Parameter
from .stepping import at_points

SAME = "results as without it; times are not to be trusted"


def _starve(fault: Fault) -> list[Effect]:
    return [at_points(fault, "*", "delay", delay_s=fault.settings["latency"])]


KINDS = (
    Kind(
        "clock.jump",
        "clocks",
        "a device's emulated clock jumps ahead",
        SAME,
        lambda fault: [DeviceEffect("clock", fault.on, {"jump": fault.settings["by"], "skew": 1.0})],
        parameters=(Parameter("by", "time", "how far", 1.0),),
    ),
    Kind(
        "clock.skew",
        "clocks",
        "a device's emulated clock runs at another rate",
        SAME,
        lambda fault: [DeviceEffect("clock", fault.on, {"jump": 0.0, "skew": fault.settings["factor"]})],
        parameters=(Parameter("factor", "number", "of the right rate", 1.1),),
    ),
    Kind(
        "disk.slow",
        "computer",
        "writing a line of a device's log takes long",
        "results as without it; beyond the lease the device is lost",
        lambda fault: [DeviceEffect("disk", fault.on, fault.settings)],
        parameters=(Parameter("latency", "time", "real time for each line", 0.01),),
        not_in={"sim": "a simulated machine writes no logs"},
    ),
    Kind(
        "cpu.starve",
        "computer",
        "a device's process hardly gets the CPU: every step waits",
        "results as without it, and it takes longer; with more than a real second at each step the device is lost, as if it hung: after a "
        "migration it has 2 s for two of them, to say that its table is up to date, and 5 s for any other answer",
        _starve,
        parameters=(Parameter("latency", "time", "at each step", 0.002),),
    ),
)
