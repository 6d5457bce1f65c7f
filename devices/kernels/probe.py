"""Kernels that touch memory word by word and say what they saw: for tests of coherence, and for programs that share counters."""

from __future__ import annotations

import numpy as np

from hmmnet.devices.access import JobError, Steps, load, load_range, store_range, update

from .chunks import chunks, counts

WORD_BYTES = 8
SHOWN_MAX = 1 << 13
"""Words that `peek` shows: what fits an answer."""


def peek(a: int, n: int) -> Steps:
    """The `n` 64-bit words at `a`, as the device sees them: ``{"words": bytes}``."""
    counts(a=a, n=n)
    if n > SHOWN_MAX:
        raise JobError(f"argument n is {n}; at most {SHOWN_MAX} words can be shown")
    words = yield load_range(a, n)
    return {"words": words.tobytes()}


def poke(a: int, words: bytes) -> Steps:
    """Store the 64-bit `words` at `a`."""
    counts(a=a)
    if len(words) % WORD_BYTES:
        raise JobError(f"argument words has {len(words)} bytes; whole 64-bit words are wanted")
    yield store_range(a, np.frombuffer(words, np.uint64))
    return {}


def gather(addresses: bytes) -> Steps:
    """The words at the 64-bit `addresses`, in their order: ``{"words": bytes}``."""
    wanted = np.frombuffer(addresses, np.uint64)
    if len(wanted) > SHOWN_MAX:
        raise JobError(f"{len(wanted)} addresses; at most {SHOWN_MAX} words can be shown")
    words = yield load(wanted)
    return {"words": words.tobytes()}


def fetch_add(a: int, n: int = 1, by: int = 1) -> Steps:
    """Add `by` to each of the `n` words at `a`, each atomically: ``{"words": bytes}``, what they were."""
    counts(a=a, n=n)
    seen = []
    for first, count in chunks(min(n, SHOWN_MAX), WORD_BYTES):
        addresses = np.arange(a + first * WORD_BYTES, a + (first + count) * WORD_BYTES, WORD_BYTES, dtype=np.uint64)
        seen.append((yield update(addresses, np.full(count, by % (1 << 64), np.uint64))))
    return {"words": b"".join(words.tobytes() for words in seen)}
