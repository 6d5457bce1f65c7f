"""What a client holds of a machine that runs elsewhere: processes, handles, files and references, each a number at the host.

Every operation is one `Call` (see its docstring for the list). What is longer than a call may carry goes in pieces, a few of them under
way at once; a piece that fails ends the operation, and those that were under way may have taken effect, as with any interrupted access.
"""

from __future__ import annotations

import errno
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import trio

from hmmnet.checks import (
    Arrayable,
    as_bytes,
    as_type,
    as_value,
    check_file,
    check_pages,
    check_range,
    check_whole,
    not_found,
    plain_arguments,
)
from hmmnet.errors import KernelError, PeerGone, PeerLost, RemoteError
from hmmnet.pages import PAGE_SIZE
from hmmnet.program import (
    Handle,
    IoctlResult,
    JobResult,
    Mapping,
    MemoryFile,
    PageReferences,
    Process,
    Residency,
    UserFaults,
    documented_by,
)
from hmmnet.wire.messages import Call, Message, Recall, Result
from hmmnet.wire.session import PendingReply, Session

CHUNK_BYTES = 1 << 20
"""Data that one call or its reply carries."""
PIECES_UNDER_WAY = 4
"""Pieces of one operation that wait for their answers at once: enough to keep the session busy."""
DEVICE_LOST = re.compile(r"host: Call: (?P<kind>PeerGone|PeerLost): (?P<why>.*)", re.DOTALL)
"""How a host says that a device is lost that it needed for a call."""
PAGES_PER_LOOK = CHUNK_BYTES // 2
Undo: TypeAlias = tuple[str, dict[str, Any]]
"""An operation and its arguments."""


