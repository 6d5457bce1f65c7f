"""One DMA stream at either end, without I/O: which chunks are out, which have landed, which are wanted again.

The sender may have `WINDOW` chunks out. The receiver credits: every quarter of a window, at the end, and at once when something is wrong.
A credit says how far everything has landed and which chunks beyond are missing or were damaged; those are sent again. Chunks may arrive
twice and take effect once. When the sender hears nothing, it repeats its oldest chunk as a *probe*, which draws a credit even from a
receiver that has everything, and asks for all gaps anew, because earlier asking may have been lost. Nothing but a probe does: answers to
needless repeats would cause further ones, and the stream would drown in them.

A chunk that is out is pinned: its source pages must not change until it is credited, as a copy engine's source must not.

What a peer may not do (ProtocolError): send another length or cut than was agreed, run ahead of its window, or credit what was not sent.
"""

from __future__ import annotations

from enum import IntEnum

from hmmnet.errors import PeerError, ProtocolError

from .chunk import CHUNK_BYTES, MISSING_MAX, Chunk, Credit

WINDOW = 16
"""Chunks out at once: 16 MiB of source pages are pinned. Fewer are up to a tenth slower on two busy cores, more no faster."""
CREDIT_EVERY = WINDOW // 4
TRIES_MAX = 32
"""Times that one chunk may come damaged. Noise does not do that; a peer that computes another checksum does."""
REPEATS_MAX = 240
"""Repeats in a row that nobody answers: a minute. A dead peer is known within its lease; this one lives, and has forgotten the stream."""


class Holds(IntEnum):
    """What a stream waits for, as its sender sees it."""

    NOTHING = 0
    """It is the sender's own turn, which does not take it: every moment's answer between two chunks, and a hung copy engine's for ever."""
    PACE = 1
    """The next chunk is not due yet, by the sender's own clock."""
    CREDIT = 2
    """The receiver is to say what has landed."""
    WAY = 3
    """No link leads to the receiver, or the channel takes nothing more."""
    GONE = 4
    """There is no such stream (any more): nothing comes of it."""


