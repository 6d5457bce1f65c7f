"""Words and their hashes, against `re` and a plain FNV-1a."""

from __future__ import annotations

import random
import re

import numpy as np
import numpy.typing as npt
import pytest

from hmmnet.words import fnv1a, tokenize

SEED = 20


def as_array(text: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text, dtype=np.uint8)


def plain_fnv1a(word: bytes) -> int:
    """The published recipe, written out anew."""
    value = 14695981039346656037
    for byte in word:
        value = (value ^ byte) * 1099511628211 % 2**64
    return value


@pytest.mark.parametrize(("word", "expected"), [(b"", 0xCBF29CE484222325), (b"a", 0xAF63DC4C8601EC8C), (b"foobar", 0x85944171F73967E8)])
def test_published_values(word: bytes, expected: int) -> None:
    """The test vectors that FNV's authors publish."""
    assert fnv1a(word) == expected


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"a",
        b"  a",
        b"a  ",
        b"two words",
        b"snake_case2 x",
        "caf\u00e9 na\u00efve".encode(),
        b"\x00\xff@[`{/:",
        b"x" * 5000 + b" y",
    ],
)
def test_words_are_those_of_re(text: bytes) -> None:
    """Maximal runs of [A-Za-z0-9_] bytes, wherever they stand."""
    words = tokenize(as_array(text))
    expected = re.findall(rb"[A-Za-z0-9_]+", text)
    assert [text[s : s + n] for s, n in zip(words.starts.tolist(), words.lengths.tolist(), strict=True)] == expected
    assert words.hashes.tolist() == [plain_fnv1a(word) for word in expected]


def test_random_text() -> None:
    """All lengths at once, so that the vectorised steps shrink from many words to few."""
    chance = random.Random(SEED)
    text = bytes(chance.choice(b"abcXYZ019_ .\n-") for _ in range(20_000)) + b"z" * 300 + b" " + b"q" * 299
    words = tokenize(as_array(text))
    expected = re.findall(rb"[A-Za-z0-9_]+", text)
    assert words.hashes.tolist() == [plain_fnv1a(word) for word in expected]
