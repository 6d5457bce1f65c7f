"""``hmmnet run WORKLOAD``: a built-in workload or ``FILE.py:FUNCTION``, on a machine of its own or on a running one."""

from __future__ import annotations

import errno
import inspect
import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Annotated, Any, get_type_hints

import typer

from .completion import machines, topologies, workloads
from .plans import Breaking, FaultsFile
from .worlds import WORLD_HELP, World

TOPOLOGY = "two-gpus"
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Of what the system may refuse for a file, what is no fault of who has named it."""
BUILT_IN = "hmmnet."
"""How the names of modules begin whose workloads are no user's own."""
NUMBERS: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float)}
"""What may be given for a parameter of a type."""


def run(
    workload: Annotated[
        str, typer.Argument(autocompletion=workloads, help="A built-in workload's name, or FILE.py:FUNCTION.", metavar="WORKLOAD")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Arguments of the workload as NAME=VALUE.", metavar="NAME=VALUE", show_default=False)
    ] = None,
    topology: Annotated[
        str | None,
        typer.Option(autocompletion=topologies, help=f"Start a machine of this topology (default: {TOPOLOGY}).", show_default=False),
    ] = None,
    on: Annotated[
        str | None, typer.Option(autocompletion=machines, help="Use this running machine instead of starting one.", show_default=False)
    ] = None,
    rate: Annotated[str, typer.Option(help="Emulated seconds for a real one: auto (measured) or a number.")] = "auto",
    world: Annotated[World, typer.Option(help=WORLD_HELP)] = World.real,
    seed: Annotated[int, typer.Option(help="What chances of faults are drawn from; with --world sim the order of events, too.")] = 0,
    faults: FaultsFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the workload's report for programs.")] = False,
) -> int:
    """Run a workload and print its report. Exit code 0 when the workload says that its results are correct, or does not say.

    Built in are list_walk, reduction, tree_search, vector_add and word_count. A workload of your own is a function
    "async def NAME(machine, **arguments)"; what it returns is the report. Below it stands what the machine's links carried since it
    started; with --json as "links".
    """
    from hmmnet.errors import WrongUse
    from hmmnet.launcher.rate import parse_rate
    from hmmnet.sim.worlds import run_in
    from hmmnet.topology.load import load

    from .plans import plan_for

    if world is World.sim and (on is not None or rate != "auto"):
        raise WrongUse("--world sim goes with neither --on nor --rate: it is a machine of its own, in virtual time")
    if on is not None and topology is not None:
        raise WrongUse("--on and --topology exclude each other: a running machine has its topology already")
    function = find(workload)
    given = parse_arguments(arguments or [])
    check_arguments(workload, function, given)
    parse_rate(rate)
    plan = plan_for(faults, world.value, None if on is not None else load(topology or TOPOLOGY))
    machine = machine_for(topology, on, rate, world, seed)
    with plan.telling(), said_of(on):
        report, links, seconds = run_in(world.value, _play, machine, function, given, plan, on is not None, seed=seed)
    shown: dict[str, Any] = dict(report) if isinstance(report, Mapping) else {"result": report}
    if as_json:
        print(json.dumps({"links": links, **plan.as_json(), **shown}, default=plain, indent=1))
    else:
        show(shown, links, seconds)
        if plan:
            print(plan.text)
    return 0 if shown.get("correct", True) else 1


def machine_for(topology: str | None, on: str | None, rate: str, world: World, seed: int = 0) -> AbstractAsyncContextManager[Any]:
    """The machine to run on: attached to, launched, or simulated."""
    if on is not None:
        import hmmnet

        return hmmnet.attach(on)
    name = topology or TOPOLOGY
    if world is World.sim:
        from hmmnet.sim import simulated

        return simulated(name, seed=seed)
    from hmmnet.machine import launch

    print(f"starting {name} for this run ...", file=sys.stderr, flush=True)
    from hmmnet.launcher.rate import parse_rate

    return launch(name, rate=parse_rate(rate), seed=seed)


