"""A GPU: runs jobs that fault, migrates what they touch, and takes prefetch commands.

Its driver is modelled after drm_gpusvm (one notifier for each aligned 512 MiB slab, inserted at the first fault there) and nvidia-uvm
(fault batches, growth to 64 KiB). Commands are explicit prefetches, as ``cudaMemPrefetchAsync``: they move what will move and report
how much, and a page that stays is no error.

Whole huge pages in a range move as one, into an aligned 2 MiB of device memory each (MIGRATE_VMA_SELECT_COMPOUND), while there is such a
run; without one they arrive as small pages. Faults do so, too, where a policy wants a whole 2 MiB.

Pages of other GPUs of its kind come straight from there, where links lead from the one to the other without passing a host memory
(MIGRATE_VMA_SELECT_DEVICE_PRIVATE and one owner for all, as xe and amdkfd do; `host/peers.py`). Else they go home by a fault first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from errno import EINVAL

from hmmnet.devices.bus import SELECT_DEVICE_COHERENT, SELECT_DEVICE_PRIVATE, SELECT_PEERS, SELECT_SYSTEM
from hmmnet.devices.context import MIGRATE_PAGES_MAX, Context, cut
from hmmnet.devices.listed import Moved
from hmmnet.errors import KernelError
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_MAX
from hmmnet.wire.messages import Ioctl, IoctlDone

from .base import Device, Opened

SLAB_PAGES = 1 << 17
"""512 MiB: the default of xe's notifier size."""
SELECT_ASKED_FOR = SELECT_SYSTEM | SELECT_DEVICE_PRIVATE | SELECT_DEVICE_COHERENT | SELECT_PEERS
"""What a command moves: a peer's coherent memory, too, which a fault reaches where it is."""


class Gpu(Device):
    """See the module."""

    slab_pages = SLAB_PAGES
    compound = True
    select_in = SELECT_SYSTEM | SELECT_DEVICE_PRIVATE | SELECT_PEERS

    async def ioctl(self, message: Ioctl) -> IoctlDone:
        """``migrate_to_dev`` and ``migrate_to_sys``: how many pages moved. Raises KernelError: EINVAL, EBADF."""
        opened = self.opened_context(message.context, "ioctl")
        commands: dict[str, Callable[[Opened, int, int], Awaitable[int]]] = {
            "migrate_to_dev": self._prefetch,
            "migrate_to_sys": self._send_home,
        }
        command = commands.get(message.command)
        if command is None:
            raise KernelError(EINVAL, "ioctl", f"a gpu has no command {message.command}: it has {', '.join(commands)}")
        start, end = page_arguments(message)
        return IoctlDone(await command(opened, start, end), 0)

    async def _prefetch(self, opened: Opened, start: int, end: int) -> int:
        return await each_piece(
            opened.context,
            start,
            end,
            lambda low, high: opened.context.migrate_in(low, high, "prefetch", compound=self.compound, select=SELECT_ASKED_FOR),
        )

    async def _send_home(self, opened: Opened, start: int, end: int) -> int:
        return await each_piece(opened.context, start, end, lambda low, high: opened.context.migrate_out(low, high, "prefetch"))


def page_arguments(message: Ioctl) -> tuple[int, int]:
    """The pages [start, end) of a command. Raises KernelError(EINVAL) unless they are aligned, not empty, and inside the address space."""
    start = message.address >> PAGE_SHIFT
    if message.address % PAGE_SIZE or message.pages == 0 or start + message.pages > PAGES_MAX:
        why = f"[0x{message.address:x}, +{message.pages} pages) is no aligned, non-empty range of an address space"
        raise KernelError(EINVAL, "ioctl", why)
    return start, start + message.pages


async def each_piece(context: Context, start: int, end: int, move: Callable[[int, int], Awaitable[Moved]]) -> int:
    """Move [start, end) piece by piece, up to the first mapping that does not take part; returns how many pages moved."""
    moved_count = 0
    for first, stop in context.slabs(start, end):
        for low, high in cut(first, stop, MIGRATE_PAGES_MAX):
            moved = await move(low, high)
            moved_count += moved.count
            if moved.errno:
                return moved_count
    return moved_count
