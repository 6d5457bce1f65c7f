"""Who finds no memory has somebody killed, and asks again: the allocator's side of the OOM killer (mm/page_alloc.c).

The kernel kills inside the allocation (__alloc_pages_may_oom), whatever locks its caller holds, and goes on where it was. Here an
allocation fails (`OutOfMemory`, with how much it wanted); the call undoes what it began, lets go of its locks, and is taken anew when
there is as much, as often as it takes. Who is killed meanwhile himself is told ENOMEM, and so is who asks when nobody may be killed.

`oom.py` chooses the victim, and says which calls come here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from hmmnet.errors import KernelError, OutOfMemory

if TYPE_CHECKING:
    from .frames import PhysicalMemory

KERNEL = 0
"""In the place of a process's number: a driver or the kernel wants memory for itself, and is nobody who could be killed."""

T = TypeVar("T")


class Relief:
    """What stands between a want of `memory` and ENOMEM."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self.killer: Callable[[int, int], Awaitable[bool]] | None = None
        """out_of_memory(process, pages): whether so many could be had by killing others. None: nobody is killed."""

    async def had(self, error: KernelError, process: int) -> bool:
        """A call of `process` ended with `error`: whether it was for want of memory, of which there is enough by now. Hold no lock.

        What a fault plan or a memory cgroup denies is no want: only OutOfMemory is.
        """
        if self.killer is None or not isinstance(error, OutOfMemory):
            return False
        return not self._memory.lacks(error.pages) or await self.killer(process, error.pages)

    async def anew(self, call: Callable[[], Awaitable[T]], process: int) -> T:
        """What `call` answers, which is taken anew as often as `had` says so. Hold no lock."""
        while True:
            try:
                return await call()
            except OutOfMemory as error:
                if not await self.had(error, process):
                    raise
