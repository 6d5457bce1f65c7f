"""The machine for programs without an event loop, or with another one: blocking calls into a trio loop in a background thread.

Notebooks run asyncio, scripts run nothing; neither can ``await`` under trio. A `Blocking` runs one asynchronous context manager in a
thread of its own; the proxies below have the methods of `Machine`, `Process` and `Handle`, without ``await``.

Ctrl-C in the caller's thread cancels the call that it waits for and raises KeyboardInterrupt there, as for any blocking call. A thread that
still runs when the interpreter ends does not hold it up: the machine's processes notice that their starter is gone.
"""

from __future__ import annotations

import atexit
import errno
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import outcome
import trio

from hmmnet.errors import HmmnetError, KernelError
from hmmnet.program import (
    Handle,
    IoctlResult,
    JobResult,
    Machine,
    Mapping,
    MemoryFile,
    PageReferences,
    Process,
    Residency,
    UserFaults,
    documented_by,
)

T = TypeVar("T")
R = TypeVar("R")

CANCEL_S_MAX = 0.5
"""Real seconds that Ctrl-C waits for the call that it cancels: one that cleans up behind a shield must not hold up who wants out."""


@contextmanager
def _refused_after_the_end() -> Iterator[None]:
    try:
        yield
    except trio.RunFinishedError:
        raise HmmnetError("the machine has ended") from None


@contextmanager
def only_error(body: BaseException | None = None) -> Iterator[None]:
    """Let an exception group with one leaf be that leaf: a nursery inside is no business of the caller's.

    It tells what it came of, as it did before. When the leaf is `body`, the exception that the caller's own block was left with, nothing is
    raised: it goes on by itself.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        leaf: BaseException = group
        while isinstance(leaf, BaseExceptionGroup) and len(leaf.exceptions) == 1:
            leaf = leaf.exceptions[0]
        if body is not None and leaf is body:
            return
        if isinstance(leaf, BaseExceptionGroup):
            raise
        context = leaf.__context__
        try:
            raise leaf
        finally:
            leaf.__context__ = context  # Python has put the group there, in place of what the leaf came of


def only_under_trio(call: str) -> None:
    """For ``async with`` of `call`. Raises HmmnetError in any other loop than trio's."""
    if not trio.lowlevel.in_trio_run():
        raise HmmnetError(f'"async with {call}" is for programs under trio; in asyncio, in notebooks and in scripts write "with {call}"')


class Blocking(Generic[T]):
    """One asynchronous context manager, entered in a background thread with a trio loop of its own. `make` is called in that thread."""

    def __init__(self, make: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._make = make
        self._started: queue.SimpleQueue[outcome.Outcome[T]] = queue.SimpleQueue()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._stop = trio.Event()
        self._outcome: outcome.Outcome[None] | None = None
        self._thread = threading.Thread(target=self._run, name="hmmnet", daemon=True)

    def start(self) -> T:
        """Enter the context manager and return what it gives."""
        if trio.lowlevel.in_trio_run():
            raise HmmnetError('this would block the trio loop it is called in: use "async with" here')
        self._thread.start()
        try:
            value = self._started.get().unwrap()
        except KeyboardInterrupt:
            self.stop()
            raise
        atexit.register(self.stop)
        return value

    def stop(self) -> None:
        """Leave the context manager and wait for the thread; what it raised while leaving is raised here. Once is enough."""
        atexit.unregister(self.stop)
        self._leave()
        self._thread.join()
        if self._outcome is not None:
            ended, self._outcome = self._outcome, None
            ended.unwrap()

    def _leave(self) -> None:
        """Have the thread leave the context manager."""
        if self._token is not None and self._thread.is_alive():
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._stop.set)

    def call(self, function: Callable[..., Awaitable[R]], *args: Any, **kwargs: Any) -> R:
        """Run a coroutine function in the loop and wait for what it returns or raises.

        A KeyboardInterrupt cancels it, and goes on when it has ended, or after `CANCEL_S_MAX`: what the caller does next finds it gone.
        """
        result: queue.SimpleQueue[outcome.Outcome[R]] = queue.SimpleQueue()
        scope = trio.CancelScope()

        async def work() -> None:
            with scope:
                try:
                    value = await function(*args, **kwargs)
                except trio.Cancelled:
                    result.put(outcome.Error(HmmnetError("the machine was ended while this call waited")))
                    raise
                except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for it
                    result.put(outcome.Error(error))
                else:
                    result.put(outcome.Value(value))

        def begin() -> None:
            if self._nursery is None:
                result.put(outcome.Error(HmmnetError("the machine has ended")))
            else:
                self._nursery.start_soon(work)

        token = self._token
        assert token is not None, "start() comes first"
        try:
            with _refused_after_the_end():
                token.run_sync_soon(begin)
            return result.get().unwrap()
        except KeyboardInterrupt:
            with suppress(trio.RunFinishedError, queue.Empty):
                token.run_sync_soon(scope.cancel)
                result.get(timeout=CANCEL_S_MAX)
            raise

    def ask(self, function: Callable[[], R]) -> R:
        """As `call`, for a function that does not wait."""

        async def asked() -> R:
            return function()

        return self.call(asked)

    def _run(self) -> None:
        self._outcome = outcome.capture(trio.run, self._main)
        if isinstance(self._outcome, outcome.Error):
            self._started.put(self._outcome)  # heard if it was the start that failed

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with only_error():
            async with self._make() as value, trio.open_nursery() as nursery:
                self._nursery = nursery
                self._started.put(outcome.Value(value))
                try:
                    await self._stop.wait()
                finally:
                    self._nursery = None  # also when it ended by itself: who calls now is told so
                nursery.cancel_scope.cancel()


