"""How a command runs in a world, and how Ctrl-C ends it."""

from __future__ import annotations

import signal

import pytest
import trio
import trio.testing

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


def test_ctrl_c_strikes_where_somebody_waits() -> None:
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
        run_in("real", interrupted)
    assert seen == ["went on", "undone"]
