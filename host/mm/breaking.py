"""Frames that are about to break, while everybody who maps them is told (mm/memory-failure.c)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from hmmnet.pages import Words

from .locks import Gate


class Breaking:
    """memory_failure() holds the folio locks of what it breaks: who wants such a frame waits here, where the kernel's faults spin."""

    def __init__(self) -> None:
        self._frames: list[Words] = []
        self._gate = Gate()

    @contextmanager
    def hold(self, frames: Words) -> Iterator[None]:
        """`frames` are breaking while this lasts."""
        self._frames.append(frames)
        try:
            yield
        finally:
            self._frames = [others for others in self._frames if others is not frames]
            self._gate.open()

    async def wait(self, frames: Words) -> bool:
        """Return when none of `frames` is breaking; whether one was, so that all may have changed."""
        waited = False
        while any(np.isin(frames, some).any() for some in self._frames):
            waited = True
            await self._gate.wait()
        return waited
