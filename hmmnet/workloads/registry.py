"""Workloads by name, through the entry points of every installed package."""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable
from importlib.metadata import entry_points
from typing import Any, TypeAlias

from hmmnet.errors import WrongUse

GROUP = "hmmnet.workloads"

Report: TypeAlias = dict[str, Any]
Workload: TypeAlias = Callable[..., Awaitable[Report]]


class UnknownWorkload(WrongUse):
    """No installed package has a workload of this name."""


def workload_names() -> tuple[str, ...]:
    """Every workload that can be run, sorted."""
    return tuple(sorted(entry_points(group=GROUP).names))


def load_workload(name: str) -> Workload:
    """The workload called `name`. Raises UnknownWorkload."""
    found = entry_points(group=GROUP, name=name)
    for entry in found:
        workload: Workload = entry.load()
        return workload
    names = workload_names()
    close = difflib.get_close_matches(name, names, n=1)
    hint = f'; did you mean "{close[0]}"? There' if close else "; there"
    raise UnknownWorkload(f'there is no workload "{name}"{hint} are {", ".join(names)}; FILE.py:FUNCTION is one of your own')
