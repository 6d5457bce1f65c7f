"""``hmmnet sweep``: one fault at a time, everywhere, until nothing is left."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .completion import scenarios
from .outputs import attempt, writable

if TYPE_CHECKING:
    from hmmnet.campaign.places import Pair
    from hmmnet.campaign.program import Program
    from hmmnet.campaign.sweep import Cell, Tried

LONG_S = 60.0
"""Of a sweep: from here on it is said how to have a shorter one."""


def sweep(
    scenario: Annotated[
        str,
        typer.Argument(metavar="SCENARIO|FILE", autocompletion=scenarios, help="A scenario (see --list), all, or a file of a program."),
    ] = "all",
    only: Annotated[str, typer.Option(help="Only places whose name begins so.", show_default=False)] = "",
    fault: Annotated[str, typer.Option(help="Only this fault, such as crash or loss.", show_default=False)] = "",
    nth: Annotated[int, typer.Option(min=1, help="At most so many hits of each pair in each scenario.")] = 500,
    first: Annotated[bool, typer.Option("--first", help="Hit each pair in one scenario only.")] = False,
    jobs: Annotated[int, typer.Option(min=1, max=1024, help="Processes.")] = 1,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the table to a Markdown file, too.", show_default=False)
    ] = None,
    pieces: Annotated[
        list[Path] | None,
        typer.Option("--merge", help="Run nothing: one table of what --json wrote (repeat it).", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Name the scenarios; run nothing.")] = False,
) -> int:
    """Fail, delay, pause, crash, hang and freeze at every protocol point in turn; lose, delay, repeat, damage every message; kill at each.

    Each is hit the first time, the second, the third ... until nothing is left. A freeze is a hang that outlasts the device's lease. After
    each hit everything is healed and must be well. Prints which places were hit by which fault, and how it ended; Ctrl-C prints what was
    found so far. Exit code 1 when something is wrong, 2 for what there is not.
    """
    from hmmnet.campaign.scenarios import SCENARIOS
    from hmmnet.campaign.sweep import sweep as run

    if listed:
        return _list({name: base.note for name, base in SCENARIOS.items()}, as_json=as_json)
    if output is not None:
        writable(output)
    if pieces:
        return _merged(pieces, output, as_json=as_json)
    chosen = _chosen(only, fault)
    scenarios = _meant(scenario)
    _announce(scenarios, chosen, nth, jobs, first=first)
    screen = _Screen()
    table: dict[Pair, Cell] = {}
    interrupted = False
    try:
        run(scenarios, chosen=chosen, nth_max=nth, first_only=first, jobs=jobs, on_done=screen.done, table=table)
    except KeyboardInterrupt:
        interrupted = True
        output = None  # half a table is no document
    finally:
        screen.clear()
    code = _told(table, f"{scenario}{f' --nth {nth}' if nth != 500 else ''}{' --first' if first else ''}", output, as_json=as_json)
    return 130 if interrupted else code


def _announce(scenarios: list[Program], chosen: list[Pair], nth: int, jobs: int, *, first: bool) -> None:
    """How much it is going to be, on stderr: the scenarios are run by themselves for that, which tells how long a run takes, too."""
    from hmmnet.campaign.sweep import alone, expected
    from hmmnet.campaign.trial import run_program
    from hmmnet.units import counted

    alone(scenarios[0])  # what is slow once is no measure
    began_s = time.monotonic()
    for base in scenarios:
        run_program(base)
    run_s = (time.monotonic() - began_s) / len(scenarios)
    runs = expected(scenarios, chosen, nth, first_only=first)
    what = f"{counted(len(chosen), 'pair')} of place and fault in {counted(len(scenarios), 'scenario')}: at most {counted(runs, 'run')}"
    shorter = "; --only, --fault, --nth, --first and one SCENARIO make it shorter" if runs * run_s / jobs > LONG_S else ""
    print(f"{what}, roughly {roughly(runs * run_s / jobs)} with {counted(jobs, 'job')}{shorter}", file=sys.stderr, flush=True)


def roughly(seconds: float) -> str:
    """A time as one says it: nobody knows what else the computer will have to do."""
    for unit, length_s in (("h", 3600.0), ("min", 60.0)):
        if seconds >= length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{max(seconds, 1.0):.0f} s"


def _list(scenarios: dict[str, str], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps([{"name": name, "what": what} for name, what in scenarios.items()], indent=1))
    else:
        for name, what in scenarios.items():
            print(f"{name:<12}{what}")
    return 0


def _meant(what: str) -> list[Program]:
    """The scenarios of that name, or the program in a file, as a scenario of the file's name. Raises WrongUse."""
    from msgspec.structs import replace

    from hmmnet.campaign.program import read
    from hmmnet.campaign.scenarios import SCENARIOS, scenario
    from hmmnet.campaign.trial import run_program
    from hmmnet.errors import WrongUse
    from hmmnet.topology.files import exists

    file = Path(what)
    if what in ("all", *SCENARIOS) or not exists(file):
        return scenario(what)
    program = replace(read(file), mix=file.stem)
    for found in run_program(program).violations[:1]:
        mend = f'"hmmnet replay {what}" tells of it; a sweep wants a program in which all is well'
        raise WrongUse(f"{what}: without a fault of the sweep: {found.checker}: {found.what}; {mend}")
    return [program]


