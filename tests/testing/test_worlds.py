"""Machines in tests of every kind: blocking, under trio, asyncio and anyio, with any of their plugins installed, in one file."""

from __future__ import annotations

from itertools import combinations

import pytest

from .suites import OTHERS, run, write

ALWAYS = '''
    """A user's tests."""

    import pytest

    pytestmark = pytest.mark.topology("two-gpus")


    def use(machine):
        process = machine.process()
        address = process.malloc(4096)
        process.store(address, 7)
        assert process.migrate(address, 4096, "gpu1") == 4096
        assert process.load(address) == 7
        assert machine.device_names == ("gpu0", "gpu1")


    async def use_under_trio(machine):
        process = await machine.create_process()
        address = await process.malloc(4096)
        await process.store(address, 7)
        assert await process.migrate(address, 4096, "gpu1") == 4096
        assert await process.load(address) == 7
        assert machine.device_names == ("gpu0", "gpu1")


    @pytest.fixture
    def process(simulated_machine):
        return simulated_machine.process()


    def test_real(machine):
        use(machine)


    def test_simulated(simulated_machine):
        use(simulated_machine)


    def test_a_fixture_on_it(process):
        assert process.malloc(8)


    def test_simulate(simulate):
        assert simulate(use_under_trio).virtual_s > 0


    async def test_real_that_nobody_runs(machine):
        await use_under_trio(machine)


    async def test_simulated_that_nobody_runs(simulated_machine):
        import trio
        began_s = trio.current_time()
        await use_under_trio(simulated_machine)
        await trio.sleep(1000)
        assert trio.current_time() - began_s > 1000
'''
PARTS = {
    "trio": """
    @pytest.fixture
    async def awaited_process(simulated_machine):
        made = await simulated_machine.create_process()
        yield made
        await made.exit()


    @pytest.mark.trio
    async def test_real_trio(machine):
        await use_under_trio(machine)


    @pytest.mark.trio
    async def test_simulated_trio(simulated_machine, awaited_process, nursery):
        import trio
        began_s = trio.current_time()
        nursery.start_soon(trio.sleep, 500)
        await use_under_trio(simulated_machine)
        assert await awaited_process.malloc(8)
        await trio.sleep(1000)
        assert trio.current_time() - began_s > 1000


    @pytest.mark.trio
    async def test_trio_alone():
        import trio
        await trio.sleep(0)
    """,
    "asyncio": """
    @pytest.mark.asyncio
    async def test_real_asyncio(machine):
        import asyncio
        use(machine)
        await asyncio.to_thread(use, machine)


    @pytest.mark.asyncio
    async def test_simulated_asyncio(simulated_machine, process):
        import asyncio
        use(simulated_machine)
        await asyncio.to_thread(use, simulated_machine)
        assert process.malloc(8)
    """,
    "anyio": """
    async def use_any(machine):
        import sniffio
        if sniffio.current_async_library() == "trio":
            await use_under_trio(machine)
        else:
            use(machine)


    @pytest.mark.anyio
    async def test_real_anyio(machine):
        await use_any(machine)


    @pytest.mark.anyio
    async def test_simulated_anyio(simulated_machine):
        await use_any(simulated_machine)


    @pytest.mark.anyio
    async def test_anyio_alone():
        import anyio
        await anyio.sleep(0)
    """,
}
PASSING = {"trio": 3, "asyncio": 2, "anyio": 6}
"""Tests of each part; anyio runs each under asyncio and under trio."""
INI = {"asyncio": "asyncio_mode = strict\nasyncio_default_fixture_loop_scope = function\n"}


@pytest.mark.parametrize(
    "beside", [some for count in range(4) for some in combinations(OTHERS, count)], ids=lambda some: "+".join(some) or "none"
)
def test_with_every_other_plugin(pytester: pytest.Pytester, beside: tuple[str, ...]) -> None:
    """The same tests pass whatever is installed beside: awaited under trio, blocking elsewhere."""
    write(pytester, ALWAYS + "".join(PARTS[name] for name in beside), ini="".join(INI.get(name, "") for name in beside))
    result = run(pytester, beside=beside)
    result.assert_outcomes(passed=6 + sum(PASSING[name] for name in beside))


def test_trio_mode(pytester: pytest.Pytester) -> None:
    """Where pytest-trio takes every asynchronous test, it takes those with a simulated machine too, in virtual time."""
    write(pytester, ALWAYS, ini="trio_mode = true\n")
    run(pytester).assert_outcomes(passed=6)