class Calls:
    """Asks the host and reads its answers."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._number = 0

    def begin(self, operation: str, data: bytes = b"", number: int = 0, **arguments: Any) -> PendingReply:
        """Send a call; `finish` gives what it returns. Raises KernelError(EINVAL) for what no message can hold, PeerLost."""
        try:
            packed = msgspec.msgpack.encode(arguments)
        except (TypeError, ValueError, OverflowError) as error:
            raise KernelError(errno.EINVAL, operation, f"the arguments cannot be sent: {error}") from error
        return self._session.begin(Call(operation, packed, data, number))

    async def finish(self, pending: PendingReply) -> tuple[Any, bytes]:
        """The value and the data of an answer. Raises the operation's KernelError or SignalError, and PeerLost: a device's, as inside the
        host, or the host's own.
        """
        try:
            result = await pending.wait()
        except RemoteError as error:
            lost = DEVICE_LOST.fullmatch(str(error))
            if lost is None:
                raise
            raise (PeerGone if lost["kind"] == "PeerGone" else PeerLost)(lost["why"]) from error
        assert isinstance(result, Result), f"a call was answered with {type(result).__name__}"
        return msgspec.msgpack.decode(result.value), result.data

    async def call(self, operation: str, data: bytes = b"", **arguments: Any) -> tuple[Any, bytes]:
        """One call, from begin to end."""
        return await self.finish(self.begin(operation, data, **arguments))

    async def recallable(self, operation: str, undo: Callable[[Any], Undo] | None = None, **arguments: Any) -> Any:
        """The value of a call that may run long, or makes something. Cancelled, it ends at the host too.

        What it has made by then is unmade: `undo` gives the call that does it.
        """
        self._number += 1
        number = self._number
        pending = self.begin(operation, number=number, **arguments)
        try:
            value, _ = await self.finish(pending)
        except trio.Cancelled:
            self._session.note(Recall(number))
            if undo is not None:
                pending.leave(partial(self._undo, undo))
            raise
        return value

    def _undo(self, undo: Callable[[Any], Undo], answer: Message) -> None:
        assert isinstance(answer, Result), f"a call was answered with {type(answer).__name__}"
        operation, arguments = undo(msgspec.msgpack.decode(answer.value))
        if self._session.lost is None:
            self.begin(operation, **arguments)

    async def pieces(self, begin: Callable[[int, int], PendingReply], length: int, step: int) -> AsyncGenerator[tuple[Any, bytes], None]:
        """The answers to ``begin(offset, size)`` for every piece of `length`, in order."""
        waiting: deque[PendingReply] = deque()
        for offset, size in _cut(length, step):
            if len(waiting) == PIECES_UNDER_WAY:
                yield await self.finish(waiting.popleft())
            waiting.append(begin(offset, size))
        while waiting:
            yield await self.finish(waiting.popleft())


def _cut(length: int, step: int) -> Iterator[tuple[int, int]]:
    for offset in range(0, length, step):
        yield offset, min(step, length - offset)


@documented_by(Handle)
class RemoteHandle:
    """See `hmmnet.program.Handle`."""

    def __init__(self, calls: Calls, process: RemoteProcess, device: str, number: int) -> None:
        self.device = device
        self.number = number
        self._calls = calls
        self._process = process
        self._where: dict[str, Any] = {"process": process.pid, "handle": number}

    async def ioctl(self, command: str, address: int, pages: int, data: bytes = b"", flags: int = 0) -> IoctlResult:
        """See `Handle.ioctl`."""
        calls = self._calls
        last = data[len(data) - len(data) % CHUNK_BYTES :]
        for offset in range(0, len(data) - len(last), CHUNK_BYTES):
            await calls.call("stage", data[offset : offset + CHUNK_BYTES], **self._where)
        done, first = await calls.call("ioctl", last, command=command, address=address, pages=pages, flags=flags, **self._where)
        got = [first]
        while (have := sum(map(len, got))) < done["length"]:
            got.append((await calls.call("fetch", offset=have, **self._where))[1])
        return IoctlResult(done["cpages"], done["faults"], b"".join(got))

    async def close(self) -> None:
        """See `Handle.close`."""
        self._process.handles.pop(self.number, None)
        await self._calls.call("close", **self._where)


@documented_by(PageReferences)
class RemoteReferences:
    """See `hmmnet.program.PageReferences`."""

    def __init__(self, calls: Calls, process: int, reference: int, count: int) -> None:
        self.count = count
        self._calls = calls
        self._where: dict[str, Any] = {"process": process, "reference": reference}
        self._held = True

    async def read(self, pages: int, first: int = 0) -> bytes:
        """See `PageReferences.read`."""

        def begin(offset: int, count: int) -> PendingReply:
            return self._calls.begin("read_pages", first=first + offset, pages=count, **self._where)

        return b"".join([data async for _, data in self._calls.pieces(begin, pages, CHUNK_BYTES // PAGE_SIZE)])

    async def put(self) -> None:
        """See `PageReferences.put`."""
        if self._held:
            self._held = False
            await self._calls.call("put_pages", **self._where)


@documented_by(MemoryFile)
class RemoteFile:
    """See `hmmnet.program.MemoryFile`."""

    def __init__(self, calls: Calls, number: int, size: int) -> None:
        self._size = size
        self._calls = calls
        self._number: int | None = number

    @property
    def size(self) -> int:
        """See `MemoryFile.size`. Of what was cancelled it knows when the answer has come."""
        self.number("fstat")
        return self._size

    def number(self, call: str) -> int:
        """What the host knows it by. Raises KernelError(EBADF) when it is closed."""
        if self._number is None:
            raise KernelError(errno.EBADF, call, "the file is closed")
        return self._number

    async def read(self, offset: int, length: int) -> bytes:
        """See `MemoryFile.read`."""
        number = self.number("pread")
        check_file("pread", offset, 0)
        check_file("pread", 0, length)
        read: list[bytes] = []

        def begin(at: int, count: int) -> PendingReply:
            return self._calls.begin("file_read", file=number, offset=offset + at, length=count)

        async with aclosing(self._calls.pieces(begin, length, CHUNK_BYTES)) as pieces:
            async for _, data in pieces:
                read.append(data)
                if len(data) < CHUNK_BYTES:
                    break  # the end of the file
        return b"".join(read)

    async def write(self, offset: int, data: Arrayable) -> None:
        """See `MemoryFile.write`."""
        number = self.number("pwrite")
        raw = as_bytes(data)
        check_file("pwrite", offset, len(raw))
        for at in range(0, len(raw), CHUNK_BYTES):
            chunk = raw[at : at + CHUNK_BYTES].tobytes()
            await self._resized(self._calls.begin("file_write", chunk, file=number, offset=offset + at))

    async def _resized(self, pending: PendingReply) -> None:
        """Wait for an answer that says how long the file is now."""
        try:
            self._size, _ = await self._calls.finish(pending)
        except trio.Cancelled:
            pending.leave(self._late)  # it takes effect all the same
            raise

    def _late(self, answer: Message) -> None:
        assert isinstance(answer, Result), f"a call was answered with {type(answer).__name__}"
        self._size = msgspec.msgpack.decode(answer.value)

    async def punch(self, offset: int, length: int) -> None:
        """See `MemoryFile.punch`."""
        check_file("fallocate", offset, 0)
        check_file("fallocate", 0, length)
        await self._calls.call("file_punch", file=self.number("fallocate"), offset=offset, length=length)

    async def truncate(self, length: int) -> None:
        """See `MemoryFile.truncate`."""
        check_file("ftruncate", 0, length)
        await self._resized(self._calls.begin("file_truncate", file=self.number("ftruncate"), length=length))

    async def close(self) -> None:
        """See `MemoryFile.close`."""
        number, self._number = self._number, None
        if number is not None:
            await self._calls.call("file_close", file=number)


@documented_by(UserFaults)
class RemoteFaults:
    """See `hmmnet.program.UserFaults`."""

    def __init__(self, calls: Calls, process: int, number: int) -> None:
        self._calls = calls
        self._where: dict[str, Any] = {"process": process, "faults": number}
        self._open = True

    async def read(self) -> int:
        """See `UserFaults.read`; cancelled, it may have taken an address that nobody gets to see."""
        return int(await self._calls.recallable("fault_read", **self._where))

    async def copy(self, address: int, data: bytes) -> None:
        """See `UserFaults.copy`; at most a chunk at once."""
        await self._calls.call("fault_copy", data, address=address, **self._where)

    async def close(self) -> None:
        """See `UserFaults.close`."""
        if self._open:
            self._open = False
            await self._calls.call("fault_close", **self._where)


@documented_by(Process)
class RemoteProcess:
    """See `hmmnet.program.Process`."""

    def __init__(self, calls: Calls, pid: int) -> None:
        self.pid = pid
        self.handles: dict[int, RemoteHandle] = {}
        self._calls = calls
        self._ended = False
        """It has exited, and the host has said so."""

    async def mmap(
        self,
        length: int,
        protection: str = "rw",
        address: int | None = None,
        *,
        populate: bool = False,
        shared: bool = False,
        file: MemoryFile | Handle | None = None,
        offset: int = 0,
        hugetlb: bool = False,
    ) -> int:
        """See `Process.mmap`."""
        check_file("mmap", offset, 0)
        if isinstance(file, RemoteHandle):
            mapping: dict[str, Any] = {
                "length": length,
                "protection": protection,
                "address": address,
                "shared": shared,
                "handle": file.number,
            }
            return int((await self._calls.call("mmap", process=self.pid, **mapping))[0])
        if file is not None and not isinstance(file, RemoteFile):
            raise KernelError(errno.EBADF, "mmap", f"{type(file).__name__} is no file of this machine; take one from memfd_create")
        where: dict[str, Any] = {"length": length, "protection": protection, "address": address, "populate": populate}
        where["hugetlb"] = hugetlb
        number = None if file is None else file.number("mmap")
        return int((await self._calls.call("mmap", process=self.pid, shared=shared, file=number, offset=offset, **where))[0])

    async def memfd_create(self, length: int) -> RemoteFile:
        """See `Process.memfd_create`."""
        check_file("memfd_create", 0, length)
        calls = self._calls
        number = await calls.recallable("memfd_create", lambda made: ("file_close", {"file": made}), process=self.pid, length=length)
        return RemoteFile(self._calls, number, length)

    async def munmap(self, address: int, length: int) -> None:
        """See `Process.munmap`."""
        await self._calls.call("munmap", process=self.pid, address=address, length=length)

    async def mprotect(self, address: int, length: int, protection: str) -> None:
        """See `Process.mprotect`."""
        await self._calls.call("mprotect", process=self.pid, address=address, length=length, protection=protection)

    async def madvise(self, address: int, length: int, advice: str) -> None:
        """See `Process.madvise`."""
        await self._calls.call("madvise", process=self.pid, address=address, length=length, advice=advice)

    async def mlock(self, address: int, length: int) -> None:
        """See `Process.mlock`."""
        await self._calls.call("mlock", process=self.pid, address=address, length=length)

    async def userfaultfd(self, address: int, length: int, *, sigbus: bool = False) -> RemoteFaults:
        """See `Process.userfaultfd`."""
        number, _ = await self._calls.call("userfaultfd", process=self.pid, address=address, length=length, sigbus=sigbus)
        return RemoteFaults(self._calls, self.pid, number)

    async def munlock(self, address: int, length: int) -> None:
        """See `Process.munlock`."""
        await self._calls.call("munlock", process=self.pid, address=address, length=length)

    async def mremap(
        self, address: int, old: int, new: int, target: int | None = None, *, may_move: bool = True, dontunmap: bool = False
    ) -> int:
        """See `Process.mremap`."""
        where: dict[str, Any] = {"address": address, "old": old, "new": new, "target": target, "may_move": may_move, "dontunmap": dontunmap}
        return int((await self._calls.call("mremap", process=self.pid, **where))[0])

    async def get_user_pages(
        self, address: int, pages: int, *, write: bool = False, pin: bool = False, longterm: bool = False
    ) -> RemoteReferences:
        """See `Process.get_user_pages`; at most 16384 pages at once."""
        how: dict[str, Any] = {"write": write, "pin": pin, "longterm": longterm}
        undo = self._undone("put_pages", lambda made: {"reference": made["reference"]})
        held = await self._calls.recallable("get_user_pages", undo, process=self.pid, address=address, pages=pages, **how)
        return RemoteReferences(self._calls, self.pid, held["reference"], held["count"])

    async def malloc(self, length: int) -> int:
        """See `Process.malloc`."""
        return int((await self._calls.call("malloc", process=self.pid, length=length))[0])

    async def read(self, address: int, length: int) -> bytes:
        """See `Process.read`."""
        check_range("read", address, length)

        def begin(offset: int, size: int) -> PendingReply:
            return self._calls.begin("read", process=self.pid, address=address + offset, length=size)

        return b"".join([data async for _, data in self._calls.pieces(begin, length, CHUNK_BYTES)])

    async def write(self, address: int, data: bytes | bytearray | memoryview | npt.NDArray[Any]) -> None:
        """See `Process.write`."""
        view = np.ascontiguousarray(data).data.cast("B") if isinstance(data, np.ndarray) else memoryview(data).cast("B")

        def begin(offset: int, size: int) -> PendingReply:
            return self._calls.begin("write", bytes(view[offset : offset + size]), process=self.pid, address=address + offset)

        async for _ in self._calls.pieces(begin, len(view), CHUNK_BYTES):
            continue

    async def load(self, address: int, dtype: str = "<u8") -> int | float:
        """See `Process.load`."""
        kind = as_type("load", dtype)
        value: int | float = np.frombuffer(await self.read(address, kind.itemsize), dtype=kind)[0].item()
        return value

    async def store(self, address: int, value: float, dtype: str = "<u8") -> None:
        """See `Process.store`."""
        await self.write(address, as_value("store", value, dtype))

    async def read_array(self, address: int, dtype: str, count: int) -> npt.NDArray[Any]:
        """See `Process.read_array`."""
        kind = as_type("read_array", dtype)
        check_whole("read_array", count=count)
        return np.frombuffer(bytearray(await self.read(address, count * kind.itemsize)), dtype=kind)

    async def pagemap(self, address: int, pages: int) -> bytes:
        """See `Process.pagemap`."""
        check_pages("pagemap", address, pages)
        return b"".join([data async for _, data in self._calls.pieces(self._looking("pagemap", address), pages, PAGES_PER_LOOK)])

    async def pagemap_words(self, address: int, pages: int) -> npt.NDArray[np.uint64]:
        """See `Process.pagemap_words`."""
        check_pages("pagemap_words", address, pages)
        parts = [data async for _, data in self._calls.pieces(self._looking("pagemap_words", address), pages, PAGES_PER_LOOK // 8)]
        return np.frombuffer(b"".join(parts), "<u8").astype(np.uint64)

    async def smaps(self) -> list[Mapping]:
        """See `Process.smaps`."""
        found, _ = await self._calls.call("smaps", process=self.pid)
        return [Mapping(*fields) for fields in found]

    async def clear_refs(self, *, soft_dirty: bool = True) -> None:
        """See `Process.clear_refs`."""
        await self._calls.call("clear_refs", process=self.pid, soft_dirty=soft_dirty)

    async def residency(self, address: int, pages: int) -> Residency:
        """See `Process.residency`."""
        check_pages("residency", address, pages)
        owners: list[str] = []
        parts: list[npt.NDArray[np.int16]] = []
        async for names, data in self._calls.pieces(self._looking("residency", address), pages, PAGES_PER_LOOK):
            owners += [name for name in names if name not in owners]
            part = np.frombuffer(data, dtype="<i2").astype(np.int16)
            number = np.array([owners.index(name) for name in names], dtype=np.int16)
            known = part >= 0
            part[known] = number[part[known]]
            parts.append(part)
        return Residency(tuple(owners), np.concatenate(parts) if parts else np.zeros(0, np.int16))

    def _undone(self, operation: str, arguments: Callable[[Any], dict[str, Any]]) -> Callable[[Any], Undo]:
        """Undo with an operation of this process."""
        return lambda made: (operation, {"process": self.pid, **arguments(made)})

    def _looking(self, operation: str, address: int) -> Callable[[int, int], PendingReply]:
        def begin(offset: int, size: int) -> PendingReply:
            return self._calls.begin(operation, process=self.pid, address=address + (offset << 12), pages=size)

        return begin

    async def open(self, device: str) -> RemoteHandle:
        """See `Process.open`."""
        undo = self._undone("close", lambda made: {"handle": made})
        number = await self._calls.recallable("open", undo, process=self.pid, device=device)
        handle = self.handles[number] = RemoteHandle(self._calls, self, device, number)
        return handle

    async def launch(self, kernel: str, device: str, placement: str = "demand", **arguments: Any) -> JobResult:
        """See `Process.launch`."""
        where: dict[str, Any] = {"kernel": kernel, "device": device, "placement": placement}
        packed = plain_arguments(kernel, arguments)
        try:
            done = await self._calls.recallable("launch", process=self.pid, arguments=packed, **where)
        except KernelError as error:
            mended = not_found(error, kernel, placement)
            if mended is None:
                raise
            raise mended from None
        return JobResult(done["results"], done["counters"])

    async def migrate(self, address: int, length: int, to: str) -> int:
        """See `Process.migrate`."""
        return int(await self._calls.recallable("migrate", process=self.pid, address=address, length=length, to=to))

    async def fork(self) -> RemoteProcess:
        """See `Process.fork`."""
        made = await self._calls.recallable("fork", lambda made: ("exit", {"process": made["process"]}), process=self.pid)
        child = RemoteProcess(self._calls, made["process"])
        for number, device in made["handles"].items():
            child.handles[number] = RemoteHandle(self._calls, child, device, number)
        return child

    async def oom_score(self) -> int:
        """See `Process.oom_score`."""
        return int((await self._calls.call("oom_score", process=self.pid))[0])

    async def set_oom_score_adj(self, value: int) -> None:
        """See `Process.set_oom_score_adj`."""
        await self._calls.call("set_oom_score_adj", process=self.pid, value=value)

    async def kill(self, *, out_of_memory: bool = False) -> None:
        """See `Process.kill`."""
        await self._end("kill", out_of_memory=out_of_memory)

    async def exit(self) -> None:
        """See `Process.exit`."""
        await self._end("exit")

    async def _end(self, operation: str, **how: Any) -> None:
        """The process ends; one that has ended already, also by a call that was cancelled or is under way, is not known there any more."""
        self.handles.clear()
        if self._ended:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self._calls.call(operation, process=self.pid, **how)
        except KernelError as error:
            if error.code != errno.ESRCH:
                raise
        self._ended = True
