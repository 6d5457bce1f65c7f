"""Entries that go on below themselves."""

from __future__ import annotations

import pytest

from hmmnet.observe.hanging import hang


def test_an_entry_goes_on_below_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its text began, in as many columns as there are; without a terminal it is one line."""
    text = "the source is unmapped, and nothing is copied yet"
    monkeypatch.setenv("COLUMNS", "40")
    assert hang("here      ", text) == "here      the source is unmapped, and\n          nothing is copied yet"
    monkeypatch.delenv("COLUMNS")
    assert hang("here  ", text * 9) == "here  " + text * 9


def test_a_wide_head_leaves_no_column_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the text goes on at the margin. A head alone ends with it; what has no blank is not cut."""
    monkeypatch.setenv("COLUMNS", "40")
    assert hang("a head of many words   ", "and a text behind it") == "a head of many words   and a text behind\n      it"
    assert hang("alone   ", "") == "alone"
    assert hang("", "x" * 50) == "x" * 50
