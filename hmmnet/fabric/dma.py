"""DMA streams over a channel: page data as checksummed, paced, credited chunks. The door of this room: what others need, by name.

A `BulkSender` and a `BulkReceiver` sit at the two ends of one channel and carry any number of streams. A stream has a number that both
ends know from control messages, a `Source` at one end and a `Sink` at the other, and a `Pacer` that gives each chunk the moment at which it
may leave and the one at which it is there. It is complete when its data have landed *and* that moment has come; moments closer than a
millisecond are accounted for, not slept.

    sender                                          receiver
    chunk 0..3  -- header, payload (pinned) -->     checked, and in memory
                <-- credit: 4 landed, rate --       pins of 0..3 end

What goes wrong: a lost chunk is missed and asked for again, a damaged one is refused and asked for again, a repeated one is ignored. A
stream that either end gives up is aborted at the other (`PeerError` with the reason), and whatever still arrives for it is dropped.

Between processes of one computer the payloads lie in shared memory, and only headers and credits are messages (`ring`).

The messages are in `chunk`, the rules in `stream`, `slots` and `pace` (no I/O there), the waits in `sender` and `receiver`, memory
in `ends`.
"""

from __future__ import annotations

from .ends import ArenaSink, ArenaSource, BytesSink, BytesSource, LiveSink, MultiArena, Sink, Source
from .pace import UNPACED, Grant, Pace, Pacer
from .receiver import Arrival, BulkReceiver
from .ring import Ring, RingPlace, Rings, new_rings
from .sender import BulkSender, StreamReport

__all__ = [
    "UNPACED",
    "ArenaSink",
    "ArenaSource",
    "Arrival",
    "BulkReceiver",
    "BulkSender",
    "BytesSink",
    "BytesSource",
    "Grant",
    "LiveSink",
    "MultiArena",
    "Pace",
    "Pacer",
    "Ring",
    "RingPlace",
    "Rings",
    "Sink",
    "Source",
    "StreamReport",
    "new_rings",
]  # fmt: skip
