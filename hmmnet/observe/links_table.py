"""What each link carried, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hmmnet.units import counted, show_rate, show_size

from .fitted import Fitted

LINKS_SHOWN = 12
WIDE = 72
"""Columns from which the capacity has room beside what was asked and reached."""
FAR_BELOW = 0.9
"""Reached, of what was asked: below, a reader wonders how that is keeping up."""
LATE = "kept up: small transfers may be late by what a driver's launch of a copy takes"
SPEEDS = {"capacity": "Can do", "asked": "Asked", "reached": "Reached"}


def links_table(links: Sequence[Mapping[str, Any]], width: int) -> Group:
    """Each direction of each link that carried something, the busiest first if there are many."""
    used = [link for link in links if link["bytes_moved"]]
    shown = used if len(used) <= LINKS_SHOWN else sorted(used, key=lambda link: -link["bytes_moved"])[:LINKS_SHOWN]
    speeds = ("capacity", "asked", "reached") if width >= WIDE else ("asked", "reached")
    table = Table(title="Links (emulated time)", title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("Direction", no_wrap=True)
    for heading in ("Carried", *(SPEEDS[speed] for speed in speeds)):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("Emulation", no_wrap=True)
    for link in shown:
        figures = (show_rate(link[f"{speed}_bytes_per_s"]) for speed in speeds)
        kept = "[green]kept up[/green]" if link["kept_up"] else "[yellow]behind[/yellow]"
        table.add_row(f"{link['source']} > {link['target']}", show_size(link["bytes_moved"]), *figures, kept)
    rest = len(used) - len(shown)
    notes = [f"and {counted(rest, 'less busy direction')}"] if rest else []
    if any(link["kept_up"] and link["reached_bytes_per_s"] < FAR_BELOW * link["asked_bytes_per_s"] for link in shown):
        notes.append(LATE)
    return Group(Fitted(table), *(Text(note, style="dim") for note in notes))
