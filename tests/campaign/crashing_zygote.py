"""A zygote whose devices end badly when all has been said: as the first argument says, those called as the second.

``logged``: a task crashes and says so, and the process ends well; ``raised``: an exception that nobody expects; ``killed``: SIGSEGV.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from hmmnet.devices import __main__ as devices
from hmmnet.devices import service
from hmmnet.errors import PeerLost

HOW, WHO = sys.argv[1:]
log = logging.getLogger("hmmnet.devices")


Process = Callable[[service.Settings, bytes], Coroutine[Any, Any, PeerLost | None]]


def ending_badly(process: Process) -> Process:
    """A device process that has been told goodbye, and does something more."""

    async def to_its_end(settings: service.Settings, secret: bytes) -> PeerLost | None:
        lost = await process(settings, secret)
        if settings.name == WHO:
            if HOW == "raised":
                raise KeyError(64)
            if HOW == "killed":
                log.warning("something is wrong")
                os.kill(os.getpid(), signal.SIGSEGV)
            log.error("a task crashed", exc_info=KeyError(64))
        return lost

    return to_its_end


setattr(service, "_process", ending_badly(service._process))  # noqa: B010 - a function is not assigned to
sys.exit(devices.zygote(os.getppid()))
