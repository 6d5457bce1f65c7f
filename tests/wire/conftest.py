"""Two sessions that are joined; and short places for sockets: a Unix socket's path has 107 bytes, pytest's own folders can be longer."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator

import pytest

from .lines import World, joined


@pytest.fixture
def place() -> Iterator[str]:
    """A folder that is gone after the test."""
    with tempfile.TemporaryDirectory(prefix="hmm-") as folder:
        yield folder


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Two sessions and the lines between them."""
    async with joined() as world:
        yield world
