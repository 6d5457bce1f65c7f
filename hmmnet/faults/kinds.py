"""Kinds of faults: a name, parameters, where it works, what holds afterwards; and `Fault`, one of a kind with its target and controls.

The families of the catalogue (a file each: `allocation`, `copying`, `memory_errors`, `notifier`, `stepping`, `device_faults`,
`process_events`, `nodes`, `wires`, `clocks`) make `Kind`s; `catalogue` has them all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from hmmnet.errors import HmmnetError, WrongUse
from hmmnet.topology.problems import did_you_mean
from hmmnet.units import parse_size, parse_time, show_size, show_time

from .controls import Controls
from .effects import STARTING, DeviceEffect, Effect, NodeEffect, has_occurrences, narrowed_by, why_not_narrowed
from .messages import HOST, TELLING
from .points import POINTS, Narrowing, matching

Form = Literal["time", "number", "count", "size", "choice", "text", "flag", "point"]
World = Literal["sim", "real"]
WORLDS: tuple[World, ...] = ("sim", "real")
On = Literal["device", "way", "link", "node", "nothing"]
"""What `Fault.on` names: devices, messages of devices in a direction, links, nodes (devices or ``host``), or nothing at all."""
Controlled = Literal["always", "with point", "never"]
"""Whether a kind takes `Controls`: it happens now and then, does so at a point that is given, or is done at once or lasts."""
Narrowed = Literal["always", "some", "never"]
"""Whether a kind can be narrowed to some processes or addresses: however it is made, or with some of its parameters only."""
EXAMPLE_POINT = "migrate.mid_copy"
"""One at which everything can happen that kinds do at a point of one's choice."""
CHOICES_SHOWN = 5
"""Of more choices than that a message lists so many, and the one that was probably meant."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kind. `default` None: it must be given."""

    name: str
    form: Form
    what: str
    default: Any = None
    choices: tuple[str, ...] = ()

    @property
    def default_text(self) -> str:
        """`default` as a person writes it, with its unit; empty when there is none."""
        return self.text(self.default)

    def text(self, value: Any) -> str:
        """`value`, as `read` gave it, as a person writes it, with its unit; empty when there is none."""
        if value in (None, ""):
            return ""
        if self.form == "time":
            return show_time(value) if value else "0 s"
        return show_size(value) if self.form == "size" else str(value)

    def as_json(self) -> dict[str, Any]:
        """Plain data; times are seconds, sizes bytes."""
        made = {"name": self.name, "form": self.form, "what": self.what, "default": self.default}
        return made | ({"choices": list(self.choices)} if self.choices else {})

    def read(self, value: Any) -> Any:
        """`value`, as a file or a command line gives it, as the effect wants it. Raises ValueError that says what is wanted."""
        if value == "" == self.default:
            return value
        try:
            return _READ[self.form](self, value)
        except HmmnetError as error:
            raise ValueError(str(error)) from None
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{value!r} where {self._wanted} is wanted{self._meant(value)}") from None

    @property
    def _wanted(self) -> str:
        return {
            "time": 'a time with its unit, such as "5 ms"',
            "number": "a number that is not negative",
            "count": "a whole number that is not negative",
            "size": 'a size with its unit, such as "64 KiB"',
            "choice": f"one of {', '.join(self.choices[:CHOICES_SHOWN])}{', ...' if len(self.choices) > CHOICES_SHOWN else ''}",
            "text": "text",
            "flag": "true or false",
            "point": "a point's name or a pattern of names",
        }[self.form]

    def _meant(self, value: Any) -> str:
        meant = did_you_mean(value, self.choices) if isinstance(value, str) else ""
        return f"; {meant}" if meant else ""


def _number(_: Parameter, value: Any) -> float:
    if isinstance(value, bool) or not float(value) >= 0:
        raise ValueError
    return float(value)


def _count(_: Parameter, value: Any) -> int:
    if isinstance(value, bool | float) or int(value) < 0:
        raise ValueError
    return int(value)


def _choice(parameter: Parameter, value: Any) -> str:
    if value not in parameter.choices:
        raise ValueError
    return str(value)


