"""``hmmnet ps``: the machines of this user, running and stale, with their devices."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .completion import machines

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hmmnet.launcher.directory import Directory, MachineRecord

DEVICES_LISTED = 16
"""A machine with more devices shows how many are in which state, and names only those that are not ready."""


def ps(
    name: Annotated[
        str | None, typer.Argument(autocompletion=machines, help="Show this machine only, with every device.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records for programs.")] = False,
) -> int:
    """Machines that run, with their devices; and what dead machines left behind."""
    from hmmnet.launcher.directory import Directory, base_directory, directories

    if name is None:
        found = list(directories())
    else:
        found = [Directory.named(name)]
        if not found[0].path.is_dir():
            print(f'hmmnet ps: there is no machine "{name}"{_others()}', file=sys.stderr)
            return 1
    described = [describe(directory) for directory in found]
    if as_json:
        import json

        print(json.dumps(described, indent=1))
        return 0
    if not described:
        print(f'no machine runs (looked in {base_directory()}); start one with "hmmnet up"')
        return 0
    show(described, everything=name is not None)
    return 0


def describe(directory: Directory) -> dict[str, Any]:
    """A machine as ``--json`` shows it: its record, and whether it is alive."""
    from msgspec import to_builtins

    record = directory.read()
    alive = directory.alive()
    entry: dict[str, Any] = {"name": directory.name} if record is None else to_builtins(record)
    entry["alive"] = alive
    entry["state"] = state_of(record, alive)
    entry["directory"] = str(directory.path)
    return entry


def state_of(record: MachineRecord | None, alive: bool) -> str:
    """``starting``, ``running``, ``failed`` or ``dead`` (its launcher vanished)."""
    if alive:
        return "starting" if record is None else record.state
    return "failed" if record is not None and record.state == "failed" else "dead"


def _others() -> str:
    from hmmnet.launcher.directory import directories

    names = [directory.name for directory in directories()]
    return f"; there are: {', '.join(names)}" if names else '; start one with "hmmnet up"'


def show(described: list[dict[str, Any]], *, everything: bool) -> None:
    """Print machines for a person."""
    from rich.console import Console
    from rich.table import Table

    from hmmnet.observe.fitted import Fitted

    console = Console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("machine", "state", "topology", "devices", "rate", "process", "up"):
        table.add_column(heading, no_wrap=heading in ("machine", "state"))
    for entry in described:
        table.add_row(*machine_row(entry))
    console.print(Fitted(table))
    for entry in described:
        if entry.get("devices") and entry["alive"]:
            console.print()
            console.print(device_table(entry, everything=everything))
    gone = [entry for entry in described if not entry["alive"]]
    for entry in gone:
        if entry.get("why"):
            hint = f'; "hmmnet logs {entry["name"]}" tells more'
            cause = entry["why"].removesuffix(hint)
            console.print(f"{entry['name']}: {cause}{hint}", markup=False, highlight=False, soft_wrap=True)
    if gone:
        names = ", ".join(entry["name"] for entry in gone)
        them = "it" if len(gone) == 1 else "them"
        text = f'left behind by machines that are gone: {names}; "hmmnet clean" removes {them}'
        console.print(text, markup=False, highlight=False, soft_wrap=True)


COLOURS = {"running": "green", "ready": "green", "starting": "yellow", "failed": "red", "dead": "red", "lost": "red", "unplugged": "yellow"}


def coloured(state: str) -> str:
    """A state as rich markup."""
    colour = COLOURS.get(state)
    return f"[{colour}]{state}[/]" if colour else state


def machine_row(entry: dict[str, Any]) -> tuple[str, ...]:
    """One machine's cells."""
    devices = entry.get("devices", [])
    ready = sum(device["state"] == "ready" for device in devices)
    up = how_long(time.time() - entry["started_s"]) if entry["alive"] and "started_s" in entry else ""
    count = f"{ready} of {len(devices)} ready" if entry["alive"] else str(len(devices) or "")
    rate = f"{entry['rate']:.3g}" if entry.get("rate") else ""
    process = str(entry.get("pid", "")) if entry["alive"] else ""
    return entry["name"], coloured(entry["state"]), entry.get("topology", "?"), count, rate, process, up


def device_table(entry: dict[str, Any], *, everything: bool = False) -> RenderableType:
    """A machine's devices; of many, only those that are not ready, and a count."""
    from rich.console import Group
    from rich.table import Table

    from hmmnet.observe.fitted import Fitted
    from hmmnet.units import show_size

    devices = entry["devices"]
    shown = devices if everything or len(devices) <= DEVICES_LISTED else [device for device in devices if device["state"] != "ready"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in (entry["name"], "model", "memory", "process", "state"):
        table.add_column(heading)
    for device in shown:
        state = coloured(device["state"]) + (f" [dim]({device['how']})[/]" if device["how"] else "")
        table.add_row(device["name"], device["model"], show_size(device["memory_bytes"]), str(device["pid"] or ""), state)
    hidden = Counter((device["model"], device["state"]) for device in devices if device not in shown)
    rest = [f"{entry['name']}: {count} {model} {coloured(state)}" for (model, state), count in hidden.items()]
    return Group(*rest, *([Fitted(table)] if shown else []))


def how_long(seconds: float) -> str:
    """A machine's age, roughly."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
