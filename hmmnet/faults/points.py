"""Protocol points: every step boundary at which something can be made to go wrong, by name.

The names are the registry; `injector.py` has what host and devices hold. A point says what may be done to it. At most of them a task may be
held up, so that anything can happen meanwhile; where code cannot wait (an allocation, a decision), it can be made to fail. ``fail`` raises
what can really be met there: a page list that cannot be had, a copy engine that gives up, a driver that refuses.
"""

from __future__ import annotations

import difflib
import errno
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Literal

from hmmnet.errors import HmmnetError, KernelError, PeerError, WrongUse
from hmmnet.pages import PAGE_SHIFT

Action = Literal["delay", "pause", "fail", "crash", "hang", "call"]
ACTIONS: tuple[Action, ...] = ("delay", "pause", "fail", "crash", "hang", "call")
_WAITS: tuple[Action, ...] = ("delay", "pause", "crash", "hang", "call")
_WAITS_FAILS: tuple[Action, ...] = (*_WAITS, "fail")
_DECIDES: tuple[Action, ...] = ("fail", "call")
HOSTS_OWN = ("hub.", "process.", "session.bye")
"""How the names of points begin that concern no device: who crashes or hangs there has to be said."""
Narrowing = Literal["device", "process", "range", "event"]
"""By what a fault may be narrowed to some of what happens: what it is on, whose it is, at which addresses, of which event."""
NARROWING: tuple[Narrowing, ...] = ("device", "process", "range", "event")
COPY_ENGINE = -1
"""In place of an errno: the copy engine, or the link, gives up in the middle of a transfer."""


@dataclass(frozen=True)
class Where:
    """A point that is reached: by whom, concerning which device, process, and pages [start, start + pages). `event` is the notifier's.

    `occurrence` is which time the point is reached, from 1 on, since something was armed first: of what happens there.
    """

    point: str
    node: str
    device: str = ""
    process: int = 0
    start: int = 0
    pages: int = 0
    event: str = ""
    occurrence: int = 0

    @property
    def address(self) -> int:
        """Where its pages begin, in bytes."""
        return self.start << PAGE_SHIFT

    @property
    def address_end(self) -> int:
        """Where they end."""
        return self.start + self.pages << PAGE_SHIFT

    def __str__(self) -> str:
        """Who is where, as in ``host at migrate.before_copy of gpu0 (process 1000, pages 0x10-0x1f)``."""
        about = [f"process {self.process}"] if self.process else []
        if self.pages:
            about.append(f"page 0x{self.start:x}" if self.pages == 1 else f"pages 0x{self.start:x}-0x{self.start + self.pages - 1:x}")
        of = f" of {self.device}" if self.device not in ("", self.node) else ""
        return f"{self.node} at {self.point}{of}" + (f" ({', '.join(about)})" if about else "")

    def as_json(self) -> dict[str, Any]:
        """Plain data of the place, without what it does not concern."""
        return {name: value for name in self.__dataclass_fields__ if (value := getattr(self, name)) and name != "occurrence"}


@dataclass(frozen=True)
class Point:
    """A step boundary. `side` is whose; `errno` is what ``fail`` means there (0: it cannot fail)."""

    name: str
    side: Literal["host", "device"]
    what: str
    actions: tuple[Action, ...] = _WAITS
    errno: int = 0

    @property
    def waits(self) -> bool:
        """Whether a task can be held up there."""
        return "pause" in self.actions

    @property
    def tells(self) -> tuple[Narrowing, ...]:
        """What is said there of what is concerned."""
        untold = _UNTOLD.get(self.name, _UNTOLD.get(f"{self.name.partition('.')[0]}.*", ()))
        return tuple(one for one in NARROWING if one not in untold and (one != "event" or self.name in _OF_EVENTS))

    def as_json(self) -> dict[str, Any]:
        """Plain data: all that `hmmnet fault points` says of it."""
        return {"name": self.name, "side": self.side, "what": self.what, "actions": list(self.actions), "tells": list(self.tells)}

    def error(self, where: Where) -> HmmnetError:
        """What ``fail`` raises."""
        why = injected(where)
        if self.errno == COPY_ENGINE:
            return PeerError(f"the copy engine gave up ({why})")
        return KernelError(self.errno, self.name.rpartition(".")[2] if not where.event else where.event, why)


def injected(where: Where) -> str:
    """What an error says of the fault that is its cause; a checker reads it (`hmmnet.campaign.excuses`)."""
    return f"a fault was injected at {where.point}{f' of {where.device}' if where.device else ''} (occurrence {where.occurrence})"