@contextmanager
def said_of(on: str | None) -> Iterator[None]:
    """Where the machine `on` went away meanwhile (None: ours), the error says that, and not only that a host did. A device that is lost
    is nothing of the kind: its error was the host's answer.
    """
    from hmmnet.errors import HmmnetError, PeerLost, RemoteError

    try:
        yield
    except HmmnetError as error:
        lost = error if isinstance(error, PeerLost) else error.__cause__  # a workload of the user's says where it was, and why
        if on is None or not isinstance(lost, PeerLost) or isinstance(lost.__cause__, RemoteError):
            raise
        raise HmmnetError(f'machine "{on}" is gone: {error}') from error


async def _play(
    machine: AbstractAsyncContextManager[Any], function: Callable[..., Awaitable[Any]], given: dict[str, Any], plan: Breaking, stays: bool
) -> tuple[Any, list[dict[str, Any]], float]:
    async with machine as entered:
        devices = (await entered.report())["devices"]
        there = ", ".join(name if devices[name]["state"] != "lost" else f"{name} (lost)" for name in entered.device_names)
        print(f"running {getattr(function, '__name__', 'the workload')} on {there or 'no device'}", file=sys.stderr, flush=True)
        began_s = entered.emulated_s()
        async with plan.on(entered, stays=stays):
            with plain_errors(function):
                report = await function(entered, **given)
        seconds = entered.emulated_s() - began_s
        return report, (await entered.report())["links"], seconds


@contextmanager
def plain_errors(function: Callable[..., Any]) -> Iterator[None]:
    """A built-in workload that cannot use a value says so in one sentence; one of the user's own shows where it went wrong: a bug with its
    traceback, an error that the machine or a file answered with by file and line.
    """
    from hmmnet.errors import HmmnetError, WrongUse

    built_in = function.__module__.startswith(BUILT_IN)
    try:
        yield
    except BrokenPipeError:  # whoever reads what the workload prints has seen enough: `main` knows
        raise
    except (HmmnetError, OSError) as error:
        place = function.__name__ if built_in else _last_line_in(function.__code__.co_filename, error)
        if isinstance(error, HmmnetError) and (built_in or not place):
            raise
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        raise (WrongUse if built_in and getattr(error, "errno", 0) not in FULL else HmmnetError)(f"{place}: {said}") from error
    except (ValueError, OverflowError, MemoryError) as error:
        if not built_in:
            raise
        raise WrongUse(f"{function.__name__}: {error}") from error


def _last_line_in(file: str, error: BaseException) -> str:
    """``FILE:LINE`` of the innermost line of `file` that `error` passed; empty when it passed none."""
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    return f"{file}:{lines[-1]}" if lines else ""


def find(workload: str) -> Callable[..., Awaitable[Any]]:
    """The function that a workload's name means. Raises HmmnetError."""
    if ".py:" in workload or workload.endswith(".py"):
        return from_file(workload)
    from hmmnet.workloads.registry import load_workload

    return load_workload(workload)


def from_file(place: str) -> Callable[..., Awaitable[Any]]:
    """The function of ``FILE.py:FUNCTION``; its folder can be imported from, as for a script. Raises HmmnetError."""
    import importlib.util

    from hmmnet.cli import did_you_mean
    from hmmnet.errors import WrongUse
    from hmmnet.topology.files import is_file

    file, _, name = place.rpartition(":") if ":" in place else (place, "", "")
    path = Path(file)
    if not name:
        raise WrongUse(f"{place}: which function? Write {place}:FUNCTION")
    if not is_file(path):
        raise WrongUse(f"{file}: there is no such file")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise WrongUse(f"{error.filename}:{error.lineno}: {error.msg}") from error
    found = getattr(module, name, None)
    functions = [key for key, value in vars(module).items() if inspect.iscoroutinefunction(value)]
    if found is None:
        raise WrongUse(f'{file} has no function "{name}"{did_you_mean(name, functions)}')
    if not inspect.iscoroutinefunction(found):
        raise WrongUse(f"{place} is no coroutine function: a workload is written as async def {name}(machine, ...)")
    function: Callable[..., Awaitable[Any]] = found
    return function


