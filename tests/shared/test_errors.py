"""Errors as they cross to another process."""

from __future__ import annotations

import pickle

import pytest

from hmmnet.errors import Mistakes, PlanError, TopologyError
from hmmnet.topology.problems import Problem


@pytest.mark.parametrize("kind", [PlanError, TopologyError])
def test_mistakes_stay_what_they_are(kind: type[Mistakes]) -> None:
    """In a test run that is spread over processes, for one: each with its file, line and mend."""
    problems = [Problem("my.toml", 3, "fault 1", "on", "no such device", "there is gpu0"), "no route from gpu0 to gpu1"]
    again = pickle.loads(pickle.dumps(kind(problems)))
    assert type(again) is kind
    assert again.problems == problems
    assert str(again) == "my.toml:3: fault 1: on: no such device; there is gpu0\nno route from gpu0 to gpu1"
