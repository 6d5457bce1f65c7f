"""The watchdog of a campaign: a run in which nothing moves ends with who waits for whom (`hmmnet.sim.waits`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from hmmnet.errors import HmmnetError
from hmmnet.sim.waits import wait_story
from hmmnet.sleeping import sleep

if TYPE_CHECKING:
    from .crew import Crew

STILL_S = 60.0
"""Virtual seconds without an operation that ends: longer than any lease with its patience."""
LOOK_S = 5.0


class Stuck(HmmnetError):
    """Nothing moves; the text is the story."""


class Watchdog:
    """Ends a run in which nothing moves."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew

    async def run(self) -> None:
        """Look from time to time. Raises Stuck."""
        seen, since_s = -1, trio.current_time()
        while True:
            await sleep(LOOK_S)
            now_s, count = trio.current_time(), self._crew.outcome.operations
            if count != seen or self._crew.harms:
                seen, since_s = count, now_s
            elif now_s - since_s >= STILL_S:
                raise Stuck(f"nothing has moved for {STILL_S:g} virtual seconds\n{wait_story()}")
