"""``hmmnet replay``: one seed, or one file, exactly as it was, with its story."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmmnet.units import counted

from . import options_given
from .outputs import writable, write

if TYPE_CHECKING:
    from hmmnet.campaign.program import Program
    from hmmnet.campaign.trial import Verdict

AFTER = 6
"""Lines of the story behind the violation."""


def replay(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="SEED|FILE", help="A seed of a campaign, or a file of a program.", show_default=False)],
    faults: Annotated[str, typer.Option("--faults", "--mix", metavar="MIX", help="The campaign's mix of faults, for a seed.")] = "all",
    operations: Annotated[int, typer.Option(min=1, max=100_000, help="The campaign's operations, for a seed.")] = 200,
    devices: Annotated[int, typer.Option(min=0, max=64, help="The campaign's devices, for a seed.")] = 4,
    lines: Annotated[int, typer.Option(min=0, help="Lines of the story before the violation.")] = 40,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write what is run to a file, to be changed or swept.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Repeat a run exactly, and tell what happened around its first violation. Exit code 1 when there is one, 2 for no such seed
    or file.

    The same seed or file gives the same digest on every computer. What hmmnet shrink or --output has written is such a file.
    """
    from hmmnet.campaign.trial import run_program
    from hmmnet.sim import Trace

    program = program_of(context, what, faults, operations, devices)
    if output is not None:
        writable(output)
        write(output, program.text())
    verdict = run_program(program, trace=Trace(keep=True))
    if as_json:
        json.dump(_as_json(verdict, lines), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        _tell(verdict, lines)
    return 1 if verdict.violations else 0


OF_A_SEED = ("faults", "operations", "devices")
"""Options that say what a seed is drawn with: a file has all that already."""
SEED_DIGITS_MAX = 100
"""Of a seed on a command line: far more than anybody tries, and far fewer than Python reads."""


def program_of(context: typer.Context, what: str, mix: str, operations: int, devices: int) -> Program:
    """The program of a seed or in a file. Raises WrongUse, also for options in `context` that a file would pass over."""
    from hmmnet.campaign.draw import draw
    from hmmnet.campaign.program import read
    from hmmnet.errors import WrongUse
    from hmmnet.topology.files import exists

    if what.isdecimal():
        if len(what) > SEED_DIGITS_MAX:
            raise WrongUse(f"a seed has at most {SEED_DIGITS_MAX} digits, not {len(what)}")
        return draw(int(what), mix, operations, devices)
    strange = [f"--{name}" for name in OF_A_SEED if name in options_given(context)]
    there = exists(Path(what))
    if strange and there:
        raise WrongUse(f"{', '.join(strange)} mean{'s' * (len(strange) == 1)} nothing with a file, which has its own; leave it out")
    if not there:
        raise WrongUse(
            f'"{what}" is no seed, and there is no such file; a seed is a whole number, and "hmmnet replay SEED -o FILE" writes a file'
        )
    return read(Path(what))


def story(verdict: Verdict, before: int) -> list[str]:
    """The lines around the first violation, which is marked; the last ones, if there is none."""
    found = min((one for one in verdict.violations if one.line), key=lambda one: one.line, default=None)
    if found is None:
        return verdict.lines[max(0, len(verdict.lines) - before - AFTER) :]
    past, coming = verdict.lines[max(0, found.line - before) : found.line], verdict.lines[found.line : found.line + AFTER]
    marked = any(" VIOLATION " in line for line in coming[:1])  # the trace has it where it was seen
    return [*past, *([] if marked else [f"VIOLATION {found.checker}: {found.what}"]), *coming]


def _as_json(verdict: Verdict, lines: int) -> dict[str, Any]:
    return {
        "seed": verdict.program.seed,
        "digest": verdict.digest,
        "operations": verdict.outcome.operations,
        "faults": dict(sorted(verdict.outcome.faults.items())),
        "violations": [{"checker": one.checker, "what": one.what} for one in verdict.violations],
        "story": story(verdict, lines),
    }


def _tell(verdict: Verdict, lines: int) -> None:
    program, outcome = verdict.program, verdict.outcome
    print(f"seed {program.seed}: {counted(outcome.operations, 'operation')} of {counted(program.actors, 'actor')}, digest {verdict.digest}")
    if verdict.violations:
        print("\n".join(story(verdict, lines)))
    for one in verdict.violations:
        print(f"{one.checker}: {one.what}")
        if one.traceback:
            print(one.traceback.rstrip())
    if not verdict.violations:
        print("no violation")
