"""Virtual time: the machine's seconds are those of the trio run, which jump."""

from __future__ import annotations

import trio

from hmmnet.fabric.clock import EmulatedClock


class VirtualClock(EmulatedClock):
    """A machine's clock in a trio run in virtual time: one emulated second is one of the run's, and no sleep is too short to be slept."""

    sleep_min_s = 0.0

    def __init__(self) -> None:
        super().__init__(1.0, trio.current_time)

    async def sleep_until(self, emulated_s: float) -> None:
        """Return at that emulated moment, exactly."""
        while (left_s := self.real_until(emulated_s)) > 0:  # noqa: ASYNC110 - time is what is waited for; the rate may change
            await trio.sleep(left_s)
