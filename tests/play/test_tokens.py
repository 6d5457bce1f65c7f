"""The recorder's spelling of pages, snapshot bytes and page table entries."""

from __future__ import annotations

import pytest

from hmmnet.pages import PAGE_SIZE
from hmmnet.play.tokens import listed, page_token, page_tokens, pagemap_symbol, snapshot_symbol


def test_page_tokens() -> None:
    """Zero, one value all over, and the checksum that h02 shows for page 0x52.. with byte 0x99 in front."""
    mixed = b"\x99" + b"\x52" * (PAGE_SIZE - 1)
    assert page_tokens(bytes(PAGE_SIZE) + b"\x07" * PAGE_SIZE + mixed) == ["z", "u07", "1f5fc496"]
    assert page_token(memoryview(mixed)) == "1f5fc496"
    assert page_tokens(b"") == []


@pytest.mark.parametrize(
    ("value", "symbol"),
    [
        (0x00, "-"),
        (0xFF, "E"),
        (0x01, "R"),
        (0x02, "W"),
        (0x11, "ZR"),
        (0x21, "LR"),
        (0x22, "LW"),
        (0x32, "XW"),
        (0x42, "CLW"),
        (0x51, "CXR"),
        (0x06, "W/PMD"),
        (0x26, "LW/PMD"),
        (0x0A, "W/PUD"),
        (0x20, "?20"),
        (0x80, "?80"),
    ],
)
def test_snapshot_symbols(value: int, symbol: str) -> None:
    """HMM_DMIRROR_PROT_* bytes; one that the driver never writes is shown, not guessed."""
    assert snapshot_symbol(value) == symbol


@pytest.mark.parametrize(("value", "symbol"), [(0x2D, "-"), (0x50, "P"), (0xD0, "Px"), (0x53, "S"), (0x70, "Pf"), (0xF0, "Pfx")])
def test_pagemap_symbols(value: int, symbol: str) -> None:
    """Letter, f for file pages, x when mapped exactly once."""
    assert pagemap_symbol(value) == symbol


def test_listed() -> None:
    assert listed(["u10", "z"]) == "[u10 z]"
    assert listed([]) == "[]"
