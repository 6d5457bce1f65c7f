"""What a person sees of a comparison: which line, what the kernel said, what the emulator said, and what differs between the two.

Results can hold a token for each of 130 pages; then only the tokens that differ are shown, by position.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hmmnet.observe.fitted import Fitted

from .compare import Difference, Outcome, Tally

DIFFERENCES_SHOWN = 5
"""Lines shown of one script: what follows the first difference is mostly its consequence."""
SCRIPTS_SHOWN = 10
"""Scripts shown with their differences unless all are asked for."""
CONTEXT_LINES = 2
"""Equal lines shown before the first difference."""
TOKENS_SHOWN = 6
TOKENS_WHOLE = 16
"""Up to this many tokens a result is shown whole."""
_LISTED = re.compile(r"\A(?P<head>.*)\[(?P<tokens>[^\]]*)\]\Z")


def contrast(recorded: str, got: str) -> tuple[str, str]:
    """The two results, shortened to what differs when they are long lists."""
    one, two = _LISTED.match(recorded), _LISTED.match(got)
    if one is None or two is None:
        return recorded, got
    ours, theirs = two["tokens"].split(), one["tokens"].split()
    if len(ours) != len(theirs) or len(ours) <= TOKENS_WHOLE:
        return recorded, got
    places = [i for i in range(len(ours)) if ours[i] != theirs[i]]
    more = f" and {len(places) - TOKENS_SHOWN} more" if len(places) > TOKENS_SHOWN else ""

    def shown(head: str, tokens: list[str]) -> str:
        return f"{head}[{' '.join(f'#{i}:{tokens[i]}' for i in places[:TOKENS_SHOWN])}{more} of {len(tokens)} tokens]"

    return shown(one["head"], theirs), shown(two["head"], ours)


def difference_lines(outcome: Outcome) -> Iterator[str]:
    """The differences of one script as marked-up lines."""
    script = outcome.script
    yield f"[bold]{escape(script.name)}[/bold]  [dim]{escape(script.path)}:{script.line}[/dim]"
    if not outcome.differences:
        return
    first = outcome.differences[0].line
    before = [line for line in script.recorded if line.number and (line.number < first or not first)]
    for line in before[-CONTEXT_LINES:]:
        yield f"  [dim]  {line.number:>3}: {escape(line.operation)} => {escape(contrast_alone(line.result))}[/dim]"
    for difference in outcome.differences[:DIFFERENCES_SHOWN]:
        yield from _one(difference)
    rest = len(outcome.differences) - DIFFERENCES_SHOWN
    if rest > 0:
        yield f"        [dim]and {rest} more lines that differ[/dim]"


def contrast_alone(result: str) -> str:
    """One result, its token list cut short."""
    match = _LISTED.match(result)
    if match is None or len(match["tokens"].split()) <= TOKENS_WHOLE:
        return result
    tokens = match["tokens"].split()
    return f"{match['head']}[{' '.join(tokens[:TOKENS_SHOWN])} ... {len(tokens)} tokens]"


def _one(difference: Difference) -> Iterator[str]:
    place = f"{difference.line:>3}: {escape(difference.operation)}" if difference.line else "at the end"
    if difference.got is None:
        yield f"  [yellow]![/yellow] {place}"
        yield f"         recorded  [green]{escape(contrast_alone(difference.recorded))}[/green]"
        yield f"         [yellow]not played: {escape(difference.why)}[/yellow]"
        return
    recorded, got = contrast(difference.recorded, difference.got)
    yield f"  [red]x[/red] {place}"
    yield f"         recorded  [green]{escape(recorded)}[/green]"
    yield f"         got       [red]{escape(got)}[/red]"


def show_differences(console: Console, outcomes: Iterable[Outcome], *, everything: bool) -> None:
    """Print what differs: scripts with wrong lines, not those that merely stopped at an operation not built yet."""
    wrong = [o for o in outcomes if not o.identical and not o.stopped]
    for outcome in wrong if everything else wrong[:SCRIPTS_SHOWN]:
        console.print()
        for line in difference_lines(outcome):
            console.print(line, highlight=False, soft_wrap=True)
    if not everything and len(wrong) > SCRIPTS_SHOWN:
        console.print(f"\n[dim]and {len(wrong) - SCRIPTS_SHOWN} more scripts that differ (--all shows them)[/dim]")


def show_summary(console: Console, tally: Tally) -> None:
    """Print the sums: by file, by operation not built yet, and the verdict."""
    console.print()
    console.print(Fitted(_by_file(tally)))
    if tally.unsupported:
        operations = ", ".join(f"{name} {count}" for name, count in tally.unsupported.most_common())
        console.print(f"operations not built yet (lines): {operations}", highlight=False)
    console.print(verdict(tally), highlight=False)


def _by_file(tally: Tally) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("file", overflow="fold")
    for name in ("scripts", "identical", "stopped", "differ", "lines", "equal"):
        table.add_column(name, justify="right")
    for path in dict.fromkeys(o.script.path for o in tally.outcomes):
        rows = [o for o in tally.outcomes if o.script.path == path]
        identical = sum(o.identical for o in rows)
        stopped = sum(o.stopped for o in rows)
        figures = (
            len(rows),
            identical,
            stopped,
            len(rows) - identical - stopped,
            sum(o.lines for o in rows),
            sum(o.lines_equal for o in rows),
        )
        table.add_row(escape(path.rsplit("/", 1)[-1]), *map(str, figures))
    return table


def verdict(tally: Tally) -> str:
    """The last line."""
    scripts, identical = len(tally.outcomes), tally.identical
    stopped = sum(o.stopped for o in tally.outcomes)
    if identical == scripts:
        those = f"all {scripts} scripts answer" if scripts > 1 else "the script answers"
        return f"[green]identical: {those} as the recorded kernel did[/green]"
    differ = scripts - identical - stopped
    parts = [f"{identical} of {scripts} scripts identical"]
    if differ:
        parts.append(f"[red]{differ} differ[/red]")
    if stopped:
        parts.append(f"[yellow]{stopped} stopped at an operation that is not built yet, equal up to there[/yellow]")
    return "; ".join(parts)
