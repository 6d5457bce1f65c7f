"""What a client may ask for: names of operations become method calls, after every argument was checked.

A client is a program in another process (or the command line). It is trusted with the machine secret and with nothing else: each operation
has a struct (`arguments.py`) that says which arguments it takes and how large they may be, so a malformed call ends in a refusal
here and never in an exception further in. A client reaches only the processes and handles that it made itself; when it goes
away, they are ended as the kernel ends a killed program's.

The operations are listed, with their arguments, in the docstring of `hmmnet.wire.messages.Call`. To add one, write its struct and a
function under ``@serves(STRUCT)``; the function's name is the operation's.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import msgspec
import numpy as np

from hmmnet.errors import KernelError, ProtocolError
from hmmnet.pages import PAGE_SIZE
from hmmnet.program import Handle, Machine, Process
from hmmnet.wire.messages import Call, Result

from .arguments import (
    CHUNK_BYTES,
    STAGED_BYTES_MAX,
    Advise,
    Allocate,
    Command,
    Fetch,
    Look,
    Map,
    Move,
    OnHandle,
    OnProcess,
    Open,
    Operation,
    Protect,
    Range,
    Read,
    Start,
    Write,
)

PROCESSES_MAX = 256
"""Processes of one client; each costs an address space."""
HANDLES_MAX = 4096

Answer: TypeAlias = tuple[Any, bytes]
"""A value that msgpack can carry, and data."""


@dataclass(eq=False)
class OpenHandle:
    """A client's handle, with ioctl data on their way in and out."""

    handle: Handle
    staged: bytearray = field(default_factory=bytearray)
    result: bytes = b""


class Client:
    """One client session's view of `machine`."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.processes: dict[int, Process] = {}
        self.handles: dict[tuple[int, int], OpenHandle] = {}
        self.handle_numbers = 0

    async def call(self, message: Call) -> Result:
        """Serve one call. Raises KernelError and SignalError of the operation, ProtocolError for a call that makes no sense."""
        entry = _OPERATIONS.get(message.operation)
        if entry is None:
            raise ProtocolError(f"unknown operation {message.operation!r}; known are {', '.join(sorted(_OPERATIONS))}")
        struct, serve = entry
        try:
            arguments = msgspec.msgpack.decode(message.arguments, type=struct)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ProtocolError(f"arguments of {message.operation}: {error}") from error
        value, data = await serve(self, arguments, message.data)
        return Result(msgspec.msgpack.encode(value), data)

    async def gone(self) -> None:
        """The client is gone: end its processes."""
        processes, self.processes = self.processes, {}
        self.handles.clear()
        for process in processes.values():
            await process.exit()

    def process(self, arguments: OnProcess) -> Process:
        """The process that a call names. Raises KernelError(ESRCH)."""
        found = self.processes.get(arguments.process)
        if found is None:
            raise KernelError(errno.ESRCH, "call", f"this client has no process {arguments.process}")
        return found

    def handle(self, arguments: OnHandle) -> OpenHandle:
        """The handle that a call names. Raises KernelError(EBADF)."""
        found = self.handles.get((arguments.process, arguments.handle))
        if found is None:
            raise KernelError(errno.EBADF, "call", f"process {arguments.process} has no handle {arguments.handle}")
        return found


T = TypeVar("T", bound=Operation)
Serve: TypeAlias = Callable[[Client, T, bytes], Awaitable[Answer]]

_OPERATIONS: dict[str, tuple[type[Any], Serve[Any]]] = {}


def serves(struct: type[T]) -> Callable[[Serve[T]], Serve[T]]:
    """Register the decorated function as the operation of its name, with arguments `struct`."""

    def register(serve: Serve[T]) -> Serve[T]:
        name: str = serve.__name__
        assert name not in _OPERATIONS, f"operation {name} is served twice"
        _OPERATIONS[name] = (struct, serve)
        return serve

    return register


def operation_names() -> tuple[str, ...]:
    """What a client can call."""
    return tuple(_OPERATIONS)


# --- the machine ------------------------------------------------------------------------------------------------------------------


@serves(Operation)
async def devices(client: Client, _arguments: Operation, _data: bytes) -> Answer:
    """Names of the devices."""
    return list(client.machine.device_names), b""


@serves(Operation)
async def report(client: Client, _arguments: Operation, _data: bytes) -> Answer:
    """What the run did so far."""
    return await client.machine.report(), b""


@serves(Operation)
async def create_process(client: Client, _arguments: Operation, _data: bytes) -> Answer:
    """A new process; its pid."""
    if len(client.processes) >= PROCESSES_MAX:
        raise KernelError(errno.EAGAIN, "create_process", f"a client may have {PROCESSES_MAX} processes")
    process = await client.machine.create_process()
    client.processes[process.pid] = process
    return process.pid, b""


# --- a process's memory -----------------------------------------------------------------------------------------------------------


@serves(Map)
async def mmap(client: Client, arguments: Map, _data: bytes) -> Answer:
    """mmap(2); the address."""
    return await client.process(arguments).mmap(arguments.length, arguments.protection, arguments.address), b""


@serves(Range)
async def munmap(client: Client, arguments: Range, _data: bytes) -> Answer:
    """munmap(2)."""
    await client.process(arguments).munmap(arguments.address, arguments.length)
    return None, b""


@serves(Protect)
async def mprotect(client: Client, arguments: Protect, _data: bytes) -> Answer:
    """mprotect(2)."""
    await client.process(arguments).mprotect(arguments.address, arguments.length, arguments.protection)
    return None, b""


@serves(Advise)
async def madvise(client: Client, arguments: Advise, _data: bytes) -> Answer:
    """madvise(2)."""
    await client.process(arguments).madvise(arguments.address, arguments.length, arguments.advice)
    return None, b""


@serves(Allocate)
async def malloc(client: Client, arguments: Allocate, _data: bytes) -> Answer:
    """Memory of the process's heap; the address."""
    return await client.process(arguments).malloc(arguments.length), b""


