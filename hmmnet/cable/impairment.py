"""What a bad cable does to packets, one direction of it: which arrive, and when. Pure arithmetic: the caller owns time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hmmnet.errors import HmmnetError

QUEUE_BYTES_MAX = 4 << 20
"""Of packets that wait for a slow cable; more are dropped, as a switch drops them."""


@dataclass(frozen=True)
class Impairment:
    """How bad one direction is; a fresh one is good.

    `loss`, `duplicate`, `reorder` are probabilities for each packet: gone, twice, late by `reorder_s` so that later ones overtake it.
    Every packet takes `latency_s` and up to `jitter_s` more, in order. `rate_bytes_per_s` is what passes (0: anything). `down`: nothing.
    Raises HmmnetError for what is none.
    """

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    reorder_s: float = 0.005
    latency_s: float = 0.0
    jitter_s: float = 0.0
    rate_bytes_per_s: float = 0.0
    down: bool = False

    def __post_init__(self) -> None:
        for name in ("loss", "duplicate", "reorder"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise HmmnetError(f"{name} {getattr(self, name):g} of a cable is no probability: give one from 0 to 1")
        for name in ("reorder_s", "latency_s", "jitter_s", "rate_bytes_per_s"):
            if getattr(self, name) < 0:
                raise HmmnetError(f"{name} {getattr(self, name):g} of a cable cannot be negative")


GOOD = Impairment()


class Direction:
    """One direction at work. `chance` gives numbers from 0 to 1, and decides what the probabilities leave open."""

    def __init__(self, chance: Callable[[], float]) -> None:
        self.impairment = GOOD
        self.passed = 0
        self.dropped = 0
        self._chance = chance
        self._free_s = 0.0
        """When the cable has sent what it was given."""
        self._last_s = 0.0
        """When the last packet in order arrives."""

    def arrivals(self, now_s: float, nbytes: int) -> list[float]:
        """When a packet of `nbytes` that is given to the cable now arrives: not at all, once, or twice."""
        bad = self.impairment
        if bad.down or self._happens(bad.loss) or self._overflows(now_s):
            self.dropped += 1
            return []
        self.passed += 1
        sent_s = now_s
        if bad.rate_bytes_per_s:
            self._free_s = sent_s = max(now_s, self._free_s) + nbytes / bad.rate_bytes_per_s
        arrives_s = sent_s + bad.latency_s + (self._chance() * bad.jitter_s if bad.jitter_s else 0.0)
        if self._happens(bad.reorder):
            arrives_s += bad.reorder_s
        else:
            self._last_s = arrives_s = max(arrives_s, self._last_s)
        return [arrives_s, arrives_s] if self._happens(bad.duplicate) else [arrives_s]

    def _happens(self, probability: float) -> bool:
        return probability > 0 and self._chance() < probability

    def _overflows(self, now_s: float) -> bool:
        rate = self.impairment.rate_bytes_per_s
        return rate > 0 and (self._free_s - now_s) * rate > QUEUE_BYTES_MAX
