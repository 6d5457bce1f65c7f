"""The invariants of a running machine, on demand: the host's books, the IOMMU domains, and what the devices say that their mirrors hold.

The host's own tables are looked at in one step and are right or wrong at that moment (`audit`). A device's mirror is told in a message, and
while that is under way pages move: what is wrong in one look may have been right when it was said. A translation that should have been
dropped stays until somebody uses it, so only what is wrong in `LOOKS` looks in a row, with time between them, is called so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hmmnet.errors import KernelError, PeerError, ProtocolError, RemoteError
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.pages import PAGES_MAX, Words, from_wire, word_of
from hmmnet.sleeping import sleep
from hmmnet.wire.messages import PAGES_PER_MESSAGE_MAX, MirrorShown, ShowMirror

from . import audit
from .device import Context, Device
from .mm.frames import PhysicalMemory
from .mm.space import Space

LOOKS = 3
PAUSE_S = 0.02
"""Real seconds between two looks: longer than a message is under way, shorter than anybody wants to wait."""
COMPLAINTS_MAX = 100
"""That are told of one mirror."""

Stale = tuple[int, int, bool]
"""A translation: page, frame, may write."""


class Checker:
    """Looks at one machine."""

    def __init__(
        self,
        memory: PhysicalMemory,
        spaces: Mapping[int, Space],
        devices: Mapping[str, Device],
        clock: EmulatedClock,
        late: Sequence[str] = (),
    ) -> None:
        self._late = late
        self._memory = memory
        self._spaces = spaces
        self._devices = devices
        self._clock = clock
        self._translations = 0

    async def check(self) -> dict[str, Any]:
        """I1 to I5, I7 and I8 of every process and memory, I1 of every mirror, as plain data.

        ``complaints``: what is wrong, in words; ``processes``, ``pages`` (that these have resident) and ``translations``: what was looked
        at; ``mirrors``: of how many open contexts; ``unseen``: devices that did not tell theirs, and why.
        """
        quiet = not self._spaces and not self._memory.files  # then nothing may be left
        complaints = [*self._late, *audit.books(self._memory, self._spaces.values(), quiet=quiet), *audit.domains(self._devices)]
        self._translations, mirrors, unseen = 0, 0, {}
        for name, device in self._devices.items():
            for context in [] if device.life is None else list(device.life.contexts.values()):
                try:
                    complaints += await self._mirror(context)
                    mirrors += 1
                except (PeerError, RemoteError, KernelError, ProtocolError) as error:
                    unseen[name] = str(error)
        return {
            "complaints": complaints,
            "processes": len(self._spaces),
            "pages": sum(space.mm.rss for space in self._spaces.values()),
            "mirrors": mirrors,
            "translations": self._translations,
            "unseen": unseen,
        }

    async def _mirror(self, context: Context) -> list[str]:
        """I1 of the device's mirror of one context. Raises what a request does."""
        lasting: set[Stale] | None = None
        for look in range(LOOKS):
            if look:
                await sleep(self._clock.real(PAUSE_S))
            found, seen = await self._look(context)
            lasting = found if lasting is None else lasting & found
            if not lasting:
                break
        self._translations += seen
        who = f"the mirror of {context.life.name}"
        return [
            audit.described(context, who, page, frame, may_write=write) for page, frame, write in sorted(lasting or ())[:COMPLAINTS_MAX]
        ]

    async def _look(self, context: Context) -> tuple[set[Stale], int]:
        """What is stale in a mirror now, and how many translations it has."""
        found: set[Stale] = set()
        seen = start = 0
        while True:
            shown = await context.life.link.ask(ShowMirror(context.number, start), MirrorShown)
            pages, entries = _shown(shown, start)
            frames, writable = entries >> word_of(1), entries & word_of(1) != 0
            bad = np.flatnonzero(audit.stale(context, pages, frames, writable))
            found |= set(zip(pages[bad].tolist(), frames[bad].tolist(), writable[bad].tolist(), strict=True))
            seen += len(pages)
            if len(pages) < PAGES_PER_MESSAGE_MAX:
                return found, seen
            start = int(pages[-1]) + 1


def _shown(message: MirrorShown, start: int) -> tuple[Words, Words]:
    """(pages, entries) of a device's answer. Raises ProtocolError."""
    if len(message.pages) % 8 or len(message.pages) != len(message.entries):
        raise ProtocolError(f"MirrorShown with {len(message.pages)} bytes of pages and {len(message.entries)} of entries")
    pages = from_wire(message.pages)
    if len(pages) and (int(pages[0]) < start or int(pages[-1]) >= PAGES_MAX or bool((pages[1:] <= pages[:-1]).any())):
        raise ProtocolError("MirrorShown with pages that were not asked for, or not in ascending order")
    return pages, from_wire(message.entries)
