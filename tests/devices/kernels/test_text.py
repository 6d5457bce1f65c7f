"""Word count against plain Python."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from hmmnet.devices.access import JobError
from hmmnet.devices.kernels.chunks import CHUNK_BYTES
from hmmnet.devices.kernels.text import word_count
from hmmnet.words import fnv1a
from tests.devices.plain_memory import PlainMemory


def count(raw: bytes, words: list[bytes]) -> tuple[dict[bytes, int], dict[str, int]]:
    plain = PlainMemory()
    by_hash = {fnv1a(word): word for word in words}
    hashes = np.array(sorted(by_hash), dtype=np.uint64)
    at, table = plain.place(np.frombuffer(raw, np.uint8)), plain.place(hashes)
    out = plain.place(np.full(len(hashes), 5, np.uint64))
    results = plain.drive(word_count(at, len(raw), table, len(hashes), out))
    found = plain.array(out, len(hashes)).tolist()
    return {by_hash[int(key)]: int(n) for key, n in zip(hashes, found, strict=True)}, results


def expected(raw: bytes, words: list[bytes]) -> dict[bytes, int]:
    seen = Counter(re.findall(rb"[A-Za-z0-9_]+", raw))
    return {word: seen[word] for word in words}


@pytest.mark.parametrize("raw", [b"", b"word", b"  a b a ", b"...", b"a_1 b-2 a_1\nb"])
def test_small_texts(raw: bytes) -> None:
    """Words at the beginning, at the end, none at all."""
    words = [b"a", b"b", b"a_1", b"word", b"nothere"]
    assert count(raw, words)[0] == expected(raw, words)


@pytest.mark.parametrize("shift", range(6))
def test_words_across_chunk_borders(shift: int) -> None:
    """A word that a chunk's end cuts through counts once, wherever it is cut."""
    filler = b"x " * ((CHUNK_BYTES - 4) // 2)
    raw = filler + b" " * shift + b"border end"
    words = [b"border", b"x", b"end"]
    assert count(raw, words)[0] == expected(raw, words)


@pytest.mark.parametrize("length", [CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 7])
def test_a_word_longer_than_a_chunk(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte without a blank is one word."""
    monkeypatch.setattr("hmmnet.devices.kernels.chunks.CHUNK_BYTES", CHUNK_BYTES >> 6)
    length = (length >> 6) + length % 64
    raw = b"y" * length + b" tail"
    found, results = count(raw, [b"y" * length, b"tail"])
    assert found == {b"y" * length: 1, b"tail": 1}
    assert results == {"seen": 2, "matched": 2}


def test_an_empty_table_counts_words_seen() -> None:
    """Without words to look for, the text is still read."""
    assert count(b"a b c", [])[1] == {"seen": 3, "matched": 0}


def test_absurd_table_is_refused() -> None:
    """A table that no device could hold ends the job."""
    with pytest.raises(JobError):
        next(word_count(0, 0, 0, 1 << 60, 0))
