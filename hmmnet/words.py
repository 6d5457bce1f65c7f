"""Words of a text, found and hashed without a Python loop over characters.

A word is a maximal run of ``[A-Za-z0-9_]`` bytes: identifiers of source code come out whole, any other byte separates. A word is known by
its 64-bit FNV-1a hash (Fowler, Noll, Vo), which is what a device can compare in one load.

FNV-1a is a chain of one multiplication for each byte, so it cannot be vectorised along a word; it is vectorised *across* words: sorted by
length, step *i* takes byte *i* of all words that are longer than *i*. The steps shrink as words run out; the few very long ones at the end
(a megabyte without a blank is a legal text) go on one by one in plain integers, which is cheaper than numpy on a handful.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FNV_OFFSET = 0xCBF29CE484222325
FNV_PRIME = 0x100000001B3
_MASK = (1 << 64) - 1
LONE_WORDS_MAX = 8
"""Words still running below which plain integers beat a numpy step."""

WORD_BYTES = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"
_IS_WORD = np.zeros(256, dtype=np.bool_)
_IS_WORD[np.frombuffer(WORD_BYTES, dtype=np.uint8)] = True

Bytes = npt.NDArray[np.uint8]
Index = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


class Words(NamedTuple):
    """The words of a text, in its order; unpacks as ``starts, lengths, hashes``."""

    starts: Index
    lengths: Index
    hashes: Hashes


def find_words(text: Bytes) -> tuple[Index, Index]:
    """Where the words of `text` begin and how long they are, in bytes, in order."""
    inside = np.zeros(len(text) + 2, dtype=np.bool_)
    np.take(_IS_WORD, text, out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1]).astype(np.int64, copy=False)
    starts = edges[0::2]
    return starts, edges[1::2] - starts


def fnv1a(word: bytes, start: int = FNV_OFFSET) -> int:
    """The 64-bit FNV-1a hash of one byte string, continued from `start`."""
    value = start
    for byte in word:
        value = ((value ^ byte) * FNV_PRIME) & _MASK
    return value


def hash_words(text: Bytes, starts: Index, lengths: Index) -> Hashes:
    """The FNV-1a hash of each word, in order."""
    order = np.argsort(-lengths, kind="stable")
    first = starts[order]
    falling = lengths[order]
    hashes = np.full(len(starts), FNV_OFFSET, dtype=np.uint64)
    prime = np.uint64(FNV_PRIME)
    step = 0
    running = len(starts)
    while running > LONE_WORDS_MAX:
        active = hashes[:running]
        active ^= text[first[:running] + step]
        active *= prime
        step += 1
        # `falling` descends: words longer than `step` are a prefix.
        running = int(np.searchsorted(-falling[:running], -step, side="left"))
    for i in range(running):
        rest = text[int(first[i]) + step : int(first[i]) + int(falling[i])]
        hashes[i] = fnv1a(rest.tobytes(), int(hashes[i]))
    out = np.empty_like(hashes)
    out[order] = hashes
    return out


def tokenize(text: Bytes) -> Words:
    """The words of `text` (one-dimensional uint8): where they start, their lengths in bytes, their FNV-1a hashes."""
    starts, lengths = find_words(text)
    return Words(starts, lengths, hash_words(text, starts, lengths))