@serves(Read)
async def read(client: Client, arguments: Read, _data: bytes) -> Answer:
    """CPU load of at most a chunk."""
    return None, await client.process(arguments).read(arguments.address, arguments.length)


@serves(Write)
async def write(client: Client, arguments: Write, data: bytes) -> Answer:
    """CPU store of the call's data."""
    await client.process(arguments).write(arguments.address, data)
    return None, b""


@serves(Look)
async def pagemap(client: Client, arguments: Look, _data: bytes) -> Answer:
    """/proc/PID/pagemap, a byte a page."""
    return None, await client.process(arguments).pagemap(arguments.address, arguments.pages)


@serves(Look)
async def residency(client: Client, arguments: Look, _data: bytes) -> Answer:
    """Owners, and for each page an index into them."""
    found = await client.process(arguments).residency(arguments.address, arguments.pages)
    return list(found.owners), np.ascontiguousarray(found.pages, dtype="<i2").tobytes()


@serves(Move)
async def migrate(client: Client, arguments: Move, _data: bytes) -> Answer:
    """Move pages; how many bytes moved."""
    return await client.process(arguments).migrate(arguments.address, arguments.length, arguments.to), b""


@serves(OnProcess)
async def exit(client: Client, arguments: OnProcess, _data: bytes) -> Answer:  # noqa: A001 - the operation's name
    """End a process."""
    process = client.process(arguments)
    del client.processes[arguments.process]
    for key in [key for key in client.handles if key[0] == arguments.process]:
        del client.handles[key]
    await process.exit()
    return None, b""


# --- devices ----------------------------------------------------------------------------------------------------------------------


@serves(Start)
async def launch(client: Client, arguments: Start, _data: bytes) -> Answer:
    """Run a kernel and wait for it."""
    reserved = arguments.arguments.keys() & {"kernel", "device", "placement", "self"}
    if reserved:
        raise ProtocolError(f"a kernel argument cannot be called {min(reserved)!r}")
    process = client.process(arguments)
    done = await process.launch(arguments.kernel, arguments.device, arguments.placement, **arguments.arguments)
    return {"results": dict(done.results), "counters": dict(done.counters)}, b""


@serves(Open)
async def open(client: Client, arguments: Open, _data: bytes) -> Answer:  # noqa: A001 - the operation's name
    """Open a device; the number of the handle."""
    if len(client.handles) >= HANDLES_MAX:
        raise KernelError(errno.EMFILE, "open", f"a client may have {HANDLES_MAX} handles")
    handle = await client.process(arguments).open(arguments.device)
    client.handle_numbers += 1
    client.handles[arguments.process, client.handle_numbers] = OpenHandle(handle)
    return client.handle_numbers, b""


@serves(OnHandle)
async def close(client: Client, arguments: OnHandle, _data: bytes) -> Answer:
    """Close a handle."""
    found = client.handle(arguments)
    del client.handles[arguments.process, arguments.handle]
    await found.handle.close()
    return None, b""


@serves(OnHandle)
async def stage(client: Client, arguments: OnHandle, data: bytes) -> Answer:
    """Put data ahead of the handle's next ioctl; how many bytes lie there now."""
    found = client.handle(arguments)
    if len(found.staged) + len(data) > STAGED_BYTES_MAX:
        found.staged.clear()
        raise KernelError(errno.E2BIG, "ioctl", f"a command takes at most {STAGED_BYTES_MAX} bytes over a client session")
    found.staged += data
    return len(found.staged), b""


@serves(Command)
async def ioctl(client: Client, arguments: Command, data: bytes) -> Answer:
    """Run a device command; its counts, and the first chunk of its data."""
    found = client.handle(arguments)
    whole = bytes(found.staged) + data if found.staged else data
    found.staged.clear()
    if arguments.pages * PAGE_SIZE > STAGED_BYTES_MAX:
        raise KernelError(errno.E2BIG, "ioctl", f"a command covers at most {STAGED_BYTES_MAX // PAGE_SIZE} pages over a client session")
    done = await found.handle.ioctl(arguments.command, arguments.address, arguments.pages, whole, arguments.flags)
    found.result = done.data
    return {"cpages": done.cpages, "faults": done.faults, "length": len(done.data)}, done.data[:CHUNK_BYTES]


@serves(Fetch)
async def fetch(client: Client, arguments: Fetch, _data: bytes) -> Answer:
    """More of the last ioctl's data."""
    found = client.handle(arguments)
    return None, found.result[arguments.offset : arguments.offset + CHUNK_BYTES]
