"""A simulated machine at another rate: as a real one, but that the seconds of the run stand for real ones."""

from __future__ import annotations

import pytest
import trio

import hmmnet
from hmmnet.errors import HmmnetError
from hmmnet.sim import SimulatedMachine

MIB = 1 << 20


def test_emulated_time_goes_at_the_rate_that_is_set() -> None:
    """At host and devices: copies, faults and what they delay take so much longer in the run, and as long in the machine."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.malloc(MIB)
        await process.write(address, bytes(MIB))

        async def there_and_back() -> tuple[float, float]:
            run_s, emulated_s = trio.current_time(), machine.emulated_s()
            assert await process.migrate(address, MIB, "gpu0") == MIB
            assert await process.migrate(address, MIB, "host") == MIB
            return trio.current_time() - run_s, machine.emulated_s() - emulated_s

        machine.add_fault("point.delay", point="migrate.before_copy", latency="20 ms")
        assert machine.rate == 1.0
        run_s, emulated_s = await there_and_back()
        assert run_s == pytest.approx(emulated_s)
        machine.set_rate(0.25)
        assert machine.rate == 0.25
        slow_run_s, slow_emulated_s = await there_and_back()
        assert slow_emulated_s == pytest.approx(emulated_s, rel=0.01)
        assert slow_run_s == pytest.approx(4 * run_s, rel=0.01)
        await machine.kill_device("gpu1")
        await machine.start_device("gpu1")
        assert machine.device("gpu1").clock.now() == pytest.approx(machine.emulated_s())
        assert (await machine.report())["rate"] == 0.25
        with pytest.raises(HmmnetError, match="a clock cannot run at rate 0"):
            machine.set_rate(0)

    hmmnet.simulate(main)


def test_a_rate_is_set_while_something_waits() -> None:
    """Faults that are to come come earlier; nobody sleeps on by the clock that was."""

    async def main(machine: SimulatedMachine) -> None:
        machine.add_fault("crash", on="gpu0", after="10 s")
        await trio.sleep(1.0)
        machine.set_rate(100.0)
        await trio.sleep(0.089)
        assert "gpu0" in machine.running
        await trio.sleep(0.002)
        assert "gpu0" not in machine.running

    hmmnet.simulate(main)
