"""``hmmnet topo``: machines as data. List the presets, show one, check files, draw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmmnet.units import counted

from . import CONTEXT, FAILED
from .completion import topologies
from .outputs import writable, write

if TYPE_CHECKING:
    from hmmnet.topology.model import Topology
    from hmmnet.topology.problems import Problem

app = typer.Typer(
    help="Machines as data: list, show, check, draw.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings=CONTEXT,
)
WIDTH_MAX = 1000
"""Wider than any table."""
Json = Annotated[bool, typer.Option("--json", help="Print the data for programs.")]
Name = Annotated[str, typer.Argument(autocompletion=topologies, help="A preset's name, or a TOML file.", show_default=False)]


@app.command("ls")
def ls(as_json: Json = False) -> None:
    """List the machines that come with hmmnet."""
    from hmmnet.topology.load import load, preset_names

    topologies = [load(name) for name in preset_names()]
    if as_json:
        print(json.dumps([summary(topology) for topology in topologies], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    from hmmnet.observe.fitted import Fitted

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("devices", justify="right")
    table.add_column("links", justify="right")
    table.add_column("what it is")
    for topology in topologies:
        table.add_row(topology.name, str(len(topology.devices)), str(len(topology.links)), topology.description)
    Console(highlight=False).print(Fitted(table))


def summary(topology: Topology) -> dict[str, Any]:
    """A line of ``ls`` as data."""
    return {
        "name": topology.name,
        "description": topology.description,
        "nodes": len(topology.nodes),
        "devices": len(topology.devices),
        "switches": len(topology.switches),
        "links": len(topology.links),
        "host_memory_bytes": sum(node.memory_bytes for node in topology.nodes),
        "device_memory_bytes": sum(device.memory_bytes for device in topology.devices),
    }


@app.command("show")
def show(
    name: Name,
    as_json: Json = False,
    as_toml: Annotated[bool, typer.Option("--toml", help="Print the file as it is: what to begin a machine of your own with.")] = False,
) -> None:
    """Show a machine: its parts, its links, and how fast everything reaches everything."""
    from hmmnet.errors import WrongUse
    from hmmnet.topology.load import find, load, own_text
    from hmmnet.topology.matrix import matrix, route_rows

    topology = load(name)
    if as_toml:
        if as_json:
            raise WrongUse("--toml and --json exclude each other")
        sys.stdout.write(own_text(find(name)))
        return
    if as_json:
        from dataclasses import asdict

        print(json.dumps({**asdict(topology), "routes": route_rows(topology)}, indent=1))
        return
    from rich.console import Console

    from hmmnet.topology.tree import terminal_tree

    console = Console(highlight=False)
    console.print(terminal_tree(topology))
    table = matrix(topology)
    console.print()
    if table is None:
        console.print(f"{counted(len(topology.devices), 'device')}: too many for a table of all routes (--json lists them)")
        return
    needed = console.measure(table, options=console.options.update(max_width=WIDTH_MAX)).maximum
    if not console.is_terminal:
        console.width = max(console.width, needed)
    if needed > console.width:
        console.print(f"the table of all routes needs a terminal {needed} columns wide (--json lists them)")
    else:
        console.print(table)


@app.command("check")
def check(
    files: Annotated[list[str], typer.Argument(autocompletion=topologies, help="TOML files, or presets' names.", show_default=False)],
    as_json: Json = False,
) -> int:
    """Check topology files: all mistakes of each, with line and mend. Exit code 1 when there is one."""
    found: list[Problem] = []
    for file in files:
        topology, problems = examined(file)
        found += problems
        if not as_json:
            for problem in problems:
                print(problem)
            if topology is not None:
                plain = "" if topology.devices else ", a plain host"
                print(f"{file}: good: {counted(len(topology.devices), 'device')}, {counted(len(topology.links), 'link')}{plain}")
    if as_json:
        print(json.dumps([problem.as_json() for problem in found], indent=1))
    elif len(found) > 1:
        print(f"{len(found)} mistakes", file=sys.stderr)
    return FAILED if found else 0


def examined(file: str) -> tuple[Topology | None, list[Problem]]:
    """The machine of a file, or what is wrong with it; a file that cannot be read is one mistake."""
    from hmmnet.errors import TopologyError
    from hmmnet.topology.load import examine, find, installed_models
    from hmmnet.topology.problems import Problem

    try:
        source = find(file)
    except TopologyError as error:
        return None, [problem for problem in error.problems if isinstance(problem, Problem)]
    return examine(source.text, source.file, source.name, installed_models() or None)


@app.command("draw")
def draw(
    name: Name,
    svg: Annotated[Path | None, typer.Option("--svg", help="Write an SVG picture to this file (- for standard output).")] = None,
) -> None:
    """Draw a machine: as a tree here, or as a picture."""
    from hmmnet.topology import draw as picture
    from hmmnet.topology.load import load

    topology = load(name)
    if svg is None:
        from rich.console import Console

        from hmmnet.topology.tree import terminal_tree

        Console(highlight=False).print(terminal_tree(topology))
    elif str(svg) == "-":
        sys.stdout.write(picture.svg(topology))
    else:
        writable(svg)
        write(svg, picture.svg(topology))
        print(f"{svg}: {topology.name}, {counted(len(topology.devices), 'device')}")