@documented_by(Handle)
class BlockingHandle:
    """See `hmmnet.program.Handle`."""

    def __init__(self, handle: Handle, loop: Blocking[Any]) -> None:
        self.device = handle.device
        self.number = handle.number
        self.handle = handle
        self._loop = loop

    def ioctl(self, command: str, address: int, pages: int, data: bytes = b"", flags: int = 0) -> IoctlResult:
        """See `Handle.ioctl`."""
        return self._loop.call(self.handle.ioctl, command, address, pages, data, flags)

    def close(self) -> None:
        """See `Handle.close`."""
        self._loop.call(self.handle.close)


@documented_by(PageReferences)
class BlockingReferences:
    """See `hmmnet.program.PageReferences`."""

    def __init__(self, held: PageReferences, loop: Blocking[Any]) -> None:
        self.count = held.count
        self._held = held
        self._loop = loop

    def read(self, pages: int, first: int = 0) -> bytes:
        """See `PageReferences.read`."""
        return self._loop.call(self._held.read, pages, first)

    def put(self) -> None:
        """See `PageReferences.put`."""
        self._loop.call(self._held.put)


@documented_by(MemoryFile)
class BlockingFile:
    """See `hmmnet.program.MemoryFile`."""

    def __init__(self, file: MemoryFile, loop: Blocking[Any]) -> None:
        self.file = file
        self._loop = loop

    @property
    def size(self) -> int:
        """See `MemoryFile.size`."""
        return self._loop.ask(lambda: self.file.size)

    def read(self, offset: int, length: int) -> bytes:
        """See `MemoryFile.read`."""
        return self._loop.call(self.file.read, offset, length)

    def write(self, offset: int, data: bytes | bytearray | memoryview | npt.NDArray[Any]) -> None:
        """See `MemoryFile.write`."""
        self._loop.call(self.file.write, offset, data)

    def punch(self, offset: int, length: int) -> None:
        """See `MemoryFile.punch`."""
        self._loop.call(self.file.punch, offset, length)

    def truncate(self, length: int) -> None:
        """See `MemoryFile.truncate`."""
        self._loop.call(self.file.truncate, length)

    def close(self) -> None:
        """See `MemoryFile.close`."""
        self._loop.call(self.file.close)


@documented_by(UserFaults)
class BlockingFaults:
    """See `hmmnet.program.UserFaults`."""

    def __init__(self, faults: UserFaults, loop: Blocking[Any]) -> None:
        self._faults = faults
        self._loop = loop

    def read(self) -> int:
        """See `UserFaults.read`."""
        return self._loop.call(self._faults.read)

    def copy(self, address: int, data: bytes) -> None:
        """See `UserFaults.copy`."""
        self._loop.call(self._faults.copy, address, data)

    def close(self) -> None:
        """See `UserFaults.close`."""
        self._loop.call(self._faults.close)


