"""What must come out, computed by plain Python: `re`, `dict`, `collections.Counter`, and a hash written out anew.

Nothing here is shared with the kernels, the tokenizer or the tree builder: a check that uses the code it checks proves little.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

NOT_THERE = 2**64 - 1


def fnv1a(word: bytes) -> int:
    """64-bit FNV-1a, as published."""
    value = 14695981039346656037
    for byte in word:
        value = (value ^ byte) * 1099511628211 % 2**64
    return value


@dataclass(frozen=True)
class Answers:
    """Hash of a word -> how often it occurs, and at which byte it occurs first."""

    counts: dict[int, int]
    first_at: dict[int, int]
    words: int

    def search(self, key: int) -> int:
        """What a search for `key` must find."""
        return self.first_at.get(key, NOT_THERE)

    def most_common(self, text: bytes, count: int, longer_than: int) -> list[tuple[str, int]]:
        """The commonest words that are longer than `longer_than` letters, for a person to recognise."""
        ranked = sorted(self.counts.items(), key=lambda item: -item[1])
        found = ((word_at(text, self.first_at[key]), times) for key, times in ranked)
        return [(word, times) for word, times in found if len(word) > longer_than][:count]


def word_at(text: bytes, offset: int) -> str:
    """The word that begins at byte `offset`."""
    match = re.compile(rb"[A-Za-z0-9_]+").match(text, offset)
    return match[0].decode() if match else ""


def answers_for(text: bytes) -> Answers:
    """Read `text` once, word by word."""
    first: dict[bytes, int] = {}
    counter: Counter[bytes] = Counter()
    for match in re.finditer(rb"[A-Za-z0-9_]+", text):
        word = match[0]
        counter[word] += 1
        first.setdefault(word, match.start())
    hashes = {word: fnv1a(word) for word in counter}
    counts: dict[int, int] = {}
    first_at: dict[int, int] = {}
    for word, count in counter.items():
        key = hashes[word]
        counts[key] = counts.get(key, 0) + count
        first_at[key] = min(first[word], first_at.get(key, first[word]))
    return Answers(counts, first_at, counter.total())


def wrong(got: Iterable[int], expected: Iterable[int]) -> int:
    """How many elements differ."""
    return sum(a != b for a, b in zip(got, expected, strict=True))
