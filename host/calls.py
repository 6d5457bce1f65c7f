"""What a client may ask for: names of operations become method calls, after every argument was checked.

Each operation has a struct (`arguments.py`) that says which arguments it takes and how large they may be, so a malformed call ends in a
refusal of the `Client` and never in an exception further in. An operation may be cancelled at any await: what it makes for the client
is the client's (in `processes`, `handles`, `files`, `references`) in the same step in which it is made.

The operations are listed, with their arguments, in the docstring of `hmmnet.wire.messages.Call`. To add one, write its struct and a
function under ``@serves(STRUCT)``; the function's name is the operation's.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import numpy as np

from hmmnet.errors import KernelError, ProtocolError
from hmmnet.faults.catalogue import fault
from hmmnet.pages import PAGE_SIZE, to_wire
from hmmnet.program import Handle, Machine, MemoryFile

from .arguments import (
    CHUNK_BYTES,
    STAGED_BYTES_MAX,
    AddFault,
    Advise,
    Allocate,
    ClearRefs,
    Command,
    Create,
    CreateCgroup,
    CreateFile,
    FaultCopy,
    Fetch,
    FileChunk,
    FilePart,
    Kill,
    Look,
    LookAtWords,
    Map,
    Move,
    OnCgroup,
    OnDevice,
    OnFaults,
    OnFile,
    OnHandle,
    OnProcess,
    Open,
    Operation,
    Protect,
    Range,
    Read,
    ReadReferred,
    Refer,
    Referred,
    Register,
    Remap,
    RemoveFault,
    ScoreAdj,
    Start,
    Write,
)
from .clients import FAULTS_MAX, FILES_MAX, REFERENCE_SETS_MAX, Answer, Client, Injectable, OpenHandle, Serve, T

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


def new_client(machine: Machine) -> Client:
    """A client that may call all of them."""
    return Client(machine, _OPERATIONS)


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
async def check(client: Client, _arguments: Operation, _data: bytes) -> Answer:
    """The invariants of the whole machine, now."""
    return await client.machine.check(), b""


@serves(Create)
async def create_process(client: Client, arguments: Create, _data: bytes) -> Answer:
    """A new process; its pid."""
    client.room_for_process("create_process")
    process = await client.machine.create_process(arguments.node, arguments.cgroup)
    client.processes[process.pid] = process
    return process.pid, b""


@serves(CreateCgroup)
async def create_cgroup(client: Client, arguments: CreateCgroup, _data: bytes) -> Answer:
    """A new memory cgroup."""
    await client.machine.create_cgroup(arguments.name, arguments.limit)
    return None, b""


@serves(OnCgroup)
async def oom_kill(client: Client, arguments: OnCgroup, _data: bytes) -> Answer:
    """Kill whose end frees most memory; its pid."""
    return await client.machine.oom_kill(arguments.cgroup), b""


@serves(OnDevice)
async def unplug(client: Client, arguments: OnDevice, _data: bytes) -> Answer:
    """Hot removal."""
    await client.machine.unplug(arguments.device)
    return None, b""


def _host(client: Client) -> Injectable:
    """The machine as who breaks it sees it. Raises KernelError(EOPNOTSUPP) for one that is not a host."""
    if not isinstance(client.machine, Injectable):
        raise KernelError(errno.EOPNOTSUPP, "add_fault", "this machine takes no faults over a session")
    return client.machine


@serves(AddFault)
async def add_fault(client: Client, arguments: AddFault, _data: bytes) -> Answer:
    """A fault begins; its number."""
    given = {str(name): value for name, value in arguments.fault.items()}
    return _host(client).add_fault(fault(str(given.pop("kind", "")), **given)), b""


@serves(RemoveFault)
async def remove_fault(client: Client, arguments: RemoveFault, _data: bytes) -> Answer:
    """A fault ends."""
    _host(client).remove_fault(arguments.fault)
    return None, b""


@serves(Operation)
async def list_faults(client: Client, _arguments: Operation, _data: bytes) -> Answer:
    """The faults that are."""
    return _host(client).list_faults(), b""


# --- a process's memory -----------------------------------------------------------------------------------------------------------


@serves(Map)
async def mmap(client: Client, arguments: Map, _data: bytes) -> Answer:
    """mmap(2); the address."""
    process = client.process(arguments)
    mapped: MemoryFile | Handle | None = None
    if arguments.handle is not None:
        mapped = client.handle(OnHandle(arguments.process, arguments.handle)).handle
    elif arguments.file is not None:
        mapped = client.file(arguments.file)
    address = await process.mmap(
        arguments.length,
        arguments.protection,
        arguments.address,
        populate=arguments.populate,
        shared=arguments.shared,
        file=mapped,
        offset=arguments.offset,
        hugetlb=arguments.hugetlb,
    )
    return address, b""


# --- files ------------------------------------------------------------------------------------------------------------------------


@serves(CreateFile)
async def memfd_create(client: Client, arguments: CreateFile, _data: bytes) -> Answer:
    """memfd_create(2); the file's number."""
    process = client.process(arguments)
    if len(client.files) >= FILES_MAX:
        raise KernelError(errno.EMFILE, "memfd_create", f"a client may have {FILES_MAX} files")
    made = await process.memfd_create(arguments.length)
    client.file_numbers += 1
    client.files[client.file_numbers] = made
    return client.file_numbers, b""


