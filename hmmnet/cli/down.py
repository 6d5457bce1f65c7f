"""``hmmnet down``: end a machine that ``hmmnet up`` started."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .completion import machines

if TYPE_CHECKING:
    from hmmnet.launcher.directory import Directory

END_S = 5.0
"""A machine ends within a second; one that does not is killed, which nothing of it survives."""


def down(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            autocompletion=machines,
            help='The machines; not needed when only one runs, or for "default".',
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="End every machine of yours.")] = False,
) -> int:
    """End machines: their devices, their hosts, and whatever they left in their runtime directories."""
    from hmmnet.errors import WrongUse
    from hmmnet.launcher.directory import directories, running_machine

    if everything:
        if names:
            raise WrongUse("a name and --all exclude each other")
        chosen = [directory for directory in directories() if directory.alive()]
        if not chosen:
            print("no machine runs")
    else:
        chosen = [running_machine(name) for name in dict.fromkeys(names)] if names else [running_machine(None)]
    results = [end(directory) for directory in chosen]
    return max(results, default=0)


def end(directory: Directory) -> int:
    """End one machine; the exit code."""
    from hmmnet.launcher.processes import signal_process, wait_gone

    record = directory.read()
    if record is None:
        print(f'hmmnet down: machine "{directory.name}" starts just now; try again in a moment', file=sys.stderr)
        return 1
    if record.kind != "up":
        owner = f"the program with process id {record.pid}"
        print(f'hmmnet down: machine "{record.name}" belongs to {owner} and ends with it (kill {record.pid})', file=sys.stderr)
        return 1
    signal_process(record.pid, record.process_started, signal.SIGTERM)
    if not wait_gone(record.pid, record.process_started, END_S):
        signal_process(record.pid, record.process_started, signal.SIGKILL)
        wait_gone(record.pid, record.process_started, END_S)
        print(
            f'hmmnet down: machine "{record.name}" did not end within {END_S:g} s and was killed; "hmmnet clean" removes what it left',
            file=sys.stderr,
        )
        return 1
    print(f'machine "{record.name}" has ended')
    return 0
