"""Who interrupts a run, and who does not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from hmmnet.sim.interrupts import interrupt
from hmmnet.sim.run import run_virtual
from hmmnet.sim.worlds import WORLDS, WorldName, run_in


@pytest.fixture
def ignored() -> Iterator[None]:
    """The program ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


async def signalled() -> object:
    """SIGINT strikes this process; who handles it."""
    handler = signal.getsignal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    for _ in range(3):
        await trio.sleep(0.001)
    return handler


@pytest.mark.usefixtures("ignored")
@pytest.mark.parametrize("world", WORLDS)
def test_what_the_program_ignores_stays_ignored(world: WorldName) -> None:
    """The run goes on, and has left the program's choice alone, for what it starts inherits that."""
    assert run_in(world, signalled) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("world", WORLDS)
def test_what_it_does_not_ignore_ends_the_run(world: WorldName) -> None:
    """As KeyboardInterrupt, when the run has ended; afterwards all is as it was."""
    before = signal.getsignal(signal.SIGINT)
    ended = []

    async def main() -> None:
        try:
            await signalled()
        finally:
            ended.append(trio.current_effective_deadline() == -float("inf"))

    with pytest.raises(KeyboardInterrupt):
        run_in(world, main)
    assert ended == [True], "it was cancelled, not struck down"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("ignored")
@pytest.mark.parametrize("world", WORLDS)
def test_a_run_can_be_interrupted_by_other_means(world: WorldName) -> None:
    """What SIGTERM is for the command line, where SIGINT is ignored."""
    assert not interrupt(), "there is no run yet"
    ended = []

    async def main() -> None:
        try:
            assert interrupt()
            await trio.sleep(1.0)
        finally:
            ended.append(trio.current_effective_deadline() == -float("inf"))

    with pytest.raises(KeyboardInterrupt):
        run_in(world, main)
    assert ended == [True]
    assert not interrupt(), "it is over"


def test_a_handler_of_the_program_is_its_own() -> None:
    """It is called, and the run goes on."""
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        assert run_virtual(signalled) is signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]


def test_a_command_in_the_background_hears_no_ctrl_c(tmp_path: Path) -> None:
    """A shell starts those with SIGINT ignored, and Ctrl-C at the terminal is for what runs in front; SIGTERM ends them in order."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "hmmnet", "campaign", "--seeds", "0:100000"]
    with (
        out.open("wb") as file,
        subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # noqa: PLW1509 - what a shell does
        ) as process,
    ):
        try:
            deadline_s = time.monotonic() + 30
            while b" of 100000 seeds" not in out.read_bytes() and time.monotonic() < deadline_s:
                time.sleep(0.05)
            for _ in range(10):
                process.send_signal(signal.SIGINT)
                time.sleep(0.05)
            assert process.poll() is None
            process.terminate()
            assert process.wait(20) == 143
        finally:
            process.kill()
    assert "Traceback" not in out.read_text()
