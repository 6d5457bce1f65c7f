"""Emulated time passes at its rate, never jumps, and drives a trio run or stands beside it."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from hmmnet.errors import HmmnetError
from hmmnet.fabric.clock import EmulatedClock


class Wall:
    """A monotonic clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_rate_scales_time() -> None:
    """Two real seconds at rate 0.25 are half an emulated one."""
    wall = Wall()
    clock = EmulatedClock(0.25, wall)
    wall.now_s += 2.0
    assert clock.now() == pytest.approx(0.5)
    assert clock.real_until(1.0) == pytest.approx(2.0)


def test_changing_the_rate_does_not_jump() -> None:
    """Time goes on from where it was."""
    wall = Wall()
    clock = EmulatedClock(1.0, wall)
    wall.now_s += 3.0
    clock.set_rate(0.1)
    assert clock.now() == pytest.approx(3.0)
    wall.now_s += 10.0
    assert clock.now() == pytest.approx(4.0)


def test_two_processes_agree() -> None:
    """Three numbers make another process's clock the same."""
    wall = Wall()
    host, device = EmulatedClock(0.5, wall), EmulatedClock(1.0, wall)
    wall.now_s += 7.0
    device.adopt(host.epoch_monotonic_s, host.epoch_emulated_s, host.rate)
    wall.now_s += 1.0
    assert device.now() == pytest.approx(host.now())


def test_a_disturbed_clock_is_right_again_in_the_end() -> None:
    """It ran at half its rate, and jumped meanwhile: righted one after the other, in any order, it is where it would be without."""
    for first, second in ((0, 1), (1, 0)):
        wall = Wall()
        clock = EmulatedClock(2.0, wall)
        wall.now_s += 1.0
        rights = [clock.disturb(0.0, 0.5)]
        wall.now_s += 4.0
        assert clock.now() == pytest.approx(2.0 + 4.0)
        rights.append(clock.disturb(10.0, 1.0))
        assert clock.now() == pytest.approx(6.0 + 10.0)
        rights[first]()
        wall.now_s += 1.0
        assert clock.now() == pytest.approx((6.0 + 10.0 + 2.0, 6.0 + 1.0)[first])
        rights[second]()
        assert clock.now() == pytest.approx(2.0 * 6.0)
        assert clock.rate == 2.0


def test_a_disturbed_clock_that_hears_of_another_rate_is_right_at_once() -> None:
    """What ends later has nothing to mend any more."""
    wall = Wall()
    clock, host = EmulatedClock(1.0, wall), EmulatedClock(0.5, wall)
    rights = [clock.disturb(5.0, 3.0), clock.disturb(1.0, 3.0)]
    wall.now_s += 1.0
    clock.adopt(host.epoch_monotonic_s, host.epoch_emulated_s, host.rate)
    for right in rights:
        wall.now_s += 1.0
        right()
        assert clock.now() == pytest.approx(host.now())


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_rates_are_refused(rate: float) -> None:
    """A clock that stands still or runs backwards is a mistake of the caller."""
    with pytest.raises(HmmnetError, match="rate"):
        EmulatedClock(rate)
    with pytest.raises(HmmnetError):
        EmulatedClock().adopt(0.0, float("nan"), 1.0)


async def test_sleeps_under_another_run_clock() -> None:
    """`sleep_until` waits emulated time also where the clock does not drive the run."""
    clock = EmulatedClock(10.0)
    await clock.sleep_until(0.1)
    assert clock.now() >= 0.1 - 10.0 * 0.001
    assert clock.real(2.0) == 2.0


def test_drives_a_trio_run() -> None:
    """As the run's own clock, trio's sleeps are emulated seconds, and `real` converts timeouts."""
    clock = EmulatedClock(50.0)

    async def main() -> float:
        began_s = trio.current_time()
        await trio.sleep(1.0)
        await clock.sleep_until(began_s + 2.0)
        assert clock.real(2.0) == 100.0
        return trio.current_time() - began_s

    assert trio.run(main, clock=clock) >= 1.9


def test_virtual_time() -> None:
    """Over a mock clock, emulated time is virtual: nothing waits."""

    async def main() -> float:
        clock = EmulatedClock(0.001, trio.current_time)
        await clock.sleep_until(5.0)
        return clock.now()

    assert trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0)) == pytest.approx(5.0)