@serves(FileChunk)
async def file_read(client: Client, arguments: FileChunk, _data: bytes) -> Answer:
    """pread(2) of a chunk."""
    return None, await client.file(arguments.file).read(arguments.offset, arguments.length)


@serves(FilePart)
async def file_write(client: Client, arguments: FilePart, data: bytes) -> Answer:
    """pwrite(2) of the data; the size then."""
    file = client.file(arguments.file)
    await file.write(arguments.offset, data)
    return file.size, b""


@serves(FilePart)
async def file_punch(client: Client, arguments: FilePart, _data: bytes) -> Answer:
    """A hole."""
    await client.file(arguments.file).punch(arguments.offset, arguments.length)
    return None, b""


@serves(FilePart)
async def file_truncate(client: Client, arguments: FilePart, _data: bytes) -> Answer:
    """ftruncate(2); the size then."""
    file = client.file(arguments.file)
    await file.truncate(arguments.length)
    return file.size, b""


@serves(OnFile)
async def file_close(client: Client, arguments: OnFile, _data: bytes) -> Answer:
    """close(2)."""
    await client.file(arguments.file).close()
    client.files.pop(arguments.file, None)
    return None, b""


# --- more of a process's memory ---------------------------------------------------------------------------------------------------


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


@serves(Range)
async def mlock(client: Client, arguments: Range, _data: bytes) -> Answer:
    """mlock(2)."""
    await client.process(arguments).mlock(arguments.address, arguments.length)
    return None, b""


@serves(Register)
async def userfaultfd(client: Client, arguments: Register, _data: bytes) -> Answer:
    """userfaultfd(2); the registration's number."""
    process = client.process(arguments)
    if len(client.faults) >= FAULTS_MAX:
        raise KernelError(errno.EMFILE, "userfaultfd", f"a client may have {FAULTS_MAX} registrations")
    made = await process.userfaultfd(arguments.address, arguments.length, sigbus=arguments.sigbus)
    client.fault_numbers += 1
    client.faults[client.fault_numbers] = made
    return client.fault_numbers, b""


@serves(OnFaults)
async def fault_read(client: Client, arguments: OnFaults, _data: bytes) -> Answer:
    """The address of a page that somebody waits for."""
    return await client.user_faults(arguments).read(), b""


@serves(FaultCopy)
async def fault_copy(client: Client, arguments: FaultCopy, data: bytes) -> Answer:
    """UFFDIO_COPY."""
    await client.user_faults(arguments).copy(arguments.address, data)
    return None, b""


@serves(OnFaults)
async def fault_close(client: Client, arguments: OnFaults, _data: bytes) -> Answer:
    """The end of a registration."""
    await client.user_faults(arguments).close()
    client.faults.pop(arguments.faults, None)
    return None, b""


@serves(Range)
async def munlock(client: Client, arguments: Range, _data: bytes) -> Answer:
    """munlock(2)."""
    await client.process(arguments).munlock(arguments.address, arguments.length)
    return None, b""


@serves(Remap)
async def mremap(client: Client, arguments: Remap, _data: bytes) -> Answer:
    """mremap(2); the address."""
    moved = await client.process(arguments).mremap(
        arguments.address, arguments.old, arguments.new, arguments.target, may_move=arguments.may_move, dontunmap=arguments.dontunmap
    )
    return moved, b""


