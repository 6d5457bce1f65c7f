"""The kernel's own test device, as lib/test_hmm.c of Linux 6.12 behaves: the model by which the emulator is compared with a kernel.

Each context mirrors a whole address space through one notifier; the units' memory is shared by all contexts. "Device access" is the driver
reading and writing through the mirror, page by page in the original, in runs here. What looks odd is the original's:

- A command works in rounds: it goes through the mirror until an entry is missing, faults *all the rest* of the range in, and goes on.
  `faults` counts rounds. Faulting goes in windows of 64 pages, so an error in a later window leaves earlier ones mapped.
- MIGRATE_TO_DEV reports what can be *read through the mirror* afterwards, moved or not; one unreadable page makes it ENOENT, though
  the others moved.
- A write fault that ends in a read-only entry (an own page shared copy-on-write: hmm_range_fault does not upgrade it) is EFAULT.
- Invalidations drop one page too many (`end_inclusive`).
- Each command has a range that is looked at first, ``release`` and ``flags`` too, which have no use for one.

One thing is not copied: a second context of the same process does not keep entries to pages that the first has migrated (the original reads
freed memory then).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from errno import EBUSY, EFAULT, EINVAL, ENOENT, ENOMEM, EPERM

import numpy as np
import numpy.typing as npt
import trio

from hmmnet.devices.access import Range
from hmmnet.devices.bus import SELECT_PARTS_STAY, SELECT_SYSTEM
from hmmnet.devices.context import MIGRATE_PAGES_MAX, Context
from hmmnet.devices.mirror import allows
from hmmnet.errors import KernelError
from hmmnet.fabric.dma import UNPACED, BytesSink, BytesSource
from hmmnet.pages import (
    DEVICE_ZONE_MIN,
    HMM_PFN_ERROR,
    HMM_PFN_FRAME_MASK,
    HMM_PFN_ORDER_SHIFT,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HUGE_SHIFT,
    PAGE_SHIFT,
    PAGE_SIZE,
    PAGES_MAX,
    ZERO_FRAME,
    ZONE_SHIFT,
    Words,
    word_of,
)
from hmmnet.wire.messages import Ioctl, IoctlDone

from .base import Device, Opened
from .gpu import page_arguments

Bytes = npt.NDArray[np.uint8]

WINDOW_PAGES = 64
WINDOW_PAGES_TODAY = 32
"""The length of the driver's pfn arrays in Linux 6.12, which was recorded, and today (with `COMPOUND`): pages of one hmm_range_fault."""
SNAPSHOT_WINDOW_PAGES = 1 << 16
"""Pages of one snapshot request; the original's 64 would be a message each, and a window more or less cannot be told from outside."""
BOUNCE_PAGES_MAX = 1 << 18
"""Pages of a command with data (1 GiB), beyond which the bounce buffer cannot be had (ENOMEM)."""
EVICT_FRAMES_MAX = 1 << 16
EVICT_ROUNDS_MAX = 14
EVICT_NAP_S = 1e-4
EVICT_S = 5.0
"""Frames of one eviction request; rounds in a row in which no frame goes home, and real seconds of them, before the unit gives up.

Before the second of those rounds it naps, and twice as long before each that follows, 0.8 s together (as the host does that removes a
device's memory). Over bad wires one round may take as long as that.
"""

FAIL_ALLOC = 1
"""HMM_DMIRROR_FLAG_FAIL_ALLOC: the next allocation of a large page fails, once; its pages go one by one. The host, which knows when one is
wanted, on either side, sees to it (`hmmnet.host.handles`)."""
COMPOUND = 1 << 8
"""Huge pages migrate whole, as with the kernel's driver from 6.19 on. Without, as with that of 6.12, which was recorded, they are split,
and pages of one that is mapped page by page stay."""

PROT_NONE = 0x00
PROT_READ = 0x01
PROT_WRITE = 0x02
PROT_PMD = 0x04
PROT_PUD = 0x08
PROT_ZERO = 0x10
PROT_PRIVATE_LOCAL = 0x20
PROT_PRIVATE_REMOTE = 0x30
PROT_COHERENT_LOCAL = 0x40
PROT_COHERENT_REMOTE = 0x50
PROT_ERROR = 0xFF
"""HMM_DMIRROR_PROT_* (lib/test_hmm_uapi.h)."""

_VALID = word_of(HMM_PFN_VALID)
_WRITE = word_of(HMM_PFN_WRITE)
_ERROR = word_of(HMM_PFN_ERROR)
_FRAME = word_of(HMM_PFN_FRAME_MASK)


