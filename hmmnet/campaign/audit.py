"""Invariants while a program runs: I1 to I5, I7 and I8 of the whole machine after every step; at its end of a machine at rest.

After a step only what it has changed is looked at, which finds what a look at everything would (`host/mm/ledger.py`). That this is so is
not taken for granted: one step in `FULL_EVERY` is followed by a look at everything, chosen by the step's own number, so that a replay looks
at the same moments. What the IOMMU refused is looked at once, when the program has ended (`trial`).
"""

from __future__ import annotations

from .crew import Crew
from .program import Step

FULL_EVERY = 128


class Auditor:
    """See the module."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._found: set[str] = set()

    def after(self, step: Step) -> None:
        """A step has ended."""
        if step.serial % FULL_EVERY == 0:
            self.full(quiet=False)
        self._complain(self._crew.machine.audit_changes())

    def full(self, *, quiet: bool) -> None:
        """Look at everything."""
        self._complain(self._crew.machine.audit(quiet=quiet))

    def _complain(self, complaints: list[str]) -> None:
        """Each once."""
        for complaint in complaints:
            if complaint not in self._found:
                self._found.add(complaint)
                self._crew.complain("invariants", complaint)
