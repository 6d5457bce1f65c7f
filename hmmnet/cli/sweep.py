"""``hmmnet sweep``: one fault at a time, everywhere, until nothing is left."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hmmnet.campaign.program import Program
    from hmmnet.campaign.sweep import Hits, Pair


def sweep(
    scenario: Annotated[str, typer.Argument(help="tour, mappings, huge, together, coherent, or all.")] = "all",
    only: Annotated[str, typer.Option(help="Only places whose name begins so.", show_default=False)] = "",
    nth: Annotated[int, typer.Option(min=1, help="At most so many hits of each pair in each scenario.")] = 500,
    first: Annotated[bool, typer.Option("--first", help="Hit each pair in one scenario only.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the table to a Markdown file, too.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Fail, delay, pause, crash and hang at every protocol point in turn; lose, delay, repeat and damage every message; kill at each.

    After each hit everything is healed and must be well. Prints which places were hit by which fault, and how it ended. Exit code 1 when
    something is wrong.
    """
    from hmmnet.campaign.scenarios import scenario as named
    from hmmnet.campaign.sweep import as_json as as_data
    from hmmnet.campaign.sweep import as_markdown, pairs
    from hmmnet.campaign.sweep import sweep as run

    scenarios = named(scenario)
    chosen = [pair for pair in pairs() if pair.place.startswith(only)]
    last: list[Pair] = []

    def tell(pair: Pair, base: Program, number: int, found: Hits) -> None:
        if last != [pair]:
            last[:] = [pair]
            print(f"{pair.place}: {pair.fault}", file=sys.stderr)
        if found.outcome == "wrong":
            print(f"  {base.mix}, number {number}: {found.wrong}", file=sys.stderr)

    table = run(scenarios, chosen=chosen, nth_max=nth, first_only=first, on_run=tell)
    if output is not None:
        output.write_text(document(as_markdown(table), f"{scenario} --nth {nth}{' --first' if first else ''}"))
    if as_json:
        json.dump(as_data(table), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        print(as_markdown(table), end="")
        data = as_data(table)
        print(f"{data['hit']} of {data['pairs']} pairs were hit, in {data['runs']} runs")
    return 1 if any(cell.wrong for cell in table.values()) else 0


def document(table: str, arguments: str) -> str:
    """The Markdown file around a table."""
    return (
        "# What was hit by what, and how it ended\n\n"
        f"Made by `hmmnet sweep {arguments} -o FILE`. A cell counts runs, each with one fault at one moment: *same*, every\n"
        "operation ended well; *refused*, some operation ended with an error that says why, and nothing was lost; *lost*, pages whose\n"
        "only copy died with a device were lost, and said so. A dash: the fault does not apply there.\n\n" + table
    )