class SendState:
    """A stream that is being sent: `total` bytes in chunks of `stride`."""

    def __init__(self, stream: int, total: int, stride: int = CHUNK_BYTES) -> None:
        assert total > 0, "an empty stream has nothing to wait for"
        self.stream = stream
        self.total = total
        self.stride = min(stride, total)
        self.chunks = -(-total // self.stride)
        self.landed = 0
        self.resent = 0
        self._next = 0
        self._again: list[int] = []
        self._probe = -1
        self._unanswered = 0

    @property
    def done(self) -> bool:
        """Whether everything has landed."""
        return self.landed == self.chunks

    @property
    def out(self) -> int:
        """Chunks that were sent and have not landed, as far as is known."""
        return self._next - self.landed

    @property
    def begun(self) -> int:
        """Grows with each chunk that is taken up, for the first time or again."""
        return self._next + self.resent

    @property
    def repeats(self) -> bool:
        """Whether a chunk that was sent is wanted again."""
        return bool(self._again)

    def next(self) -> int | None:
        """The chunk to send now, or None: wait for a credit."""
        while self._again:
            sequence = self._again.pop(0)
            if sequence >= self.landed:
                self.resent += 1
                return sequence
        if self._next < self.chunks and self._next < self.landed + WINDOW:
            self._next += 1
            return self._next - 1
        return None

    def chunk(self, sequence: int, checksum: int | None, slot: int | None = None) -> Chunk:
        """The header of the chunk that `next` gave; `slot` is where it lies in the ring, if it does."""
        probe = sequence == self._probe
        if probe:
            self._probe = -1
        return Chunk(self.stream, self.total, sequence, self.stride, checksum, probe, slot)

    @property
    def unsure(self) -> bool:
        """Whether the chunk that goes next is repeated since nothing was heard: all may have landed."""
        return self._probe >= 0

    def question(self) -> Chunk:
        """What asks how far all is, and for the pace: the last chunk, without its data."""
        return Chunk(self.stream, self.total, self.chunks - 1, self.stride, None, probe=True)

    def credit(self, credit: Credit) -> None:
        """Take a credit. Raises ProtocolError when it credits what was never sent."""
        wanted = credit.missing
        if credit.landed > self._next or (wanted and max(wanted) >= self._next):
            raise ProtocolError(f"stream {self.stream}: credit up to chunk {max((credit.landed, *wanted))}, {self._next} were sent")
        self._unanswered = 0
        self.landed = max(self.landed, credit.landed)
        for sequence in wanted:
            if sequence >= self.landed and sequence not in self._again:
                self._again.append(sequence)

    def timeout(self) -> None:
        """Nothing was heard for a while: repeat the oldest chunk that is out. Raises PeerError after `REPEATS_MAX` in a row."""
        if self._unanswered == REPEATS_MAX:
            raise PeerError(f"stream {self.stream}: chunk {self.landed} was repeated {REPEATS_MAX} times, and nobody answered")
        if self.landed < self._next and self.landed not in self._again:
            self._unanswered += 1
            self._probe = self.landed
            self._again.append(self.landed)


class ReceiveState:
    """A stream that is being received: `total` bytes in chunks of `stride`."""

    def __init__(self, stream: int, total: int, stride: int = CHUNK_BYTES) -> None:
        self.stream = stream
        self.total = total
        self.stride = min(stride, total)
        self.chunks = -(-total // self.stride) if total else 0
        self.landed = 0
        self.corrupted = 0
        self.duplicates = 0
        self._ahead: set[int] = set()
        self._highest = -1
        self._asked: set[int] = set()
        self._damaged: dict[int, int] = {}
        self._since_credit = 0

    @property
    def done(self) -> bool:
        """Whether everything has landed."""
        return self.landed == self.chunks

    @property
    def came(self) -> int:
        """How many chunks have landed, in their turn or ahead of it."""
        return self.landed + len(self._ahead)

    def wants(self, chunk: Chunk) -> bool:
        """Whether to take a chunk's data; False for a repeat. Raises ProtocolError for a chunk of another stream than was expected."""
        if chunk.total != self.total:
            raise ProtocolError(f"stream {self.stream}: a chunk of {chunk.total} bytes in all, {self.total} were expected")
        if chunk.stride != self.stride:
            raise ProtocolError(f"stream {self.stream}: cut into chunks of {chunk.stride} bytes, not of {self.stride}")
        if chunk.sequence >= self.landed + WINDOW:
            raise ProtocolError(f"stream {self.stream}: chunk {chunk.sequence} is beyond the window; {self.landed} have landed")
        if chunk.sequence < self.landed or chunk.sequence in self._ahead:
            self.duplicates += 1
            return False
        return True

    def take(self, chunk: Chunk, intact: bool) -> Credit | None:
        """A wanted chunk's data came; returns the credit to send now, if any. Raises ProtocolError when it was damaged too often."""
        sequence = chunk.sequence
        self._highest = max(self._highest, sequence)
        if not intact:
            return self._refuse(sequence)
        self._asked.discard(sequence)
        self._damaged.pop(sequence, None)
        self._since_credit += 1
        if sequence == self.landed:
            self.landed += 1
            while self.landed in self._ahead:
                self._ahead.remove(self.landed)
                self.landed += 1
        else:
            self._ahead.add(sequence)
        if chunk.probe:
            return self.again()
        gaps = self._new_gaps()
        if gaps or self.done or self._since_credit >= CREDIT_EVERY:
            return self.credit(gaps)
        return None

    def _refuse(self, sequence: int) -> Credit:
        self.corrupted += 1
        times = self._damaged[sequence] = self._damaged.get(sequence, 0) + 1
        if times == TRIES_MAX:
            raise ProtocolError(f"stream {self.stream}: chunk {sequence} did not fit its checksum {times} times")
        self._asked.add(sequence)
        return self.credit((sequence,))

    def _new_gaps(self) -> tuple[int, ...]:
        """Chunks passed over that were not asked for yet: the channel keeps order, so they are lost."""
        if not self._ahead:
            return ()
        gaps = tuple(n for n in range(self.landed, self._highest) if n not in self._ahead and n not in self._asked)[:MISSING_MAX]
        self._asked.update(gaps)
        return gaps

    def again(self) -> Credit:
        """The answer to a probe: everything known, and all gaps anew, since what was asked for may have been lost too."""
        self._asked.clear()
        return self.credit(self._new_gaps())

    def credit(self, missing: tuple[int, ...] = ()) -> Credit:
        """A credit for what has landed."""
        self._since_credit = 0
        return Credit(self.stream, self.landed, missing, 0.0)
