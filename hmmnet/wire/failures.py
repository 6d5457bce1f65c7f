"""Errors on their way over a session: what a handler raised as a `Failed`, and a `Failed` as what it stands for at the other end.

Errors of the model (`KernelError`, `SignalError`) arrive as what they are; so do mistakes of who asked, as a host tells its clients. All
else is the peer's failure, a `RemoteError` with its text, and a line of the log where it happened.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable

from hmmnet.errors import (
    BusError,
    HmmnetError,
    KernelError,
    PeerError,
    PlanError,
    RemoteError,
    SegmentationFault,
    SignalError,
    TopologyError,
    WrongUse,
)

from . import crashes
from .messages import TEXT_MAX, Call, Failed, Message

SIGNALS: dict[str, type[SignalError]] = {kind.signal_name: kind for kind in (SegmentationFault, BusError)}
_SIGNAL_TEXT = re.compile(r"0x([0-9a-f]{1,16}): (.*)", re.DOTALL)
HOST = "host"
"""What its peers call the host."""
SAID: dict[str, Callable[[str], Exception]] = {
    HmmnetError.__name__: RemoteError,
    WrongUse.__name__: WrongUse,
    TopologyError.__name__: lambda told: TopologyError(told.splitlines()),
    PlanError.__name__: lambda told: PlanError(told.splitlines()),
}
"""What a host says to people, by what it raised: a command that asked for what there is not ends as if it had found out itself.

A mistake of another kind goes as the nearest of these that it is: the other end may not know it.
"""

log = logging.getLogger("hmmnet.wire")


def failed(asked: Message, error: Exception, peer_name: str) -> Failed:
    """The answer to what `peer_name` asked, whose handler raised `error`; what is not the model's is logged, and a crash told."""
    call = type(asked).__name__
    if isinstance(error, KernelError):
        return Failed(error.code, error.call[:TEXT_MAX], error.why[:TEXT_MAX])
    if isinstance(error, SignalError):
        return Failed(errno.EFAULT, error.signal_name, f"0x{error.address:x}: {error.why}"[:TEXT_MAX])
    kind = type(error).__name__
    if isinstance(error, PeerError | WrongUse):
        log.warning("%s of %s failed: %s", call, peer_name, error)
        if isinstance(error, WrongUse):
            kind = next(above.__name__ for above in type(error).__mro__ if above.__name__ in SAID)
    else:
        log.error("%s of %s failed", call, peer_name, exc_info=error)
        crashes.tell(f"{call} of {peer_name}", error)
    return Failed(0, call, f"{kind}: {error}"[:TEXT_MAX])


def failure(peer_name: str, failed: Failed) -> Exception:
    """The exception that a peer's `Failed` stands for."""
    signal = SIGNALS.get(failed.call)
    if signal is not None:
        match = _SIGNAL_TEXT.fullmatch(failed.why)
        if match is not None:
            return signal(int(match[1], 16), match[2])
    if failed.errno > 0:
        return KernelError(failed.errno, failed.call, failed.why)
    kind, _, told = failed.why.partition(": ")
    if peer_name == HOST and failed.call == Call.__name__ and kind in SAID:
        return SAID[kind](told)  # what a host says to people is a sentence by itself
    return RemoteError(f"{peer_name}: {failed.call}: {failed.why}")
