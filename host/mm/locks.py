"""The locks of an address space, and their order.

    1. `mmap_lock`      one reader/writer lock for each address space. Readers: CPU faults, hmm_range_fault, migrate_vma, MADV_DONTNEED.
                        Writers: whatever changes VMAs (mmap, munmap, mprotect, mremap, mlock, fork, exit).
    2. an invalidation  ``hub.invalidate(...)``: entered with the mmap lock held (or, for eviction by frame, with no lock at all).
    3. migration entry  a page's lock. `collect` only *tries* (a page that is locked is left out), so migrations never wait for each
                        other; a CPU or device fault waits for one, with the mmap lock held for reading and inside no invalidation.

A lock is taken only while holding locks of smaller number. Who waits on a migration entry holds the mmap lock for reading; who owns the
entry holds it for reading too (or needs none), so it can always go on to `finalize`: there is no cycle. Inside an invalidation nothing
waits for a migration entry, because the owner of that entry may be waiting for its own invalidation to be acknowledged.

Between 1 and 2 lies a file's `mapping`: for reading while a VMA of the file comes to be, for writing by who has told all who map it. It is
taken inside invalidations, too, and only ever held while mirrors are told or in one step: nobody who has it waits for another lock.

Memory that is breaking (`breaking.py`) is waited for as a migration entry is: who breaks it waits for acknowledgements alone.

Two processes' mmap locks are held together only by fork: parent first, then the child, which nobody else knows yet.

Everything below these three is synchronous code, which is atomic here; it replaces page table locks, the LRU lock and the rmap locks.
"""

from __future__ import annotations

from collections import deque
from types import TracebackType

import trio


class _Read:
    __slots__ = ("_lock",)

    def __init__(self, lock: RwLock) -> None:
        self._lock = lock

    async def __aenter__(self) -> None:
        if not self._lock.try_read():
            await self._lock.wait(writer=False)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release_read()


class _Write:
    __slots__ = ("_lock",)

    def __init__(self, lock: RwLock) -> None:
        self._lock = lock

    async def __aenter__(self) -> None:
        lock = self._lock
        if lock.readers == 0 and not lock.queue:
            lock.readers = -1
        else:
            await lock.wait(writer=True)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release_write()


class RwLock:
    """A fair reader/writer lock: who came first goes first, readers next to each other go together.

    A task must not take it twice: with a writer waiting in between that is a deadlock, as with the kernel's rwsem. A reader's hold may be
    released by another task than the one that took it.
    """

    def __init__(self) -> None:
        self.readers = 0
        """How many hold it for reading; -1: one for writing."""
        self.queue: deque[tuple[bool, trio.Event]] = deque()
        self._read = _Read(self)
        self._write = _Write(self)

    @property
    def held(self) -> bool:
        """Whether anybody holds it."""
        return self.readers != 0

    @property
    def written(self) -> bool:
        """Whether it is held for writing."""
        return self.readers < 0

    def read(self) -> _Read:
        """``async with lock.read():``."""
        return self._read

    def write(self) -> _Write:
        """``async with lock.write():``."""
        return self._write

    def try_read(self) -> bool:
        """Take it for reading if nobody is in the way; else `wait`. `release_read` must follow either."""
        if self.readers >= 0 and not self.queue:
            self.readers += 1
            return True
        return False

    async def wait(self, *, writer: bool) -> None:
        """Queue up; returns with the lock held. Cancelled, it leaves the queue, or gives back what it was handed."""
        turn = trio.Event()
        self.queue.append((writer, turn))
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():
                (self.release_write if writer else self.release_read)()
            else:
                self.queue.remove((writer, turn))
                self._hand_over()
            raise

    def release_read(self) -> None:
        """One reader lets go."""
        assert self.readers > 0, "release_read of a lock that is not held for reading"
        self.readers -= 1
        if self.queue:
            self._hand_over()

    def release_write(self) -> None:
        """The writer lets go."""
        assert self.readers == -1, "release_write of a lock that is not held for writing"
        self.readers = 0
        if self.queue:
            self._hand_over()

    def _hand_over(self) -> None:
        while self.queue:
            writer, turn = self.queue[0]
            if self.readers < 0 or (writer and self.readers):
                return
            self.readers = -1 if writer else self.readers + 1
            self.queue.popleft()
            turn.set()


class Gate:
    """Where tasks wait for any migration entry of a process to be replaced; each looks at its own page again when it opens."""

    def __init__(self) -> None:
        self._event: trio.Event | None = None

    async def wait(self) -> None:
        """Return at the next `open`."""
        if self._event is None:
            self._event = trio.Event()
        await self._event.wait()

    def open(self) -> None:
        """Let everybody who waits now go."""
        if self._event is not None:
            self._event.set()
            self._event = None


async def give_way() -> None:
    """Let other tasks run."""
    await trio.lowlevel.checkpoint()