@documented_by(Process)
class BlockingProcess:
    """See `hmmnet.program.Process`."""

    def __init__(self, process: Process, loop: Blocking[Any]) -> None:
        self.pid = process.pid
        self._process = process
        self._loop = loop

    def __repr__(self) -> str:
        return f"<process {self.pid}>"

    @property
    def handles(self) -> dict[int, BlockingHandle]:
        """See `Process.handles`."""
        return {
            number: BlockingHandle(handle, self._loop) for number, handle in self._loop.ask(lambda: dict(self._process.handles)).items()
        }

    def mmap(
        self,
        length: int,
        protection: str = "rw",
        address: int | None = None,
        *,
        populate: bool = False,
        shared: bool = False,
        file: BlockingFile | BlockingHandle | None = None,
        offset: int = 0,
        hugetlb: bool = False,
    ) -> int:
        """See `Process.mmap`."""
        if file is not None and not isinstance(file, BlockingFile | BlockingHandle):
            raise KernelError(errno.EBADF, "mmap", f"{type(file).__name__} is no file of this machine; take one from memfd_create")
        mapped = file.file if isinstance(file, BlockingFile) else None if file is None else file.handle
        where: dict[str, Any] = {"populate": populate, "shared": shared, "file": mapped, "offset": offset, "hugetlb": hugetlb}
        return self._loop.call(self._process.mmap, length, protection, address, **where)

    def memfd_create(self, length: int) -> BlockingFile:
        """See `Process.memfd_create`."""
        return BlockingFile(self._loop.call(self._process.memfd_create, length), self._loop)

    def munmap(self, address: int, length: int) -> None:
        """See `Process.munmap`."""
        self._loop.call(self._process.munmap, address, length)

    def mprotect(self, address: int, length: int, protection: str) -> None:
        """See `Process.mprotect`."""
        self._loop.call(self._process.mprotect, address, length, protection)

    def madvise(self, address: int, length: int, advice: str) -> None:
        """See `Process.madvise`."""
        self._loop.call(self._process.madvise, address, length, advice)

    def mlock(self, address: int, length: int) -> None:
        """See `Process.mlock`."""
        self._loop.call(self._process.mlock, address, length)

    def userfaultfd(self, address: int, length: int, *, sigbus: bool = False) -> BlockingFaults:
        """See `Process.userfaultfd`; the program that fills pages in has to be another thread than the one that waits for them."""
        return BlockingFaults(self._loop.call(self._process.userfaultfd, address, length, sigbus=sigbus), self._loop)

    def munlock(self, address: int, length: int) -> None:
        """See `Process.munlock`."""
        self._loop.call(self._process.munlock, address, length)

    def mremap(self, address: int, old: int, new: int, target: int | None = None, *, may_move: bool = True, dontunmap: bool = False) -> int:
        """See `Process.mremap`."""
        return self._loop.call(self._process.mremap, address, old, new, target, may_move=may_move, dontunmap=dontunmap)

    def get_user_pages(
        self, address: int, pages: int, *, write: bool = False, pin: bool = False, longterm: bool = False
    ) -> BlockingReferences:
        """See `Process.get_user_pages`."""
        held = self._loop.call(self._process.get_user_pages, address, pages, write=write, pin=pin, longterm=longterm)
        return BlockingReferences(held, self._loop)

    def malloc(self, length: int) -> int:
        """See `Process.malloc`."""
        return self._loop.call(self._process.malloc, length)

    def read(self, address: int, length: int) -> bytes:
        """See `Process.read`."""
        return self._loop.call(self._process.read, address, length)

    def write(self, address: int, data: bytes | bytearray | memoryview | npt.NDArray[Any]) -> None:
        """See `Process.write`."""
        self._loop.call(self._process.write, address, data)

    def load(self, address: int, dtype: str = "<u8") -> int | float:
        """See `Process.load`."""
        return self._loop.call(self._process.load, address, dtype)

    def store(self, address: int, value: float, dtype: str = "<u8") -> None:
        """See `Process.store`."""
        self._loop.call(self._process.store, address, value, dtype)

    def read_array(self, address: int, dtype: str, count: int) -> npt.NDArray[Any]:
        """See `Process.read_array`."""
        return self._loop.call(self._process.read_array, address, dtype, count)

    def pagemap(self, address: int, pages: int) -> bytes:
        """See `Process.pagemap`."""
        return self._loop.call(self._process.pagemap, address, pages)

    def pagemap_words(self, address: int, pages: int) -> npt.NDArray[np.uint64]:
        """See `Process.pagemap_words`."""
        return self._loop.call(self._process.pagemap_words, address, pages)

    def smaps(self) -> list[Mapping]:
        """See `Process.smaps`."""
        return self._loop.call(self._process.smaps)

    def clear_refs(self, *, soft_dirty: bool = True) -> None:
        """See `Process.clear_refs`."""
        self._loop.call(self._process.clear_refs, soft_dirty=soft_dirty)

    def residency(self, address: int, pages: int) -> Residency:
        """See `Process.residency`."""
        return self._loop.call(self._process.residency, address, pages)

    def open(self, device: str) -> BlockingHandle:
        """See `Process.open`."""
        return BlockingHandle(self._loop.call(self._process.open, device), self._loop)

    def launch(self, kernel: str, device: str, placement: str = "demand", **arguments: Any) -> JobResult:
        """See `Process.launch`."""
        return self._loop.call(self._process.launch, kernel, device, placement, **arguments)

    def migrate(self, address: int, length: int, to: str) -> int:
        """See `Process.migrate`."""
        return self._loop.call(self._process.migrate, address, length, to)

    def fork(self) -> BlockingProcess:
        """See `Process.fork`."""
        return BlockingProcess(self._loop.call(self._process.fork), self._loop)

    def oom_score(self) -> int:
        """See `Process.oom_score`."""
        return self._loop.call(self._process.oom_score)

    def set_oom_score_adj(self, value: int) -> None:
        """See `Process.set_oom_score_adj`."""
        self._loop.call(self._process.set_oom_score_adj, value)

    def kill(self, *, out_of_memory: bool = False) -> None:
        """See `Process.kill`."""
        self._loop.call(self._process.kill, out_of_memory=out_of_memory)

    def exit(self) -> None:
        """See `Process.exit`."""
        self._loop.call(self._process.exit)


