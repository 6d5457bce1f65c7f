"""`hmmnet bench`: speed, as ratios to references measured in the same run."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from hmmnet.bench.registry import Suite, run
from hmmnet.errors import HmmnetError

if TYPE_CHECKING:
    from rich.table import Table

    from hmmnet.bench.measurement import Measurement


def bench(name: str | None, *, as_json: bool) -> int:
    """Measure and print; exit code 0 when every goal was met, 1 when one was missed, 2 for an unknown name."""
    found: list[Measurement] = []
    try:
        for measurement in run(name, _announce):
            found.append(measurement)
            if not as_json:
                print(_line(measurement), file=sys.stderr, flush=True)
    except HmmnetError as error:
        print(f"hmmnet bench: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps([measurement.as_dict() for measurement in found], indent=2))
    else:
        from rich.console import Console

        Console().print(_table(found))
    return 0 if all(measurement.met for measurement in found) else 1


def _announce(suite: Suite) -> None:
    print(f"measuring {', '.join(suite.figures)} ...", file=sys.stderr, flush=True)


def _line(measurement: Measurement) -> str:
    ratio = "" if measurement.ratio is None else f", ratio {measurement.ratio:.2f}"
    return f"  {measurement.name}: {measurement.value:.4g} {measurement.unit}{ratio}"


def _table(found: list[Measurement]) -> Table:
    from rich.table import Table

    table = Table(title="Figures of this run; ratios count, machines differ", title_justify="left")
    for heading, justify in (("figure", "left"), ("value", "right"), ("reference", "right"), ("ratio", "right"), ("goal", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]  # rich wants a Literal, which a tuple of pairs loses
    for m in found:
        reference = "" if m.reference is None else f"{m.reference:.4g} {m.unit}"
        ratio = "" if m.ratio is None else f"{m.ratio:.2f}"
        table.add_row(m.name, f"{m.value:.4g} {m.unit}", reference, ratio, m.goal, "[green]met[/]" if m.met else "[red]missed[/]")
    return table
