"""What a program may give where faults are wanted, and the plan that it means: one reading for `hmmnet.simulate`, `hmmnet.launch`,
`add_fault` of every machine and pytest's marker ``faults``.

`hmmnet.simulate(main, faults=...)` takes any of these::

    Plan.load("plan.toml")                          # a plan, made or read
    "plan.toml"                                     # the file of one
    fault("loss", probability=0.05)                 # a fault
    {"kind": "loss", "probability": 0.05}           # one as a [[fault]] of a plan says it
    {"loss": 0.05, "delay": {"latency": "5 ms"}}    # kinds, with their probabilities or parameters
    "loss"                                          # a kind, as it is by itself
    ["plan.toml", {"kind": "loss"}]                 # several of them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from hmmnet.errors import WrongUse
from hmmnet.topology.files import is_file as there_is_file

from .catalogue import KINDS, fault
from .injector import PointFault
from .kinds import Fault
from .messages import MessageFault
from .plan import AnyFault, Plan

Plannable: TypeAlias = Plan | AnyFault | Mapping[str, Any] | str | Path | Iterable[Any]
"""What `as_plan` reads."""
WANTED = "a plan file, a Plan, a fault, a dictionary, kinds, or a list of them are wanted, such as"


def as_plan(given: Plannable, place: str = "faults", folder: Path | None = None) -> Plan:
    """The plan that is meant. `place` is what messages call it; files are looked for in `folder` first.

    Raises PlanError with every mistake of a plan, HmmnetError for what is none.
    """
    if isinstance(given, Plan):
        return given
    if isinstance(given, Fault | MessageFault | PointFault):
        return Plan((given,), place)
    if isinstance(given, Mapping):
        return Plan.of([given] if "kind" in given else [_entry(kind, value, place) for kind, value in given.items()], place)
    if isinstance(given, str) and not is_file(given, folder):
        return Plan((fault(given),), place)
    if isinstance(given, str | Path):
        beside = Path(given) if folder is None else folder / given
        return Plan.load(beside if there_is_file(beside) else given)
    if isinstance(given, Iterable):
        return Plan.joined([as_plan(one, f"{place}[{index}]", folder) for index, one in enumerate(given)], place)
    raise WrongUse(f"{place}: {given!r} is no plan: {WANTED} {{'kind': 'loss', 'probability': 0.05}}")


def one_fault(given: Plannable, parameters: Mapping[str, Any]) -> AnyFault:
    """The one fault that is meant, for `add_fault`: a kind's name with its `parameters`, or all that `as_plan` reads, of which it is one.

    Raises HmmnetError with every mistake, and for a plan of none or several.
    """
    if isinstance(given, str) and (parameters or given in KINDS):
        return fault(given, **parameters)
    if parameters:
        raise WrongUse(f"{', '.join(parameters)}: a fault that is made already has its parameters; give them with a kind's name")
    if isinstance(given, Fault | MessageFault | PointFault):
        return given
    faults = as_plan(given, "add_fault").faults
    if len(faults) != 1:
        raise WrongUse(f"add_fault begins one fault, and that plan has {len(faults)}; call it for each of Plan.load(...).faults")
    return faults[0]


def is_file(given: str, folder: Path | None = None) -> bool:
    """Whether a text means a plan's file, and not a kind."""
    if given in KINDS:
        return False
    return given.endswith(".toml") or "/" in given or there_is_file(Path(given) if folder is None else folder / given)


def _entry(kind: str, value: Any, place: str) -> dict[str, Any]:
    """``loss=0.05`` or ``delay={"latency": "5 ms"}`` as a ``[[fault]]``. Raises HmmnetError."""
    if isinstance(value, Mapping):
        return {"kind": kind, **value}
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongUse(f'{place}: {kind} is {value!r}: a probability or a dictionary is wanted, such as {kind}=0.05 or {kind}={{"nth": 3}}')
    return {"kind": kind, "probability": float(value)}
