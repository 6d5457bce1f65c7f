"""``hmmnet shrink``: a failing run made short, as one file for a bug report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hmmnet.units import counted

from .outputs import attempt, writable
from .replay import program_of


def shrink(
    context: typer.Context,
    what: Annotated[
        str, typer.Argument(metavar="SEED|FILE", help="A seed of a campaign, or a file of an earlier shrink.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.", show_default=False)],
    faults: Annotated[str, typer.Option("--faults", "--mix", metavar="MIX", help="The campaign's mix of faults, for a seed.")] = "all",
    operations: Annotated[int, typer.Option(min=1, max=100_000, help="The campaign's operations, for a seed.")] = 200,
    devices: Annotated[int, typer.Option(min=0, max=64, help="The campaign's devices, for a seed.")] = 4,
    runs: Annotated[int, typer.Option(min=1, help="Candidates to try at most.")] = 2000,
) -> int:
    """Leave out faults, actors, operations, devices and regions while the run fails in the same way, and write what is left to a file.

    Attach the file to a bug report: hmmnet replay FILE shows the failure. Ctrl-C writes the shortest so far. What cannot be written to
    the file is printed. Exit code 1 for that, and when the run does not fail.
    """
    from hmmnet.campaign.program import Program
    from hmmnet.campaign.shrink import Shrinker

    def tell(count: int, best: Program) -> None:
        print(
            f"{counted(count, 'run')}: {counted(len(best.steps), 'step')}, {counted(len(best.faults) + len(best.planned), 'fault')}, "
            f"{counted(len(best.harms), 'harm')}",
            file=sys.stderr,
        )

    program = program_of(context, what, faults, operations, devices)
    writable(output)
    shrinker = Shrinker(program, runs_max=runs, on_run=tell)
    if not shrinker.fails:
        print(f"hmmnet shrink: {f'seed {what}' if what.isdecimal() else what} does not fail: there is nothing to shrink", file=sys.stderr)
        return 1
    interrupted = False
    try:
        shrinker.shrink()
    except KeyboardInterrupt:
        interrupted = True
    short = shrinker.best
    unwritten = attempt(output, short.text())
    became = f"{counted(len(program.steps), 'step')} became {len(short.steps)} in {counted(shrinker.runs, 'run')}"
    early = ", when it was interrupted: it may become shorter still" if interrupted else ""
    if unwritten is not None:
        sys.stdout.write(short.text())
        print(f"{became}{early}: {short.note}\nwhat was to be in the file is on standard output", file=sys.stderr)
        raise unwritten
    print(f"{became}{early}: {short.note}\nagain: hmmnet replay {output}")
    return 130 if interrupted else 0
