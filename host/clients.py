"""A program in another process, as the host knows it: what it made, what it may have, and what it waits for.

It is trusted with the machine secret and with nothing else. It reaches only the processes, handles, files and held pages that it made
itself; when it goes away they are ended as the kernel ends a killed program's: what it waits for is cancelled first, so that a
call under way cannot make something that nobody would ever end.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import msgspec
import trio

from hmmnet.errors import KernelError, ProtocolError
from hmmnet.faults.kinds import Fault
from hmmnet.program import Handle, Machine, MemoryFile, PageReferences, Process, UserFaults
from hmmnet.wire.messages import Call, Recall, Result

from .arguments import OnFaults, OnHandle, OnProcess, Operation, Referred

PROCESSES_MAX = 256
"""Processes of one client; each costs an address space."""
HANDLES_MAX = 4096
REFERENCE_SETS_MAX = 4096
"""Times that one client may hold pages at once."""
FILES_MAX = 4096
"""Files that one client may have."""
FAULTS_MAX = 1024
"""Ranges whose missing pages one client may fill in."""

Answer: TypeAlias = tuple[Any, bytes]
"""A value that msgpack can carry, and data."""


@dataclass(eq=False)
class OpenHandle:
    """A client's handle, with ioctl data on their way in and out."""

    handle: Handle
    staged: bytearray = field(default_factory=bytearray)
    result: bytes = b""


T = TypeVar("T", bound=Operation)
K = TypeVar("K")
V = TypeVar("V")
Serve: TypeAlias = "Callable[[Client, T, bytes], Awaitable[Answer]]"
Operations: TypeAlias = "Mapping[str, tuple[type[Operation], Serve[Any]]]"
"""Operations by name: the struct of the arguments, and what serves it."""


@runtime_checkable
class Injectable(Protocol):
    """A machine that can be broken on purpose."""

    def add_fault(self, fault: Fault) -> int:
        """A fault begins; its number. Raises HmmnetError."""
        ...

    def remove_fault(self, number: int) -> None:
        """It ends. Raises HmmnetError."""
        ...

    def list_faults(self) -> list[dict[str, Any]]:
        """The faults that are, as plain data."""
        ...


class Client:
    """One client session's view of `machine`, served by `operations`."""

    def __init__(self, machine: Machine, operations: Operations) -> None:
        self.machine = machine
        self._operations = operations
        self._under_way: dict[object, trio.CancelScope] = {}
        """Calls that are being served: by the client's number, or a key of our own where it gave none."""
        self._gone = False
        self._idle = trio.Event()
        self.processes: dict[int, Process] = {}
        self.handles: dict[tuple[int, int], OpenHandle] = {}
        self.references: dict[int, PageReferences] = {}
        self.reference_numbers = 0
        self.files: dict[int, MemoryFile] = {}
        self.file_numbers = 0
        self.faults: dict[int, UserFaults] = {}
        self.fault_numbers = 0

    def call(self, message: Call) -> Awaitable[Result]:
        """Serve one call, which is known from its arrival on, so that a `Recall` right behind finds it.

        Raises KernelError and SignalError of the operation, KernelError(EINTR) when it was recalled, ProtocolError for what makes no sense.
        """
        entry = self._operations.get(message.operation)
        if entry is None:
            raise ProtocolError(f"unknown operation {message.operation!r}; known are {', '.join(sorted(self._operations))}")
        struct, serve = entry
        try:
            arguments = msgspec.msgpack.decode(message.arguments, type=struct)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ProtocolError(f"arguments of {message.operation}: {error}") from error
        key = message.number or object()
        if key in self._under_way:
            raise ProtocolError(f"call {message.number} is under way already")
        self._under_way[key] = trio.CancelScope()
        return self._serve(key, message.operation, serve(self, arguments, message.data))

    async def _serve(self, key: object, operation: str, serving: Awaitable[Answer]) -> Result:
        try:
            with self._under_way[key]:
                value, data = await serving
                return Result(msgspec.msgpack.encode(value), data)
        finally:
            del self._under_way[key]
            if self._gone and not self._under_way:
                self._idle.set()
        raise KernelError(errno.EINTR, operation, "the client does not wait for it any more")

    def recall(self, message: Recall) -> None:
        """The client does not wait for a call any more: it ends where it is. One that is over is over."""
        scope = self._under_way.get(message.number)
        if scope is not None:
            scope.cancel()

    async def gone(self) -> None:
        """The client is gone: end its calls, then its processes."""
        self._gone = True
        for scope in self._under_way.values():
            scope.cancel()
        if self._under_way:
            await self._idle.wait()
        processes, self.processes = self.processes, {}
        self.handles.clear()
        self.files.clear()
        faults, self.faults = self.faults, {}
        for registration in faults.values():
            await registration.close()
        references, self.references = self.references, {}
        for held in references.values():
            await held.put()
        for process in processes.values():
            await process.exit()

    def process(self, arguments: OnProcess) -> Process:
        """The process that a call names. Raises KernelError(ESRCH)."""
        return _found(self.processes, arguments.process, errno.ESRCH, f"process {arguments.process}")

    def room_for(self, handles: int, call: str) -> None:
        """Raises KernelError(EMFILE) when so many more handles are too many."""
        if len(self.handles) + handles > HANDLES_MAX:
            raise KernelError(errno.EMFILE, call, f"a client may have {HANDLES_MAX} handles")

    def room_for_process(self, call: str) -> None:
        """Raises KernelError(EAGAIN) when one more process is too many."""
        if len(self.processes) >= PROCESSES_MAX:
            raise KernelError(errno.EAGAIN, call, f"a client may have {PROCESSES_MAX} processes")

    def handle(self, arguments: OnHandle) -> OpenHandle:
        """The handle that a call names. Raises KernelError(EBADF)."""
        key = arguments.process, arguments.handle
        return _found(self.handles, key, errno.EBADF, f"handle {arguments.handle} of process {arguments.process}")

    def referred(self, arguments: Referred) -> PageReferences:
        """The referenced pages that a call names. Raises KernelError(EINVAL)."""
        return _found(self.references, arguments.reference, errno.EINVAL, f"referenced pages {arguments.reference}")

    def file(self, number: int) -> MemoryFile:
        """The file that a call names. Raises KernelError(EBADF)."""
        return _found(self.files, number, errno.EBADF, f"file {number}")

    def user_faults(self, arguments: OnFaults) -> UserFaults:
        """The registration that a call names. Raises KernelError(EBADF)."""
        return _found(self.faults, arguments.faults, errno.EBADF, f"userfaultfd registration {arguments.faults}")


def _found(table: Mapping[K, V], key: K, code: int, what: str) -> V:
    found = table.get(key)
    if found is None:
        raise KernelError(code, "call", f"this client has no {what}")
    return found
