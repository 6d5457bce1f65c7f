"""What can be chosen by name and may be anybody's: device models, kernels, policies.

Three sources, asked in this order: what this process registered (`register`, `offered`), what comes with hmmnet, and what installed
packages offer through entry points. Registering serves programs and tests whose machine lives in one process (`hmmnet.simulate`); device
processes start afresh and know entry points only.

Reading the installed packages' metadata costs tens of milliseconds and a few megabytes, so it happens only for names that are not built in,
and once for each `sys.path`: what is installed while a process runs is there for the next one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

MODELS = "hmmnet.devices"
KERNELS = "hmmnet.kernels"
POLICIES = "hmmnet.policies"
"""Entry point groups."""

_NOTHING: Mapping[str, str] = MappingProxyType({})
_registered: dict[tuple[str, str], Any] = {}


def register(group: str, name: str, thing: Any) -> None:
    """From now on `name` is `thing` in this process, whatever else is called that."""
    _registered[group, name] = thing


@contextmanager
def offered(group: str, name: str, thing: Any) -> Iterator[None]:
    """`name` is `thing` in this process while the block runs."""
    before = _registered.get((group, name))
    _registered[group, name] = thing
    try:
        yield
    finally:
        if before is None:
            del _registered[group, name]
        else:
            _registered[group, name] = before


def load(group: str, name: str, built_in: Mapping[str, str] = _NOTHING) -> Any:
    """The object called `name`: registered, ``module:attribute`` of `built_in`, or an entry point of `group`; None when there is none."""
    if (group, name) in _registered:
        return _registered[group, name]
    place = built_in.get(name)
    if place is not None:
        module, _, attribute = place.partition(":")
        return getattr(import_module(module), attribute)  # which waits for another thread that imports it just now
    for entry in _installed(group, tuple(sys.path)):
        if entry.name == name:
            return entry.load()
    return None


def names(group: str, built_in: Mapping[str, str] = _NOTHING) -> list[str]:
    """Every name that `load` finds, sorted."""
    registered = (name for kind, name in _registered if kind == group)
    return sorted({*built_in, *registered, *(entry.name for entry in _installed(group, tuple(sys.path)))})


def absent(what: str, name: str) -> str:
    """What is said of a name that `load` does not find, by devices too; `what` is ``kernel`` or ``placement``."""
    return f'no {what} is called "{name}"'


def only_here(group: str, name: str) -> str:
    """The mend where a device has not found `name`, if it is that of something that this process registered; otherwise nothing."""
    if (group, name) not in _registered:
        return ""
    return f'it is registered in this process, and the device is another one: offer it through the entry point group "{group}"'


@cache
def _installed(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:  # noqa: ARG001 - `path` is where they are found
    """What the packages of this `sys.path` offer."""
    from importlib.metadata import entry_points

    return tuple(entry_points(group=group))
