"""What processes do at the wrong moment: fork, exit, mprotect, mremap, munmap, madvise, at any protocol point of the host."""

from __future__ import annotations

from typing import Any

from .effects import HostEffect
from .kinds import Fault, Kind, Parameter

AT = Parameter("point", "point", "at which point of the host (empty: at once; what changes memory then needs a range)", "")
ADVICE = (
    *("NORMAL", "RANDOM", "SEQUENTIAL", "DONTFORK", "DOFORK", "WIPEONFORK", "KEEPONFORK"),
    *("HUGEPAGE", "NOHUGEPAGE", "MERGEABLE", "UNMERGEABLE"),
    *("COLD", "DONTNEED", "DONTNEED_LOCKED", "FREE", "PAGEOUT", "WILLNEED"),
    *("GUARD_INSTALL", "GUARD_REMOVE", "REMOVE", "COLLAPSE", "POPULATE_READ", "POPULATE_WRITE"),
)
"""Of madvise(2), without MADV_; a test holds them to the host's. Memory that breaks by MADV_HWPOISON is `ecc.uncorrectable`."""
MORE = {"madvise": (Parameter("advice", "choice", "what is advised, without MADV_ (empty: DONTNEED)", "", ADVICE),)}
"""What some deeds can be told besides."""
KEEPING_ADVICE = frozenset(ADVICE) - {"DONTNEED", "DONTNEED_LOCKED", "FREE", "REMOVE", "GUARD_INSTALL"}
"""What may be advised of memory whose data are to stay what they are."""
DEEDS = {
    "fork": ("the process forks; the child reads the pages concerned, and exits", "parent and child see what they should"),
    "exit": ("the process exits", "its pages are free everywhere; others go on"),
    "kill": ("the process is killed (SIGKILL)", "its pages are free everywhere; others go on"),
    "oom": (
        "the process (none given: whom the OOM killer chooses) is reaped, and exits",
        "its pages are free everywhere; late faults are EFAULT",
    ),
    "exec": ("the process's address space goes, and with it the mirrors (as at exec)", "devices lose what they mirrored"),
    "mprotect": ("the pages concerned become read-only and writable again", "no write after that is lost"),
    "mremap": ("the pages concerned move to another address and back", "data move with them"),
    "munmap": ("a part (the last page) of the pages concerned is unmapped", "who touches it gets SIGSEGV"),
    "madvise": (
        "something is advised about the pages concerned",
        "by itself (DONTNEED) they are zero afterwards; else as madvise(2) has it",
    ),
}

CHANGES = frozenset({"mprotect", "mremap", "munmap", "madvise"})
"""Deeds that are done to addresses."""


def _kind(deed: str, what: str, holds: str) -> Kind:
    def makes(fault: Fault) -> list[HostEffect]:
        point = fault.settings["point"]
        return [HostEffect(deed, point, fault.on, fault.process, fault.start, fault.end, fault.controls, more(fault))]

    def more(fault: Fault) -> dict[str, Any]:
        return {one.name: fault.settings[one.name] for one in MORE.get(deed, ())}

    return Kind(f"process.{deed}", "process", what, holds, makes, parameters=(AT, *MORE.get(deed, ())), needs_range=deed in CHANGES)


KINDS = tuple(_kind(deed, what, holds) for deed, (what, holds) in DEEDS.items())
