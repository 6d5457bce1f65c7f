"""Memory that host and device map both: one file, two arenas; a file that is not there is told with its cause."""

from __future__ import annotations

import os

import numpy as np
import pytest

from hmmnet.devices.shared import shared_arena
from hmmnet.errors import HmmnetError
from hmmnet.host.admission import SharedMemory
from hmmnet.pages import PAGE_SIZE, ZONE_SHIFT


def test_both_ends_see_one_memory() -> None:
    """A store at one end is read at the other; memory that is given back reads as zero at both; the file may be closed meanwhile."""
    shared = SharedMemory("gh200", 64, 32)
    arena = shared_arena(64, 32, shared.path)
    shared.close()
    shared.close()
    arena.pages[3] = 7
    assert bool((shared.arena.pages[3] == 7).all())
    shared.arena.bytes[5 * PAGE_SIZE] = 9
    assert arena.bytes[5 * PAGE_SIZE] == 9
    arena.discard(np.arange(32, dtype=np.uint64) + np.uint64(64 << ZONE_SHIFT))
    assert not shared.arena.bytes.any()


def test_a_file_that_cannot_be_opened(tmp_path: os.PathLike[str]) -> None:
    """The path, the cause, and why it matters."""
    with pytest.raises(HmmnetError, match=r"memory cannot be opened at .*nothing: No such file.*coherent.*host's computer"):
        shared_arena(64, 1, f"{tmp_path}/nothing")
