"""The arguments of every operation a client may call, with their bounds: what `calls.py` decodes before it believes anything."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec

from hmmnet.pages import ADDRESS_BITS, PAGE_SIZE
from hmmnet.wire.messages import NAME_MAX, PAGES_PER_MESSAGE_MAX, Name

CHUNK_BYTES = 1 << 20
"""Data that one call or its reply carries (the bound of `Call.data`)."""
STAGED_BYTES_MAX = 64 << 20
"""Ioctl data that a client may pile up on one handle, and results kept for it to fetch: 16384 pages."""

REFERENCES_MAX = 1 << 14
"""Pages of one get_user_pages over a client session (64 MiB)."""

Address: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << ADDRESS_BITS)]
Length: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << ADDRESS_BITS)]
ChunkLength: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=CHUNK_BYTES)]
Pages: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=PAGES_PER_MESSAGE_MAX)]
Word: TypeAlias = Annotated[str, msgspec.Meta(max_length=32)]


class Operation(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Arguments of an operation on the machine."""


class Create(Operation, frozen=True):
    """``create_process``."""

    node: Annotated[str, msgspec.Meta(max_length=NAME_MAX)] = ""
    cgroup: Annotated[str, msgspec.Meta(max_length=NAME_MAX)] = ""


class CreateCgroup(Operation, frozen=True):
    """``create_cgroup``; without `limit` it has none."""

    name: Annotated[str, msgspec.Meta(max_length=NAME_MAX)]
    limit: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] | None = None


class OnCgroup(Operation, frozen=True):
    """``oom_kill``; without a name all processes are meant."""

    cgroup: Annotated[str, msgspec.Meta(max_length=NAME_MAX)] = ""


class OnDevice(Operation, frozen=True):
    """``unplug``."""

    device: Name


class AddFault(Operation, frozen=True):
    """``add_fault``: what makes a fault (`hmmnet.faults.catalogue.fault`)."""

    fault: dict[str, Any]


class RemoveFault(Operation, frozen=True):
    """``remove_fault``: its number."""

    fault: int


class OnProcess(Operation, frozen=True):
    """Arguments of an operation on a process."""

    process: int


class ScoreAdj(OnProcess, frozen=True):
    """``set_oom_score_adj``."""

    value: int


class Map(OnProcess, frozen=True):
    """``mmap``; `file` is a number from ``memfd_create``, `handle` one from ``open``."""

    length: Length
    protection: Word = "rw"
    address: Address | None = None
    populate: bool = False
    shared: bool = False
    file: int | None = None
    handle: int | None = None
    offset: Length = 0
    hugetlb: bool = False


class CreateFile(OnProcess, frozen=True):
    """``memfd_create``."""

    length: Length


class OnFile(Operation, frozen=True):
    """Arguments of an operation on a file."""

    file: int


class FilePart(OnFile, frozen=True):
    """``file_write``, ``file_punch``, ``file_truncate`` (`length` alone counts)."""

    offset: Length = 0
    length: Length = 0


class FileChunk(OnFile, frozen=True):
    """``file_read``."""

    offset: Length
    length: ChunkLength


class Range(OnProcess, frozen=True):
    """``munmap``, ``mlock``, ``munlock``."""

    address: Address
    length: Length


class Register(Range, frozen=True):
    """``userfaultfd``."""

    sigbus: bool = False


class OnFaults(OnProcess, frozen=True):
    """``fault_read``, ``fault_close``."""

    faults: int


class FaultCopy(OnFaults, frozen=True):
    """``fault_copy``; the bytes are the call's data."""

    address: Address


class Protect(Range, frozen=True):
    """``mprotect``."""

    protection: Word


class Advise(Range, frozen=True):
    """``madvise``."""

    advice: Word


class Remap(OnProcess, frozen=True):
    """``mremap``."""

    address: Address
    old: Length
    new: Length
    target: Address | None = None
    may_move: bool = True
    dontunmap: bool = False


class Refer(OnProcess, frozen=True):
    """``get_user_pages``."""

    address: Address
    pages: Annotated[int, msgspec.Meta(gt=0, le=REFERENCES_MAX)]
    write: bool = False
    pin: bool = False
    longterm: bool = False


class Referred(OnProcess, frozen=True):
    """``put_pages``."""

    reference: int


class ReadReferred(Referred, frozen=True):
    """``read_pages``."""

    first: Annotated[int, msgspec.Meta(ge=0, le=REFERENCES_MAX)]
    pages: Annotated[int, msgspec.Meta(ge=0, le=CHUNK_BYTES // PAGE_SIZE)]


class Allocate(OnProcess, frozen=True):
    """``malloc``."""

    length: Length


class Read(OnProcess, frozen=True):
    """``read``."""

    address: Address
    length: ChunkLength


class Write(OnProcess, frozen=True):
    """``write``; the bytes are the call's data."""

    address: Address


class Look(OnProcess, frozen=True):
    """``pagemap``, ``pagemap_words`` and ``residency``."""

    address: Address
    pages: Annotated[int, msgspec.Meta(ge=0, le=CHUNK_BYTES // 2)]


class LookAtWords(Look, frozen=True):
    """``pagemap_words``: eight bytes a page."""

    pages: Annotated[int, msgspec.Meta(ge=0, le=CHUNK_BYTES // 8)]


class ClearRefs(OnProcess, frozen=True):
    """``clear_refs``."""

    soft_dirty: bool


class Kill(OnProcess, frozen=True):
    """``kill``."""

    out_of_memory: bool


class Move(Range, frozen=True):
    """``migrate``."""

    to: Name


class Start(OnProcess, frozen=True):
    """``launch``."""

    kernel: Name
    device: Name
    placement: Name = "demand"
    arguments: dict[str, Any] = {}


class Open(OnProcess, frozen=True):
    """``open``."""

    device: Name


class OnHandle(OnProcess, frozen=True):
    """``close`` and ``stage``."""

    handle: int


class Command(OnHandle, frozen=True):
    """``ioctl``."""

    command: Name
    address: Address
    pages: Pages
    flags: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 0


class Fetch(OnHandle, frozen=True):
    """``fetch``."""

    offset: Annotated[int, msgspec.Meta(ge=0, le=STAGED_BYTES_MAX)]
