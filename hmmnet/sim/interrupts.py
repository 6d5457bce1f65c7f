"""Ctrl-C in a run of trio: the run is cancelled, and KeyboardInterrupt is raised when all of it has ended.

A KeyboardInterrupt out of the blue strikes whatever task is at work and leaves half a step behind. In a machine of tasks that may be a
device's: the program that was meant hears of its end only when time has passed, and in virtual time none does while it computes.

A SIGINT that is ignored (as a shell does for what it starts in the background) stays so. Who wants to end such a run all the same, for a
signal of another kind, says `interrupt`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import trio

_runs: list[Callable[[], None]] = []
"""How the run of the main thread is interrupted, if there is one."""


def interrupt() -> bool:
    """Interrupt the run of the main thread as Ctrl-C would, from a handler of another signal; False if there is none that hears of it."""
    if _runs:
        _runs[-1]()
    return bool(_runs)


class CtrlC:
    """Made before the run begins, which takes SIGINT for itself. Who began it raises KeyboardInterrupt at its end if one `came`.

    Nothing is done in another thread than the main one, nor where the program has a handler of its own; where it ignores SIGINT, that is
    not touched.
    """

    def __init__(self) -> None:
        self.came = False
        in_main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGINT)
        self._ours = in_main and handler in (signal.default_int_handler, signal.SIG_IGN)
        self._ignored = handler is signal.SIG_IGN

    @contextmanager
    def cancels(self, scope: trio.CancelScope) -> Iterator[None]:
        """While the block runs, the first SIGINT or `interrupt` cancels `scope`. Any further one is a KeyboardInterrupt where it strikes:
        the way out of a program that never waits.
        """
        if not self._ours:
            yield
            return
        token = trio.lowlevel.current_trio_token()

        def handle(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
            if self.came:
                signal.default_int_handler(number, frame)
            self.came = True
            token.run_sync_soon(scope.cancel)

        _runs.append(handle)
        before = signal.SIG_IGN if self._ignored else signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            if not self._ignored:
                signal.signal(signal.SIGINT, before)
            _runs.remove(handle)
