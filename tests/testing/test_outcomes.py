"""Expected outcomes: each passes when it is so, and fails saying what is otherwise."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

import hmmnet
from hmmnet.errors import HmmnetError
from hmmnet.program import Process
from hmmnet.sim import SimulatedMachine
from hmmnet.testing import outcomes
from tests.campaign.mutations import MUTATIONS

from .suites import run, write

PAGE = 4096
PAGES = 4
TEXT = b"kept" * (PAGES * PAGE // 4)
Main = Callable[[SimulatedMachine, Process, int], Awaitable[None]]


def play(main: Main) -> None:
    """`main(machine, process, address)` with four pages that hold `TEXT`."""

    async def world(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(PAGES * PAGE)
        await process.write(address, TEXT)
        await main(machine, process, address)

    hmmnet.simulate(world)


def test_preserved() -> None:
    """A copy whose bytes are damaged on the way is sent again: data are what they were, read before or given."""

    async def main(machine: SimulatedMachine, process: Process, address: int) -> None:
        machine.add_fault("copy.corrupt", on="gpu0", nth=1)
        async with outcomes.preserved(process, address, PAGES * PAGE):
            await process.migrate(address, PAGES * PAGE, "gpu0")
        async with outcomes.preserved(process, address, PAGES * PAGE, TEXT):
            await process.migrate(address, PAGES * PAGE, "gpu1")

    play(main)


def test_not_preserved() -> None:
    """The first byte that is another is named, with its page; and the page that is gone."""

    async def main(machine: SimulatedMachine, process: Process, address: int) -> None:
        at = address + 2 * PAGE + 7
        with pytest.raises(AssertionError, match=rf"0x{at:x} \(page 0x{at >> 12:x}\) holds 0x58 where 0x74 was; 1 byte of"):
            async with outcomes.preserved(process, address, PAGES * PAGE):
                await process.write(at, b"X")
        await process.migrate(address, PAGE, "gpu0")
        with pytest.raises(AssertionError, match=rf'is not preserved: SIGBUS at 0x{address:x}.*"gpu0"'):
            async with outcomes.preserved(process, address, PAGE, TEXT[:PAGE]):
                await machine.kill_device("gpu0")
        with pytest.raises(ValueError, match="of its own"):  # what the block raises is what the test sees
            async with outcomes.preserved(process, address + PAGE, PAGE):
                raise ValueError("an error of its own")
        with pytest.raises(HmmnetError, match="0 bytes are to be preserved"):
            outcomes.preserved(process, address, 0)
        with pytest.raises(HmmnetError, match="8 bytes are to be preserved, and data has 1"):
            outcomes.preserved(process, address, 8, b"x")

    play(main)


def test_lost() -> None:
    """What died with its device is lost; another range is not, and a page that is lost besides is named."""

    async def main(machine: SimulatedMachine, process: Process, address: int) -> None:
        with pytest.raises(AssertionError, match=rf"page 0x{address >> 12:x} .* is not lost: it can be read"):
            await outcomes.lost(process, address, PAGE, "gpu0")
        await process.migrate(address, 2 * PAGE, "gpu0")
        await machine.kill_device("gpu0")
        await outcomes.lost(process, address, 2 * PAGE, "gpu0")
        with pytest.raises(AssertionError, match=rf"page 0x{address >> 12:x} is lost, and what says so does not name it and gpu1: SIGBUS"):
            await outcomes.lost(process, address, 2 * PAGE, "gpu1")
        with pytest.raises(AssertionError, match=rf"page 0x{(address >> 12) + 1:x} is lost, too: SIGBUS"):
            await outcomes.lost(process, address, PAGE, "gpu0")
        machine.add_fault("ecc.uncorrectable", process=process.pid, range=f"0x{address + 3 * PAGE:x}+{PAGE}")
        await trio.sleep(0.01)
        with pytest.raises(AssertionError, match=rf"\Apage 0x{(address >> 12) + 3:x} is lost, too: SIGBUS"):
            await outcomes.lost(process, address, 2 * PAGE, "gpu0")
        await process.munmap(address, 2 * PAGE)
        await outcomes.lost(process, address + 3 * PAGE, PAGE)
        with pytest.raises(AssertionError, match=r"is not lost with a SIGBUS: SIGSEGV"):
            await outcomes.lost(process, address, 2 * PAGE)
        with pytest.raises(HmmnetError, match="give their length"):
            await outcomes.lost(process, address, 0)
        await process.kill()
        with pytest.raises(
            AssertionError, match=r"is not lost with a SIGBUS: read: ESRCH(.|\n)*what else the process has cannot be seen: smaps: ESRCH"
        ):
            await outcomes.lost(process, address, PAGE)

    play(main)


def test_killed() -> None:
    """A process that lives is not."""

    async def main(machine: SimulatedMachine, process: Process, address: int) -> None:
        with pytest.raises(AssertionError, match=rf"process {process.pid} lives \(after 0.1 s\)"):
            await outcomes.killed(process, limit_s=0.1)
        machine.add_fault("process.kill", process=process.pid, after="1 s")
        await outcomes.killed(process)

    play(main)


def test_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a process is there and afterwards; not when a device's frame is left over, nor when a translation has outlived its page."""

    async def main(machine: SimulatedMachine, process: Process, address: int) -> None:
        await process.migrate(address, PAGES * PAGE, "gpu0")
        await outcomes.sound(machine)
        await process.exit()
        await outcomes.sound(machine)
        machine.device("gpu0").memory.grant(1)
        with pytest.raises(AssertionError, match=r"gpu0: 1 frames of its memory are left over \(after 1 s\)"):
            await outcomes.sound(machine, limit_s=1.0)

    play(main)

    async def stale(machine: SimulatedMachine, process: Process, address: int) -> None:
        await process.launch("reduction", "gpu0", "remote", a=address, n=8, dtype="<u8")
        await process.munmap(address, PAGE)
        with pytest.raises(AssertionError, match="I1"):
            await outcomes.sound(machine, limit_s=1.0)

    MUTATIONS["unmap_is_not_told"](monkeypatch)
    play(stale)


