"""What ``help()`` tells of a process: what each call does, its units, what it raises, and what it is in the kernel."""

from __future__ import annotations

import inspect

import pytest

from hmmnet import program
from hmmnet.host.process import Process

CALLS = [name for name in vars(program.Process) if not name.startswith("_") and inspect.isfunction(vars(program.Process)[name])]
RAISES_NOTHING = frozenset({"smaps", "clear_refs", "oom_score", "kill", "exit"})


@pytest.mark.parametrize("name", CALLS)
def test_each_call_tells_what_the_interface_does_and_its_source(name: str) -> None:
    """Of a call that raises nothing of its own nothing is promised."""
    told = inspect.getdoc(getattr(Process, name)) or ""
    interface = inspect.getdoc(getattr(program.Process, name)) or ""
    assert told.startswith(interface)
    assert "Raises " in told or name in RAISES_NOTHING
    assert "Source: " in told or name == "launch"
