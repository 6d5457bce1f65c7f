"""``hmmnet fault``: break a running machine on purpose, mend it, and look up what can be done."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmmnet.observe.hanging import hang

from . import CONTEXT
from .completion import devices, machines

if TYPE_CHECKING:
    from hmmnet.faults.kinds import Kind, Parameter
    from hmmnet.faults.points import Narrowing

    from .toxics import Sights

ON_HELP = 'The machine; not needed when only one runs, or for "default".'
NARROWED: dict[Narrowing, str] = {"device": "on", "process": "process", "range": "range"}
"""What narrows a fault, and what it is called where one is made."""
CHOICES_LISTED = 24
"""Of more names that a parameter may have, the catalogue says how many there are."""
app = typer.Typer(
    help="Break a running machine on purpose, and mend it.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings=CONTEXT,
)
Machine = Annotated[str | None, typer.Option("--machine", "-m", autocompletion=machines, help=ON_HELP, show_default=False)]
Target = Annotated[str, typer.Argument(autocompletion=devices, help="A device, DEVICE<->host, or a link.")]
Device = Annotated[str, typer.Argument(autocompletion=devices, help="A device, or a pattern of names, such as gpu*.", metavar="DEVICE")]
Held = Annotated[
    str, typer.Argument(autocompletion=devices, help="A device, or a way: DEVICE<->host, DEVICE->host, host->DEVICE.", metavar="DEVICE|WAY")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OneWay = Annotated[bool, typer.Option("--oneway", help="Only from the device to the host, or as the target says.")]


@app.command()
def kinds(
    names: Annotated[list[str] | None, typer.Argument(help="Only these kinds or families.", show_default=False)] = None,
    as_json: AsJson = False,
) -> int:
    """The catalogue: every kind of fault, its parameters, what holds afterwards, and where it works."""
    from hmmnet.faults.catalogue import CONTROLS, COUNTED, TARGETS

    chosen = _chosen(names or [])
    if as_json:
        return _write([kind.as_json() for kind in chosen])
    family = ""
    for kind in chosen:
        if kind.family != family:
            print(f"\n{kind.family}" if family else kind.family)
            family = kind.family
        _describe(kind)
    print("\nevery kind; on, process and range where nothing else is said of them")
    for parameter in TARGETS.values():
        _parameter(parameter)
    print("\ncontrols, of every kind that says nothing else of them")
    for parameter in CONTROLS.values():
        _parameter(parameter)
    print(hang(f"    {'counted':<22}", COUNTED))
    return 0


def _chosen(names: list[str]) -> list[Kind]:
    """The kinds that are called so, or whose families are; all without a name. Raises HmmnetError for names of neither."""
    from hmmnet.cli import did_you_mean
    from hmmnet.errors import WrongUse
    from hmmnet.faults.catalogue import KINDS

    known = [*KINDS, *dict.fromkeys(kind.family for kind in KINDS.values())]
    wrong = [f'no fault or family is called "{name}"{did_you_mean(name, known)}' for name in names if name not in known]
    if wrong:
        raise WrongUse("\n".join([*wrong, "`hmmnet fault kinds` lists them all"]))
    return [kind for kind in KINDS.values() if not names or kind.name in names or kind.family in names]


def _describe(kind: Kind) -> None:
    from hmmnet.faults.kinds import WORLDS

    print(hang(f"  {kind.name:<24}", kind.what))
    for parameter in kind.parameters:
        _parameter(parameter)
    if kind.controlled != "always":
        few = "none" if kind.controlled == "never" else "only with a point; without one"
        print(hang(f"    {'controls':<22}", f"{few}{':' if kind.controlled == 'never' else ''} {kind.why_uncontrolled}"))
    _narrowing(kind)
    if kind.holds:
        print(hang(f"    {'afterwards':<22}", kind.holds))
    for world in WORLDS:
        if world in kind.not_in:
            print(hang(f"    {'not in ' + world:<22}", kind.not_in[world]))


def _narrowing(kind: Kind) -> None:
    """Whether on, process and range are anything to it, where they are not always."""
    said: dict[str, list[str]] = {}
    for name, called in NARROWED.items():
        only = kind.narrowed_with(name)
        if kind.narrowed_by(name) != "always":
            said.setdefault(f"only with {only}" if only else f"none: {kind.why_wide(name)}", []).append(called)
    for what, names in said.items():
        print(hang(f"    {', '.join(names):<22}", what))


def _parameter(parameter: Parameter) -> None:
    default = f" (default {parameter.default_text})" if parameter.default_text else ""
    print(hang(f"    {parameter.name:<22}", f"{parameter.what}{_choices(parameter)}{default}"))


def _choices(parameter: Parameter) -> str:
    """What it may be, where it is one of several names."""
    if len(parameter.choices) > CHOICES_LISTED:
        return f"; `--json` has all {len(parameter.choices)}"
    return f": {', '.join(parameter.choices)}" if parameter.choices else ""


def _write(data: Any) -> int:
    import json

    print(json.dumps(data, indent=1))
    return 0


@app.command()
def points(as_json: AsJson = False) -> int:
    """Every protocol point: where `point.delay`, `point.fail` and the like can happen."""
    from hmmnet.faults.points import POINTS

    if as_json:
        return _write([point.as_json() for point in POINTS.values()])
    for point in POINTS.values():
        told = f"; tells {', '.join(point.tells)}" if point.tells else ""
        print(hang(f"{point.name:<26}{point.side:<8}", f"{point.what} ({', '.join(point.actions)}){told}"))
    return 0


@app.command()
def add(
    what: Annotated[
        str, typer.Argument(help="A kind of the catalogue, or a target: a device, DEVICE<->host, a link.", metavar="KIND|TARGET")
    ],
    given: Annotated[list[str] | None, typer.Argument(help="Whom, and parameters as NAME=VALUE.", metavar="ON|NAME=VALUE")] = None,
    machine: Machine = None,
) -> int:
    """Faults begin on a running machine; prints their numbers.

    A kind first: fault add point.delay gpu0 point=migrate.mid_copy latency=5ms. Or a target first, and toxics, of which there are
    latency, jitter, bandwidth, loss, duplicate, reorder and corrupt: fault add "gpu0<->host" latency=5ms jitter=1ms. The first three
    are the links': of what crosses the device's own link to the host; for DEVICE alone of each link at it, by a fault of its own.
    Latency and jitter are emulated times (5ms). Bandwidth is the part of it that is left (10% or 0.1), the others are the part of the
    messages that suffer.
    """
    from hmmnet.faults.catalogue import KINDS

    from . import toxics

    words = given or []
    if what not in KINDS and toxics.is_target(what, words):
        toxics.pairs_of(words)  # mistakes are told without a machine, too
        return _begin(machine, lambda sights: toxics.faults_for(what, words, sights))
    made = said(what, words)
    return _begin(machine, lambda _: [made])


@app.command()
def partition(target: Target, oneway: OneWay = False, machine: Machine = None) -> int:
    """Nothing passes between a device and the host, or over a link, until it is repaired."""
    from . import toxics

    return _begin(machine, lambda sights: toxics.cut(target, sights, oneway=oneway))


@app.command()
def repair(target: Target, machine: Machine = None) -> int:
    """A partition ends."""
    return _undo("repair", target, machine)


@app.command()
def hold(target: Held, oneway: OneWay = False, machine: Machine = None) -> int:
    """A device stops where it is (SIGSTOP), and what it is sent waits, until it is released."""
    from . import toxics

    return _begin(machine, lambda sights: toxics.held(target, sights, oneway=oneway))


@app.command()
def release(target: Held, machine: Machine = None) -> int:
    """What is held goes on."""
    return _undo("release", target, machine)


@app.command()
def crash(target: Device, machine: Machine = None) -> int:
    """A device is gone from one moment to the next (SIGKILL)."""

    def dies(sights: Sights) -> list[dict[str, Any]]:
        if target != "host":  # of which the machine says what to do
            sights.running(target)
        return [said("crash", [target])]

    return _begin(machine, dies)


@app.command()
def bounce(
    target: Device,
    down: Annotated[str, typer.Option(help="Emulated time until it starts again, such as 100ms; by itself at once.")] = "0ms",
    machine: Machine = None,
) -> int:
    """A device crashes and starts again, empty."""
    return _begin(machine, lambda _: [said("bounce", [target, f"down={down}"])])


@app.command()
def unplug(target: Device, machine: Machine = None) -> int:
    """A device is taken out in order: its pages go home, its memory goes, it is told goodbye. Who holds on to a page is named."""
    import hmmnet

    from .toxics import Sights

    async def main() -> None:
        async with hmmnet.attach(machine) as entered:
            for name in Sights.of(await entered.report()).running(target):
                await entered.unplug(name)
                print(f"{name} is unplugged")

    _run(main)
    return 0


@app.command()
def oom(
    cgroup: Annotated[str, typer.Option(help="Only processes of this memory cgroup.", show_default=False)] = "", machine: Machine = None
) -> int:
    """The OOM killer ends the process whose end frees most memory, weighed by its oom_score_adj."""
    print(f"process {_ask(machine, 'oom_kill', cgroup=cgroup)} is killed")
    return 0


@app.command()
def ls(machine: Machine = None, as_json: AsJson = False) -> int:
    """The faults of a running machine, and how often each has happened."""
    faults = _ask(machine, "list_faults")
    if as_json:
        return _write(faults)
    if not faults:
        print("no fault")
        return 0
    print(f"{'':>4}  {'kind':<20} {'on':<16} with")
    for one in faults:
        given = dict(one["fault"])
        kind, on = given.pop("kind"), given.pop("on", "")
        print(hang(f"{one['number']:>4}  {kind:<20} {on:<16} ", f"{_words(kind, given)} ({_so_far(one)})".lstrip()))
    return 0


def _so_far(one: dict[str, Any]) -> str:
    """Whether a fault is there, and how often it has happened."""
    times = {0: "has not happened", 1: "happened once"}
    return times.get(one["fired"], f"happened {one['fired']} times") if one["begun"] else "to come"


def _words(kind: str, given: dict[str, Any]) -> str:
    """What a fault does, as one writes it: with units, and with what it does where nothing was said."""
    from hmmnet.faults.catalogue import CONTROLS, KINDS, TARGETS

    own = {parameter.name: parameter for parameter in KINDS[kind].parameters}
    known = {**CONTROLS, **TARGETS, **own}
    unsaid = {name: parameter.default for name, parameter in own.items() if parameter.default and name not in given}
    return " ".join(f"{name}={known[name].text(value).replace(' ', '')}" for name, value in {**given, **unsaid}.items())


@app.command()
def rm(numbers: Annotated[list[str], typer.Argument(metavar="NUMBER", help="Faults' numbers, or all.")], machine: Machine = None) -> int:
    """Faults end."""
    from hmmnet.errors import WrongUse

    every = numbers == ["all"]
    for number in () if every else numbers:
        if not number.isdecimal():
            raise WrongUse(f'"{number}" is no number of a fault; write numbers, or "all" alone: `hmmnet fault ls` shows them')
    there = [one["number"] for one in _ask(machine, "list_faults")]
    wanted = there if every else sorted(dict.fromkeys(map(int, numbers)), key=there.__contains__)
    for one in wanted:  # of those named the first are any that there are not: that is said before a fault ends
        _ask(machine, "remove_fault", number=one)
        print(f"fault {one} has ended")
    if not wanted:
        print("no fault")
    return 0


def said(kind: str, words: list[str]) -> dict[str, Any]:
    """What a command line says of a fault. Raises HmmnetError with every mistake."""
    from hmmnet.cli import did_you_mean
    from hmmnet.errors import WrongUse
    from hmmnet.faults.catalogue import KINDS, fault

    if kind not in KINDS and not words and not did_you_mean(kind, list(KINDS)):
        raise WrongUse(
            f'no fault is called "{kind}": if it is a target, what is to happen there is missing, such as latency=5ms; '
            "`hmmnet fault kinds` lists the faults"
        )
    if kind not in KINDS:
        raise WrongUse(f'no fault is called "{kind}"{did_you_mean(kind, list(KINDS))}; `hmmnet fault kinds` lists them')
    made: dict[str, Any] = {"kind": kind}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign and "on" in made:
            raise WrongUse(f'"{word}": what it is on was said already ("{made["on"]}"); parameters are NAME=VALUE')
        made[name if sign else "on"] = value if sign else word
    fault(**made)
    return made


def _begin(machine: str | None, makes: Callable[[Sights], list[dict[str, Any]]]) -> int:
    """Faults that depend on what the machine has begin, all or none."""
    import hmmnet
    from hmmnet.errors import HmmnetError

    from .toxics import Sights, until, waits

    async def main() -> None:
        async with hmmnet.attach(machine) as entered:
            begun: list[int] = []
            sights = Sights.of(await entered.report())
            for made in makes(sights):
                try:
                    number = await entered.add_fault(**made)
                except HmmnetError:
                    for number in begun:
                        await entered.remove_fault(number)
                    raise
                begun.append(number)
                words = [f"{name}={value}" if name not in ("kind", "on") else str(value) for name, value in made.items()]
                print(f"fault {number}: {' '.join(words)}{waits(made, sights)}{until(made, number)}")

    _run(main)
    return 0


def _undo(verb: str, target: str, machine: str | None) -> int:
    """The faults that `verb` undoes end."""
    import hmmnet

    from .toxics import Sights, again, ended_by

    async def main() -> None:
        async with hmmnet.attach(machine) as entered:
            sights = Sights.of(await entered.report())
            faults = await entered.list_faults()
            ended = ended_by(verb, sights.between(target), faults)
            for number in ended:
                await entered.remove_fault(number)
                print(f"fault {number} has ended")
            for name in sights.lost_by([one["fault"] for one in faults if one["number"] in ended]):
                print(f"{name} is lost: {sights.lost[name]}; {again(name)}")

    _run(main)
    return 0


def _run(main: Callable[[], Awaitable[None]]) -> None:
    import trio

    trio.run(main)


def _ask(machine: str | None, call: str, **given: Any) -> Any:
    import trio

    import hmmnet

    async def main() -> Any:
        async with hmmnet.attach(machine) as entered:
            return await getattr(entered, call)(**given)

    return trio.run(main)
