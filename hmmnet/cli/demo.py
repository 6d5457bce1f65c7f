"""``hmmnet demo``: the tour."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .completion import topologies
from .outputs import attempt, writable
from .plans import Breaking, FaultsFile, plan_for
from .worlds import WORLD_HELP, World

if TYPE_CHECKING:
    from hmmnet.demo.data import Input
    from hmmnet.sim.worlds import WorldName

SEED = 1


def demo(
    files: Annotated[list[Path] | None, typer.Argument(help="More text files.", show_default=False)] = None,
    given: Annotated[
        list[Path] | None,
        typer.Option("--input", help="Text to work on; several files may follow. Default: the standard library's sources."),
    ] = None,
    topology: Annotated[str, typer.Option(autocompletion=topologies, help="The machine: a preset's name or a TOML file.")] = "two-gpus",
    limit_mib: Annotated[int, typer.Option(min=1, max=256, help="Read at most so much of the text.")] = 4,
    rate: Annotated[str, typer.Option(help="Emulated seconds for a real one: auto (measured) or a number.")] = "auto",
    seed: Annotated[int, typer.Option(help="For the words looked up, chances of faults and, with --world sim, the order.")] = SEED,
    world: Annotated[World, typer.Option(help=WORLD_HELP)] = World.real,
    svg: Annotated[Path | None, typer.Option(help="Write where the pages live over time to this file.", show_default=False)] = None,
    faults: FaultsFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what happened for programs.")] = False,
) -> int:
    """Run word count and tree search on GPUs over pointers that the CPU made, by demand and after migration, and check every result.

    All GPUs of the machine take part, up to eight: as many of them as are a power of two. Exit code 0 if every result is what plain
    Python computes, 1 if not.
    """
    if not as_json:
        print("hmmnet demo: a multi-GPU machine in software, at work on real text\n", flush=True)
    from hmmnet.demo.data import MEBIBYTE, read_input
    from hmmnet.errors import WrongUse
    from hmmnet.launcher.rate import parse_rate
    from hmmnet.topology.load import load

    # a machine that there is not, and faults and rates that cannot be, are said before anything is read
    machine = load(topology)
    if not machine.devices:
        raise WrongUse(f"{topology} has no devices, which the demo is about; give it another --topology")
    parse_rate(rate)
    plan = plan_for(faults, world.value, machine)
    paths = [*(given or []), *(files or [])]
    try:
        text = read_input(paths, limit_mib * MEBIBYTE)
    except OSError as error:
        print(f"hmmnet demo: {error.filename}: {error.strerror}; name a text file that can be read", file=sys.stderr)
        return 2
    if not any(byte in _WORD_BYTES for byte in text.text[:4096]) and not any(byte in _WORD_BYTES for byte in text.text):
        print(f"hmmnet demo: {text.source}: holds no word ([A-Za-z0-9_]); give another file to --input", file=sys.stderr)
        return 2
    return _conduct(text, topology, rate, seed, world.value, svg, plan, as_json=as_json)


_WORD_BYTES = frozenset(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz")


def _conduct(text: Input, topology: str, rate: str, seed: int, world: WorldName, svg: Path | None, plan: Breaking, *, as_json: bool) -> int:
    from rich.console import Console

    from hmmnet.demo.conduct import Conductor
    from hmmnet.demo.screen import Screen, columns_of
    from hmmnet.errors import WrongUse
    from hmmnet.launcher.rate import parse_rate
    from hmmnet.observe.residency import svg_picture
    from hmmnet.sim.worlds import run_in

    if svg is not None:
        writable(svg)
    screen = Screen(Console(quiet=as_json))
    screen.reading(text, topology, simulated=world == "sim")
    if world == "sim" and rate != "auto":
        raise WrongUse("--rate and --world sim exclude each other: in virtual time every link holds")
    conductor = Conductor(text, topology, seed, screen.tell, screen.started, parse_rate(rate), world=world, during=plan.on)
    with plan.telling():
        outcome = run_in(world, conductor.run, seed=seed)
    unwritten = None if svg is None else attempt(svg, svg_picture(columns_of(screen.samples, outcome.devices)))
    if as_json:
        json.dump({**outcome.as_json(), **plan.as_json()}, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        screen.finished(outcome)
        if plan:
            print(plan.text)
    if unwritten is not None:
        raise unwritten
    return 0 if outcome.correct else 1
