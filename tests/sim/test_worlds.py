"""How a command runs in a world, and how Ctrl-C ends it."""

from __future__ import annotations

import signal

import pytest
import trio
import trio.testing

from hmmnet.sim.run import SimulationStuck
from hmmnet.sim.worlds import WorldName, run_in


@pytest.mark.parametrize("world", ["real", "sim"])
def test_the_value_and_the_error_are_those_of_main(world: WorldName) -> None:
    """No group of one error is seen, in either world."""

    async def main(value: int) -> int:
        await trio.sleep(0.001)
        if value < 0:
            raise BrokenPipeError
        return value

    assert run_in(world, main, 7) == 7
    with pytest.raises(BrokenPipeError):
        run_in(world, main, -1)


@pytest.mark.parametrize("world", ["real", "sim"])
def test_ctrl_c_strikes_where_somebody_waits(world: WorldName) -> None:
    """It is a cancellation: what is between two waits is done, what must be undone is, with waits of its own, and then it is raised."""
    seen: list[str] = []

    async def main() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
            seen.append("went on")
            await trio.sleep_forever()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.001)
            seen.append("undone")
            raise

    async def interrupted() -> None:
        await trio.testing.wait_all_tasks_blocked()
        await main()

    with pytest.raises(KeyboardInterrupt):
        run_in(world, interrupted)
    assert seen == ["went on", "undone"]


@pytest.mark.parametrize("world", ["real", "sim"])
def test_ctrl_c_is_mains_whoever_is_at_work(world: WorldName) -> None:
    """Not the task's that it strikes, which goes on; also when main ends in an error or with a value all the same."""
    seen: list[str] = []

    async def at_work() -> None:
        signal.raise_signal(signal.SIGINT)
        seen.append("went on")

    async def main(then: str) -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(at_work)
            try:
                await trio.sleep(1000.0)
            except BaseException:
                seen.append("cancelled")
                if then == "error":
                    raise ValueError(then) from None
                if then == "value":
                    return then
                raise
        return "never"

    for then in ("cancelled", "error", "value"):
        with pytest.raises(KeyboardInterrupt):
            run_in(world, main, then)
    assert seen == ["went on", "cancelled"] * 3


@pytest.mark.parametrize("world", ["real", "sim"])
def test_a_program_that_never_waits_is_interrupted_by_the_second(world: WorldName) -> None:
    """And the handler of before is back afterwards."""

    async def main() -> None:
        await trio.lowlevel.checkpoint()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        run_in(world, main)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_programs_own_stays() -> None:
    """A simulation that is a part of something takes no signal from it."""
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))

    async def main() -> str:
        signal.raise_signal(signal.SIGINT)
        await trio.sleep(1.0)
        return "done"

    try:
        assert run_in("sim", main) == "done"
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]


def test_a_command_in_virtual_time_that_has_no_end_is_told_so() -> None:
    """Heartbeats go on for ever; who waits for what never comes does not."""
    with pytest.raises(SimulationStuck, match="no end after 21600 virtual seconds"):
        run_in("sim", trio.sleep_forever)
