"""Emulated time: seconds of the modelled machine, which may pass slower than ours.

A PCIe 4 link moves 32 GB/s; ZeroMQ on this computer perhaps 3. So that the links of a model keep their *proportions*, the machine's clock
runs at `rate` emulated seconds for each real one, and a transfer that takes a millisecond there may take twenty here.

    emulated = epoch_emulated + (CLOCK_MONOTONIC - epoch_monotonic) * rate

All processes of one computer share CLOCK_MONOTONIC, so three numbers in the welcome message make them agree. The clock is a
`trio.abc.Clock` and may drive a trio run; it need not, because a host that is embedded in somebody's program must not change what
`trio.sleep` means there. `sleep_until` works either way. Liveness (heartbeats, leases) is always in real seconds: `real` converts at one
place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import trio

from hmmnet.errors import HmmnetError
from hmmnet.sleeping import Bell, sleep_until

SLEEP_MIN_S = 0.001
"""Real seconds. trio sleeps whole milliseconds, rounding up; less is accounted for and not slept."""
SLEEP_MAX_S = 1.0
"""Real seconds of one sleep: then somebody looks whether the clock runs at another rate now."""


class EmulatedClock(trio.abc.Clock):
    """A clock at `rate` emulated seconds for each second of `monotonic`. Raises HmmnetError for a rate that is no positive number."""

    sleep_min_s = SLEEP_MIN_S
    """What is shorter is not slept."""

    def __init__(self, rate: float = 1.0, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self.epoch_monotonic_s = monotonic()
        self.epoch_emulated_s = 0.0
        self.rate = _checked(rate)
        self._agreed: tuple[float, float, float] | None = None
        """What was agreed upon before the first of the disturbances that last."""
        self._disturbances = 0
        self._adoptions = 0

    def now(self) -> float:
        """Emulated seconds since the machine began."""
        return self.epoch_emulated_s + (self._monotonic() - self.epoch_monotonic_s) * self.rate

    def set_rate(self, rate: float) -> None:
        """Go on at another rate from now on; time does not jump."""
        self.epoch_emulated_s, self.epoch_monotonic_s = self.now(), self._monotonic()
        self.rate = _checked(rate)

    def adopt(self, epoch_monotonic_s: float, epoch_emulated_s: float, rate: float) -> None:
        """Agree with another process's clock."""
        if not (math.isfinite(epoch_monotonic_s) and math.isfinite(epoch_emulated_s)):
            raise HmmnetError("the host's clock is no pair of finite numbers")
        self.rate = _checked(rate)
        self.epoch_monotonic_s = epoch_monotonic_s
        self.epoch_emulated_s = epoch_emulated_s
        self._agreed = epoch_monotonic_s, epoch_emulated_s, rate
        self._adoptions += 1

    def disturb(self, jump_s: float, factor: float) -> Callable[[], None]:
        """A fault: the clock jumps by so many emulated seconds, and goes on at `factor` times its rate. Returns what rights it.

        With the last disturbance that is righted the clock steps to where it would be without any: one that was slow for a while would
        stay behind for ever, and wait so much longer for whatever others say the time of.
        """
        if not self._disturbances:
            self._agreed = self.epoch_monotonic_s, self.epoch_emulated_s, self.rate
        self._disturbances += 1
        adoptions = self._adoptions
        self.set_rate(self.rate * factor)
        self.epoch_emulated_s += jump_s

        def right() -> None:
            self._disturbances -= 1
            if not self._disturbances and self._agreed is not None:
                self.adopt(*self._agreed)
            elif adoptions == self._adoptions:  # else it was set right as a whole
                self.set_rate(self.rate / factor)
                self.epoch_emulated_s -= jump_s

        return right

    def real_until(self, emulated_s: float) -> float:
        """Real seconds until that emulated moment; negative when it has passed."""
        now_s = self.epoch_emulated_s + (self._monotonic() - self.epoch_monotonic_s) * self.rate  # `now`, without a call
        return (emulated_s - now_s) / self.rate

    def real(self, seconds: float) -> float:
        """What to hand to trio's timeouts of this run for `seconds` real seconds."""
        return seconds * self.rate if trio.lowlevel.current_clock() is self else seconds

    async def sleep_until(self, emulated_s: float) -> None:
        """Return at that emulated moment, or up to a real millisecond early: what is shorter is not worth a sleep."""
        while (look_s := self._look_at(emulated_s)) is not None:
            await sleep_until(look_s)

    async def sleep_until_then(self, moment: Callable[[], float], bell: Bell) -> None:
        """`sleep_until` for a moment that may change: whoever changes it rings `bell`, for which nobody else waits."""
        while (look_s := self._look_at(moment())) is not None:
            await bell.heard_by(look_s)

    def _look_at(self, emulated_s: float) -> float | None:
        """When to look, by trio's clock, whether that moment has come; None: it has. The rate may change meanwhile."""
        left_s = self.real_until(emulated_s)
        return None if left_s < SLEEP_MIN_S else trio.current_time() + self.real(min(left_s, SLEEP_MAX_S) - SLEEP_MIN_S / 2)

    # --- as the clock of a trio run

    def start_clock(self) -> None:
        """The clock has been running since it was made."""

    def current_time(self) -> float:
        """As `now`."""
        return self.now()

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Real seconds until an emulated deadline."""
        return self.real_until(deadline)


def _checked(rate: float) -> float:
    if not (math.isfinite(rate) and rate > 0):
        raise HmmnetError(f"a clock cannot run at rate {rate}: a positive number is wanted, such as 0.1 (ten times slower than real time)")
    return rate
