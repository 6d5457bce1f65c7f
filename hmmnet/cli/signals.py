"""SIGTERM ends a command as cleanly as Ctrl-C does: it becomes a KeyboardInterrupt, but not everywhere.

While modules are being imported, that waits, for `WAIT_S`. Python passes over what is raised in a callback of its import system, and the
signal would be lost. And what is raised below a text that is being executed (a dataclass is one) makes the interpreter end itself by SIGINT
at last, however well it was caught (`unhandled_keyboard_interrupt` in CPython's pythonrun.c).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

AGAIN_S = 0.005
"""So long after it came in the middle of an import, a SIGTERM is looked at again."""
WAIT_S = 2.0
"""So long in all: a module of the user's may wait for ever while it is imported."""
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"


class Termination:
    """SIGTERM for one command. `came` says whether one did."""

    def __init__(self) -> None:
        self.came = False
        self._waits_until_s = 0.0

    def listen(self) -> None:
        """From now on a SIGTERM interrupts the command; SIGALRM is taken for one that has to wait."""
        signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - as Python calls it
        if not self.came:
            self.came = True
            self._waits_until_s = monotonic() + WAIT_S
        if monotonic() < self._waits_until_s and _imports(frame):
            signal.signal(signal.SIGALRM, self._hear)
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
            return
        runs = sys.modules.get("hmmnet.sim.interrupts")  # nothing runs yet where it was not imported
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as a shell leaves it to what it starts in the background
        if ignored and runs is not None and runs.interrupt():
            return
        if ignored:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.raise_signal(signal.SIGINT)


def _imports(frame: FrameType | None) -> bool:
    """Whether it, or who called it, imports a module."""
    while frame is not None and frame.f_code.co_filename != _IMPORT_SYSTEM:
        frame = frame.f_back
    return frame is not None


@contextmanager
def signals_later() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block: for Ctrl-C holds what was said of imports, too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
