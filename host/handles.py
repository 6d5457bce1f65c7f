"""What a process holds beyond its memory: open devices, and references to pages.

An open file is shared by the handles that fork makes of one, and stays open until the last of them is closed. A command goes to the device
over its session; data of more than a few words go beside it, as streams that cross no link: they are the caller's buffers, not pages.
"""

from __future__ import annotations

import errno
import logging
from functools import partial

import numpy as np
import trio

from hmmnet.errors import HmmnetError, KernelError, PeerError
from hmmnet.fabric.dma import BytesSink, BytesSource
from hmmnet.pages import PAGE_SIZE, Words
from hmmnet.program import IoctlResult, PageReferences, documented_by
from hmmnet.wire.messages import PAGES_PER_MESSAGE_MAX, Ioctl, IoctlDone

from .contexts import Contexts
from .device import Context
from .link import SessionLink
from .mm.space import Space
from .watchdog import ANSWER_S

STREAMED_OUT = frozenset({"read", "read_unlocked", "migrate_to_dev", "exclusive"})
"""Commands of a dmirror whose data, a page for each page, come as a stream."""

FAIL_ALLOC = 1
"""HMM_DMIRROR_FLAG_FAIL_ALLOC: this open file's next allocation of a large page fails, on the device or, for pages that come home, here.

The driver's flags are its file's (struct dmirror), and which allocation of either kind comes first is known here.
"""

log = logging.getLogger("hmmnet.host")


class OpenFile:
    """An open device, as struct file: the handles that fork makes of one share it, and the last close lets its context go."""

    def __init__(self, context: Context, contexts: Contexts) -> None:
        self.context = context
        self.references = 0
        self._contexts = contexts

    async def let_go(self) -> None:
        """One reference less."""
        self.references -= 1
        if self.references == 0:
            await self._contexts.put(self.context)


class Handle:
    """An open device under `number` in the `table` of a process; see `hmmnet.program.Handle`."""

    def __init__(self, table: dict[int, Handle], number: int, file: OpenFile) -> None:
        self.device = file.context.life.name
        self.number = number
        self.file = file
        self._table = table
        table[number] = self
        file.references += 1

    async def ioctl(self, command: str, address: int, pages: int, data: bytes = b"", flags: int = 0) -> IoctlResult:
        """Run a device command. Raises KernelError with the command's errno, PeerLost when the device is gone."""
        self._check_open("ioctl")
        if not 0 <= address < 1 << 63 or not 0 <= pages <= PAGES_PER_MESSAGE_MAX:
            raise KernelError(errno.EINVAL, "ioctl", f"0x{address:x} + {pages} pages is no range of an address space")
        context = self.file.context
        dmirror = context.life.spec.model == "dmirror"
        streamed_out = pages if dmirror and command in STREAMED_OUT else 0
        if not dmirror or command != "flags":
            return await command_device(context, command, address, pages, data, flags, streamed_out)
        with trio.CancelScope(shield=True):  # what the device has taken is so for the host, too
            done = await command_device(context, command, address, pages, data, flags, streamed_out)
            failing = context.life.link.fail_large
            failing.add(context.number) if flags & FAIL_ALLOC else failing.discard(context.number)
        return done

    def check_mappable(self) -> None:
        """Raises KernelError: EBADF when it is closed, ENODEV when the device has nothing to map."""
        self._check_open("mmap")
        if self.file.context.life.spec.model != "dmirror":
            raise KernelError(errno.ENODEV, "mmap", f"{self.device} has no pages to map; devices of model dmirror have")

    async def close(self) -> None:
        """Drop this reference. Raises KernelError(EBADF) when it is closed already."""
        self._check_open("close")
        del self._table[self.number]
        await self.file.let_go()

    def _check_open(self, call: str) -> None:
        self.file.context.life.page_map.memory.there()
        if self._table.get(self.number) is not self:
            raise KernelError(errno.EBADF, call, f"this handle on {self.device} is closed")


@documented_by(PageReferences)
class HeldPages:
    """See `hmmnet.program.PageReferences`."""

    def __init__(self, space: Space, frames: Words, *, pin: bool) -> None:
        self.count = len(frames)
        self._space = space
        self._frames = frames
        self._pin = pin

    async def read(self, pages: int, first: int = 0) -> bytes:
        """What they hold. Raises KernelError(EINVAL) when they were let go, or are fewer."""
        self._space.memory.there()
        if not 0 <= first <= first + pages <= len(self._frames):
            raise KernelError(errno.EINVAL, "read", f"{len(self._frames)} pages are held, not {first} + {pages}")
        data = np.empty(pages * PAGE_SIZE, np.uint8)
        self._space.memory.read(self._frames[first : first + pages], 0, data)
        return data.tobytes()

    async def put(self) -> None:
        """Let them go."""
        self._space.memory.there()
        frames, self._frames = self._frames, self._frames[:0]
        self._space.put_pages(frames, pin=self._pin)
        if self._space.memory.emptied:
            self._space.memory.bury_emptied()


async def command_device(context: Context, command: str, address: int, pages: int, data: bytes, flags: int, pages_out: int) -> IoctlResult:
    """Send a command, with its data on a stream, and take `pages_out` pages of data from another. They cross no link: nothing is paced."""
    link = context.life.link
    if link.session.lost is not None:
        raise link.lost_error()
    link.flush_freed()
    stream_in = link.new_stream() if data else 0
    stream_out = link.new_stream() if pages_out else 0
    message = Ioctl(context.number, command, address, pages, stream_in, stream_out, flags)
    if not pages_out:
        done = await _commanded(link, message, data)
        return IoctlResult(done.cpages, done.faults, done.data)
    out = bytearray(pages_out * PAGE_SIZE)
    async with link.expected(stream_out, BytesSink(out), late=True) as arrival:
        with trio.CancelScope() as scope:
            arrival.on_failure = partial(_answers_soon, link, scope)  # `arrival` says what it was, unless the answer does
            if arrival.failed:  # before anybody was to be told
                arrival.on_failure()
            done = await _commanded(link, message, data)
            link.answered(arrival)
    return IoctlResult(done.cpages, done.faults, bytes(out))


def _answers_soon(link: SessionLink, scope: trio.CancelScope) -> None:
    """The data of a command will not come, or not arrive: its answer, for which `scope` waits, says why, or is waited for no longer."""
    scope.deadline = trio.current_time() + link.real(ANSWER_S)


async def _commanded(link: SessionLink, message: Ioctl, data: bytes) -> IoctlDone:
    """Send a command and its data. One that fails may never look at them; one that does not get them may never hear that, nor answer."""
    if not data:
        return await link.session.ask(message, IoctlDone)
    failure: HmmnetError | None = None
    done: IoctlDone | None = None
    async with trio.open_nursery() as nursery:

        async def send_data() -> None:
            nonlocal failure
            try:
                await link.sender.send(message.stream_in, BytesSource(data))
            except PeerError as error:
                log.info("the data of a command to %s were not taken: %s", link.name, error)
                failure = PeerError(f"{message.command} did not get its data: {error}")
                _answers_soon(link, nursery.cancel_scope)

        nursery.start_soon(send_data)
        try:
            done = await link.session.ask(message, IoctlDone)
        except HmmnetError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if done is None:
        assert failure is not None, "only that ends the wait for the answer"
        raise failure
    return done
