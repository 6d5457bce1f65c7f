"""What is demanded after everything is healed: a failure that was injected before excuses nothing then, and no bug ends a campaign."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest

from hmmnet.campaign import trial
from hmmnet.campaign.campaign import run_campaign, try_seed
from hmmnet.campaign.nemesis import Nemesis
from hmmnet.campaign.program import Harm, Hit, Program
from hmmnet.campaign.scenarios import SCENARIOS
from hmmnet.campaign.trial import run_program
from hmmnet.cli import main
from hmmnet.errors import BusError, KernelError, SegmentationFault, SignalError
from hmmnet.host.process import Process
from hmmnet.pages import PAGE_SIZE

FAILED = msgspec.structs.replace(SCENARIOS["tour"], hits=(Hit("migrate.before_copy", "fail", nth=1),))
HARMED = msgspec.structs.replace(FAILED, harms=(Harm(20, "death", 0, 0.001),))
UNREADABLE: dict[str, Callable[[int], Exception]] = {
    "EFAULT": lambda _: KernelError(errno.EFAULT, "read", "broken"),
    "SIGSEGV": lambda address: SegmentationFault(address, "read"),
    "SIGBUS": lambda address: BusError(address, "read"),
}


def broken_once_healed(patch: pytest.MonkeyPatch, name: str, replacement: Any, where: type = Process) -> None:
    """One method is `replacement` from the moment when all faults have ended."""
    heal = Nemesis.heal

    async def heal_and_break(nemesis: Nemesis) -> None:
        await heal(nemesis)
        patch.setattr(where, name, replacement)

    patch.setattr(Nemesis, "heal", heal_and_break)


def raising(error: Callable[[int], Exception]) -> Callable[..., Coroutine[Any, Any, bytes]]:
    """A `Process.read` that only raises."""

    async def read(_: Process, address: int, __: int) -> bytes:
        raise error(address)

    return read


@pytest.mark.parametrize("program", [FAILED, HARMED], ids=["failed", "failed and harmed"])
@pytest.mark.parametrize("error", UNREADABLE)
def test_a_failure_excuses_nothing_once_all_is_healed(monkeypatch: pytest.MonkeyPatch, program: Program, error: str) -> None:
    """No page can be read at the end: that is said, whatever was injected before, and although memory is limited."""
    assert run_program(program).violations == []
    broken_once_healed(monkeypatch, "read", raising(UNREADABLE[error]))
    assert len(run_program(program).violations) > 2


@pytest.mark.parametrize(
    ("program", "error"), [(FAILED, SegmentationFault), (FAILED, BusError), (HARMED, SegmentationFault), (HARMED, BusError)]
)
def test_a_device_that_serves_no_more_is_found(monkeypatch: pytest.MonkeyPatch, program: Program, error: type[SignalError]) -> None:
    """Its jobs end with a signal at an address that is in no region of the program: each device is named."""

    async def launch(*_: Any, **__: Any) -> Any:
        raise error(0x1000, "broken")

    broken_once_healed(monkeypatch, "launch", launch)
    found = run_program(program).violations
    assert {one.checker for one in found} == {"service"}
    assert all(any(device in one.what for one in found) for device in ("dev0", "dev1"))


@pytest.mark.parametrize("argument", ["a", "b", "out"])
def test_a_device_that_misses_what_others_have_stored_is_found(monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
    """Once all is healed one device loads other words than the CPU or another device has stored, or stores elsewhere: that is seen."""
    launch = Process.launch

    async def astray(process: Process, kernel: str, device: str, *more: Any, **arguments: Any) -> Any:
        if device == "dev1":
            arguments[argument] += PAGE_SIZE // 2
        return await launch(process, kernel, device, *more, **arguments)

    broken_once_healed(monkeypatch, "launch", astray)
    found = run_program(FAILED).violations
    assert found
    assert {one.checker for one in found} == {"history"}


async def hold_and_leave(process: Process, leave: Callable[[Process], Coroutine[Any, Any, None]] = Process.exit) -> None:
    """A process ends and somebody keeps one of its pages."""
    await process.get_user_pages(await process.mmap(PAGE_SIZE), 1, write=True)
    await leave(process)


async def stay(_: Process) -> None:
    """A process that does not end."""


@pytest.mark.parametrize(
    ("ends", "told"), [(hold_and_leave, "node0: 1 frames are left over"), (stay, "process 1000 is left over")], ids=["frame", "process"]
)
def test_what_the_host_does_not_get_back_is_a_leak(monkeypatch: pytest.MonkeyPatch, ends: Any, told: str) -> None:
    """Of the host's own memory, too; devices have nothing to do with it."""
    broken_once_healed(monkeypatch, "exit", ends)
    found = [one.what for one in run_program(HARMED).violations if one.checker == "leaks"]
    assert [what for what in found if what.endswith(told)] != []


def test_who_is_short_of_memory_may_be_refused_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM at the end is an answer in a program with a limit, and a violation in one without."""
    broken_once_healed(monkeypatch, "read", raising(lambda _: KernelError(errno.ENOMEM, "read", "broken")))
    assert run_program(FAILED).violations == []
    monkeypatch.undo()
    broken_once_healed(monkeypatch, "read", raising(lambda _: KernelError(errno.ENOMEM, "read", "broken")))
    assert "ENOMEM" in run_program(msgspec.structs.replace(FAILED, limit_pages=0)).violations[0].what


# --- bugs that raise ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["read", "exit"])
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method of every process, called by actors or at the end, raises a KeyError."""

    async def forgetful(*_: Any) -> Any:
        known: dict[str, int] = {}
        return known["forgotten"]

    monkeypatch.setattr(Process, request.param, forgetful)


@pytest.mark.usefixtures("planted")
def test_an_exception_is_a_violation() -> None:
    """A bug of ours is told with type, text and place, and the next seed is run."""
    for one in try_seed(0, "none", 20).violations[:1]:
        assert one[0] == "crash"
        assert "KeyError: 'forgotten' (test_last_check.py:" in one[1]
    summary = run_campaign(range(2), "none", 20)
    assert [(one["seed"], one["checker"]) for one in summary.violations] == [(0, "crash"), (1, "crash")]


def test_an_exception_outside_of_any_task_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no group of exceptions counts just as well."""
    monkeypatch.setattr(trial, "topology_of", {}.__getitem__)
    assert [one.checker for one in run_program(FAILED).violations] == ["crash"]


@pytest.mark.usefixtures("planted")
def test_the_command_reports_it(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON and exit code 1, as for any violation."""
    with pytest.raises(SystemExit) as ended:
        main(["campaign", "--seeds", "0:2", "--faults", "none", "--operations", "20", "--json"])
    assert ended.value.code == 1
    report = json.loads(capsys.readouterr().out)
    assert report["seeds"] == 2
    assert {one["checker"] for one in report["violations"]} == {"crash"}
