"""One device of a simulated machine: the task that it is, and what it holds of the wires, which can be cut at any moment.

A process that is killed takes its sockets along; a task has to be cut off from what it shares with the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import trio

from hmmnet.errors import HmmnetError
from hmmnet.faults.messages import Channel
from hmmnet.faults.network import Network
from hmmnet.sleeping import Completion
from hmmnet.wire.memory_transport import MemoryChannel, MemoryTransport
from hmmnet.wire.transport import CHANNEL_BYTES_MAX


class NodeTransport(MemoryTransport):
    """What one device holds of the wires. `cut` is its sudden death: what it sends falls into the void, what is sent to it as well."""

    def __init__(self, wires: MemoryTransport, name: str, network: Network) -> None:
        self._wires = wires
        self._name = name
        self._network = network
        self._channels: list[MemoryChannel] = []

    def connect(self, endpoint: str, identity: bytes) -> MemoryChannel:
        """See `Transport.connect`."""
        return self._through(self._mine(self._wires.connect(endpoint, identity)), "control")

    def connect_channel(self, endpoint: str, max_bytes: int = CHANNEL_BYTES_MAX, key: bytes = b"") -> MemoryChannel:
        """See `Transport.connect_channel`."""
        return self._through(self._mine(self._wires.connect_channel(endpoint, max_bytes, key)), "bulk")

    def connect_telemetry(self, endpoint: str) -> MemoryChannel:
        """See `Transport.connect_telemetry`."""
        return self._mine(self._wires.connect_telemetry(endpoint))

    def fresh_identity(self, name: str) -> bytes:
        """See `Transport.fresh_identity`."""
        return self._wires.fresh_identity(name)

    def _through(self, channel: MemoryChannel, kind: Channel) -> MemoryChannel:
        """The channel's messages pass the network."""
        wire = self._network.wire
        channel.divert(wire(self._name, kind, to_device=True), wire(self._name, kind, to_device=False))
        return channel

    def _mine(self, channel: MemoryChannel) -> MemoryChannel:
        self._channels.append(channel)
        return channel

    def cut(self) -> None:
        """From now on nothing of this device reaches anybody."""
        for channel in self._channels:
            channel.cut()


@dataclass(eq=False)
class Node:
    """A device that runs."""

    transport: NodeTransport
    scope: trio.CancelScope
    incarnation: int
    device: Any = None
    ended: Completion = field(default_factory=Completion)
    failure: HmmnetError | None = None