def _chosen(only: str, fault: str) -> list[Pair]:
    """The pairs that are meant. Raises WrongUse."""
    from hmmnet.campaign.places import pairs
    from hmmnet.cli import did_you_mean
    from hmmnet.errors import WrongUse

    every = pairs()
    faults = list(dict.fromkeys(pair.fault for pair in every))
    if fault not in ("", *faults):
        raise WrongUse(f'no fault of a sweep is called "{fault}"{did_you_mean(fault, faults)}; there are: {", ".join(faults)}')
    at = [pair for pair in every if pair.place.startswith(only)]
    if not at:
        guess = did_you_mean(only, list(dict.fromkeys(pair.place for pair in every)))
        raise WrongUse(f'no place\'s name begins with "{only}"{guess}; they are points ("hmmnet fault points") and types of messages')
    chosen = [pair for pair in at if fault in ("", pair.fault)]
    if not chosen:
        there = ", ".join(dict.fromkeys(pair.fault for pair in at))
        raise WrongUse(f'where a name begins with "{only}", "{fault}" cannot happen; what can is {there}')
    return chosen


def _told(table: dict[Pair, Cell], options: str, output: Path | None, *, as_json: bool) -> int:
    """Write a table to `output`, as that of a sweep with those `options`, and print it; the exit code. Raises HmmnetError: not written."""
    from hmmnet.campaign.coverage import as_json as as_data
    from hmmnet.campaign.coverage import as_markdown, document

    unwritten = None if output is None else attempt(output, document(table, options))
    data = as_data(table)
    if as_json:
        json.dump(data, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        print(as_markdown(table), end="")
        print(f"{data['hit']} of {data['pairs']} pairs were hit, in {data['runs']} runs")
    if unwritten is not None:
        raise unwritten
    return 1 if any(cell.wrong for cell in table.values()) else 0


def _merged(pieces: list[Path], output: Path | None, *, as_json: bool) -> int:
    """Sweeps that were run in pieces, as one table. Raises WrongUse."""
    from hmmnet.campaign.coverage import from_json

    table = from_json([_piece(piece) for piece in pieces])
    return _told(table, " ".join(f"--merge {piece.name}" for piece in pieces), output, as_json=as_json)


def _piece(file: Path) -> dict[str, Any]:
    """What one sweep wrote. Raises WrongUse."""
    from hmmnet.campaign.coverage import from_json
    from hmmnet.errors import WrongUse

    try:
        piece: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        from_json([piece])
    except OSError as error:
        raise WrongUse(f"--merge: {file}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WrongUse(f"--merge: {file}: not what hmmnet sweep --json writes: {error}") from None
    return piece


class _Screen:
    """Progress on stderr: a line that is written over on a terminal, one line for each place elsewhere; violations as they are found."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._runs = 0
        self._wrong = 0
        self._place = ""

    def done(self, number: int, total: int, tried: list[Tried]) -> None:
        """One piece of work."""
        self._runs += len(tried)
        for one in tried:
            if one.found.outcome == "wrong":
                self._wrong += 1
                self.clear()
                print(f"{one.pair.place} {one.pair.fault}, {one.scenario}, {one.when}: {one.found.wrong}", file=sys.stderr, flush=True)
        if tried and (self._live or tried[0].pair.place != self._place):
            self._place = tried[0].pair.place
            line = f"{number} of {total}: {self._place} {tried[0].pair.fault}; {self._runs} runs, {self._wrong} wrong"
            print(f"\r\x1b[K{line}" if self._live else line, file=sys.stderr, end="" if self._live else "\n", flush=True)

    def clear(self) -> None:
        """No line is left half."""
        if self._live:
            print("\r\x1b[K", file=sys.stderr, end="", flush=True)
