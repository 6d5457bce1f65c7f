"""What a shell offers for the word that is being typed: commands, options, and the names of what there is.

typer's own completion, for bash, zsh and fish: ``hmmnet --install-completion`` makes the shell ask ``hmmnet`` itself, through a variable
(`COMPLETION`), at each press of TAB. The answer must come at once, so a command's module is only imported when its own words are
completed, and names are looked up where they are listed anyway: presets, entry points, folders of machines.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer
from typer.completion import completion_init, get_completion_script, install  # type: ignore[attr-defined]  # typer's, shown to its own
from typer.core import TyperCommand, TyperGroup

from . import COMMANDS, COMPLETION, FAILED, WRONG_USE, _command, _complain, did_you_mean

PROGRAM = "hmmnet"
SHELLS = ("bash", "zsh", "fish")


# --- names ------------------------------------------------------------------------------------------------------------------------


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def topologies(incomplete: str) -> list[str]:
    """Presets; for what begins none of them, the shell offers files."""
    from hmmnet.topology.load import preset_names

    return _beginning(preset_names(), incomplete)


def workloads(incomplete: str) -> list[str]:
    """Built-in workloads, and those of installed packages; for a file of one's own, the shell offers files."""
    from hmmnet.workloads.registry import workload_names

    return _beginning(workload_names(), incomplete)


def scenarios(incomplete: str) -> list[str]:
    """What a sweep goes through."""
    from hmmnet.campaign.scenarios import SCENARIOS

    return _beginning(["all", *SCENARIOS], incomplete)


def machines(incomplete: str) -> list[str]:
    """Machines of this user that run, or have left something behind."""
    from hmmnet.errors import HmmnetError
    from hmmnet.launcher.directory import directories

    with suppress(HmmnetError):  # a place that cannot be used has none
        return _beginning([directory.name for directory in directories()], incomplete)
    return []


def devices(context: typer.Context, incomplete: str) -> list[str]:
    """Devices of the machine that ``--machine`` names, or of all that run."""
    return _beginning(_devices_of(context.params.get("machine")), incomplete)


def processes(context: typer.Context, incomplete: str) -> list[str]:
    """Who writes a log, of the machine that is the first argument, or of all that run."""
    named = context.params.get("name") or next(iter(context.args), None)  # there it is behind an option without its value
    return _beginning(["host", "launcher", *_devices_of(named)], incomplete)


def _devices_of(machine: str | None) -> Iterable[str]:
    from hmmnet.errors import HmmnetError
    from hmmnet.launcher.directory import directories

    found: dict[str, None] = {}
    with suppress(HmmnetError):
        for directory in directories():
            record = directory.read() if machine in (None, directory.name) else None
            if record is not None and directory.alive():
                found |= dict.fromkeys(device.name for device in record.devices)
    return found


# --- asked by a shell -------------------------------------------------------------------------------------------------------------


class _Commands(TyperGroup):
    """All commands, of which only the one whose words are completed is imported: what a list says of the others is known without."""

    def __init__(self) -> None:
        super().__init__(name=PROGRAM, commands={name: TyperCommand(name, help=what) for name, what in COMMANDS.items()})

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the words begin with, as it is."""
        if args and args[0] in COMMANDS:
            return args[0], _command(args[0]), args[1:]
        return super().resolve_command(ctx, args)


def answer() -> int:
    """Print what the shell asks for; the exit code."""
    completion_init()
    try:
        _Commands().main(args=[], prog_name=PROGRAM, complete_var=COMPLETION, standalone_mode=False)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FAILED
    return FAILED


# --- set up -----------------------------------------------------------------------------------------------------------------------


def set_up(option: str, arguments: Sequence[str]) -> int:
    """``hmmnet --install-completion [SHELL]``, ``hmmnet --show-completion [SHELL]``; the exit code."""
    shell = arguments[0] if arguments else Path(os.environ.get("SHELL", "")).name
    where = f"{PROGRAM} {option}"
    if len(arguments) > 1:
        return _complain(where, f'one shell is wanted, not {len(arguments)}; "{where} {arguments[0]}" is for the first', WRONG_USE)
    if shell not in SHELLS:
        what = (
            f'"{shell}" is no shell that words are completed in{did_you_mean(shell, SHELLS)}'
            if shell
            else "$SHELL does not say which shell"
        )
        return _complain(where, f"{what}; say which: {', '.join(f'{where} {one}' for one in SHELLS)}", WRONG_USE)
    if option == "--show-completion":
        print(get_completion_script(prog_name=PROGRAM, complete_var=COMPLETION, shell=shell))
        return 0
    try:
        _, path = install(shell=shell, prog_name=PROGRAM, complete_var=COMPLETION)
    except OSError as error:
        return _complain(
            where, f'{error.filename or Path.home()}: {error.strerror}; "{PROGRAM} --show-completion {shell}" prints it', FAILED
        )
    print(f"{shell} completes the words of {PROGRAM} from its next start on: {path}")
    return 0
