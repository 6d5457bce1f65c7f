"""``hmmnet bugs``: the library of drivers' bugs, told and run."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmmnet.errors import WrongUse
from hmmnet.units import counted

if TYPE_CHECKING:
    from rich.console import Console

    from hmmnet.bugs import Bug, Trial


def bugs(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Tell these, and run them.")] = None,
    run_all: Annotated[bool, typer.Option("--all", help="Run every bug.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Run from this seed only, not from each of the bug's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> int:
    """List bugs that real drivers had; with NAME, tell the story and run it with the bug and without.

    Exits with 1 when a bug does not show, or shows where it is mended.
    """
    from hmmnet.bugs import BUGS

    if run_all and names:
        raise WrongUse(f"--all runs every bug, and {', '.join(names)} with the others: leave one of both out")
    if seed is not None and not (run_all or names):
        raise WrongUse("--seed means nothing without a bug to run from it: name one, or write --all")
    chosen = list(BUGS) if run_all else names or []
    for name in chosen:
        _check(name, BUGS)
    if not chosen:
        _list(BUGS, as_json=as_json)
        return 0
    return _run([BUGS[name] for name in chosen], seed, as_json=as_json, tell=not run_all)


def _check(name: str, known: dict[str, Bug]) -> None:
    from hmmnet.cli import did_you_mean

    if name not in known:
        raise WrongUse(f'no bug is called "{name}"{did_you_mean(name, list(known))}; "hmmnet bugs" lists them')


def _list(known: dict[str, Bug], *, as_json: bool) -> None:
    if as_json:
        _write([bug.as_json() for bug in known.values()])
        return
    from rich.console import Console
    from rich.table import Table

    from hmmnet.observe.fitted import Fitted

    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("what happens")
    for bug in known.values():
        table.add_row(bug.name, bug.title)
    console = Console(highlight=False)
    console.print(Fitted(table))
    console.print('\n"hmmnet bugs NAME" tells one and runs it, "hmmnet bugs --all" runs them all')


def _run(chosen: list[Bug], seed: int | None, *, as_json: bool, tell: bool) -> int:
    from rich.console import Console

    from hmmnet.bugs import KINDS, try_bug

    console = Console(highlight=False, quiet=as_json)
    trials: list[Trial] = []
    for bug in chosen:
        if tell:
            _tell(console, bug)
        for kind in KINDS:
            with _unheard():
                trial = try_bug(bug, kind, seed)
            trials.append(trial)
            _show(console, trial)
            if kind == "buggy" and seed is not None and not (trial.as_told or as_json):
                _show_where(console, bug)
    if as_json:
        _write([trial.as_json() for trial in trials])
    told = sum(trial.as_told for trial in trials)
    console.print(f"\n{told} of {counted(len(trials), 'run')} came out as told")
    return 0 if told == len(trials) else 1


@contextmanager
def _unheard() -> Iterator[None]:
    """What host and devices log of a buggy driver is known already."""
    logger = logging.getLogger("hmmnet")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _tell(console: Console, bug: Bug) -> None:
    from rich.markup import escape

    console.print(f"[bold]{bug.name}[/bold]: {escape(bug.title)}\nseen in {escape(bug.where)}\n")
    console.print(escape(" ".join(bug.story.split())) + "\n")


def _show(console: Console, trial: Trial) -> None:
    from rich.markup import escape

    verdict = escape(trial.found) if trial.found else "nothing wrong"
    wonder = "" if trial.as_told else "   [bold]NOT AS TOLD[/bold]"
    console.print(f"{trial.bug}  {trial.kind:<5}  seed {trial.seed}  {verdict}{wonder}")


def _show_where(console: Console, bug: Bug) -> None:
    """From which of its seeds a bug shows that did not from the one that was asked for."""
    from hmmnet.bugs import try_bug

    with _unheard():
        showing = [seed for seed in range(bug.seeds) if try_bug(bug, "buggy", seed).found]
    if showing:
        console.print(f"  the order of events decides whether it shows: it does with --seed {' or '.join(map(str, showing))}")


def _write(data: Any) -> None:
    json.dump(data, sys.stdout, indent=1)
    sys.stdout.write("\n")
