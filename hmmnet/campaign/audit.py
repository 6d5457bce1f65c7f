"""Invariants while a program runs: I1 to I5 and I8 of the whole machine, after every so many events; at its end of a machine at rest.

A look costs as much as a dozen operations, so it is taken after one in `EVERY` of those that change mappings or move pages, and one in four
times as many of the others, chosen by the operation's own number, so that a replay looks at the same moments. What the IOMMU refused is
looked at once, when the program has ended (`trial`).
"""

from __future__ import annotations

from .crew import Crew
from .program import Step

EVERY = 16
QUIET_KINDS = frozenset({"load", "store", "add", "lane_store", "file_read", "file_write"})
"""Kinds of steps that rarely change what is checked: looked at less often."""


class Auditor:
    """See the module."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._found: set[str] = set()

    def after(self, step: Step) -> None:
        """A step has ended."""
        every = EVERY * 4 if step.kind in QUIET_KINDS else EVERY
        if step.serial % every == 0:
            self.full(quiet=False)

    def full(self, *, quiet: bool) -> None:
        """Look at everything."""
        for complaint in self._crew.machine.audit(quiet=quiet):
            if complaint not in self._found:
                self._found.add(complaint)
                self._crew.complain("invariants", complaint)
