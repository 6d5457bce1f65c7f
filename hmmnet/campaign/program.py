"""What one seed does, as plain data: the machine, the actors' operations, the faults. It can be repeated, shortened and sent to somebody.

Everything that chance decides about *what* is done is decided when it is drawn, and stands here; the seed decides about the order in which
tasks run and about which messages a fault hits. So any part of a program can be left out, and what is left is again a program with exactly
one run. A file of it is JSON, which `hmmnet replay` reads.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, TypeAlias, cast

import msgspec
from msgspec import Meta

from hmmnet.errors import PlanError, TopologyError, WrongUse
from hmmnet.faults.kinds import Fault
from hmmnet.faults.plan import Plan
from hmmnet.faults.points import POINTS
from hmmnet.topology.problems import did_you_mean
from hmmnet.units import counted

from .machines import devices_of
from .words import HARM_KINDS, HUGE_SPREAD, REGION_KINDS, STEP_KINDS, choices_of, places

FORMAT = 1
"""Of the files; grows when older ones cannot be read any more."""
PAGES_MAX = 1024
"""Of a region, and of what a step concerns: the addresses that each mapping has for itself."""
ACTORS_MAX = 1024
"""Their lanes are a region."""
REGIONS_MAX = 64
VICTIMS_MAX = 64
NUMBER_MAX = 1 << 40
"""Of what is counted: far beyond any run, and far below what a word holds."""
SECONDS_MAX = 900.0
"""Virtual; no run is longer."""
Whole: TypeAlias = Annotated[int, Meta(ge=0, le=NUMBER_MAX)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0.0, le=SECONDS_MAX)]


class Layout(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A region: `kind` is ``anon``, ``shared``, ``file`` or ``huge``; `pages` are those that are used."""

    kind: str
    pages: Annotated[int, Meta(ge=1, le=PAGES_MAX)]


