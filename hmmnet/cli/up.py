"""``hmmnet up``: start a machine and hold it, in the foreground with its devices on the screen, or in the background."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .completion import topologies
from .plans import Breaking, FaultsFile, plan_for, told

if TYPE_CHECKING:
    from hmmnet.launcher.directory import MachineRecord
    from hmmnet.launcher.rate import Rate
    from hmmnet.topology.model import Topology
    from hmmnet.wire.transport import Kind

NAME = "default"


def up(
    topology: Annotated[str, typer.Argument(autocompletion=topologies, help="A preset's name or a TOML file.")] = "two-gpus",
    name: Annotated[str, typer.Option(help="What the machine is called.")] = NAME,
    rate: Annotated[str, typer.Option(help="Emulated seconds for a real one: auto (measured) or a number.")] = "auto",
    transport: Annotated[
        str,
        typer.Option(help="What the processes talk over: ring (ipc, page data in shared memory), ipc, or tcp on loopback."),
    ] = "ring",
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when the machine runs, and leave it running.")] = False,
    personality: Annotated[
        str, typer.Option(help="Whose rules the host keeps: today or v25; the topology's own when left out.", show_default=False)
    ] = "",
    faults: FaultsFile = None,
    seed: Annotated[int, typer.Option(help="What chances of faults are drawn from.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the machine's record, one line after every change, for programs.")] = False,
) -> int:
    """Start a machine and hold it until Ctrl-C (or until "hmmnet down", with --detach)."""
    from hmmnet.cli import did_you_mean
    from hmmnet.launcher.directory import check_name, refuse_if_running
    from hmmnet.launcher.rate import parse_rate
    from hmmnet.topology.load import installed_models, load
    from hmmnet.topology.model import with_personality
    from hmmnet.wire.transport import KINDS

    chosen = next((kind for kind in KINDS if kind == transport), None)
    if chosen is None:
        raise typer.BadParameter(f'there is no transport "{transport}"{did_you_mean(transport, KINDS)}; there are: {", ".join(KINDS)}')
    refuse_if_running(check_name(name))
    how_fast = parse_rate(rate)
    machine = with_personality(load(topology, installed_models() or None), personality or None)
    plan = plan_for(faults, "real", machine)
    hold = background if detach else foreground
    return hold(machine, name, how_fast, chosen, plan, seed, as_json=as_json)


def foreground(topology: Topology, name: str, rate: Rate, transport: Kind, plan: Breaking, seed: int, *, as_json: bool) -> int:
    """Hold the machine here; the exit code."""
    import trio

    from hmmnet.launcher.__main__ import stop_on_signal
    from hmmnet.launcher.supervisor import Supervisor

    held: list[Supervisor] = []

    async def hold(screen: Screen) -> None:
        supervisor = Supervisor(topology, name, rate, transport, screen.show, faults=plan.as_given(), seed=seed)
        held.append(supervisor)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop_on_signal, nursery.cancel_scope)
            await nursery.start(supervisor.run)

    with a_screen(as_json=as_json) as screen:
        screen.announce(f'starting "{name}": {topology.name}, {count(len(topology.devices))}')
        trio.run(hold, screen)
    fired = held[0].record.faults
    screen.announce(f'machine "{name}" has ended' + (f"; {told(fired)}" if fired else ""))
    return 0


def background(topology: Topology, name: str, rate: Rate, transport: Kind, plan: Breaking, seed: int, *, as_json: bool) -> int:
    """Start a launcher of its own, wait until the machine runs, and leave it; the exit code."""
    from msgspec import to_builtins

    from hmmnet.errors import HmmnetError
    from hmmnet.launcher.processes import child_environment

    config = {
        "topology": to_builtins(topology),
        "name": name,
        "rate": rate,
        "transport": transport,
        "faults": plan.as_given(),
        "seed": seed,
    }
    launcher = subprocess.Popen(
        [sys.executable, "-m", "hmmnet.launcher"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_environment(),
        start_new_session=True,
    )
    assert launcher.stdin is not None, "asked for"
    assert launcher.stdout is not None, "asked for"
    launcher.stdin.write(json.dumps(config).encode())
    launcher.stdin.close()
    record: dict[str, Any] = {}
    try:
        for line in launcher.stdout:
            record = json.loads(line)
            if "error" in record:
                raise HmmnetError(record["error"])
    except KeyboardInterrupt:
        launcher.terminate()
        launcher.wait()
        raise
    if record.get("state") != "running":
        raise HmmnetError(f'the launcher of "{name}" {ended(launcher.wait())} before the machine ran; "hmmnet logs {name}" may tell why')
    if as_json:
        print(json.dumps(record))
    else:
        print(f'machine "{name}" runs in the background: {topology.name}, {count(len(topology.devices))}, process {record["pid"]}')
        print(f"use it: hmmnet run vector_add --on {name}    see it: hmmnet ps    end it: hmmnet down {name}")
    return 0


def ended(status: int) -> str:
    """How a process ended."""
    from hmmnet.launcher.processes import describe_exit

    return describe_exit(status)


def count(devices: int) -> str:
    """``1 device``, ``2 devices``."""
    return f"{devices} device{'' if devices == 1 else 's'}"


class Screen:
    """Plain lines: what changed, as it changes."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def announce(self, text: str) -> None:
        """Say something in a line of its own."""
        print(text, flush=True)

    def show(self, record: MachineRecord) -> None:
        """The record changed."""
        for device in record.devices:
            if self._seen.get(device.name) != device.state and device.state != "starting":
                self._seen[device.name] = device.state
                self.announce(f"  {device.name} {device.state}" + (f": {device.how}" if device.how else ""))
        if record.state == "running" and self._seen.get("") != "running":
            self._seen[""] = "running"
            self.announce(RUNNING.format(name=record.name, rate=record.rate))


RUNNING = (
    'machine "{name}" runs at {rate:.3g} emulated seconds a second; from another terminal: '
    "hmmnet run vector_add --on {name}, hmmnet ps, hmmnet logs {name} -f; Ctrl-C ends it"
)


class JsonScreen(Screen):
    """The record after every change of a state, one line each; nothing else on stdout."""

    def announce(self, text: str) -> None:
        """Nothing for programs."""

    def show(self, record: MachineRecord) -> None:
        """The record changed."""
        from msgspec import to_builtins

        states = f"{record.state} {[device.state for device in record.devices]}"
        if self._seen.get("") != states:
            self._seen[""] = states
            print(json.dumps(to_builtins(record)), flush=True)


class LiveScreen(Screen):
    """On a terminal: a table of the devices that changes in place."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.live import Live

        self._console = Console()
        self.live = Live(console=self._console, auto_refresh=False, transient=False)

    def announce(self, text: str) -> None:
        """A line above the table."""
        self._console.print(text, markup=False, highlight=False)

    def show(self, record: MachineRecord) -> None:
        """The record changed."""
        from msgspec import to_builtins
        from rich.console import Group
        from rich.text import Text

        from .ps import device_table

        hint = RUNNING.format(name=record.name, rate=record.rate) if record.state == "running" else f"{record.state} ..."
        self.live.update(Group(device_table(to_builtins(record)), Text(hint, style="dim")), refresh=True)


@contextmanager
def a_screen(*, as_json: bool) -> Iterator[Screen]:
    """The screen that fits where stdout goes."""
    if as_json:
        yield JsonScreen()
    elif sys.stdout.isatty():
        screen = LiveScreen()
        with screen.live:
            yield screen
    else:
        yield Screen()
