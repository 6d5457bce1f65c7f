"""Markers that tell of a machine, on tests that have none: a fixture misspelt, mostly, and nothing of what the marker says is tested.

Sure at collection, where no fixture has a request: there it is an error. A test with one can have a machine in ways that nobody sees (a
fixture of its own that reads the marker, a factory that is not called this time): there it is an `IdleMarkerWarning`, when it has passed.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection

import pytest

MACHINES = ("simulated_machine", "simulate", "machine")
"""Fixtures that give a test what markers tell of."""
OF_MACHINES = ("topology", "faults", "strict_migrations")
"""Markers that tell of a machine."""
CONTRACTS = frozenset({"hmmnet.testing.device_contract", "hmmnet.testing.policy_contract"})
"""Modules of tests to inherit."""


class IdleMarkerWarning(pytest.PytestWarning):
    """A test has passed, and no fixture of hmmnet's has used its marker."""

    __module__ = "hmmnet.testing"


def idle_at_collection(item: pytest.Function, given: Collection[str]) -> str:
    """What to say of a marker that is surely for nothing in a test with the fixtures `given`; nothing if there is none.

    Nor of a test that is marked to be skipped.
    """
    if item.get_closest_marker("skip") is not None:
        return ""
    own = "" if "request" in given else idle_marker(item, given)  # by which it may get a machine
    return own or _idle_on_contract(item, given)


def idle_marker(item: pytest.Item, given: Collection[str]) -> str:
    """What to say of a marker of the test's own that none of the fixtures it is `given` has a use for; nothing if there is none."""
    for name in OF_MACHINES:
        users = _users(name)
        if any(mark.name == name for mark in item.own_markers) and not any(user in given for user in users):
            return f"{name}(...) on a test without a machine: ask for {', '.join(users[:-1])} or {users[-1]}"
    return ""


def _users(marker: str) -> tuple[str, ...]:
    """Fixtures that have a use for it."""
    return MACHINES if marker != "strict_migrations" else (*MACHINES, "migrations")


def _idle_on_contract(item: pytest.Function, given: Collection[str]) -> str:
    """What to say of a marker of the class of a contract's test, where all tests of the class are the contract's; nothing if there is none.

    A contract plays its checks on machines of its own; a fixture of the class, used by each of them, may have another.
    """
    owner = item.getparent(pytest.Class)
    if owner is None or item.function.__module__ not in CONTRACTS:
        return ""
    if any(name.startswith("test") and getattr(thing, "__module__", "") not in CONTRACTS for name, thing in inspect.getmembers(item.cls)):
        return ""  # a test of the user's own may be what it is for
    for mark in owner.own_markers:
        if mark.name in OF_MACHINES and not any(user in given for user in _users(mark.name)):
            return f"{mark.name}(...) on a contract, which has machines of its own: leave it out; seeds(...) is what a contract takes"
    return ""
