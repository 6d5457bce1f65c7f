"""Coherent memory: the file that host and device map both (`hmmnet.host.admission.SharedMemory`)."""

from __future__ import annotations

import os

from hmmnet.arena import Arena
from hmmnet.errors import HmmnetError
from hmmnet.pages import ZONE_SHIFT


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