class Step(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One operation of actor `actor`: `kind` names it; what the others mean, `operations` says."""

    actor: Whole
    kind: str
    region: Whole = 0
    page: Whole = 0
    word: Whole = 0
    count: Annotated[int, Meta(ge=1, le=PAGES_MAX)] = 1
    device: Whole = 0
    choice: str = ""
    serial: Whole = 0
    """Different in each step: what it stores is made of it."""


class Harm(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """When `at` operations have ended, something happens to a device: ``death``, ``partition`` or ``hang``, for so long.

    ``message``: it dies when message number `at` is sent; with a type (or way) of messages in `message`, whose device dies when the
    `at`-th of them is sent.
    """

    at: Whole
    kind: str
    device: Whole = 0
    seconds: Seconds = 0.0
    message: str = ""


class Hit(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Something happens at a protocol point (`hmmnet.faults.points`): ``delay``, ``pause``, ``fail``, ``crash`` or ``hang``.

    At the `nth` time that it is reached, or each time with `probability`. `seconds` is how long it takes, until a paused or hung one goes
    on, or until a crashed one is started again. Where the point concerns no device, device `nth` (they are counted round) crashes or hangs.
    """

    point: str
    action: str
    nth: Annotated[int, Meta(ge=0)] = 0
    probability: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    seconds: Seconds = 0.0


class Planned(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """When `at` operations have ended, `fault` begins: an entry of a plan of faults, as TOML."""

    at: Whole
    fault: str


class Program(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One seed. `machine` and each of `faults` are TOML: a topology, and entries of a plan of faults that begin when it does."""

    seed: Annotated[int, Meta(ge=0)]
    machine: str
    actors: Annotated[int, Meta(ge=1, le=ACTORS_MAX)]
    regions: Annotated[tuple[Layout, ...], Meta(min_length=1, max_length=REGIONS_MAX)]
    steps: tuple[Step, ...]
    faults: tuple[str, ...] = ()
    planned: tuple[Planned, ...] = ()
    harms: tuple[Harm, ...] = ()
    hits: tuple[Hit, ...] = ()
    victims: Annotated[int, Meta(ge=0, le=VICTIMS_MAX)] = 0
    """Processes that faults may end, or change the memory of (`victims`): processes `VICTIM_PID_FIRST` and following."""
    limit_pages: Whole = 0
    """Of the memory cgroup of all processes; 0: none."""
    mix: str = "all"
    format: int = FORMAT
    note: str = ""
    """Why it was kept: the violation it shows."""

    def text(self) -> str:
        """What stands in a file of it."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode() + "\n"


class _Version(msgspec.Struct):
    """What a file of any format has."""

    format: int = FORMAT


def read(file: Path) -> Program:
    """The program in a file. Raises WrongUse, of one line, for all that could not be run: nothing of it is left to be found then."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise WrongUse(f"{file}: cannot be read: {error.strerror}") from None
    try:
        version = msgspec.json.decode(data, type=_Version).format
        program = msgspec.json.decode(data, type=Program) if version == FORMAT else None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        cause = _what_else(data) or _plain(str(error))
        raise WrongUse(f"{file}: {cause}; hmmnet shrink writes the files wanted here") from None
    except RecursionError:
        raise WrongUse(f"{file}: no program of a campaign: nested too deeply; hmmnet shrink writes the files wanted here") from None
    if program is None:
        raise WrongUse(f"{file}: format {version}; this hmmnet reads format {FORMAT}")
    for place, word, known in _words(program):
        if word not in known:
            others = f"there are {', '.join(sorted({*known} - {''})) or 'none'}"
            raise WrongUse(f'{file}: {place}: there is no "{word}"; {did_you_mean(word, known, others)}')
    for wrong in _impossible(program):
        raise WrongUse(f"{file}: {wrong}")
    return program


def _plain(error: str) -> str:
    """What msgspec says of a file, with the place in front, and what was meant by a key that there is not."""
    cause, _, place = error.partition(" - at `$")
    strange = re.search(r"unknown field `(.*)`", cause)
    if strange:
        known = [name for struct in (Program, Layout, Step, Harm, Hit, Planned) for name in struct.__struct_fields__]
        guess = did_you_mean(strange[1], known)
        cause = f'there is no key "{strange[1]}"{guess and f", {guess}"}'
    place = place.strip(".`")
    return f"{place}: {cause[:1].lower()}{cause[1:]}" if place else f"no program of a campaign: {cause}"


def _impossible(program: Program) -> Iterator[str]:
    """What no machine can do of a program whose numbers and words are right: place, cause and mend of each."""
    yield from _wrong_machine(program.machine)
    for number, text in enumerate(program.faults):
        yield from _wrong_faults(f"faults[{number}]", text)
    for number, planned in enumerate(program.planned):
        yield from _wrong_faults(f"planned[{number}].fault", planned.fault)
    for number, layout in enumerate(program.regions):
        if layout.kind == "huge" and layout.pages > len(HUGE_SPREAD):
            yield f"regions[{number}].pages: {layout.pages} of a huge page; at most {len(HUGE_SPREAD)} are used"
    for number, step in enumerate(program.steps):
        if step.actor >= program.actors:
            yield f"steps[{number}].actor: there is no actor {step.actor}; there are {counted(program.actors, 'actor')}, from 0 on"


def _wrong_machine(text: str) -> Iterator[str]:
    try:
        if not devices_of(text):
            yield "machine: no device; write [[device]], and a [[link]] to it"
    except TopologyError as error:
        yield "; ".join(map(str, error.problems))


def _wrong_faults(place: str, text: str) -> Iterator[str]:
    """What they are on is not asked: a program with parts left out is a program."""
    try:
        faults = Plan.parse(text, place).faults
    except PlanError as error:
        yield "; ".join(map(str, error.problems))
        return
    for kind in (cast(Fault, fault).kind for fault in faults):
        if "sim" in kind.not_in:
            yield f'{place}: no campaign has the fault "{kind.name}": {kind.not_in["sim"]}; leave it out'


def _what_else(data: bytes) -> str:
    """What a file is that is no program of a campaign, if it is one of those that people have beside them."""
    try:
        tables = tomllib.loads(data.decode())
    except (ValueError, RecursionError):
        return ""
    if "fault" in tables:
        return "a plan of faults, which says nothing of the work (hmmnet run --faults takes plans), and no program of a campaign"
    return "a topology, and no program of a campaign" if tables.keys() & {"memory", "device", "link"} else ""


def _words(program: Program) -> Iterator[tuple[str, str, Collection[str]]]:
    """Every word of a program that must be one of some: its place, the word, and those that there are."""
    for number, layout in enumerate(program.regions):
        yield f"regions[{number}].kind", layout.kind, REGION_KINDS
    for number, step in enumerate(program.steps):
        yield f"steps[{number}].kind", step.kind, STEP_KINDS
        yield f"steps[{number}].choice", step.choice, choices_of(step.kind)
    for number, harm in enumerate(program.harms):
        yield f"harms[{number}].kind", harm.kind, HARM_KINDS
        if harm.message:
            yield f"harms[{number}].message", harm.message, places().keys() - POINTS.keys()
    for number, hit in enumerate(program.hits):
        yield f"hits[{number}].point", hit.point, POINTS
        yield f"hits[{number}].action", hit.action, [action for action in POINTS[hit.point].actions if action != "call"]
