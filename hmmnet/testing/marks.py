"""Markers, read and checked: what a test asks of its machine.

Imports nothing heavy: hmmnet's own rooms are loaded when a marker needs them. A mistake is a `MarkMistake` of one line that names the
marker and the mend.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hmmnet.faults import Plan
    from hmmnet.topology.model import Topology

SEEDS_MAX = 100_000
"""Seeds of one test: each is a test of its own, which pytest keeps in memory; a campaign takes more."""

MARKERS = {
    "topology": "topology(machine): the machine of this test: a preset's name, a TOML file (as seen from the test's folder), or a Topology",
    "faults": "faults(*plans, **kinds): what goes wrong: plan files, Plans, dictionaries ([[fault]] of a plan), or kind=probability, "
    "kind={...}; several markers add up",
    "seeds": "seeds(n): run the test with seeds 0 to n-1, each a test of its own; also a range or a list of seeds",
    "strict_migrations": "strict_migrations(on=True): an unexpected migration fails the test; see the fixture migrations",
}
"""The markers of the plugin and what pytest says about each."""


class MarkMistake(Exception):
    """A marker that cannot be used, and why."""


@dataclass(frozen=True)
class Mark:
    """A marker's arguments; of pytest's `Mark`."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def read_seeds(mark: Mark) -> list[int]:
    """The seeds of ``seeds(...)``. Raises MarkMistake."""
    what = f"seeds({_shown(mark)})"
    if len(mark.args) != 1 or mark.kwargs:
        raise MarkMistake(f"{what}: one number, range or list of seeds is wanted, such as seeds(20)")
    (given,) = mark.args
    if _whole(given):
        given = range(given)
    if not isinstance(given, range | list | tuple | set | frozenset):
        raise MarkMistake(f"{what}: a whole number, a range or a list of seeds is wanted, such as seeds(20)")
    seeds = sorted(given) if isinstance(given, set | frozenset) else given
    if not 0 < len(seeds) <= SEEDS_MAX:
        raise MarkMistake(f"{what}: that are {len(seeds)} seeds; at least one and at most {SEEDS_MAX} can be had")
    for seed in seeds:
        if not _whole(seed) or seed < 0:
            raise MarkMistake(f"{what}: {seed!r} is no seed: seeds are whole numbers from 0 on")
    if len(set(seeds)) < len(seeds):
        raise MarkMistake(f"{what}: a seed is named twice")
    return list(seeds)


def read_topology(mark: Mark, folder: Path) -> Topology:
    """The machine of ``topology(...)``; files are looked for in `folder` first. Raises MarkMistake."""
    from hmmnet.topology.model import Topology

    what = f"topology({_shown(mark)})"
    if len(mark.args) != 1 or mark.kwargs:
        raise MarkMistake(f'{what}: one machine is wanted, such as topology("nvlink-8")')
    (given,) = mark.args
    if isinstance(given, Topology):
        return given
    if not isinstance(given, str | Path):
        raise MarkMistake(f"{what}: a preset's name, a TOML file or a Topology is wanted")
    return load_topology(given, folder, what)


def load_topology(given: str | Path, folder: Path, what: str) -> Topology:
    """The machine that a preset or file describes; `what` is what messages call it. Raises MarkMistake."""
    from hmmnet.errors import TopologyError
    from hmmnet.topology.files import is_file
    from hmmnet.topology.load import load

    beside = folder / given
    named_as_file = isinstance(given, Path) or "/" in given or given.endswith(".toml")
    try:
        return load(beside if named_as_file and is_file(beside) else given, _models())
    except TopologyError as error:
        raise MarkMistake(f"{what}: {error}") from None


@lru_cache(maxsize=1)
def _models() -> frozenset[str] | None:
    from hmmnet.topology.load import installed_models

    return installed_models() or None


def read_faults(marks: Iterable[Mark], folder: Path) -> Plan:
    """All ``faults(...)`` of a test together (`hmmnet.faults.forms`). Raises MarkMistake."""
    from hmmnet.errors import HmmnetError
    from hmmnet.faults import Plan, as_plan

    parts: list[Plan] = []
    places = []
    for mark in marks:
        what = f"faults({_shown(mark)})"
        places.append(what)
        if not mark.args and not mark.kwargs:
            raise MarkMistake(f"{what}: says nothing; a plan or kinds are wanted, such as faults(loss=0.05)")
        try:
            parts += [as_plan(given, what, folder) for given in (*mark.args, dict(mark.kwargs))]
        except HmmnetError as error:
            text = str(error)
            raise MarkMistake(text if text.startswith(what) else f"{what}: {text}") from None
    return Plan.joined(parts, " + ".join(places))


def read_strict(mark: Mark) -> bool:
    """Whether ``strict_migrations(...)`` switches strict mode on. Raises MarkMistake."""
    given = mark.args[0] if len(mark.args) == 1 else mark.kwargs.get("on", True)
    if len(mark.args) > 1 or set(mark.kwargs) - {"on"} or (mark.args and mark.kwargs) or not isinstance(given, bool):
        raise MarkMistake(f"strict_migrations({_shown(mark)}): True or False is wanted, or nothing")
    return given


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(mark: Mark) -> str:
    named = [f"{name}={value!r}" for name, value in mark.kwargs.items()]
    text = ", ".join([*map(repr, mark.args), *named])
    return text if len(text) < 80 else text[:77] + "..."
