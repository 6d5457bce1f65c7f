"""The host's side of telemetry: the newest sample of each living device."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import trio

from hmmnet.errors import ProtocolError
from hmmnet.wire.telemetry import Sample, unpack_sample
from hmmnet.wire.transport import Channel

log = logging.getLogger("hmmnet.host")


class Telemetry:
    """Reads samples from `channel`; `zones` are the living devices' names by zone, the only ones whose samples count."""

    def __init__(self, channel: Channel, secret: bytes, zones: Mapping[int, object]) -> None:
        self.dropped = 0
        self._channel = channel
        self._secret = secret
        self._zones = zones
        self._newest: dict[int, Sample] = {}

    async def run(self) -> None:
        """Read until cancelled or closed."""
        try:
            while True:
                message, payload = await self._channel.receive()
                if payload is not None:
                    self.dropped += 1
                    continue
                self.take(message)
        except trio.ClosedResourceError:
            log.info("telemetry has ended: its socket was closed")

    def take(self, message: bytes) -> None:
        """One message, from anybody."""
        try:
            sample = unpack_sample(message, self._secret)
        except ProtocolError as error:
            self.dropped += 1
            if self.dropped & (self.dropped - 1) == 0:  # the 1st, 2nd, 4th ...: a flood must not fill the disk
                log.warning("dropped %d telemetry messages, the last: %s", self.dropped, error)
            return
        newest = self._newest.get(sample.zone)
        if sample.zone in self._zones and (newest is None or sample.number > newest.number):
            self._newest[sample.zone] = sample

    def figures(self, zone: int) -> dict[str, int | float | str]:
        """The newest figures of the device with `zone`; empty when none came yet."""
        sample = self._newest.get(zone)
        return {} if sample is None else dict(sample.figures)

    def forget(self, zone: int) -> None:
        """That life is over."""
        self._newest.pop(zone, None)
