"""The table that a GPU profiler prints for unified memory: how often, how large, how long.

Columns and row names are those of nvprof's "Unified Memory profiling result", so that people who read those read this, and scripts that
parse those need little change. Times are emulated seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hmmnet.units import show_size, show_time

from .counters import CPU_FAULT, DEVICE_TO_DEVICE, DEVICE_TO_HOST, GPU_FAULT_GROUP, HOST_TO_DEVICE, Profile

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {
    HOST_TO_DEVICE: "Host To Device",
    DEVICE_TO_HOST: "Device To Host",
    DEVICE_TO_DEVICE: "Device To Device",
    CPU_FAULT: "CPU Page faults",
    GPU_FAULT_GROUP: "Gpu page fault groups",
}
ALWAYS = (HOST_TO_DEVICE, DEVICE_TO_HOST, CPU_FAULT, GPU_FAULT_GROUP)
"""Rows that stand there even when nothing happened: zero is an answer."""
FAULTS = frozenset({CPU_FAULT, GPU_FAULT_GROUP})
"""Kinds whose sizes are not transfers: profilers print only how many and how long."""


def rows(profile: Profile) -> list[dict[str, Any]]:
    """One row for each kind, summed over devices: count, mean, min, max and total bytes, seconds, name."""
    kinds = (*ALWAYS, *(kind for kind in profile.kinds() if kind not in ALWAYS))
    return [{"kind": kind, "name": TITLES.get(kind, kind), **profile.counter(kind).as_json()} for kind in kinds]


def profiler_table(profile: Profile, title: str = "Unified Memory profiling result (emulated time)") -> Table:
    """The table for a terminal."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("Count", "Avg Size", "Min Size", "Max Size", "Total Size", "Total Time"):
        table.add_column(heading, justify="right")
    table.add_column("Name")
    for row in rows(profile):
        sizes = ("mean_bytes", "min_bytes", "max_bytes", "total_bytes")
        shown = ["-"] * len(sizes) if row["kind"] in FAULTS or not row["count"] else [show_size(row[size]) for size in sizes]
        table.add_row(f"{row['count']:,}", *shown, show_time(row["seconds"]) if row["count"] else "-", row["name"])
    return table
