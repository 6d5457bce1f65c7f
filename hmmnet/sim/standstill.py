"""Finds out when a simulation goes in circles in which no time passes.

Virtual time moves on when nobody can run. Tasks that ask and answer each other without an end, and without waiting for the clock, keep it
where it is: no timeout of theirs ever comes, and no limit on virtual time either. So the rounds of the scheduler at one and the same moment
are counted, and after a number that no honest program needs its run is cancelled.
"""

from __future__ import annotations

import trio

ROUNDS_MAX = 500_000
"""Rounds at one moment: some twenty seconds of real time. A migration of a page takes some twenty."""


class Standstill(trio.abc.Instrument):
    """Cancels `scope`, once it is set, after `rounds_max` rounds of the scheduler at one moment of `clock`; then `found` is true."""

    def __init__(self, clock: trio.abc.Clock, rounds_max: int = ROUNDS_MAX) -> None:
        self.scope: trio.CancelScope | None = None
        self.found = False
        self._clock = clock
        self._rounds_max = rounds_max
        self._rounds = 0
        self._at_s = -1.0

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - an instrument's
        """A round is over."""
        now_s = self._clock.current_time()
        if now_s != self._at_s:
            self._at_s, self._rounds = now_s, 0
        self._rounds += 1
        if self._rounds == self._rounds_max and self.scope is not None:
            self.found = True
            self.scope.cancel()
