"""``hmmnet down``: end a machine that ``hmmnet up`` started."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .completion import machines

if TYPE_CHECKING:
    from hmmnet.launcher.directory import Directory, MachineRecord

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
    from hmmnet.errors import HmmnetError, WrongUse
    from hmmnet.launcher.directory import directories, running_machine, running_machines

    missing = ""
    if everything:
        if names:
            raise WrongUse("a name and --all exclude each other")
        chosen = [directory for directory in directories() if directory.alive()]
        if not chosen:
            print("no machine runs")
    elif names:
        chosen, missing = running_machines(names)
    else:
        chosen = [running_machine(None)]
    results = [end(directory) for directory in chosen]
    if missing:
        raise HmmnetError(missing)
    return max(results, default=0)


def end(directory: Directory) -> int:
    """End one machine; the exit code."""
    from hmmnet.launcher.processes import signal_process, wait_gone

    record = _owner(directory)
    if record is None:
        print(f'hmmnet down: machine "{directory.name}" {_unknown(directory)}', file=sys.stderr)
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


def _owner(directory: Directory) -> MachineRecord | None:
    """The machine's record; where it is damaged, or names another process than the lock, that which the lock's holder began with."""
    from hmmnet.launcher.directory import process_started

    record, signed = directory.read(), directory.signature()
    if signed is None:
        return record
    owner = signed.pid, signed.process_started
    if record is not None and (record.pid, record.process_started) == owner:
        return record
    return signed if signed.process_started and process_started(signed.pid) == signed.process_started else None


def _unknown(directory: Directory) -> str:
    """Why a machine cannot be ended of which no record can be read, and what can be done about it."""
    if not directory.record_file.exists():
        return "starts just now; try again in a moment"
    damaged = f"cannot be ended from here: {directory.record_file} is damaged, and so is what its lock says"
    holders = " ".join(map(str, directory.holders()))
    if not holders:
        return f'{damaged}; "fuser {directory.path / "lock"}" tells its owner which process holds it'
    return f'{damaged}; process {holders} holds it: see what that is with "ps {holders}", and end it with "kill {holders}"'