def test_anyio_runs_trio_only(pytester: pytest.Pytester) -> None:
    """A suite that has chosen its backend."""
    text = """
    import pytest


    @pytest.fixture
    def anyio_backend():
        return "trio", {"restrict_keyboard_interrupt_to_checkpoints": True}


    @pytest.fixture
    async def process(machine):
        made = await machine.create_process()
        yield made
        await made.exit()


    @pytest.mark.anyio
    async def test_it(process):
        assert await process.malloc(8)
    """
    write(pytester, text)
    run(pytester, beside=["anyio"]).assert_outcomes(passed=1)


def test_two_machines_are_one_too_many(pytester: pytest.Pytester) -> None:
    """One line that says so; a fixture that needs more than this plugin says what it needs; so does a clock in the way."""
    text = """
    import pytest

    def test_both(machine, simulated_machine):
        pass

    @pytest.fixture
    def process(machine):
        return machine.create_process()

    async def test_fixture(process):
        pass

    @pytest.mark.trio
    async def test_clock(simulated_machine, autojump_clock):
        pass

    @pytest.mark.faults({"kind": "restart.kept", "on": "gpu0"}, loss={"on": "gpu9"})
    def test_faults(machine):
        pass

    @pytest.mark.faults({"kind": "unplug", "on": "gpu0"})
    def test_elsewhere(machine):
        pass
    """
    write(pytester, text)
    result = run(pytester)
    result.assert_outcomes(errors=4, failed=1)
    result.stdout.fnmatch_lines_random(
        [
            "*a test has one machine: machine or simulated_machine, not both",
            "E*AttributeError: the machine of an asynchronous test has no 'create_process' yet*need pytest-trio",
            "*simulated_machine brings the clock of its virtual time*",
            '*: fault 1: the fault "restart.kept" cannot be done in the real world: *',
            '*: fault 2: no device is called "gpu9"; did you mean "gpu1"? There are gpu0, gpu1',
            '*: fault 1: the fault "unplug" cannot be done in the real world: *',
            "ask for simulated_machine or simulate instead",
        ]
    )
    assert result.stdout.str().partition("short test summary")[0].count("ask for simulated_machine") == 1


def test_a_real_machine_with_faults(pytester: pytest.Pytester) -> None:
    """What real processes can have they have, whoever runs the test."""
    text = """
    import pytest
    from hmmnet.errors import KernelError

    @pytest.mark.faults({"kind": "alloc.host", "times": 1})
    def test_blocking(machine):
        process = machine.process()
        address = process.mmap(4096)
        with pytest.raises(KernelError, match="ENOMEM"):
            process.write(address, b"x")
        process.write(address, b"x")
        assert machine.report()["faults"] == {"alloc.host": 1}

    @pytest.mark.faults({"kind": "alloc.host", "times": 1})
    async def test_awaited(machine):
        process = await machine.create_process()
        with pytest.raises(KernelError, match="ENOMEM"):
            await process.write(await process.mmap(4096), b"x")
    """
    write(pytester, text)
    run(pytester).assert_outcomes(passed=2)


def test_a_machine_cannot_be_kept_for_ever(pytester: pytest.Pytester) -> None:
    """The call that waits ends, and the test fails with the reason: blocking, under pytest-trio, and run by the plugin."""
    text = """
    import time

    import pytest
    import trio

    def test_blocking(machine):
        process = machine.process()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            process.malloc(8)

    @pytest.mark.trio
    async def test_awaited(machine):
        await trio.sleep(30)

    async def test_here(machine):
        await trio.sleep(30)

    def test_between_calls(machine):
        time.sleep(1)
    """
    write(pytester, text, ini="hmmnet_timeout = 0.6\n")
    result = run(pytester)
    result.assert_outcomes(failed=3, passed=1, errors=2)
    assert result.stdout.str().count("MachineOverdue: this test has kept its machine for 0.6 s") >= 4


def test_the_world_of_a_test_ends_with_it(pytester: pytest.Pytester) -> None:
    """No machine is left after a suite of real ones, whatever became of their tests."""
    text = """
    import pytest
    from hmmnet.launcher.directory import directories

    def test_fails(machine):
        assert machine.name.startswith("test-")
        assert [directory.name for directory in directories()] == [machine.name]
        assert 0

    def test_device_killed(machine):
        machine.kill_device("gpu0")
        assert 0

    async def test_raises(machine):
        raise ZeroDivisionError

    def test_nothing_is_left():
        assert list(directories()) == []
    """
    write(pytester, text)
    result = run(pytester)
    result.assert_outcomes(failed=3, passed=1)
    result.stdout.fnmatch_lines(["* ms  gpu0 is lost: *killed*", "E*ZeroDivisionError"])
    assert "goodbye" not in result.stdout.str(), "behind the last word of a test it would look like the cause"
