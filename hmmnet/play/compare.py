"""Recorded against got, line by line, and the sums over many scripts.

A script that stops at an operation which is not built yet is neither right nor wrong: the lines up to there are compared, the rest
counts as not equal, and the operation is counted under `unsupported_ops`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .script import Script

UNSUPPORTED = "unsupported operation"


@dataclass(frozen=True)
class Difference:
    """One line that came out otherwise. `got` is None when the line was not played; `why` says then why."""

    script: str
    path: str
    line: int
    operation: str
    recorded: str
    got: str | None
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        out: dict[str, Any] = {"script": self.script, "file": self.path, "line": self.line, "operation": self.operation}
        out |= {"recorded": self.recorded, "got": self.got}
        return out | ({"why": self.why} if self.why else {})


@dataclass(frozen=True)
class Outcome:
    """How one script went: its lines, how many were equal, where they were not."""

    script: Script
    lines: int
    lines_equal: int
    differences: tuple[Difference, ...]
    unsupported: tuple[str, ...] = ()
    """Operations of the script that cannot be played yet, once for each line."""

    @property
    def identical(self) -> bool:
        """Whether the kernel and the emulator answered alike to the last line."""
        return self.lines == self.lines_equal

    @property
    def stopped(self) -> bool:
        """Whether it ended early and everything up to there was equal."""
        return bool(self.unsupported) and not any(d.got is not None for d in self.differences)


def compare(script: Script, got: dict[int, str], unsupported: tuple[str, ...], why: str = "") -> Outcome:
    """Compare the results `got` (by line number; missing: not played, because of `why`) with the recording."""
    differences: list[Difference] = []
    equal = 0
    missing = False
    for line in script.recorded:
        result = got.get(line.number)
        if result == line.result:
            equal += 1
        elif result is not None or not missing:
            missing = missing or result is None
            reason = why or "nothing like this happened" if result is None else ""
            differences.append(Difference(script.name, script.path, line.number, line.operation, line.result, result, reason))
    return Outcome(script, len(script.recorded), equal, tuple(differences), unsupported)


@dataclass
class Tally:
    """Sums over outcomes."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def identical(self) -> int:
        """Scripts without a difference."""
        return sum(o.identical for o in self.outcomes)

    @property
    def unsupported(self) -> Counter[str]:
        """Operations that could not be played, by name."""
        return Counter(name for o in self.outcomes for name in o.unsupported)

    def as_json(self) -> dict[str, Any]:
        """What ``hmmnet play --json`` prints."""
        return {
            "scripts": len(self.outcomes),
            "identical": self.identical,
            "lines": sum(o.lines for o in self.outcomes),
            "lines_equal": sum(o.lines_equal for o in self.outcomes),
            "unsupported_ops": dict(sorted(self.unsupported.items(), key=lambda item: (-item[1], item[0]))),
            "differences": [d.as_json() for o in self.outcomes for d in o.differences],
        }