class Dmirror(Device):
    """One unit. Commands: ``read read_unlocked write migrate_to_dev migrate_to_sys snapshot exclusive check_exclusive release flags``."""

    slab_pages = PAGES_MAX
    end_inclusive = True

    flags = 0
    """What the last ``flags`` command set: `FAIL_ALLOC`, `COMPOUND`."""

    async def opened(self, opened: Opened) -> None:
        """dmirror_fops_open: one notifier over everything."""
        await opened.context.subscription(0)

    async def closing(self, opened: Opened) -> None:  # noqa: ARG002 - which context closes does not matter
        """dmirror_fops_release: every page of the unit goes home, whoever maps it."""
        await self._evict_all("release")

    async def ioctl(self, message: Ioctl) -> IoctlDone:
        """dmirror_fops_unlocked_ioctl. Raises KernelError."""
        opened = self.opened_context(message.context, "ioctl")
        start, end = page_arguments(message)
        commands: dict[str, Callable[[Context, Ioctl, int, int], Awaitable[IoctlDone]]] = {
            "read": self._read,
            "read_unlocked": self._read,
            "write": self._write,
            "migrate_to_dev": self._migrate_to_dev,
            "migrate_to_sys": self._migrate_to_sys,
            "snapshot": self._snapshot,
            "exclusive": self._exclusive,
            "check_exclusive": self._check_exclusive,
            "release": self._release,
            "flags": self._set_flags,
        }
        command = commands.get(message.command)
        if command is None:
            raise KernelError(EINVAL, "ioctl", f"a dmirror has no command {message.command}: it has {', '.join(commands)}")
        return await command(opened.context, message, start, end)

    # --- read, write ----------------------------------------------------------------------------------------------------------

    async def _read(self, context: Context, message: Ioctl, start: int, end: int) -> IoctlDone:
        """dmirror_read; ``read_unlocked`` waits for pages that a userfaultfd's owner fills in, which are EFAULT else."""
        bounce = bounce_buffer(start, end)
        faults = await self._rounds(context, start, end, bounce, write=False, unlocked=message.command == "read_unlocked")
        await self._give(message.stream_out, bounce)
        return IoctlDone(end - start, faults)

    async def _write(self, context: Context, message: Ioctl, start: int, end: int) -> IoctlDone:
        """dmirror_write."""
        bounce = bounce_buffer(start, end)
        if message.stream_in:
            async with self.bus.expected(message.stream_in, BytesSink(bounce)):
                pass
        else:
            bounce[:] = 0
        faults = await self._rounds(context, start, end, bounce, write=True)
        return IoctlDone(end - start, faults)

    async def _rounds(self, context: Context, start: int, end: int, bounce: Bytes, *, write: bool, unlocked: bool = False) -> int:
        """Go through the mirror and fault the rest in, until the range is through; returns how often it faulted."""
        at, faults = start, 0
        while True:
            at += await self._through_mirror(context, at, end, bounce[(at - start) * PAGE_SIZE :], write=write)
            if at == end:
                return faults
            await self._fault(context, at, end, write=write, unlocked=unlocked)
            faults += 1

    async def _through_mirror(self, context: Context, start: int, end: int, bounce: Bytes, *, write: bool) -> int:
        """dmirror_do_read, dmirror_do_write: copy pages up to the first one without a suitable entry; returns how many."""
        usable = allows(context.mirror.range(start, end), write)
        count = end - start if usable.all() else int(np.argmin(usable))
        if count:
            nbytes = count * PAGE_SIZE
            access = Range(start << PAGE_SHIFT, nbytes, bounce[:nbytes] if write else None)
            step = access.advance(context.mirror, context.memory)
            assert access.is_done, "every entry was looked at a moment ago"
            await context.transfer(step.foreign)
            if not write:
                bounce[:nbytes] = access.data
        return count

    async def _fault(self, context: Context, start: int, end: int, *, write: bool, unlocked: bool) -> None:
        """dmirror_fault: hmm_range_fault window by window."""
        flags = HMM_PFN_REQ_FAULT | (HMM_PFN_REQ_WRITE if write else 0)
        window = WINDOW_PAGES_TODAY if self.flags & COMPOUND else WINDOW_PAGES
        for first in range(start, end, window):

            def program(at: int, words: Words) -> None:
                self._program_window(context, at, words, write=write)

            await context.range_fault(first, min(first + window, end), flags, program=program, unlocked=unlocked)

    def _program_window(self, context: Context, start: int, words: Words, *, write: bool) -> None:
        """dmirror_do_fault. Raises KernelError(EFAULT) at the first entry without the right asked for; those before it are programmed.

        That a range fault for writing ends in an entry that may not be written is what the driver did not expect: the kernel WARNs (h11).
        """
        if write:
            refused = words & _WRITE == 0
            if refused.any():
                first = int(np.argmax(refused))
                context.mirror.program(start, words[:first])
                why = f"page 0x{start + first:x} is this device's own and read-only: a range fault does not upgrade it"
                self.report_bug(why)
                raise KernelError(EFAULT, "dmirror_do_fault", why)
        context.mirror.program(start, words)

    async def _give(self, stream: int, data: Bytes) -> None:
        """Copy to the caller's buffer; no link is involved, so nothing is paced."""
        if stream:
            await self.bus.send(stream, BytesSource(data), UNPACED)

    # --- migration ------------------------------------------------------------------------------------------------------------

    async def _migrate_to_dev(self, context: Context, message: Ioctl, start: int, end: int) -> IoctlDone:
        """dmirror_migrate_to_device; what was readable is counted, not what moved, unless nobody wants the data."""
        moved_count = 0
        for low in range(start, end, MIGRATE_PAGES_MAX):
            large = bool(self.flags & COMPOUND) and self.spec.maps_huge
            select = SELECT_SYSTEM if self.flags & COMPOUND else SELECT_SYSTEM | SELECT_PARTS_STAY
            moved = await context.migrate_in(low, min(low + MIGRATE_PAGES_MAX, end), "user", compound=large, select=select)
            moved_count += moved.count
            if moved.errno:
                raise _unmigratable(moved.errno, low, min(low + MIGRATE_PAGES_MAX, end))
        if not message.stream_out:
            return IoctlDone(moved_count, 0)
        return await self._read_back(context, message, start, end)

    async def _read_back(self, context: Context, message: Ioctl, start: int, end: int) -> IoctlDone:
        """The range through the mirror, without faulting. Raises KernelError(ENOENT) at a page that is not mirrored."""
        bounce = bounce_buffer(start, end)
        readable = await self._through_mirror(context, start, end, bounce, write=False)
        if readable < end - start:
            raise KernelError(
                ENOENT, "dmirror_do_read", f"page 0x{start + readable:x} is not mirrored (it did not move, or was taken back)"
            )
        await self._give(message.stream_out, bounce)
        return IoctlDone(readable, 0)

    async def _migrate_to_sys(self, context: Context, message: Ioctl, start: int, end: int) -> IoctlDone:  # noqa: ARG002 - one shape for all commands
        """dmirror_migrate_to_system."""
        moved_count = 0
        for low in range(start, end, MIGRATE_PAGES_MAX):
            moved = await context.migrate_out(low, min(low + MIGRATE_PAGES_MAX, end), "user")
            moved_count += moved.count
            if moved.errno:
                raise _unmigratable(moved.errno, low, min(low + MIGRATE_PAGES_MAX, end))
        return IoctlDone(moved_count, 0)

    async def _release(self, context: Context, message: Ioctl, start: int, end: int) -> IoctlDone:  # noqa: ARG002 - one shape for all commands
        """HMM_DMIRROR_RELEASE: everything goes home; what range is given does not matter, but there has to be one."""
        await self._evict_all("release")
        return IoctlDone(0, 0)

    async def _set_flags(self, context: Context, message: Ioctl, start: int, end: int) -> IoctlDone:  # noqa: ARG002 - one shape for all commands
        """HMM_DMIRROR_FLAGS. There the number of pages is the flags, so that they cannot be none; here they stand beside a range."""
        self.flags = message.flags
        return IoctlDone(0, 0)

    async def _evict_all(self, cause: str) -> None:
        """dmirror_device_remove_chunks: all frames but broken ones go home, in every process; busy ones are tried again, for a while."""
        patience_s = self.bus.clock.real(EVICT_S)
        fruitless, until_s = 0, trio.current_time() + patience_s
        while fruitless < EVICT_ROUNDS_MAX and trio.current_time() < until_s:
            frames = self.memory.live_frames()
            if len(frames) == 0:
                return
            moved, broken = 0, 0
            for first in range(0, len(frames), EVICT_FRAMES_MAX):
                evicted = await self.bus.evict(frames[first : first + EVICT_FRAMES_MAX], cause)
                moved, broken = moved + evicted.moved, broken + evicted.broken
            if broken == len(frames):
                return
            if moved:
                fruitless, until_s = 0, trio.current_time() + patience_s
            else:
                fruitless += 1
                await trio.sleep(self.bus.clock.real(EVICT_NAP_S * (1 << fruitless - 1)) if fruitless < EVICT_ROUNDS_MAX else 0)

    # --- exclusive access -----------------------------------------------------------------------------------------------------

    async def _exclusive(self, context: Context, message: Ioctl, start: int, end: int) -> IoctlDone:
        """dmirror_exclusive, today page by page; then what can be read through the mirror.

        Today the page that cannot be had says why: EFAULT (no right to write), EOPNOTSUPP (no anonymous memory); those before it are had.
        """
        at = start
        while at < end and self.flags & COMPOUND:
            at += await context.make_exclusive(at, min(at + WINDOW_PAGES, end), folios=False)
        for first in range(at, end, WINDOW_PAGES):
            await self._exclusive_window(context, first, min(first + WINDOW_PAGES, end))
        return await self._read_back(context, message, start, end)

    async def _exclusive_window(self, context: Context, first: int, stop: int) -> None:
        """The driver of 6.12: whatever make_device_exclusive_range says, a window that is not had whole is EBUSY, and is not mapped."""
        try:
            got = await context.make_exclusive(first, stop, folios=True)
        except KernelError:
            got = 0
        if got < stop - first:
            why = f"page 0x{first + got:x} cannot be had exclusively; the windows of {WINDOW_PAGES} pages before its own are exclusive"
            raise KernelError(EBUSY, "dmirror_exclusive", why)

    async def _check_exclusive(self, context: Context, message: Ioctl, start: int, end: int) -> IoctlDone:  # noqa: ARG002 - one shape for all commands
        """dmirror_check_atomic: EPERM while the mirror holds a page of the range for exclusive access."""
        if context.mirror.has_exclusive(start, end):
            raise KernelError(EPERM, "dmirror_check_atomic", f"a page of [0x{start:x}, 0x{end:x}) is held for exclusive access")
        return IoctlDone(0, 0)

    # --- snapshot -------------------------------------------------------------------------------------------------------------

    async def _snapshot(self, context: Context, message: Ioctl, start: int, end: int) -> IoctlDone:  # noqa: ARG002 - one shape for all commands
        """dmirror_snapshot: one byte a page, nothing is faulted in or programmed."""
        check_bounce(start, end)
        symbols: list[bytes] = []

        def look(_: int, words: Words) -> None:
            symbols.append(self.permissions(words).tobytes())

        for low in range(start, end, SNAPSHOT_WINDOW_PAGES):
            await context.range_fault(low, min(low + SNAPSHOT_WINDOW_PAGES, end), 0, program=look)
        return IoctlDone(end - start, 0, b"".join(symbols))

    def permissions(self, words: Words) -> Bytes:
        """dmirror_mkentry for each word."""
        frames = words & _FRAME
        zones = frames >> word_of(ZONE_SHIFT)
        own = self.memory.owns(frames)
        local = PROT_COHERENT_LOCAL if self.spec.is_coherent else PROT_PRIVATE_LOCAL
        out = np.where(words & _WRITE != 0, PROT_WRITE, PROT_READ).astype(np.uint8)
        # Today's walker hides a foreign private page; what is on another device and VALID is coherent memory. v25 shows it without VALID.
        out |= np.where(own, local, np.where(zones >= DEVICE_ZONE_MIN, PROT_COHERENT_REMOTE, 0)).astype(np.uint8)
        out |= np.where(frames == ZERO_FRAME, PROT_ZERO, 0).astype(np.uint8)
        order = words >> word_of(HMM_PFN_ORDER_SHIFT) & word_of(0x1F)
        out |= np.where(order == HUGE_SHIFT, PROT_PMD, np.where(order == 2 * HUGE_SHIFT, PROT_PUD, 0)).astype(np.uint8)
        out[words & _VALID == 0] = PROT_NONE
        foreign = (words & (_VALID | _ERROR) == 0) & (frames != 0)
        out[foreign] = PROT_PRIVATE_REMOTE | np.where(words[foreign] & _WRITE != 0, PROT_WRITE, PROT_READ)
        out[words & _ERROR != 0] = PROT_ERROR
        return out


def _unmigratable(code: int, start: int, end: int) -> KernelError:
    """What a migration of [start, end) ends with that met a mapping, or a hole, that cannot take part."""
    why = f"not all of pages [0x{start:x}, 0x{end:x}) lies in mappings that can migrate; what lies before the first that cannot has moved"
    return KernelError(code, "migrate_vma_setup", why)


def check_bounce(start: int, end: int) -> None:
    """Raise KernelError(ENOMEM) for a range that no buffer could be allocated for."""
    if end - start > BOUNCE_PAGES_MAX:
        raise KernelError(ENOMEM, "dmirror_bounce_init", f"no buffer of {end - start} pages can be had (at most {BOUNCE_PAGES_MAX})")


def bounce_buffer(start: int, end: int) -> Bytes:
    """dmirror_bounce_init. Raises KernelError(ENOMEM)."""
    check_bounce(start, end)
    return np.empty((end - start) * PAGE_SIZE, dtype=np.uint8)
