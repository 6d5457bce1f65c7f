"""What processes do at the wrong moment: fork, exit, mprotect, mremap, munmap, madvise, at any protocol point of the host."""

from __future__ import annotations

from .effects import HostEffect
from .kinds import Fault, Kind, Parameter

AT = Parameter("point", "point", "at which point of the host (empty: at once)", "")
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
    "madvise": ("the pages concerned are dropped (MADV_DONTNEED)", "they are zero afterwards"),
}


def _kind(deed: str, what: str, holds: str) -> Kind:
    def makes(fault: Fault) -> list[HostEffect]:
        point = fault.settings["point"]
        return [HostEffect(deed, point, fault.on, fault.process, fault.start, fault.end, fault.controls)]

    return Kind(f"process.{deed}", "process", what, holds, makes, parameters=(AT,))


KINDS = tuple(_kind(deed, what, holds) for deed, (what, holds) in DEEDS.items())
