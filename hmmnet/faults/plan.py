"""Plans: lists of faults, as a TOML file or made in Python.

[[fault]]
kind = "copy.corrupt"      # a name in the catalogue (`hmmnet fault kinds`)
on = "gpu*"                # whom: devices, gpu0<->host, links, nodes; default: everybody
probability = 0.05         # and interval, times, space, nth: see Controls
direction = "to_host"      # the kind's own parameters
after = "10 ms"            # begins then, emulated, and
lasts = "1 s"              # ends again
process = 1000             # only this process's
range = "0x7f0000000000+64KiB"  # only these addresses
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from hmmnet.errors import HmmnetError, PlanError, WrongUse
from hmmnet.topology.lines import KeyLines
from hmmnet.topology.problems import Problem, did_you_mean, no_text, toml_of

from .catalogue import CONTROLS, as_given, checked, kind_named
from .catalogue import fault as make_fault
from .controls import Controls
from .effects import Effect
from .injector import PointFault
from .kinds import Fault, Kind, World
from .messages import MessageFault
from .targets import target_mistakes

if TYPE_CHECKING:
    from hmmnet.topology.model import Topology

AnyFault: TypeAlias = Fault | MessageFault | PointFault
"""A named fault with its parameters, or what such a one comes down to."""
SECTION = "fault"
_KIND = re.compile(r"\Afault \S+: ")
"""How an error of one fault begins, where no place is known."""


@dataclass(frozen=True)
class Plan:
    """Faults that act together. `file` and `lines` say where each was read, if it was; of several plans in one, `parts` do."""

    faults: Sequence[AnyFault] = ()
    file: str = dataclasses.field(default="plan", compare=False)
    lines: Sequence[int] = dataclasses.field(default=(), compare=False, repr=False)
    parts: Sequence[Plan] = dataclasses.field(default=(), compare=False, repr=False)

    @classmethod
    def parse(cls, text: str, file: str = "plan.toml") -> Plan:
        """The plan in `text`. Raises PlanError with every mistake of the file: line, fault, field, cause, and what was meant."""
        data = toml_of(text, file, "[[fault]]")
        if isinstance(data, Problem):
            raise PlanError([data])
        lines = KeyLines(text)
        mistakes = [
            Problem(
                file, lines.get((key,), 0), "", key, "unknown section or key", did_you_mean(key, [SECTION], "a plan has [[fault]] tables")
            )
            for key in data
            if key != SECTION
        ]
        tables = data.get(SECTION, [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            mistakes.append(Problem(file, lines.get((SECTION,), 0), "", SECTION, "no array of tables", "write [[fault]] before each one"))
            tables = []
        return cls._of(tables, file, lines, mistakes)

    @classmethod
    def of(cls, entries: Iterable[Mapping[str, Any]], place: str = "plan") -> Plan:
        """The plan of `entries`, each a ``[[fault]]`` as a dictionary; `place` is what messages call it. Raises PlanError as `parse`."""
        return cls._of([dict(entry) for entry in entries], place, {}, [])

    @classmethod
    def _of(cls, tables: Sequence[dict[str, Any]], file: str, lines: Mapping[Any, int], mistakes: list[Problem]) -> Plan:
        faults = []
        for index, table in enumerate(tables):
            made, found = _read(file, lines, index, table)
            mistakes += found
            if made is not None:
                faults.append(made)
        if mistakes:
            raise PlanError(sorted(mistakes, key=lambda mistake: mistake.line))
        return cls(tuple(faults), file, _Lines(lines, len(faults)))

    @classmethod
    def joined(cls, parts: Iterable[Plan], place: str) -> Plan:
        """One plan of several, whose faults keep their places."""
        each = tuple(parts)
        return cls(tuple(one for plan in each for one in plan.faults), place, parts=each)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan in a file. Raises PlanError; HmmnetError when it cannot be read."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PlanError([no_text(error, str(path))]) from error
        except OSError as error:
            raise WrongUse(f"{path}: cannot be read: {error.strerror or error}") from error
        return cls.parse(text, str(path))

    def check(self, world: World, topology: Topology | None = None) -> None:
        """Raises PlanError that names every fault which cannot be done in `world`, or not on that machine, with its line, and why."""
        found = [self.problem(index, cause) for index, one in enumerate(self.faults) for cause in _impossible(one, world, topology)]
        if found:
            raise PlanError(found)

    def begin(self, add: Callable[[AnyFault], object]) -> None:
        """Its faults begin, each by `add`. Raises PlanError with the line of one that cannot, or would be in vain."""
        for index, one in enumerate(self.faults):
            with self.naming(index):
                add(one)

    @contextmanager
    def naming(self, index: int) -> Iterator[None]:
        """What is wrong with the fault of that index, as it begins in the block, is said with its place. Raises PlanError for WrongUse."""
        try:
            yield
        except WrongUse as error:
            raise PlanError([self.problem(index, _KIND.sub("", cause)) for cause in str(error).splitlines()]) from None

    def place(self, index: int) -> str:
        """What messages call the fault of that index: its file, its line, and which one it is there."""
        return str(self.problem(index, ""))

    def problem(self, index: int, cause: str) -> Problem:
        """What is wrong with the fault of that index: `cause`, and behind a semicolon its mend."""
        before = 0
        for part in self.parts:
            if before <= index < before + len(part.faults):
                there = part.problem(index - before, cause)
                if there.line:  # in a file
                    return there
            before += len(part.faults)
        line = self.lines[index] if len(self.lines) == len(self.faults) else 0
        cause, _, mend = cause.partition("; ")
        return Problem(self.file, line, f"fault {index + 1}", "", cause, mend)

    def as_toml(self) -> str:
        """A file that `parse` reads as this plan. Raises HmmnetError for a fault with a function in it."""
        return "\n".join(_as_toml(named(one)) for one in self.faults)


class _Lines(Sequence[int]):
    """The line on which each of `count` faults begins: found out when somebody asks, as `KeyLines` are."""

    def __init__(self, lines: Mapping[Any, int], count: int) -> None:
        self._lines = lines
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"there are {self._count} faults, none with number {index}")
        return self._lines.get((SECTION, index % self._count), 0)


def _impossible(one: AnyFault, world: World, topology: Topology | None) -> Iterator[str]:
    """Why it cannot be done in `world`, or on that machine."""
    whole = one if isinstance(one, Fault) else plain(one)
    try:
        whole.kind.check_world(world)
    except HmmnetError as error:
        yield str(error)
        return
    if topology is not None:
        yield from target_mistakes(whole, topology, world)


def _read(file: str, lines: Mapping[Any, int], index: int, table: dict[str, Any]) -> tuple[Fault | None, list[Problem]]:
    """The fault that a table describes, unless something is wrong with it; and all that is. Only then `lines` are asked: they cost."""
    kind = table.get("kind")
    made, mistakes = (
        checked(kind, {name: value for name, value in table.items() if name != "kind"}) if isinstance(kind, str) else (None, [])
    )
    if made is not None:
        return made, []
    place, first = f"fault {index + 1}", lines.get((SECTION, index), 0)
    if not isinstance(kind, str):
        return None, [Problem(file, first, place, "kind", "missing, or no text", 'add kind = "loss", or another of `hmmnet fault kinds`')]
    found = []
    for field, cause in mistakes:
        cause, _, mend = cause.partition("; ")
        found.append(Problem(file, lines.get((SECTION, index, field), first), place, field, cause, mend))
    return None, found


def plain(effect: MessageFault | PointFault) -> Fault:
    """A fault that comes down to just that effect."""
    if isinstance(effect, PointFault) and effect.call is not None:
        kind = Kind("call", "points", "a function is called", "", lambda _: [effect])
    else:
        made = named(effect)
        kind = Kind(made.kind.name, made.kind.family, made.kind.what, made.kind.holds, lambda _: _effects(effect), made.kind.on)
    return Fault(kind, "", effect.controls)


def _effects(effect: Effect) -> list[Effect]:
    return [effect]


def named(one: AnyFault) -> Fault:
    """The fault of the catalogue that comes down to that effect. Raises HmmnetError for one with a function in it."""
    if isinstance(one, Fault):
        return one
    given: dict[str, Any] = _controls(one.controls)
    if isinstance(one, MessageFault):
        given |= {"on": one.way.text, "channel": one.way.channel, "latency": one.late_s, "jitter": one.jitter_s}
        given |= {"message": one.message, "shape": one.shape} | _narrowing(one)
        kind = kind_named(one.kind)
    else:
        if one.call is not None:
            raise WrongUse(f"a fault that calls a function cannot be written down: {one.point}")
        given |= {
            "on": one.device,
            "point": one.point,
            "event": one.event,
            "node": one.node,
            "latency": one.delay_s,
            "jitter": one.jitter_s,
        }
        given |= _narrowing(one)
        kind = kind_named(f"point.{one.action}")
    fitting = {*CONTROLS, "on", "process", "range", *(parameter.name for parameter in kind.parameters)}
    return make_fault(kind.name, **{name: value for name, value in given.items() if name in fitting})


def _narrowing(one: MessageFault | PointFault) -> dict[str, Any]:
    process = {"process": one.process} if one.process else {}
    return process | ({"range": f"0x{one.start:x}+{one.end - one.start}"} if one.end > one.start else {})


def _controls(controls: Controls) -> dict[str, Any]:
    return {name: value for name, one in CONTROLS.items() if (value := getattr(controls, name)) != one.default}


def _as_toml(one: Fault) -> str:
    lines = ["[[fault]]"]
    for name, value in as_given(one).items():
        if isinstance(value, bool):
            lines.append(f"{name} = {str(value).lower()}")
        elif isinstance(value, str):
            lines.append(f'{name} = "{value}"')
        else:
            lines.append(f"{name} = {value!r}")
    return "\n".join(lines) + "\n"
