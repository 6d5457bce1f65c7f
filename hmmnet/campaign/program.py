"""What one seed does, as plain data: the machine, the actors' operations, the faults. It can be repeated, shortened and sent to somebody.

Everything that chance decides about *what* is done is decided when it is drawn, and stands here; the seed decides about the order in which
tasks run and about which messages a fault hits. So any part of a program can be left out, and what is left is again a program with exactly
one run. A file of it is JSON, which `hmmnet replay` reads.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec

from hmmnet.errors import HmmnetError, WrongUse
from hmmnet.faults.points import POINTS
from hmmnet.topology.problems import did_you_mean

from .words import HARM_KINDS, REGION_KINDS, STEP_KINDS, places

FORMAT = 1
"""Of the files; grows when older ones cannot be read any more."""


class Layout(msgspec.Struct, frozen=True, omit_defaults=True):
    """A region: `kind` is ``anon``, ``shared``, ``file`` or ``huge``; `pages` are those that are used."""

    kind: str
    pages: int


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """One operation of actor `actor`: `kind` names it; what the others mean, `operations` says."""

    actor: int
    kind: str
    region: int = 0
    page: int = 0
    word: int = 0
    count: int = 1
    device: int = 0
    choice: str = ""
    serial: int = 0
    """Different in each step: what it stores is made of it."""


class Harm(msgspec.Struct, frozen=True, omit_defaults=True):
    """When `at` operations have ended, something happens to a device: ``death``, ``partition`` or ``hang``, for so long.

    ``message``: it dies when message number `at` is sent; with a type (or way) of messages in `message`, whose device dies when the
    `at`-th of them is sent.
    """

    at: int
    kind: str
    device: int = 0
    seconds: float = 0.0
    message: str = ""


class Hit(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something happens at a protocol point (`hmmnet.faults.points`): ``delay``, ``pause``, ``fail``, ``crash`` or ``hang``.

    At the `nth` time that it is reached, or each time with `probability`. `seconds` is how long it takes, until a paused or hung one goes
    on, or until a crashed one is started again. Where the point concerns no device, device `nth` (they are counted round) crashes or hangs.
    """

    point: str
    action: str
    nth: int = 0
    probability: float = 0.0
    seconds: float = 0.0


class Planned(msgspec.Struct, frozen=True, omit_defaults=True):
    """When `at` operations have ended, `fault` begins: an entry of a plan of faults, as TOML."""

    at: int
    fault: str


class Program(msgspec.Struct, frozen=True, omit_defaults=True):
    """One seed. `machine` and each of `faults` are TOML: a topology, and entries of a plan of faults that begin when it does."""

    seed: int
    machine: str
    actors: int
    regions: tuple[Layout, ...]
    steps: tuple[Step, ...]
    faults: tuple[str, ...] = ()
    planned: tuple[Planned, ...] = ()
    harms: tuple[Harm, ...] = ()
    hits: tuple[Hit, ...] = ()
    victims: int = 0
    """Processes that faults may end, or change the memory of (`victims`): processes `VICTIM_PID_FIRST` and following."""
    limit_pages: int = 0
    """Of the memory cgroup of all processes; 0: none."""
    mix: str = "all"
    format: int = FORMAT
    note: str = ""
    """Why it was kept: the violation it shows."""

    def write(self, file: Path) -> None:
        """As a file. Raises HmmnetError."""
        try:
            file.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        except OSError as error:
            raise HmmnetError(f"{file}: {error.strerror}") from None


def read(file: Path) -> Program:
    """The program in a file. Raises WrongUse."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise WrongUse(f"{file}: cannot be read: {error.strerror}") from None
    try:
        program = msgspec.json.decode(data, type=Program)
    except msgspec.MsgspecError as error:
        raise WrongUse(
            f"{file}: {_what_else(data) or f'no program of a campaign: {error}'}; hmmnet shrink writes the files wanted here"
        ) from None
    if program.format != FORMAT:
        raise WrongUse(f"{file}: format {program.format}; this hmmnet reads format {FORMAT}")
    for place, word, known in _words(program):
        if word not in known:
            others = f"there are {', '.join(sorted(known))}"
            raise WrongUse(f'{file}: {place}: there is no "{word}"; {did_you_mean(word, known, others)}')
    return program


def _what_else(data: bytes) -> str:
    """What a file is that is no program of a campaign, if it is one of those that people have beside them."""
    try:
        tables = tomllib.loads(data.decode())
    except ValueError:
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
    for number, harm in enumerate(program.harms):
        yield f"harms[{number}].kind", harm.kind, HARM_KINDS
        if harm.message:
            yield f"harms[{number}].message", harm.message, places().keys() - POINTS.keys()
    for number, hit in enumerate(program.hits):
        yield f"hits[{number}].point", hit.point, POINTS
        yield f"hits[{number}].action", hit.action, POINTS[hit.point].actions
