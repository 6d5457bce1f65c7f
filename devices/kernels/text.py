"""Kernels over text."""

from __future__ import annotations

import numpy as np

from hmmnet.devices.access import JobError, Steps, load_range, store_range
from hmmnet.words import find_words, fnv1a, hash_words

from .chunks import chunks, counts

WORD_BYTES = 8
WORDS_MAX = 1 << 24
"""Entries of the word table (128 MiB of hashes), which the kernel holds whole, as it would in shared memory."""


def word_count(text: int, length: int, words: int, n: int, out: int) -> Steps:
    """``out[i]`` = how often the word with hash ``words[i]`` occurs in the `length` bytes at `text`.

    `words` are `n` ascending 64-bit FNV-1a hashes (`hmmnet.words`). Results: words seen, and how many of them were in the table.
    """
    counts(text=text, length=length, words=words, n=n, out=out)
    if n > WORDS_MAX:
        raise JobError(f"argument n is {n}; at most {WORDS_MAX} words can be counted")
    table = (yield load_range(words, n)).copy()
    totals = np.zeros(n, dtype=np.uint64)
    seen = matched = 0
    carried: int | None = None  # hash so far of a word that the last chunk's end cut through
    for first, count in chunks(length, 1):
        piece = yield load_range(text + first, count, "u1")
        starts, lengths = find_words(piece)
        head: list[int] = []
        if carried is not None:
            if len(starts) and starts[0] == 0:
                carried = fnv1a(piece[: int(lengths[0])].tobytes(), carried)
                if int(lengths[0]) == count and first + count < length:
                    continue  # the whole chunk is the middle of one word
                starts, lengths = starts[1:], lengths[1:]
            head.append(carried)
            carried = None
        if first + count < length and len(starts) and int(starts[-1] + lengths[-1]) == count:
            carried = fnv1a(piece[int(starts[-1]) :].tobytes())
            starts, lengths = starts[:-1], lengths[:-1]
        hashes = np.concatenate((np.array(head, dtype=np.uint64), hash_words(piece, starts, lengths)))
        seen += len(hashes)
        if n:
            places = np.minimum(np.searchsorted(table, hashes), n - 1)
            hits = places[table[places] == hashes]
            matched += len(hits)
            totals += np.bincount(hits, minlength=n).astype(np.uint64)
    if n:
        yield store_range(out, totals)
    return {"seen": seen, "matched": matched}