def test_usable() -> None:
    """A device that comes back is; one that stays away, or does not answer, is not."""

    async def main(machine: SimulatedMachine, process: Process, address: int) -> None:
        del process, address
        machine.add_fault("bounce", on="gpu0", down="2 s")
        await outcomes.usable(machine, "gpu0")
        await machine.kill_device("gpu1")
        with pytest.raises(AssertionError, match=r"gpu1 is not usable: .*gpu1.* \(after 1 s\)"):
            await outcomes.usable(machine, "gpu1", limit_s=1.0)
        assert (await machine.report())["processes"] == 1

    play(main)


def test_a_device_that_computes_what_is_wrong_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first word that is another is named."""

    async def main(machine: SimulatedMachine, process: Process, address: int) -> None:
        del process, address
        with pytest.raises(AssertionError, match=r"gpu0 is not usable: it stored \d+ at 0x[0-9a-f]+ where \d+ is the sum"):
            await outcomes.usable(machine, "gpu0", limit_s=0.1)

    MUTATIONS["copies_home_are_zero"](monkeypatch)  # single pages
    monkeypatch.setattr(outcomes, "WORDS", outcomes.WORDS[: PAGE // 8])
    play(main)


def test_within() -> None:
    """What takes longer is given up; what is over in time is not touched, and its errors come through."""

    async def main(machine: SimulatedMachine, process: Process, address: int) -> None:
        async with outcomes.within(machine, 1.0):
            await process.migrate(address, PAGES * PAGE, "gpu0")
        with pytest.raises(AssertionError, match=r"not within 1 s: given up after 1 s \(emulated\)"):
            async with outcomes.within(machine, 1.0):
                await trio.sleep_forever()
        with pytest.raises(ZeroDivisionError):
            async with outcomes.within(machine, 1.0):
                raise ZeroDivisionError

    play(main)


@pytest.mark.parametrize("fixture", ["simulated_machine", "machine"])
def test_in_tests_of_users(pytester: pytest.Pytester, fixture: str) -> None:
    """Of both worlds, awaited and blocking; a failing one shows its line, and not how it was found."""
    path = write(
        pytester,
        f"""
        import pytest
        from hmmnet.testing import outcomes

        LENGTH = 4 * 4096

        async def test_awaited({fixture}):
            machine = {fixture}
            process = await machine.process()
            address = await process.malloc(LENGTH)
            async with outcomes.within(machine, 50.0), outcomes.preserved(process, address, LENGTH):
                await process.migrate(address, LENGTH, "gpu0")
            await process.write(address, b"x" * LENGTH)
            await process.migrate(address, LENGTH, "gpu0")
            await machine.kill_device("gpu0")
            await outcomes.lost(process, address, LENGTH, "gpu0")
            await machine.start_device("gpu0")
            await outcomes.usable(machine, "gpu0")
            await process.kill()
            await outcomes.killed(process)
            await outcomes.sound(machine)

        @pytest.mark.parametrize("right", [True, False])
        def test_blocking({fixture}, right):
            machine = {fixture}
            process = machine.process()
            address = process.malloc(LENGTH)
            with outcomes.within(machine, 50.0), outcomes.preserved(process, address, LENGTH):
                process.migrate(address, LENGTH, "gpu0")
            process.write(address, b"x" * LENGTH)
            process.migrate(address, LENGTH, "gpu0")
            machine.kill_device("gpu0")
            outcomes.lost(process, address, LENGTH if right else LENGTH // 2, "gpu0")
            outcomes.usable(machine, "gpu1")
            process.kill()
            outcomes.killed(process)
            outcomes.sound(machine)
        """,
    )
    found = run(pytester, str(path), beside=())
    found.assert_outcomes(passed=2, failed=1)
    found.stdout.fnmatch_lines(["E * AssertionError: page 0x* is lost, too: SIGBUS at *"])
    found.stdout.no_fnmatch_line("*outcomes.py*")
