"""`hmmnet bench`: speed, as ratios to references measured in the same run."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import FAILED

if TYPE_CHECKING:
    from rich.table import Table

    from hmmnet.bench.measurement import Measurement
    from hmmnet.bench.registry import Suite

WIDTH_MAX = 1000
"""Longer than any line of the table."""
COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("figure", "left"),
    ("value", "right"),
    ("reference", "right"),
    ("ratio", "right"),
    ("goal", "right"),
    ("", "left"),
)


def bench(
    name: Annotated[str | None, typer.Argument(help="A figure such as bridge.rtt, or a group such as dma; default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Measure, and print each figure beside its reference and its goal. Exit code 1 when a goal was missed.

    Measure with nothing else running: what counts are ratios, but a busy computer makes even those uneven.
    """
    from hmmnet.bench.registry import run

    found: list[Measurement] = []
    for measurement in run(name, _announce):
        found.append(measurement)
        print(_line(measurement), file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps([measurement.as_dict() for measurement in found], indent=2))
    else:
        print_table(found)
    return 0 if all(measurement.met for measurement in found) else FAILED


def _announce(suite: Suite) -> None:
    print(f"measuring {', '.join(suite.figures)} ...", file=sys.stderr, flush=True)


def _line(measurement: Measurement) -> str:
    ratio = "" if measurement.ratio is None else f", ratio {measurement.ratio:.2f}"
    return f"  {measurement.name}: {measurement.value:.4g} {measurement.unit}{ratio}"


def print_table(found: list[Measurement]) -> None:
    """All figures on standard output. A narrow terminal folds their names; what is not a terminal gets the lines as long as they are."""
    from rich.console import Console

    from hmmnet.observe.fitted import Fitted

    table = _table(found)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, console.measure(table, options=console.options.update(max_width=WIDTH_MAX)).maximum)
    console.print(Fitted(table))


def _table(found: list[Measurement]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading, justify in COLUMNS:
        table.add_column(heading, justify=justify, no_wrap=heading != "figure", overflow="fold")
    for m in found:
        reference = "" if m.reference is None else f"{m.reference:.4g}"
        ratio = "" if m.ratio is None else f"{m.ratio:.3g}"
        table.add_row(m.name, f"{m.value:.4g} {m.unit}", reference, ratio, m.goal, _verdict(m))
    return table


def _verdict(m: Measurement) -> str:
    if not m.goal:
        return ""
    return "[green]met[/]" if m.met else "[red]missed[/]"
