"""Files that host and device map both: coherent memory (`hmmnet.host.admission.SharedMemory`), and rings for page data."""

from __future__ import annotations

import logging
import os

from hmmnet.arena import Arena
from hmmnet.errors import HmmnetError
from hmmnet.fabric.dma import RingPlace, Rings
from hmmnet.pages import ZONE_SHIFT

log = logging.getLogger("hmmnet.devices")


def shared_arena(zone: int, pages: int, file: str) -> Arena:
    """The memory of `zone`, which is in `file`. Raises HmmnetError when that cannot be opened."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        why = "coherent memory is shared with the host, so a coherent device runs on the host's computer, as the same user"
        raise HmmnetError(f"the host's memory cannot be opened at {file}: {error.strerror}; {why}") from error
    try:
        return Arena(zone << ZONE_SHIFT, pages, descriptor)
    finally:
        os.close(descriptor)


def shared_rings(file: str, token: bytes) -> Rings | None:
    """The rings in the host's `file`; None when there are none, or they cannot be reached: then page data are messages."""
    if not file:
        return None
    try:
        return Rings.opened(RingPlace(file, token))
    except HmmnetError as error:
        log.info("page data are sent as messages: %s", error)
        return None
