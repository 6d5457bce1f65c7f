"""``hmmnet sweep``: one fault at a time, everywhere, until nothing is left."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hmmnet.campaign.sweep import Tried


def sweep(
    scenario: Annotated[str, typer.Argument(help="A scenario (see --list), or all.")] = "all",
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
    """Fail, delay, pause, crash and hang at every protocol point in turn; lose, delay, repeat and damage every message; kill at each.

    Each is hit the first time, the second, the third ... until nothing is left. After each hit everything is healed and must be well.
    Prints which places were hit by which fault, and how it ended. Exit code 1 when something is wrong.
    """
    from hmmnet.campaign.coverage import as_json as as_data
    from hmmnet.campaign.coverage import as_markdown, document
    from hmmnet.campaign.places import pairs
    from hmmnet.campaign.scenarios import SCENARIOS
    from hmmnet.campaign.scenarios import scenario as named
    from hmmnet.campaign.sweep import sweep as run
    from hmmnet.errors import HmmnetError

    if listed:
        for name, base in SCENARIOS.items():
            print(f"{name:<12}{base.note}")
        return 0
    if pieces:
        return _merged(pieces, output)
    scenarios = named(scenario)
    chosen = [pair for pair in pairs() if pair.place.startswith(only) and fault in ("", pair.fault)]
    if not chosen:
        raise HmmnetError(f'nothing begins with "{only}"' + (f' and has the fault "{fault}"' if fault else "") + "; see COVERAGE.md")
    screen = _Screen()
    try:
        table = run(scenarios, chosen=chosen, nth_max=nth, first_only=first, jobs=jobs, on_done=screen.done)
    finally:
        screen.clear()
    if output is not None:
        output.write_text(document(table, f"{scenario}{f' --nth {nth}' if nth != 500 else ''}{' --first' if first else ''}"))
    data = as_data(table)
    if as_json:
        json.dump(data, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        print(as_markdown(table), end="")
        print(f"{data['hit']} of {data['pairs']} pairs were hit, in {data['runs']} runs")
    return 1 if any(cell.wrong for cell in table.values()) else 0


def _merged(pieces: list[Path], output: Path | None) -> int:
    """Sweeps that were run in pieces, as one table. Raises HmmnetError."""
    from hmmnet.campaign.coverage import as_json, as_markdown, document, from_json
    from hmmnet.errors import HmmnetError

    try:
        table = from_json([json.loads(piece.read_text()) for piece in pieces])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HmmnetError(f"--merge: {error}; hmmnet sweep SCENARIO --json writes such files") from None
    if output is not None:
        output.write_text(document(table, " ".join(f"--merge {piece.name}" for piece in pieces)))
    print(as_markdown(table), end="")
    data = as_json(table)
    print(f"{data['hit']} of {data['pairs']} pairs were hit, in {data['runs']} runs")
    return 1 if any(cell.wrong for cell in table.values()) else 0


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
