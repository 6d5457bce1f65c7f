"""Moves packets between the two ends of each cable, as badly as it was told."""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from random import Random

import trio

from hmmnet.errors import HmmnetError

from .impairment import GOOD, Direction, Impairment
from .namespaces import MTU, Ends, lay
from .packets import RST, SYN, parse, resets

HOST_ADDRESS = "10.77.0.1"
CABLES_MAX = 200
"""Addresses of one subnet."""
BURST = 64
"""Packets taken in a row before others have their turn."""


class Cable:
    """One cable, between the host and device `name`."""

    def __init__(self, name: str, address: str, ends: Ends, random: Random) -> None:
        self.name = name
        self.address = address
        """The device's."""
        self.namespace = f"/proc/{os.getpid()}/fd/{ends.namespace}"
        """What the device's process has to enter."""
        self.to_device = Direction(random.random)
        self.to_host = Direction(random.random)
        self._ends = ends
        self._order = itertools.count()
        self._late: list[tuple[float, int, int, bytes]] = []
        self._changed = trio.Event()
        self._reset_until_s = 0.0

    def impair(self, both: Impairment = GOOD, *, to_device: Impairment | None = None, to_host: Impairment | None = None) -> None:
        """The cable is as bad as that from now on; directions that are not named as `both`."""
        self.to_device.impairment = both if to_device is None else to_device
        self.to_host.impairment = both if to_host is None else to_host

    def repair(self) -> None:
        """The cable is good."""
        self.impair(GOOD)

    def reset(self, seconds: float) -> None:
        """Whoever sends something within so many seconds finds his connection reset, and so does the other side."""
        self._reset_until_s = trio.current_time() + seconds

    async def run(self) -> None:
        """Move packets until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take, self._ends.host, self._ends.device, self.to_device)
            nursery.start_soon(self._take, self._ends.device, self._ends.host, self.to_host)
            nursery.start_soon(self._deliver)

    async def _take(self, source: int, target: int, direction: Direction) -> None:
        while True:
            await trio.lowlevel.wait_readable(source)
            for packet in _waiting(source):
                now_s = trio.current_time()
                if now_s < self._reset_until_s and self._reset(packet, source, target):
                    continue
                for arrives_s in direction.arrivals(now_s, len(packet)):
                    self._put(arrives_s, now_s, target, packet)

    def _put(self, arrives_s: float, now_s: float, target: int, packet: bytes) -> None:
        if arrives_s <= now_s and not self._late:
            _write(target, packet)
            return
        heapq.heappush(self._late, (arrives_s, next(self._order), target, packet))
        self._changed.set()

    def _reset(self, packet: bytes, source: int, target: int) -> bool:
        segment = parse(packet)
        if segment is None or segment.flags & (RST | SYN):
            return False
        back, on = resets(segment)
        _write(source, back)
        _write(target, on)
        return True

    async def _deliver(self) -> None:
        while True:
            self._changed = trio.Event()
            with trio.move_on_at(self._late[0][0] if self._late else float("inf")):
                await self._changed.wait()
            while self._late and self._late[0][0] <= trio.current_time():
                _, _, target, packet = heapq.heappop(self._late)
                _write(target, packet)


def _waiting(source: int) -> Iterator[bytes]:
    """Packets that are there, a burst at most."""
    for _ in range(BURST):
        try:
            yield os.read(source, MTU + 64)
        except BlockingIOError:
            return


def _write(target: int, packet: bytes) -> None:
    """A full or closed end loses the packet, as cables do."""
    with suppress(OSError):
        os.write(target, packet)


class Cables(Mapping[str, Cable]):
    """A machine's cables by device."""

    def __init__(self, cables: Sequence[Cable]) -> None:
        self._cables = {cable.name: cable for cable in cables}
        self._stopped = trio.Event()

    def __getitem__(self, name: str) -> Cable:
        return self._cables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cables)

    def __len__(self) -> int:
        return len(self._cables)

    @classmethod
    @contextmanager
    def laid(cls, names: Sequence[str], seed: int = 0) -> Iterator[Cables]:
        """One cable for each name while the block runs; `run` must run meanwhile. Raises HmmnetError."""
        if len(names) > CABLES_MAX:
            raise HmmnetError(f"{len(names)} devices are too many for cables of one subnet: at most {CABLES_MAX}")
        ends: list[Ends] = []
        try:
            made = []
            for number, name in enumerate(names):
                address = f"10.77.0.{number + 2}"
                ends.append(lay(f"hmmnet{number}", HOST_ADDRESS, address))
                made.append(Cable(name, address, ends[-1], Random(f"{seed} {name}")))  # noqa: S311 - chance, not secrecy
            yield cls(made)
        finally:
            for pair in ends:
                pair.close()

    def repair(self) -> None:
        """All are good."""
        for cable in self._cables.values():
            cable.repair()

    async def run(self) -> None:
        """Move packets on all cables until `stop`."""
        async with trio.open_nursery() as nursery:
            for cable in self._cables.values():
                nursery.start_soon(cable.run)
            await self._stopped.wait()
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """Nothing passes any more."""
        self._stopped.set()