def parse_arguments(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` texts; a value is read as JSON where it is JSON, else it is the text. Raises HmmnetError."""
    from hmmnet.errors import WrongUse

    given: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.isidentifier():
            raise WrongUse(f'"{pair}" is no argument: write NAME=VALUE, such as n=1000')
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    return given


def check_arguments(workload: str, function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Whether `function` takes `given`. Raises HmmnetError."""
    from hmmnet.cli import did_you_mean
    from hmmnet.errors import WrongUse

    every = list(inspect.signature(function).parameters.values())
    if not every:
        raise WrongUse(f"{workload} takes no machine: a workload is written as async def {function.__name__}(machine, ...)")
    parameters = every[1:]
    names = [parameter.name for parameter in parameters if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for name in given:
        if name not in names and not takes_any:
            raise WrongUse(f'{workload} has no argument "{name}"{did_you_mean(name, names)}; it takes: {", ".join(names) or "none"}')
    kinds = get_type_hints(function)
    for name, value in given.items():
        wanted = kinds.get(name)
        if wanted in NUMBERS and (isinstance(value, bool) or not isinstance(value, NUMBERS[wanted])):
            raise WrongUse(f"{workload}: {name} is {value!r}; {'a whole number' if wanted is int else 'a number'} is wanted")
        if wanted is int and value < 0 and function.__module__.startswith(BUILT_IN):
            raise WrongUse(f"{workload}: {name} is {value}; at least 0 is wanted")
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.name in names and parameter.default is parameter.empty and parameter.name not in given
    ]
    if missing:
        raise WrongUse(f"{workload} needs {', '.join(f'{name}=...' for name in missing)}")


def plain(value: Any) -> Any:
    """What json does not know: numpy scalars and arrays, bytes, anything else as its text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return value.hex() if isinstance(value, bytes) else str(value)


def show(report: dict[str, Any], links: Sequence[Mapping[str, Any]], seconds: float) -> None:
    """A report for a person: facts one a line, figures by device and by link as tables, the verdict last."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from hmmnet.observe.fitted import Fitted
    from hmmnet.observe.links_table import links_table
    from hmmnet.units import show_time

    console = Console()
    for name, value in report.items():
        if name not in ("correct", "mistakes", "devices"):
            console.print(f"{name:<12} {escape(str(value))}", highlight=False)
    console.print(f"{'emulated':<12} {show_time(seconds)}", highlight=False)
    devices = report.get("devices")
    if isinstance(devices, Mapping) and devices and all(isinstance(figures, Mapping) for figures in devices.values()):
        names = list(dict.fromkeys(name for figures in devices.values() for name in figures))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("figure")
        for device in devices:
            table.add_column(device, justify="right")
        for name in names:
            table.add_row(*figure_row(name, [figures.get(name) for figures in devices.values()]))
        console.print()
        console.print(Fitted(table))
        console.print()
    if any(link["bytes_moved"] for link in links):
        console.print(links_table(links, console.width))
        console.print()
    if "correct" in report:
        console.print("[green]every result is correct[/]" if report["correct"] else "[red]results are wrong[/]", highlight=False)
        for mistake in report.get("mistakes", []):
            console.print(f"  {escape(str(mistake))}", highlight=False)


def figure_row(name: str, values: Sequence[Any]) -> tuple[str, ...]:
    """One figure of each device, as a row of a table; seconds and bytes, which stand at the end of a name, in units that people read."""
    from hmmnet.units import show_size, show_time

    for unit, show_it in (("_bytes", show_size), ("_s", show_time)):
        if name.endswith(unit) and all(isinstance(value, int | float) for value in values):
            return name.removesuffix(unit), *map(show_it, values)
    return name, *map(figure_text, values)


def figure_text(value: Any) -> str:
    """One figure of a table."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
