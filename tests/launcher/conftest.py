"""A disk that fills up while a machine begins."""

from __future__ import annotations

import errno
import os

import pytest


@pytest.fixture
def full_at_the_second_signature(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """There is room for one signature of a folder (`Directory.sign`), and for none after it; how long each was to be, in bytes."""
    signed: list[int] = []
    has_room = os.posix_fallocate

    def fills_up(file: int, offset: int, length: int) -> None:
        signed.append(length)
        if len(signed) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        has_room(file, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", fills_up)
    return signed