def _steps(side: Literal["host", "device"], *lines: tuple[str, str] | tuple[str, str, int]) -> list[Point]:
    """Boundaries at which a task may wait."""
    return [
        Point(line[0], side, line[1], (*_WAITS, "fail"), line[2]) if len(line) == 3 else Point(line[0], side, line[1]) for line in lines
    ]


def _choices(side: Literal["host", "device"], *lines: tuple[str, str]) -> list[Point]:
    """Decisions that cannot wait."""
    return [Point(name, side, what, _DECIDES) for name, what in lines]


_ALL = [
    *_steps(
        "host",
        # migrate_vma towards a device
        ("migrate.before_collect", "nothing is locked yet; fails as a driver without memory for its page lists", errno.ENOMEM),
        ("migrate.after_entry", "one page of the range has its migration entry, the next has not (one page at a time while wanted)"),
        ("migrate.after_vma", "one VMA of the range is collected, announcements over"),
        ("migrate.after_unmap", "all migration entries are in, mirrors have let go"),
        ("migrate.allocate", "the driver's frames are about to be taken for the pages", errno.ENOMEM),
        ("migrate.before_copy", "between unmap and copy", COPY_ENGINE),
        ("migrate.mid_copy", "before each chunk of the copy to the device; held for 20 real seconds, that copy fails", COPY_ENGINE),
        ("migrate.before_pages", "all data are on the device, identities not yet"),
        ("migrate.after_pages", "identities are the device's; its table knows nothing yet"),
        ("migrate.before_finalize", "the device says that its table is up to date"),
        ("migrate.after", "migration entries are gone, the mmap lock is still held"),
        # the ways home
        ("home.fault", "a CPU touched pages of a device (migrate_to_ram begins)", errno.ENOMEM),
        ("home.explicit", "an explicit migration home begins", errno.ENOMEM),
        ("home.evict", "an eviction by frame begins", errno.ENOMEM),
        ("home.collected", "migration entries are in for pages that come home"),
        ("home.before_copy", "between unmap and copy on the way home", COPY_ENGINE),
        ("home.before_pages", "the data are in host frames, identities not yet"),
        ("home.before_finalize", "identities are the host's, migration entries still stand"),
        ("home.after", "pages are home"),
        ("home.one.taken", "the one-page path has put its migration entry in"),
        ("home.one.copied", "the one page is in its host frame, its entry not yet"),
        ("evict.collected", "frames are out of every process that maps them"),
        ("evict.before_pages", "evicted data are in host frames, identities not yet"),
        ("evict.before_finalize", "identities are the host's, migration entries still stand"),
        # hmm_range_fault
        ("retry.before_read_begin", "a range fault begins", errno.ENOMEM),
        ("retry.after_read_begin", "the sequence is noted, the walk not begun", errno.EBUSY),
        ("retry.between_faults", "a round of faults of the walk is done"),
        ("retry.before_read_retry", "the walk is done, the sequence not compared"),
        ("retry.after_read_retry", "the sequence was good, and what is in the answer is granted; it is about to leave"),
        # the notifier hub
        ("hub.before_callbacks", "a change is announced; no device has heard of it"),
        ("hub.after_callbacks", "devices were told; none is waited for yet"),
        ("hub.after_acks", "every device concerned has let go; the table is about to change"),
        ("hub.before_range_end", "the table has changed; readers still wait"),
        # a process's calls, before they take the mmap lock
        ("process.fork", "fork(2) begins", errno.ENOMEM),
        ("process.mprotect", "mprotect(2) begins", errno.ENOMEM),
        ("process.mremap", "mremap(2) begins", errno.ENOMEM),
        ("process.munmap", "munmap(2) begins", errno.ENOMEM),
        ("process.madvise", "madvise(2) begins", errno.EAGAIN),
        ("process.exit", "exit begins"),
        # sessions
        ("session.joined", "a device was welcomed; it has not answered anything"),
        ("session.bye", "the host is about to say goodbye"),
    ),
    *_steps(
        "device",
        ("device.hello", "a device is about to say hello"),
        ("device.fetch", "a batch was fetched from the fault buffer"),
        ("device.before_migrate", "frames are granted, DMA is over; the migrate request is about to leave", errno.ENOMEM),
        ("device.migrated", "the host says what moved; the own table is not written"),
        ("device.before_done", "the own table is written; the host is about to be told"),
        ("device.before_write", "a range fault is answered; sequence not compared, table not written"),
        ("device.after_write", "the table is written"),
        ("device.before_ack", "entries of an invalidation are gone; the acknowledgement is about to leave", errno.EAGAIN),
        ("device.copy_in", "the copy engine is told of a stream towards this device", COPY_ENGINE),
        ("device.copy_out", "pages are about to leave this device; held for 20 real seconds (a few pages: 5), it is lost", COPY_ENGINE),
        ("device.mid_copy", "before each chunk of a copy out; held for 20 real seconds, the device is lost", COPY_ENGINE),
        ("device.replay", "faults are serviced; the accesses are about to be replayed"),
        ("device.job_start", "a job is about to run", errno.ENOMEM),
        ("device.job_step", "between two requests of a job"),
        ("device.job_end", "a job has ended; its answer is about to leave"),
    ),
    *_choices(
        "host",
        ("host.alloc.frame", "a frame of host memory for a process"),
        ("host.alloc.huge", "an aligned run of 512 host frames"),
        ("host.alloc.home", "host frames for pages on their way home"),
        ("host.alloc.page_cache", "a frame of a file's page cache"),
        ("memcg.charge", "a charge to a memory cgroup, as if its limit were reached"),
        ("migrate.trylock", "the lock of a page that migrate_vma collects: somebody holds it"),
        ("migrate.count", "the count check of a collected page: an extra reference has appeared"),
        ("migrate.insert", "a page inserted on an empty entry: the CPU was first"),
        ("migrate.split", "the split of a large page in a range that migrates"),
        ("session.hello", "a device says hello: it is told that the host is busy"),
        ("hub.wrong_owner", "a device's own migration is announced: it is told as if it were another's"),
        ("hub.wide", "a device is told of a range: of pages around it, too"),
    ),
    *_choices(
        "device",
        ("device.alloc.small", "frames of a device for a migration"),
        ("device.alloc.large", "an aligned run of 512 device frames"),
        ("device.bad_copy", "pages that come home with an answer: damaged behind their checksum"),
        ("device.duplicate", "a batch of faults was serviced: it is reported once more"),
        ("device.replay_lost", "accesses are to be replayed: the replay is lost"),
        ("device.unserviceable", "a batch of faults is about to be serviced: its first page cannot be"),
        ("device.welcome", "the device finds that it cannot be what the host's welcome wants"),
    ),
]
_NEITHER: tuple[Narrowing, ...] = ("process", "range")
_NOTHING: tuple[Narrowing, ...] = ("device", *_NEITHER)
_UNTOLD: dict[str, tuple[Narrowing, ...]] = {
    **dict.fromkeys(("host.*", "memcg.*", "session.bye"), _NOTHING),
    **dict.fromkeys(("session.*", "evict.*"), _NEITHER),
    **dict.fromkeys(("process.*", "hub.before_callbacks", "hub.after_callbacks", "hub.after_acks", "hub.before_range_end"), ("device",)),
    **dict.fromkeys(("migrate.trylock", "migrate.count", "migrate.insert", "migrate.split"), ("device",)),
    **dict.fromkeys(("process.fork", "process.exit"), ("device", "range")),
    **dict.fromkeys(("migrate.mid_copy", "migrate.before_finalize", "home.evict"), _NEITHER),
    **dict.fromkeys(("device.hello", "device.welcome", "device.copy_in", "device.copy_out", "device.mid_copy"), _NEITHER),
    **dict.fromkeys(("device.bad_copy", "device.alloc.large"), _NEITHER),
    **dict.fromkeys(("device.job_start", "device.job_step", "device.job_end"), ("range",)),
}
"""By point, or ``part.*``: what of device, process and range is not known there. Data that are copied are frames, whosever pages."""
_OF_EVENTS = frozenset(
    {
        *("hub.before_callbacks", "hub.after_callbacks", "hub.after_acks", "hub.before_range_end"),
        *("hub.wrong_owner", "hub.wide", "device.before_ack"),
    }
)
"""Points that an event of the notifier reaches."""
POINTS: dict[str, Point] = {point.name: point for point in _ALL}
"""Every point by name."""


@lru_cache(maxsize=1024)
def matching(pattern: str) -> tuple[Point, ...]:
    """The points whose names match. Raises HmmnetError when none does."""
    found = tuple(point for name, point in POINTS.items() if name == pattern or fnmatchcase(name, pattern))
    if not found:
        close = difflib.get_close_matches(pattern, POINTS, n=1, cutoff=0.5)
        mend = f'did you mean "{close[0]}"?' if close else "`hmmnet fault points` lists them"
        raise WrongUse(f'no point is called "{pattern}"; {mend}')
    return found
