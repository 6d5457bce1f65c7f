"""Short places for sockets: a Unix socket's path has 107 bytes, and pytest's own temporary folders can be longer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture
def place() -> Iterator[str]:
    """A folder that is gone after the test."""
    with tempfile.TemporaryDirectory(prefix="hmm-") as folder:
        yield folder
