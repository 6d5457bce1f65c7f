"""What a device is told about itself in the welcome message: its entry of the topology, as far as a device cares."""

from __future__ import annotations

from typing import Annotated

import msgspec

from hmmnet.errors import ProtocolError
from hmmnet.pages import HUGE_PAGES, PAGE_SHIFT, PAGE_SIZE, PAGES_MAX
from hmmnet.wire.messages import Welcome


class Spec(msgspec.Struct, frozen=True):
    """The part of `hmmnet.topology.DeviceSpec` that shapes a device model; further fields are the topology's business."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    model: str = "gpu"
    memory_bytes: Annotated[int, msgspec.Meta(ge=PAGE_SIZE, le=PAGES_MAX << PAGE_SHIFT)] = 1 << 30
    kind: str = "private"
    page_sizes: tuple[int, ...] = (PAGE_SIZE, 16 * PAGE_SIZE, HUGE_PAGES * PAGE_SIZE)
    """Bytes, ascending."""
    fault_capable: bool = True
    atomics: bool = True
    unit: int | None = None
    memory_file: str = ""
    """Where its memory is, if it is shared with the host because it is coherent."""
    chance: str = ""
    """What its chances of faults are drawn from: the machine's seed, its name, and which life of it this is."""
    ring_file: str = ""
    ring_token: bytes = b""
    """Where page data may lie on their way between host and device, and the proof that the file is the host's; empty: they are messages."""

    @property
    def pages(self) -> int:
        """Frames of its memory."""
        return self.memory_bytes >> PAGE_SHIFT

    @property
    def maps_huge(self) -> bool:
        """Whether its page table can map 2 MiB as one; what cannot never asks for huge pages as one (MIGRATE_VMA_SELECT_COMPOUND)."""
        return HUGE_PAGES * PAGE_SIZE in self.page_sizes

    @property
    def is_coherent(self) -> bool:
        """Whether the CPU reaches this memory in place (MEMORY_DEVICE_COHERENT)."""
        return self.kind == "coherent"


def spec_of(welcome: Welcome) -> Spec:
    """The spec in a welcome. Raises ProtocolError."""
    try:
        spec = msgspec.msgpack.decode(welcome.config, type=Spec)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"the host's welcome holds no device specification: {error}") from error
    if spec.kind not in {"private", "coherent"}:
        raise ProtocolError(f"the host's welcome gives device {spec.name} memory of kind {spec.kind!r}; private or coherent is wanted")
    return spec
