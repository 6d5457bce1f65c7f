"""The devices' processes together: who is called when they have ended."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from hmmnet.errors import HmmnetError, KernelError
from hmmnet.launcher.crew import Crew
from hmmnet.launcher.directory import Directory
from hmmnet.launcher.zygote import Exited, ZygoteClient
from hmmnet.topology.load import load


class Zygote:
    """A zygote whose devices have ended."""

    process = SimpleNamespace(pid=1)

    async def end(self, grace_s: float) -> None:
        """They have."""

    async def start(self, name: str, settings: object) -> None:
        """Another process."""


def crew_of(tmp_path: Path, *calls: Callable[[], None]) -> Crew:
    crew = Crew(
        load("two-gpus"),
        cast(Directory, SimpleNamespace(secret_file=tmp_path, logs=tmp_path)),
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


@pytest.mark.parametrize("first", ["the host", "the zygote"])
async def test_who_is_unplugged_is_not_lost(tmp_path: Path, first: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever tells first, that its process has ended or why; nobody is alarmed when it was known before. It can be started again."""
    crew = crew_of(tmp_path)
    record = crew.records["gpu0"]
    record.state, record.pid = "ready", 7
    caplog.set_level("INFO", "hmmnet.launcher")
    steps: list[Callable[[], None]] = [lambda: crew.unplugged("gpu0"), lambda: crew._hear(Exited("gpu0", 7, 0, "ended well"))]
    for step in steps if first == "the host" else reversed(steps):
        step()
    assert (record.state, record.how, crew.has_ended("gpu0")) == ("unplugged", "", True)
    assert [(one.levelname, one.message) for one in caplog.records] == [
        ("INFO", "device gpu0 was unplugged, and ended well") if first == "the host" else ("ERROR", "device gpu0 is gone: ended well")
    ]
    assert await crew.wait_ended("gpu0") == "was unplugged"
    with pytest.raises(KernelError, match="ESRCH"):
        crew.signal("gpu0", signal.SIGTERM)
    await crew.restart("gpu0")
    assert record.state == "starting"
    crew._hear(Exited("gpu0", 8, -9, "killed by SIGKILL"))
    assert (record.state, record.how) == ("lost", "killed by SIGKILL")


async def test_a_host_loses_who_is_ready_and_was_not_unplugged(tmp_path: Path) -> None:
    """The loss of a former life, told late, is none of the next one; a device that was taken out in order is not lost."""
    crew = crew_of(tmp_path)
    record = crew.records["gpu0"]
    crew.lost("gpu0", "gpu0 was silent")
    assert record.state == "starting"
    crew.ready("gpu0")
    crew.lost("gpu0", "gpu0 was silent")
    assert (record.state, record.how, crew.has_ended("gpu0")) == ("lost", "gpu0 was silent", False)
    with pytest.raises(KernelError, match="EBUSY"):
        await crew.restart("gpu0")
    other = crew.records["gpu1"]
    crew.ready("gpu1")
    crew.unplugged("gpu1")
    crew.lost("gpu1", "it was unplugged")
    assert other.state == "ready"


async def test_who_has_ended_and_is_not_heard_of_yet_does_not_run(tmp_path: Path) -> None:
    """Between a process's end and its zygote's word for it a signal finds nobody."""
    crew = crew_of(tmp_path)
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    record = crew.records["gpu0"]
    record.state, record.pid = "ready", ended.pid
    with pytest.raises(KernelError, match=r"ESRCH.*it has just ended"):
        crew.signal("gpu0", signal.SIGCONT)
