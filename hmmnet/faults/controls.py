"""How often a fault happens: the attributes of the kernel's fault injection (lib/fault-inject.c, should_fail_ex), and fail-nth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from random import Random

from hmmnet.errors import WrongUse

EVERY = 1 << 40
"""From here on `nth` is none that ever comes: of each occurrence it is asked whether this is the one (`decided_by`)."""
Decide = Callable[[int], bool]
"""Takes which occurrence it is, from 1 on."""
_decides: ContextVar[Decide | None] = ContextVar("decides", default=None)


@contextmanager
def decided_by(decide: Decide) -> Iterator[None]:
    """Who decides about faults that are made in the block, and in tasks that begin in it, with an `nth` of `EVERY` or more."""
    token = _decides.set(decide)
    try:
        yield
    finally:
        _decides.reset(token)


def decides(occurrence: int) -> bool:
    """Whether who decides here takes that occurrence; nobody takes none."""
    decide = _decides.get()
    return decide is not None and decide(occurrence)


@dataclass(frozen=True)
class Controls:
    """When a fault that could happen does.

    `probability` of each occurrence (0 to 1), at most every `interval`-th of them, at most `times` (-1: without end), not before `space`
    bytes have passed. `nth`, when it is not 0, is the one occurrence that fails, whatever the others say. Raises HmmnetError.
    """

    probability: float = 1.0
    interval: int = 1
    times: int = -1
    space: int = 0
    nth: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise WrongUse(f"probability {self.probability} is not between 0 and 1")
        for name in ("interval", "space", "nth"):
            if getattr(self, name) < (1 if name == "interval" else 0):
                raise WrongUse(f"{name} {getattr(self, name)} is too small; it begins at {1 if name == 'interval' else 0}")
        if self.times < -1:
            raise WrongUse(f"times {self.times} is too small; -1 means without end")


@dataclass
class Tally:
    """What counts for one fault, wherever it can happen: occurrences so far, how many of them it was, bytes that passed before."""

    seen: int = 0
    fired: int = 0
    passed_bytes: int = 0


class Chance:
    """The controls of one fault at work, in one place; `tally` is common to all its places."""

    def __init__(self, controls: Controls, random: Random, tally: Tally | None = None) -> None:
        self.controls = controls
        self.fired = 0
        """How often it has happened in this place."""
        self._random = random
        self._tally = tally or Tally()

    def fires(self, nbytes: int = 1) -> bool:
        """Whether it happens this time; `nbytes` pass if it does not."""
        controls, tally = self.controls, self._tally
        tally.seen += 1
        if controls.nth:
            happens = tally.seen == controls.nth if controls.nth < EVERY else decides(tally.seen)
        elif tally.fired == controls.times:
            happens = False
        elif tally.passed_bytes < controls.space:
            tally.passed_bytes += nbytes
            happens = False
        else:
            happens = tally.seen % controls.interval == 0 and self._random.random() < controls.probability
        tally.fired += happens
        self.fired += happens
        return happens