@documented_by(Machine)
class BlockingMachine:
    """See `hmmnet.program.Machine`."""

    def __init__(self, machine: Machine, loop: Blocking[Any]) -> None:
        self._machine = machine
        self._loop = loop

    def __repr__(self) -> str:
        return repr(self._machine)

    @property
    def device_names(self) -> tuple[str, ...]:
        """See `Machine.device_names`."""
        return self._loop.ask(lambda: self._machine.device_names)

    def emulated_s(self) -> float:
        """See `Machine.emulated_s`."""
        return self._loop.ask(self._machine.emulated_s)

    def create_process(self, node: str = "", cgroup: str = "") -> BlockingProcess:
        """See `Machine.create_process`."""
        return BlockingProcess(self._loop.call(self._machine.create_process, node, cgroup), self._loop)

    def process(self, node: str = "", cgroup: str = "") -> BlockingProcess:
        """The same as `create_process`, for short programs."""
        return self.create_process(node, cgroup)

    def create_cgroup(self, name: str, limit_bytes: int | None = None) -> None:
        """See `Machine.create_cgroup`."""
        self._loop.call(self._machine.create_cgroup, name, limit_bytes)

    def oom_kill(self, cgroup: str = "") -> int:
        """See `Machine.oom_kill`."""
        return self._loop.call(self._machine.oom_kill, cgroup)

    def unplug(self, device: str) -> None:
        """See `Machine.unplug`."""
        self._loop.call(self._machine.unplug, device)

    def report(self) -> dict[str, Any]:
        """See `Machine.report`."""
        return self._loop.call(self._machine.report)

    def check(self) -> dict[str, Any]:
        """See `Machine.check`."""
        return self._loop.call(self._machine.check)

    def run(self, workload: Callable[..., Awaitable[R]], *args: Any, **kwargs: Any) -> R:
        """Run an asynchronous workload, ``workload(machine, ...)``, and return what it returns."""
        return self._loop.call(workload, self._machine, *args, **kwargs)
