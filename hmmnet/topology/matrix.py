"""How fast everything reaches everything: the table that ``nvidia-smi topo -m`` makes people look for, with rates in place of letters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hmmnet.units import show_time

from .model import Topology
from .routes import Routes

if TYPE_CHECKING:
    from rich.table import Table

ENDS_SHOWN_MAX = 12
"""A wider table does not fit a terminal."""
ENDS_WITH_LATENCY_MAX = 6
"""Latencies take a second line in each cell; in a large table they would drown the rates."""


def ends(topology: Topology) -> list[str]:
    """What transfers begin and end at: memory nodes and devices."""
    return [*(node.name for node in topology.nodes), *topology.device_names]


def route_rows(topology: Topology) -> list[dict[str, Any]]:
    """Every ordered pair of ends: bottleneck, latency and links of its route."""
    routes = Routes(topology)
    return [
        {
            "source": source,
            "target": target,
            "bandwidth_bytes_per_s": routes.bandwidth_bytes_per_s(source, target),
            "latency_s": routes.latency_s(source, target),
            "links": [hop.link.name for hop in routes.route(source, target)],
        }
        for source in ends(topology)
        for target in ends(topology)
        if source != target
    ]


def matrix(topology: Topology) -> Table | None:
    """The table for a terminal, in GB/s from row to column; None when the machine has too many ends for one."""
    from rich.table import Table

    names = ends(topology)
    if not 2 <= len(names) <= ENDS_SHOWN_MAX:
        return None
    cells = {(row["source"], row["target"]): row for row in route_rows(topology)}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("GB/s", style="bold", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for source in names:
        table.add_row(source, *(_cell(cells.get((source, target)), len(names) <= ENDS_WITH_LATENCY_MAX) for target in names))
    return table


def _cell(row: dict[str, Any] | None, latency: bool) -> str:
    if row is None:
        return "[dim]-[/dim]"
    rate = f"{row['bandwidth_bytes_per_s'] / 1e9:.4g}"
    return f"{rate}\n[dim]{show_time(row['latency_s'])}[/dim]" if latency else rate