def _text(_: Parameter, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _point(parameter: Parameter, value: Any) -> str:
    matching(_text(parameter, value))
    return str(value)


def _flag(_: Parameter, value: Any) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


_READ: dict[str, Callable[[Parameter, Any], Any]] = {
    "time": lambda _, value: parse_time(re.sub(r"(?<=\d)(?=[a-z])", " ", value)) if isinstance(value, str) else _number(_, value),
    "size": lambda _, value: parse_size(re.sub(r"(?<=\d)(?=[A-Za-z])", " ", value)) if isinstance(value, str) else _count(_, value),
    "number": _number,
    "count": _count,
    "choice": _choice,
    "text": _text,
    "flag": _flag,
    "point": _point,
}


@dataclass(frozen=True)
class Kind:
    """A named fault. `holds` is its recovery oracle: what a test may demand afterwards. `not_in` says why it cannot be done in a world.

    `once`: it happens when it is added, and is over. `needs_range`: where no point says which addresses it concerns, a range has to.
    `makes` are its effects.
    """

    name: str
    family: str
    what: str
    holds: str
    makes: Callable[[Fault], Sequence[Effect]]
    on: On = "device"
    parameters: tuple[Parameter, ...] = ()
    not_in: Mapping[str, str] = field(default_factory=dict)
    once: bool = False
    needs_range: bool = False

    def parameter(self, name: str) -> Parameter | None:
        """The parameter called `name`."""
        return next((one for one in self.parameters if one.name == name), None)

    @cached_property
    def controlled(self) -> Controlled:
        """Whether it takes `Controls`, as its effects say (`effects.has_occurrences`)."""
        if self._occurs(""):
            return "always"
        return "with point" if self.parameter("point") and self._occurs(EXAMPLE_POINT) else "never"

    def _occurs(self, point: str) -> bool:
        """Whether one with every parameter at its default, and at `point`, happens now and then."""
        return any(map(has_occurrences, self._with({"point": point} if point else {}).effects))

    def _with(self, given: Mapping[str, Any]) -> Fault:
        """One with `given`, and every other parameter at its default."""
        needed = {"point": EXAMPLE_POINT}
        settings = {one.name: needed.get(one.name, "*") if one.default is None else one.default for one in self.parameters}
        return Fault(self, "*<->host" if self.on == "way" else "*", settings={**settings, **given})

    def narrowed_by(self, name: Narrowing) -> Narrowed:
        """Whether `name` narrows it, as its effects say (`effects.narrowed_by`)."""
        answers = {not one.not_narrowed_by(name) for one in self._variants()}
        return "some" if len(answers) == 2 else "always" if answers == {True} else "never"

    def _variants(self) -> Iterator[Fault]:
        """One of each sort that may be narrowed by something else than the others."""
        point, message = self.parameter("point"), self.parameter("message")
        at = [] if point is None else [{"point": name} for name in ([""] if point.default == "" else []) + list(POINTS)]
        for given in at or [{}] + ([{"message": TELLING}] if message else []):
            one = self._with(given)
            with suppress(HmmnetError):  # not at that point
                one.effects  # noqa: B018 - where it shows
                yield one

    def why_wide(self, name: Narrowing) -> str:
        """Why `name` does not narrow it by itself; empty when it does."""
        return next((why for one in self._variants() if (why := one.not_narrowed_by(name))), "")

    def narrowed_with(self, name: Narrowing) -> str:
        """With what `name` narrows it, where not with everything."""
        if self.narrowed_by(name) != "some":
            return ""
        return f"message={TELLING}" if self.parameter("message") else "a point that tells it (`hmmnet fault points`)"

    @property
    def nowhere(self) -> str:
        """Why it can be done in no world; empty when it can."""
        return " and ".join(dict.fromkeys(self.not_in.values())) if set(self.not_in) == set(WORLDS) else ""

    @property
    def why_uncontrolled(self) -> str:
        """Why it takes no controls, of a kind with `controlled` "with point" as long as none is given; empty when it always does."""
        if self.controlled == "always":
            return ""
        if self.nowhere:
            return f"it can be done in no world: {self.nowhere}"
        if self.once or self.controlled == "with point":
            return "it happens once, as it is added"
        return "it lasts, and has no occurrences to choose from"

    def as_json(self) -> dict[str, Any]:
        """Plain data: all that `hmmnet fault kinds` says of it."""
        return {
            "name": self.name,
            "family": self.family,
            "what": self.what,
            "on": self.on,
            "parameters": [parameter.as_json() for parameter in self.parameters],
            "holds": self.holds,
            "once": self.once,
            "controls": self.controlled,
            "narrowed_by": {"on": self.narrowed_by("device"), **{name: self.narrowed_by(name) for name in ("process", "range")}},
            "not_in": dict(self.not_in),
        }

    def check_world(self, world: World) -> None:
        """Raises HmmnetError when it cannot be done there, and says why."""
        if world in self.not_in:
            raise WrongUse(f'the fault "{self.name}" cannot be done in the {world} world: {self.not_in[world]}')


EACH = "; by default it happens to each until the fault ends: nothing gets through, and a device may be given up (times=1: to one)"
"""Of what is mended by doing it again, which is in vain if every try goes wrong (``probability=0.1``, ``times=1`` say less)."""


@dataclass(frozen=True)
class Fault:
    """One fault of a plan: `kind` and its `settings`, what it is `on`, how often (`controls`), and whose pages it concerns.

    It begins `after_s` emulated seconds after it was added and ends `lasts_s` later (0: when it is removed). Made by `catalogue.fault`,
    which checks all of it.
    """

    kind: Kind
    on: str
    controls: Controls = field(default_factory=Controls)
    settings: Mapping[str, Any] = field(default_factory=dict)
    process: int = 0
    start: int = 0
    end: int = 0
    after_s: float = 0.0
    lasts_s: float = 0.0

    @property
    def at_once(self) -> bool:
        """It happens as it is added, and never again."""
        return self.kind.once or self.settings.get("point") == ""

    @property
    def endless(self) -> bool:
        """Whether it goes on, and happens to each, until somebody removes it: it neither ends by itself nor happens now and then."""
        return not (self.at_once or self.lasts_s) and self.controls == Controls()

    @cached_property
    def effects(self) -> Sequence[Effect]:
        """What it comes down to."""
        return self.kind.makes(self)

    @property
    def needs_running(self) -> str:
        """Devices, by pattern, one of which has to run as it begins; empty when it needs none."""
        for effect in self.effects:
            if isinstance(effect, NodeEffect) and effect.node != HOST and effect.deed not in STARTING:
                return effect.node
            if isinstance(effect, DeviceEffect) and self.kind.once:
                return effect.device
        return ""

    def not_narrowed_by(self, name: Narrowing) -> str:
        """Why `name` (what it is on, a process, addresses, an event) means nothing to it; empty when it does."""
        if self.kind.nowhere:
            return "it can be done in no world"
        if name == "device" and self.kind.on == "nothing":
            return "there is one host"
        return next((why_not_narrowed(one) for one in self.effects if name not in narrowed_by(one)), "")

    def __str__(self) -> str:
        given = [f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in self.settings.items() if value]
        return " ".join([self.kind.name, self.on, *given])
