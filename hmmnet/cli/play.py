"""``hmmnet play FILE...``: recorded kernel scripts, compared line by line."""

from __future__ import annotations

import difflib
import fnmatch
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hmmnet.units import counted

from .plans import Breaking, FaultsFile, plan_for
from .worlds import WORLD_HELP, World

if TYPE_CHECKING:
    from rich.console import Console

    from hmmnet.play.compare import Outcome
    from hmmnet.play.script import Script
    from hmmnet.sim.worlds import WorldName

PROGRESS_EVERY_S = 2.0
"""Between progress lines; a terminal's reader wants to see life, a log's reader wants few lines."""


def play(
    files: Annotated[list[Path], typer.Argument(help="Trace files, each holding many scripts.", show_default=False)],
    world: Annotated[World, typer.Option(help=WORLD_HELP)] = World.real,
    seed: Annotated[int, typer.Option(help="What chances of faults are drawn from; with --world sim the order of events, too.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Scripts to play, by name or pattern such as 'h0*'; may be repeated.")] = None,
    faults: FaultsFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print counts and differences for programs.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show every script that differs, not the first ten.")] = False,
) -> int:
    """Play recorded kernel scripts and compare line by line.

    A real kernel's answers are the oracle. Exit code 0 only if all scripts are identical, 1 if not, 2 if a file cannot be played.
    """
    from hmmnet.play.script import ScriptError
    from hmmnet.play.world import TOPOLOGY
    from hmmnet.topology.load import load

    plan = plan_for(faults, world.value, load(TOPOLOGY))
    try:
        count = f"{len(files)} files" if len(files) > 1 else files[0].name
        print(f"reading {count}", file=sys.stderr, flush=True)
        return _play(files, world.value, seed, only or [], plan, as_json=as_json, everything=everything)
    except (ScriptError, ValueError) as error:
        print(f"hmmnet play: {error}", file=sys.stderr)
        return 2


def _play(
    files: Sequence[Path], world: WorldName, seed: int, only: Sequence[str], plan: Breaking, *, as_json: bool, everything: bool
) -> int:
    from rich.console import Console

    from hmmnet.play.report import show_differences, show_summary
    from hmmnet.play.world import launcher, play_all, prepare_all
    from hmmnet.sim.worlds import run_in

    launch = plan.world(launcher(world, seed))
    scripts = chosen_scripts(files, only)
    prepared = prepare_all(scripts)
    notes = Console(stderr=True)
    progress = Progress(notes, len(scripts))
    try:
        with plan.telling(), driver_bugs_counted(notes) as bugs:

            def on_outcome(outcome: Outcome) -> None:
                bugs.on_outcome(outcome)
                progress.on_outcome(outcome)

            tally = run_in(world, play_all, prepared, launch, on_outcome, seed=seed)
    finally:
        progress.done()
    if as_json:
        json.dump({**tally.as_json(), **plan.as_json()}, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        console = Console()
        show_differences(console, tally.outcomes, everything=everything)
        show_summary(console, tally)
        if plan:
            print(plan.text)
    return 0 if tally.identical == len(scripts) else 1


@contextmanager
def driver_bugs_counted(notes: Console) -> Iterator[DriverBugs]:
    """Of what is logged in this process while the block runs, driver bugs are told to `notes` by script. (Real devices log to their
    machine's folder.)
    """
    logger, bugs = logging.getLogger("hmmnet"), DriverBugs(notes)
    logger.addHandler(bugs)
    try:
        yield bugs
    finally:
        logger.removeHandler(bugs)
        bugs.done()


class DriverBugs(logging.Handler):
    """Driver bugs of scripts whose recorded kernel WARNed are counted, and the number told at the end: those scripts are there for them. Of
    any other script they are shown in full. What is no driver bug is shown as it would be without this handler.
    """

    def __init__(self, notes: Console) -> None:
        super().__init__()
        self._notes = notes
        self._new: Counter[str] = Counter()
        """Of the script that runs, by their texts."""
        self._meant = 0
        self._scripts = 0

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        text = record.getMessage()
        if text.startswith("driver bug"):
            self._new[text] += 1
        elif logging.lastResort is not None and record.levelno >= logging.lastResort.level and not self._has_others(record):
            logging.lastResort.handle(record)

    def _has_others(self, record: logging.LogRecord) -> bool:
        """Whether another handler hears `record`, such as that of a machine's log: then nothing would be on stderr."""
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False

    def on_outcome(self, outcome: Outcome) -> None:
        """A script has ended: what came since the last one is its own."""
        script = outcome.script
        if script.warned:
            self._meant += self._new.total()
            self._scripts += bool(self._new)
            self._new.clear()
        else:
            self._show(f"{script.path}:{script.line}: {script.name}: the recorded kernel did not WARN: ")

    def done(self) -> None:
        """Tell what is left, and the number."""
        self._show("outside of any script: ")
        if self._meant:
            scripts = counted(self._scripts, "script")
            what = f"drivers did {counted(self._meant, 'time')} what a kernel WARNs about, in {scripts} whose recorded kernel WARNed"
            self._notes.print(what, highlight=False, soft_wrap=True)

    def _show(self, where: str) -> None:
        for text, times in self._new.items():
            often = f" ({counted(times, 'time')})" if times > 1 else ""
            self._notes.print(f"{where}{text}{often}", highlight=False, markup=False, soft_wrap=True)
        self._new.clear()


def chosen_scripts(files: Sequence[Path], only: Sequence[str]) -> list[Script]:
    """The scripts of `files` that match `only` (none: all). Raises ScriptError, and ValueError for a pattern that matches nothing."""
    from hmmnet.play.script import read_scripts

    scripts = [script for path in files for script in read_scripts(path)]
    if not only:
        return scripts
    names = [script.name for script in scripts]
    for pattern in only:
        if not any(matches(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.5)
            raise ValueError(f"no script is called {pattern!r}" + (f'; did you mean "{close[0]}"?' if close else ""))
    return [script for script in scripts if any(matches(script.name, pattern) for pattern in only)]


def matches(name: str, pattern: str) -> bool:
    """Whether a script is meant by `pattern`: its whole name, its number (``h07``), or a shell pattern."""
    return fnmatch.fnmatchcase(name, pattern) or name.split("-", 1)[0] == pattern


class Progress:
    """How far it is: one line that is rewritten on a terminal, a line now and then in a log."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._done = 0
        self._equal = 0
        self._said_s = time.monotonic()
        what = f"playing {counted(total, 'script')} on a host and four dmirror devices"
        self._status = console.status(what) if console.is_terminal else None
        if self._status is not None:
            self._status.start()
        else:
            console.print(what, highlight=False)

    def on_outcome(self, outcome: Outcome) -> None:
        """Count one script."""
        self._done += 1
        self._equal += outcome.identical
        text = f"{self._done} of {self._total} played, {self._equal} identical: {outcome.script.name}"
        if self._status is not None:
            self._status.update(text)
        elif time.monotonic() - self._said_s >= PROGRESS_EVERY_S:
            self._said_s = time.monotonic()
            self._console.print(text, highlight=False)

    def done(self) -> None:
        """Clear the line."""
        if self._status is not None:
            self._status.stop()
