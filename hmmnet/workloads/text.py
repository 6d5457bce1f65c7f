"""Text: counting the words of real files."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hmmnet.program import Machine
from hmmnet.words import WORD_BYTES as WORD_CHARACTERS
from hmmnet.words import tokenize

from .registry import Report
from .shares import chosen_devices, mistakes_between, report_of, reserve, run_shares, store_array

TEXT_BYTES_MAX = 4 << 20
"""Read of the input unless more is asked for: enough for thousands of pages, little enough to check in plain Python within a second."""
WORD_BYTES = 8


_WORD_ENDS = frozenset(bytes([byte]) for byte in WORD_CHARACTERS)


def library_files() -> Iterator[Path]:
    """The source files of the running Python's own standard library: a few MB of real text on every machine."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    yield from sorted(path for path in folder.glob("*.py") if path.is_file())
    for package in ("asyncio", "collections", "email", "http", "json", "logging", "multiprocessing", "unittest", "xml"):
        yield from sorted((folder / package).glob("*.py"))


def load_text(paths: Sequence[Path] | None = None, limit: int = TEXT_BYTES_MAX) -> bytes:
    """At most `limit` bytes of the files, one after the other; without `paths`, of the standard library. Raises OSError.

    A word ends with its file: a line feed is put in where the file itself does not say so.
    """
    parts: list[bytes] = []
    left = limit
    for path in paths or library_files():
        if left <= 0:
            break
        try:
            with path.open("rb") as file:
                part = file.read(left)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error  # one in the middle of a file names none
        if not part:
            continue
        between = b"\n" if parts and parts[-1][-1:] in _WORD_ENDS else b""
        parts.append((between + part)[:left])
        left -= len(parts[-1])
    return b"".join(parts)


def cut_text(text: bytes, shares: int) -> list[tuple[int, int]]:
    """`text` in at most `shares` ranges of about equal size, cut between words; empty ones are left out."""
    characters = frozenset(WORD_CHARACTERS)
    borders = [0]
    for i in range(1, shares):
        border = max(borders[-1], len(text) * i // shares)
        while 0 < border < len(text) and text[border] in characters and text[border - 1] in characters:
            border += 1
        borders.append(border)
    borders.append(len(text))
    return [(a, b) for a, b in pairwise(borders) if a < b]


def plain_hash(word: bytes) -> int:
    """FNV-1a written out for one word: the check shares no code with what it checks."""
    value = 0xCBF29CE484222325
    for byte in word:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def plain_counts(text: bytes) -> dict[int, int]:
    """Hash -> count of every word, by `re` and `collections.Counter`."""
    counts: dict[int, int] = {}
    for word, count in Counter(re.findall(rb"[A-Za-z0-9_]+", text)).items():
        key = plain_hash(word)
        counts[key] = counts.get(key, 0) + count
    return counts


def as_array(text: bytes) -> npt.NDArray[np.uint8]:
    """`text` as bytes of an array, without a copy."""
    return np.frombuffer(text, dtype=np.uint8)


async def word_count(
    machine: Machine,
    input: Sequence[str] | str | None = None,  # noqa: A002 - named as the option of the command line
    limit: int = TEXT_BYTES_MAX,
    devices: Sequence[str] | str | None = None,
    placement: str = "demand",
) -> Report:
    """Count the words of `input` (files; default: the standard library's sources), each device its share of the text."""
    names = await chosen_devices(machine, devices)
    paths = [Path(p) for p in ([input] if isinstance(input, str) else input)] if input else None
    text = load_text(paths, limit)
    words = np.unique(tokenize(as_array(text)).hashes)
    process = await machine.create_process()
    text_at = await store_array(process, as_array(text))
    shares = {}
    for name, (a, b) in zip(names, cut_text(text, len(names)), strict=False):
        words_at = await store_array(process, words)
        out_at = await reserve(process, words.nbytes)
        shares[name] = {"text": text_at + a, "length": b - a, "words": words_at, "n": len(words), "out": out_at}
    jobs = await run_shares(process, "word_count", placement, shares)
    got = np.zeros(len(words), dtype=np.uint64)
    for arguments in shares.values():
        got += await process.read_array(arguments["out"], "<u8", len(words))
    await process.exit()
    expected = plain_counts(text)
    mistakes = mistakes_between(got, np.array([expected.get(key, 0) for key in words.tolist()], dtype=np.uint64))
    if len(expected) != len(words):
        mistakes.append(f"{len(words)} different words were counted, there are {len(expected)}")
    return report_of("word_count", jobs, mistakes, text_bytes=len(text), words=int(got.sum()), different_words=len(words))
