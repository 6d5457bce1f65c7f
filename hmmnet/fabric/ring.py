"""Chunks in shared memory: what they carry need not pass through a socket between processes of one computer.

A *ring* is one direction's slots, each as large as a chunk. The sender gathers a chunk from its memory straight into a slot; the chunk's
header goes over the bulk channel as ever, with the slot's number in place of a payload; the receiver copies from the slot straight to where
the chunk belongs, or scatters it. So a byte is copied twice, by our own hands, where a socket copies it three times and allocates for it:
1.5 to 2.5 times the throughput for half of the processor time. Sequence numbers, checksums, credits, repeats and aborts are those of every
stream; what finds no free slot travels as a message.

    sender                                     receiver
    chunk -- gather -->  | slot 3 |
          -- header: sequence, checksum, slot 3 -->
                         | slot 3 | -- copy, check -->  memory
          <-- credit: slot 3 is free, the pins end --

Both rings of a device lie in one file without a name (memfd), which the host makes and the device opens through ``/proc/PID/fd``: whatever
kills whom, nothing is left behind. A file that is found there may be another one (a container has pids of its own), so its first page holds
what the welcome says, a random token with it; and the device writes the token into it once more, by which the host knows that both see the
same memory. A device that cannot open it goes without: its data come as messages.

The peer is not trusted. The file is sealed against being cut (touching what is gone would be a SIGBUS); a slot's number is checked against
the ring, a length against the slot; bytes that somebody has written over do not match their checksum, are asked for again, and are gathered
anew from the source, which stays pinned until then.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
import struct
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from hmmnet.errors import HmmnetError, ProtocolError
from hmmnet.pages import PAGE_SIZE

from .chunk import CHUNK_BYTES
from .slots import Slots

SLOTS = 16
"""In each direction, so a busy device has up to 32 MiB of shared memory, which go back when it is idle. As many as a stream's window: what
one process does while the other is off its processor for a slice of 3 to 4 ms. (While neither is, few are in use, and those are warm.)"""
RING_BYTES = SLOTS * CHUNK_BYTES
TOKEN_BYTES = 16

_HEAD = struct.Struct(f"<8sII{TOKEN_BYTES}s")
_MAGIC = b"HMring1\0"
_ANSWER_AT = 64
"""Where in the first page the device repeats the token."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_FILE_BYTES = PAGE_SIZE + 2 * RING_BYTES

Bytes = npt.NDArray[np.uint8]

log = logging.getLogger("hmmnet.fabric")


class RingPlace(NamedTuple):
    """How a device finds the rings: the file, and the token that proves that it is the right one. An empty path: there are none."""

    path: str
    token: bytes


class Ring:
    """One direction of a pair of rings, at either end."""

    def __init__(self, rings: Rings, first: int) -> None:
        self.slots = Slots(SLOTS)
        """Which are free, as far as the sender knows; the receiver has no use for it."""
        self._rings = rings
        self._first = first

    @property
    def usable(self) -> bool:
        """Whether the other end sees the same memory."""
        return self._rings.attached

    def part(self, slot: int, length: int) -> Bytes:
        """The first `length` bytes of a slot, writable. Raises ProtocolError when that is outside the ring."""
        memory = self._rings.bytes
        if not (0 <= slot < SLOTS and 0 <= length <= CHUNK_BYTES and len(memory)):
            raise ProtocolError(f"{length} bytes in slot {slot} of a ring of {SLOTS if len(memory) else 0} slots of {CHUNK_BYTES} bytes")
        begin = self._first + slot * CHUNK_BYTES
        return memory[begin : begin + length]

    def discard(self) -> None:
        """The sender has been idle: its slots' memory goes back to the operating system. Nothing happens while a slot is taken."""
        if self.slots.idle:
            self._rings.discard(self._first, RING_BYTES)


class Rings:
    """Both directions between a host and one device, in memory that both have mapped. Made by `made` and `opened`."""

    def __init__(self, descriptor: int, token: bytes) -> None:
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, _FILE_BYTES)
        self._token = token
        self._attached = False
        self.bytes: Bytes = np.frombuffer(self._map, dtype=np.uint8)
        self.to_device = Ring(self, PAGE_SIZE)
        self.to_host = Ring(self, PAGE_SIZE + RING_BYTES)

    @classmethod
    def made(cls, name: str) -> Self:
        """New rings, for the host. Raises OSError when the operating system does not give so much, or such files at all."""
        descriptor = os.memfd_create(f"hmmnet-ring-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, _FILE_BYTES)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            rings = cls(descriptor, secrets.token_bytes(TOKEN_BYTES))
        except BaseException:
            os.close(descriptor)
            raise
        rings._map[: _HEAD.size] = rings._head()
        return rings

    @classmethod
    def opened(cls, place: RingPlace) -> Self:
        """The host's rings, for the device, which from then on is known to see them. Raises HmmnetError when it does not."""
        try:
            descriptor = os.open(place.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HmmnetError(f"{place.path} cannot be opened: {error.strerror}") from error
        try:
            if os.fstat(descriptor).st_size != _FILE_BYTES or fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise HmmnetError(f"{place.path} is not the host's file: it has another size, or can be cut")
            rings = cls(descriptor, place.token)
        except OSError as error:
            raise HmmnetError(f"{place.path} cannot be mapped: {error.strerror}") from error
        finally:
            os.close(descriptor)
        rings._descriptor = -1
        if rings._map[: _HEAD.size] != rings._head():
            raise HmmnetError(f"{place.path} is not the host's file: it does not hold the token of the welcome")
        rings._map[_ANSWER_AT : _ANSWER_AT + TOKEN_BYTES] = place.token
        return rings

    def _head(self) -> bytes:
        return _HEAD.pack(_MAGIC, SLOTS, CHUNK_BYTES, self._token)

    @property
    def place(self) -> RingPlace:
        """What to tell the device, while the file is open."""
        return RingPlace(f"/proc/{os.getpid()}/fd/{self._descriptor}", self._token)

    @property
    def attached(self) -> bool:
        """Whether the device has them mapped, too."""
        if not self._attached and self._token:
            self._attached = self._map[_ANSWER_AT : _ANSWER_AT + TOKEN_BYTES] == self._token
        return self._attached

    def discard(self, first: int, length: int) -> None:
        """The memory of those bytes goes back to the operating system; they are zeros afterwards, at both ends. Nothing once closed."""
        if len(self.bytes):
            self._map.madvise(mmap.MADV_REMOVE, first, length)

    def shut(self) -> None:
        """The device has opened the file, or never will; what is mapped stays mapped."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def close(self) -> None:
        """The device is gone: nothing is held any more, not even by what still has the memory mapped. Nobody sees the rings from now on."""
        self.shut()
        self.discard(0, _FILE_BYTES)
        self._attached, self._token = False, b""
        self.bytes = np.empty(0, dtype=np.uint8)
        try:
            self._map.close()
        except BufferError:  # the mapping, empty, ends with the last view of it
            log.debug("a ring is closed while somebody still looks at it")


def new_rings(name: str) -> Rings | None:
    """New rings; None where there can be none (a limit on the size of files, say): data are messages then."""
    try:
        return Rings.made(name)
    except OSError as error:
        log.warning("page data are sent as messages: there is no shared memory for them (%s)", error)
        return None
