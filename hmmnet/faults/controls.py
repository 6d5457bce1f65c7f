"""How often a fault happens: the attributes of the kernel's fault injection (lib/fault-inject.c, should_fail_ex), and fail-nth."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from hmmnet.errors import HmmnetError


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
            raise HmmnetError(f"probability {self.probability} is not between 0 and 1")
        for name in ("interval", "space", "nth"):
            if getattr(self, name) < (1 if name == "interval" else 0):
                raise HmmnetError(f"{name} {getattr(self, name)} is too small; it begins at {1 if name == 'interval' else 0}")
        if self.times < -1:
            raise HmmnetError(f"times {self.times} is too small; -1 means without end")


class Chance:
    """The controls of one fault at work."""

    def __init__(self, controls: Controls, random: Random) -> None:
        self.controls = controls
        self.seen = 0
        """Occurrences so far."""
        self.fired = 0
        self._random = random
        self._space = controls.space

    def fires(self, nbytes: int = 1) -> bool:
        """Whether it happens this time; `nbytes` pass if it does not."""
        controls = self.controls
        self.seen += 1
        if controls.nth:
            happens = self.seen == controls.nth
        elif self.fired == controls.times:
            happens = False
        elif self._space > 0:
            self._space -= nbytes
            happens = False
        else:
            happens = self.seen % controls.interval == 0 and self._random.random() < controls.probability
        self.fired += happens
        return happens
