"""One DMA stream at either end, without I/O: which chunks are out, which have landed, which are wanted again.

The sender may have `WINDOW` chunks out. The receiver credits: every quarter of a window, at the end, and at once when something is wrong.
A credit says how far everything has landed and which chunks beyond are missing or were damaged; those are sent again. Chunks may arrive
twice (a repeat that was not needed) and take effect once. When the sender hears nothing, it repeats its oldest chunk, which draws a
credit even from a receiver that has everything.

A chunk that is out is pinned: its source pages must not change until it is credited, as a copy engine's source must not.
"""

from __future__ import annotations

from hmmnet.errors import ProtocolError

from .chunk import CHUNK_BYTES, MISSING_MAX, Chunk, Credit

WINDOW = 16
"""Chunks out at once. Latency wants few, throughput 8 to 16; 16 MiB of source pages are pinned then."""
CREDIT_EVERY = WINDOW // 4


class SendState:
    """A stream that is being sent: `total` bytes in chunks."""

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

    @property
    def done(self) -> bool:
        """Whether everything has landed."""
        return self.landed == self.chunks

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

    def credit(self, credit: Credit) -> None:
        """Take a credit. Raises ProtocolError when it credits what was never sent."""
        wanted = credit.missing
        if credit.landed > self._next or any(sequence >= self._next for sequence in wanted):
            raise ProtocolError(f"stream {self.stream}: credit up to chunk {max((credit.landed, *wanted))}, {self._next} were sent")
        self.landed = max(self.landed, credit.landed)
        for sequence in wanted:
            if sequence >= self.landed and sequence not in self._again:
                self._again.append(sequence)

    def timeout(self) -> None:
        """Nothing was heard for a while: repeat the oldest chunk that is out."""
        if self.landed < self._next and self.landed not in self._again:
            self._again.append(self.landed)


class ReceiveState:
    """A stream that is being received."""

    def __init__(self, stream: int, total: int) -> None:
        self.stream = stream
        self.total = total
        self.landed = 0
        self.corrupted = 0
        self.duplicates = 0
        self.arrive_s = float("-inf")
        self._stride = 0
        self._ahead: set[int] = set()
        self._highest = -1
        self._asked: set[int] = set()
        self._since_credit = 0

    @property
    def done(self) -> bool:
        """Whether everything has landed."""
        return self._stride > 0 and self.landed * self._stride >= self.total

    def wants(self, chunk: Chunk) -> bool:
        """Whether to take a chunk's data; False for a repeat. Raises ProtocolError for a chunk of another stream than was expected."""
        if chunk.total != self.total:
            raise ProtocolError(f"stream {self.stream}: a chunk of {chunk.total} bytes in all, {self.total} were expected")
        if self._stride == 0:
            self._stride = chunk.stride
        elif chunk.stride != self._stride:
            raise ProtocolError(f"stream {self.stream}: chunks of {self._stride} bytes became chunks of {chunk.stride}")
        if chunk.sequence < self.landed or chunk.sequence in self._ahead:
            self.duplicates += 1
            return False
        return True

    def take(self, chunk: Chunk, intact: bool) -> Credit | None:
        """A wanted chunk's data came; returns the credit to send now, if any."""
        self._highest = max(self._highest, chunk.sequence)
        self._asked.discard(chunk.sequence)
        if not intact:
            self.corrupted += 1
            self._asked.add(chunk.sequence)
            return self.credit((chunk.sequence,))
        self.arrive_s = max(self.arrive_s, chunk.arrive_s)
        self._since_credit += 1
        if chunk.sequence == self.landed:
            self.landed += 1
            while self.landed in self._ahead:
                self._ahead.remove(self.landed)
                self.landed += 1
        else:
            self._ahead.add(chunk.sequence)
        gaps = self._new_gaps()
        if gaps or self.done or self._since_credit >= CREDIT_EVERY:
            return self.credit(gaps)
        return None

    def _new_gaps(self) -> tuple[int, ...]:
        """Chunks passed over that were not asked for yet: the channel keeps order, so they are lost."""
        if not self._ahead:
            return ()
        gaps = tuple(n for n in range(self.landed, self._highest) if n not in self._ahead and n not in self._asked)[:MISSING_MAX]
        self._asked.update(gaps)
        return gaps

    def again(self) -> Credit:
        """The answer to a repeat: everything known, and all gaps anew, since what was asked for may have been lost too."""
        self._asked.clear()
        return self.credit(self._new_gaps())

    def credit(self, missing: tuple[int, ...] = ()) -> Credit:
        """A credit for what has landed."""
        self._since_credit = 0
        return Credit(self.stream, self.landed, missing, 0.0)
