"""Errors, named as the kernel names them.

Three families that callers must be able to tell apart:

- `KernelError`: an operation answered with an errno, as a system call or an HMM function would. Part of the model, not a fault of ours.
- `SignalError`: an access that would have killed the program (SIGSEGV, SIGBUS).
- `HmmnetError`: the emulator itself cannot go on: bad input, a peer that broke the protocol, a peer that is gone.

Every text names the place, the cause and, where there is one, the mend.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Callable, Sequence
from typing import Any

_NAMES = {**_errno.errorcode, _errno.EOPNOTSUPP: "EOPNOTSUPP"}
"""ENOTSUP has the same number, and is what Python calls it; the kernel has no ENOTSUP."""


on_made: Callable[[HmmnetError], None] | None = None
"""Told of each `HmmnetError` when it is made; what it raises, comes in place of that (`hmmnet.sim.livelock`)."""


class HmmnetError(Exception):
    """Root of everything that hmmnet raises on purpose."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        if on_made is not None:
            on_made(self)


class WrongUse(HmmnetError):
    """What was asked for there is not, or cannot be: nothing was begun. A command ends with 2, where 1 says what its work came to."""


class KernelError(HmmnetError):
    """A modelled kernel call failed with `errno`.

    `code` is the positive errno value, `name` its name (``EINVAL``), `call` the kernel function or system call that returned it.
    """

    def __init__(self, code: int, call: str, why: str) -> None:
        self.code = code
        self.name = _NAMES.get(code, str(code))
        self.call = call
        self.why = why
        super().__init__(f"{call}: {self.name}: {why}")

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.code, self.call, self.why))


class InjectedError(KernelError):
    """A failure that a fault plan asked for: who meets it does not try again, as it may where memory is short."""


class OutOfMemory(KernelError):
    """Host memory is used up (ENOMEM): who meets it has somebody killed for the `pages` that it wanted, and tries again.

    What a memory cgroup refuses, or a call that asks for more than there can be, is another ENOMEM.
    """

    def __init__(self, code: int, call: str, why: str, pages: int = 1) -> None:
        self.pages = pages
        super().__init__(code, call, why)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.code, self.call, self.why, self.pages))


class SignalError(HmmnetError):
    """An access ended in a signal. `address` is the byte address that was touched."""

    signal_name = "SIG"

    def __init__(self, address: int, why: str) -> None:
        self.address = address
        self.why = why
        super().__init__(f"{self.signal_name} at 0x{address:x}: {why}")

    def narrow(self, address: int) -> None:
        """The access began at `address`: where that is further on than the page that was named, it is the byte that was touched."""
        if address > self.address:
            self.__init__(address, self.why)  # type: ignore[misc]  # an exception keeps its text where only its constructor writes

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.address, self.why))


class SegmentationFault(SignalError):
    """No mapping, or a mapping without the right (SIGSEGV)."""

    signal_name = "SIGSEGV"


class BusError(SignalError):
    """A mapping whose data is gone or beyond the end of its file (SIGBUS)."""

    signal_name = "SIGBUS"


class Mistakes(WrongUse):
    """What was given has mistakes: all of them in `problems` (`hmmnet.topology.problems.Problem`, or a text), one a line in its text."""

    def __init__(self, problems: Sequence[Any]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.problems,), self.__dict__)


class TopologyError(Mistakes):
    """A topology cannot be used."""


class PlanError(Mistakes):
    """A plan of faults cannot be used."""


class PeerError(HmmnetError):
    """The peer at the other end of a session is at fault, not we."""


class ProtocolError(PeerError):
    """A peer sent something that the protocol does not allow: garbage, a wrong version, an unknown or oversized message."""


class PeerRefused(PeerError):
    """A peer turned us away (version, secret, unknown name); its reason is the text."""


class PeerLost(PeerError):
    """A peer is gone: it said BYE, was silent for longer than the lease, or was replaced by a new incarnation."""


class PeerGone(PeerLost):
    """A peer is gone and certainly touches nothing any more: it said BYE, or its process has ended. No lease needs to be waited out."""


class Unreachable(PeerError):
    """No link that works leads there: links are down, or were for too long. The peer itself may be well."""


class RemoteError(PeerError):
    """The peer's handler failed in a way that is not part of the model; its text says what it reported."""


class IommuFault(PeerError):
    """A device accessed a frame that it holds no translation for: a driver bug, never passed over silently."""


def is_crash(error: BaseException) -> bool:
    """Whether it is a bug: not an `HmmnetError`, or a group with one that is not."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_crash, error.exceptions))
    return not isinstance(error, HmmnetError)
