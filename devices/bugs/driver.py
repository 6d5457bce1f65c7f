"""A gpu whose driver has a few commands more, as the buggy ones need them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import ClassVar

from hmmnet.devices.models.base import Opened
from hmmnet.devices.models.gpu import Gpu, page_arguments
from hmmnet.wire.messages import Ioctl, IoctlDone

Command = Callable[[Opened, int, int], Awaitable[int]]
"""Does something on pages [start, end); returns how many it was good for. Raises KernelError."""


class Driver(Gpu):
    """`extra` are its commands beside those of a gpu: what each is called, and the method (a `Command`) that does it."""

    extra: ClassVar[Mapping[str, str]]

    async def ioctl(self, message: Ioctl) -> IoctlDone:
        """See `Gpu.ioctl`."""
        if message.command not in self.extra:
            return await super().ioctl(message)
        command: Command = getattr(self, self.extra[message.command])
        opened = self.opened_context(message.context, "ioctl")
        return IoctlDone(await command(opened, *page_arguments(message)), 0)
