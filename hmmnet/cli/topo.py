"""`hmmnet topo`: machines as data. List the presets, show one, check files, draw."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hmmnet.topology.load import examine, load, preset_names, read_source
from hmmnet.units import show_size

from . import CONTEXT, FAILED

app = typer.Typer(
    help="Machines as data.", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True, context_settings=CONTEXT
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="A preset's name, or a TOML file.")]


@app.command("ls")
def ls(as_json: Json = False) -> None:
    """List the machines that come with hmmnet."""
    topologies = [load(name) for name in preset_names()]
    if as_json:
        print(json.dumps([{"name": t.name, "devices": len(t.devices), "links": len(t.links), "description": t.description} for t in topologies], indent=2))
        return
    width = max(len(t.name) for t in topologies)
    for topology in topologies:
        print(f"{topology.name:<{width}}  {len(topology.devices):>2} devices  {topology.description}")


@app.command("show")
def show(name: Name, as_json: Json = False) -> None:
    """Print a machine: its parts and its links."""
    topology = load(name)
    if as_json:
        print(json.dumps(asdict(topology), indent=2))
        return
    from rich.console import Console

    from hmmnet.topology.draw import link_text, terminal_tree

    console = Console(highlight=False)
    console.print(terminal_tree(topology))
    total = sum(device.memory_bytes for device in topology.devices)
    console.print(f"{len(topology.devices)} devices with {show_size(total)}, {len(topology.links)} links; the widest: ", end="")
    widest = max(topology.links, key=lambda link: link.capacity_bytes_per_s(True), default=None)
    console.print("none" if widest is None else f"{widest.name} ({link_text(widest)})")


@app.command("check")
def check(files: Annotated[list[str], typer.Argument(help="TOML files, or presets' names.")], as_json: Json = False) -> int:
    """Check topology files; all mistakes of each, with line and mend. Exit code 1 when there is one."""
    found = []
    for file in files:
        text, name = read_source(file)
        _, problems = examine(text, name)
        found += problems
        if not as_json:
            for problem in problems:
                print(problem)
            if not problems:
                print(f"{name}: good")
    if as_json:
        print(json.dumps([problem.as_json() for problem in found], indent=2))
    return FAILED if found else 0


@app.command("draw")
def draw(name: Name, svg: Annotated[Path | None, typer.Option("--svg", help="Write an SVG picture to this file.")] = None) -> None:
    """Draw a machine: as a tree here, or as a picture."""
    from hmmnet.topology import draw as pictures

    topology = load(name)
    if svg is None:
        from rich.console import Console

        Console(highlight=False).print(pictures.terminal_tree(topology))
        return
    from hmmnet.errors import HmmnetError

    try:
        svg.write_text(pictures.svg(topology))
    except OSError as error:
        raise HmmnetError(f"{svg}: cannot be written: {error.strerror}; name another file") from error
    print(f"{svg}: {topology.name}, {len(topology.devices)} devices")
