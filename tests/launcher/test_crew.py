"""The devices' processes together: who is called when they have ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from hmmnet.errors import HmmnetError
from hmmnet.launcher.crew import Crew
from hmmnet.launcher.directory import Directory
from hmmnet.launcher.zygote import ZygoteClient
from hmmnet.topology.load import load


class Zygote:
    """A zygote whose devices have ended."""

    process = SimpleNamespace(pid=1)

    async def end(self, grace_s: float) -> None:
        """They have."""


def crew_of(tmp_path: Path, *calls: Callable[[], None]) -> Crew:
    crew = Crew(
        load("two-gpus"),
        cast(Directory, tmp_path),
        cast(ZygoteClient, Zygote()),
        changed=lambda: None,
        lost=lambda name, how: None,
    )
    crew.when_ended += calls
    return crew


def failing(why: str) -> Callable[[], None]:
    def call() -> None:
        raise HmmnetError(why)

    return call


async def test_one_that_fails_keeps_nobody_from_being_called(tmp_path: Path) -> None:
    """The others are called, and its error is raised as it is."""
    called: list[str] = []
    crew = crew_of(tmp_path, lambda: called.append("first"), failing("no logs"), lambda: called.append("last"))
    with pytest.raises(HmmnetError, match=r"^no logs$"):
        await crew.end()
    assert called == ["first", "last"]


async def test_the_errors_of_several_are_raised_together(tmp_path: Path) -> None:
    """None is lost."""
    called: list[str] = []
    crew = crew_of(tmp_path, failing("one"), lambda: called.append("called"), failing("two"))
    with pytest.raises(ExceptionGroup) as raised:
        await crew.end()
    assert [str(error) for error in raised.value.exceptions] == ["one", "two"]
    assert called == ["called"]