@serves(Refer)
async def get_user_pages(client: Client, arguments: Refer, _data: bytes) -> Answer:
    """References to pages; their number, and how many there are."""
    process = client.process(arguments)
    if len(client.references) >= REFERENCE_SETS_MAX:
        raise KernelError(errno.EMFILE, "get_user_pages", f"a client may hold pages {REFERENCE_SETS_MAX} times")
    held = await process.get_user_pages(
        arguments.address, arguments.pages, write=arguments.write, pin=arguments.pin, longterm=arguments.longterm
    )
    client.reference_numbers += 1
    client.references[client.reference_numbers] = held
    return {"reference": client.reference_numbers, "count": held.count}, b""


@serves(ReadReferred)
async def read_pages(client: Client, arguments: ReadReferred, _data: bytes) -> Answer:
    """What referenced pages hold."""
    return None, await client.referred(arguments).read(arguments.pages, arguments.first)


@serves(Referred)
async def put_pages(client: Client, arguments: Referred, _data: bytes) -> Answer:
    """Let referenced pages go."""
    held = client.referred(arguments)
    del client.references[arguments.reference]
    await held.put()
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


@serves(LookAtWords)
async def pagemap_words(client: Client, arguments: LookAtWords, _data: bytes) -> Answer:
    """/proc/PID/pagemap."""
    return None, to_wire(await client.process(arguments).pagemap_words(arguments.address, arguments.pages))


@serves(OnProcess)
async def smaps(client: Client, arguments: OnProcess, _data: bytes) -> Answer:
    """/proc/PID/smaps, each mapping as its fields in order."""
    return [list(astuple(mapping)) for mapping in await client.process(arguments).smaps()], b""


@serves(ClearRefs)
async def clear_refs(client: Client, arguments: ClearRefs, _data: bytes) -> Answer:
    """/proc/PID/clear_refs."""
    await client.process(arguments).clear_refs(soft_dirty=arguments.soft_dirty)
    return None, b""


@serves(Move)
async def migrate(client: Client, arguments: Move, _data: bytes) -> Answer:
    """Move pages; how many bytes moved."""
    return await client.process(arguments).migrate(arguments.address, arguments.length, arguments.to), b""


@serves(OnProcess)
async def fork(client: Client, arguments: OnProcess, _data: bytes) -> Answer:
    """fork(2); the child's pid, and the devices of its handles by number."""
    parent = client.process(arguments)
    client.room_for_process("fork")
    client.room_for(len(parent.handles), "fork")
    child = await parent.fork()
    client.processes[child.pid] = child
    for number, handle in child.handles.items():
        client.handles[child.pid, number] = OpenHandle(handle)
    return {"process": child.pid, "handles": {number: handle.device for number, handle in child.handles.items()}}, b""


@serves(OnProcess)
async def exit(client: Client, arguments: OnProcess, _data: bytes) -> Answer:  # noqa: A001 - the operation's name
    """End a process."""
    process = client.process(arguments)
    _forget_handles(client, arguments.process)
    await process.exit()
    client.processes.pop(arguments.process, None)
    return None, b""


@serves(Kill)
async def kill(client: Client, arguments: Kill, _data: bytes) -> Answer:
    """SIGKILL for a process."""
    process = client.process(arguments)
    _forget_handles(client, arguments.process)
    await process.kill(out_of_memory=arguments.out_of_memory)
    client.processes.pop(arguments.process, None)
    return None, b""


@serves(OnProcess)
async def oom_score(client: Client, arguments: OnProcess, _data: bytes) -> Answer:
    """/proc/PID/oom_score."""
    return await client.process(arguments).oom_score(), b""


@serves(ScoreAdj)
async def set_oom_score_adj(client: Client, arguments: ScoreAdj, _data: bytes) -> Answer:
    """/proc/PID/oom_score_adj."""
    await client.process(arguments).set_oom_score_adj(arguments.value)
    return None, b""


def _forget_handles(client: Client, process: int) -> None:
    for key in [key for key in client.handles if key[0] == process]:
        del client.handles[key]


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
    client.room_for(1, "open")
    handle = await client.process(arguments).open(arguments.device)
    client.handles[arguments.process, handle.number] = OpenHandle(handle)
    return handle.number, b""


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
