"""Ctrl-C in a run of trio: the run is cancelled, and KeyboardInterrupt is raised when all of it has ended.

A KeyboardInterrupt out of the blue strikes whatever task is at work and leaves half a step behind. In a machine of tasks that may be a
device's: the program that was meant hears of its end only when time has passed, and in virtual time none does while it computes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import trio


class CtrlC:
    """Made before the run begins, which takes SIGINT for itself. Who began it raises KeyboardInterrupt at its end if one `came`.

    Nothing is done in another thread than the main one, nor where the program has a handler of its own.
    """

    def __init__(self) -> None:
        self.came = False
        in_main = threading.current_thread() is threading.main_thread()
        self._ours = in_main and signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)

    @contextmanager
    def cancels(self, scope: trio.CancelScope) -> Iterator[None]:
        """While the block runs, the first SIGINT cancels `scope`. Any further one is a KeyboardInterrupt where it strikes: the way out of a
        program that never waits.
        """
        if not self._ours:
            yield
            return
        token = trio.lowlevel.current_trio_token()

        def handle(number: int, frame: FrameType | None) -> None:
            if self.came:
                signal.default_int_handler(number, frame)
            self.came = True
            token.run_sync_soon(scope.cancel)

        before = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
