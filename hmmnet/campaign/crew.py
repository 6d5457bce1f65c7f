"""The actors of one machine: what they share, how their accesses are recorded, and what they may be told.

`Crew` has a method for each way to touch a word. Each records the access in the region's history, and judges errors: a SIGSEGV is right
where rights or place changed meanwhile, a lost page or a lost device where somebody was harmed, anything else is a violation.
"""

from __future__ import annotations

import contextlib
import errno
import traceback
from collections import Counter as Counts
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import trio

from hmmnet.errors import BusError, HmmnetError, IommuFault, KernelError, PeerError, SegmentationFault, SignalError
from hmmnet.faults.controls import EVERY, decides
from hmmnet.pages import PAGE_SIZE
from hmmnet.program import Process
from hmmnet.sim import SimulatedMachine, Trace
from hmmnet.wire.crashes import listening

from .counter import Counter
from .excuses import AFTERMATH_S, Excuses, Harm, named_in
from .history import Clock, Words
from .program import Program
from .regions import READ, WORD_BYTES, WORDS_PER_PAGE, WRITE, Look, Region
from .words import VICTIM_PID_FIRST

VIOLATIONS_MAX = 16
"""Of one run: what follows the first is often its consequence."""
REGION_FIRST = 0x10_0000_0000
REGION_STRIDE = 1 << 22
"""Each mapping gets an address of its own that is never used again, so that a late store cannot hit another region."""
SERIAL_SHIFT = 16
COUNTERS = 8
LANE_PART = 100
"""Words of each of the three parts of an actor's lane."""
LANE_WORDS = 3 * LANE_PART
ONLY_COPY = "its only copy"
"""What is said of pages that died with their device, or were about to come home from it when it died."""
LOST = "had its only copy"
"""What is said of them once it is known that they are lost."""


@dataclass(frozen=True)
class Violation:
    """Something that must not be. `checker` is who found it; `line` is how many lines the trace had when it was so, and `traceback` is
    that of a crash.
    """

    checker: str
    what: str
    line: int = 0
    traceback: str = field(default="", compare=False)

    @classmethod
    def crash(cls, error: BaseException, line: int = 0) -> Violation:
        """An exception that came out of a run."""
        return cls("crash", "; ".join(_leaves(error)), line, "".join(traceback.format_exception(error)))


Moment: TypeAlias = tuple[float, int]
"""Virtual seconds, and how many lines the trace has."""


def moment(trace: Trace | None) -> Moment:
    """Now."""
    return trio.current_time(), 0 if trace is None else trace.count


def _leaves(error: BaseException) -> list[str]:
    """Each exception by type and text, and by its place where it is none of ours."""
    if isinstance(error, BaseExceptionGroup):
        return [text for one in error.exceptions for text in _leaves(one)]
    frames = [] if isinstance(error, HmmnetError) else traceback.extract_tb(error.__traceback__)[-1:]
    return [f"{type(error).__name__}: {error}" + "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in frames)]


class AtomicProcess(Process, Protocol):
    """A process inside the host, which has atomic additions."""

    async def fetch_add(self, address: int, value: int) -> int:
        """Add to a word; what it was."""
        ...


@dataclass(eq=False)
class Derived:
    """A job under way that stores what it makes of words [first, first + count) of a region; `unknown` once some of them were given up."""

    region: Region
    first: int
    count: int
    out: int
    out_count: int
    unknown: bool = False


@dataclass
class Outcome:
    """What a run found out."""

    operations: int = 0
    faults: Counts[str] = field(default_factory=Counts)
    done: Counts[str] = field(default_factory=Counts)
    """Operations by kind."""
    refused: int = 0
    """Operations that ended with an error."""
    lost: int = 0
    """How often a page was found to be lost."""
    violations: list[Violation] = field(default_factory=list)
    reached: Counts[str] = field(default_factory=Counts)
    """How often protocol points were reached and messages sent, by name, until everything was healed; only if that was to be counted."""

    def complain(self, checker: str, what: str, trace: Trace | None, *, since: Moment | None = None, crash: str = "") -> None:
        """A violation, with its virtual time: now, or `since` then. `crash` is a traceback."""
        if len(self.violations) < VIOLATIONS_MAX:
            at_s, line = since or moment(trace)
            self.violations.append(Violation(checker, f"at {at_s:.6f} s: {what}", line, crash))
            if trace is not None:
                trace.add(trio.current_time(), f"VIOLATION {checker}: {what}")

    @contextlib.contextmanager
    def seeing_crashes(self, trace: Trace | None = None) -> Iterator[None]:
        """Whatever crashes in a handler of a message, of sessions that begin here meanwhile, is a violation that nothing excuses."""

        def crashed(whose: str, error: Exception) -> None:
            found = Violation.crash(error)
            self.complain("crash", f"{whose}: {found.what}", trace, crash=found.traceback)

        with listening(crashed):
            yield


class Crew:
    """See the module."""

    def __init__(self, machine: SimulatedMachine, process: AtomicProcess, program: Program, outcome: Outcome, trace: Trace | None) -> None:
        self.machine = machine
        self.now_s = trio.lowlevel.current_clock().current_time
        """`trio.current_time`, without asking who runs: the time of each access is noted."""
        self.process = process
        self.program = program
        self.outcome = outcome
        self.clock = Clock()
        self.regions: list[Region] = []
        self.counters: Region | None = None
        self.adds = [Counter(self.clock) for _ in range(COUNTERS)]
        self.adds_sure = True
        """No page of counters was given up: then they can be judged."""
        self.harms = 0
        """Harms under way."""
        self.excuses = Excuses(range(VICTIM_PID_FIRST, VICTIM_PID_FIRST + program.victims))
        """What operations may be refused for."""
        self._also_told = machine.host.on_change
        """Of devices that are lost or ready: who launched the machine."""
        machine.host.on_change = self._changed
        machine.host.on_refused = self._refused
        self.refusals: dict[str, Moment] = {}
        """When each device was first refused an access in this life of it."""
        self.short = 0
        """How often memory was refused to a program that has little of it."""
        self._harmed_s = -1.0
        self._aftermath_until_s = 0.0
        self._derived: list[Derived] = []
        self._trace = trace
        self._mappings = 0
        self.apart: set[int] = set()
        """Where mappings are, or were, that one step has for itself (`apart`)."""
        self.clears = 0
        """How often a write to /proc/PID/clear_refs has begun or ended."""
        self.clearing = 0
        """Such writes under way."""
        self._due: dict[int, trio.Event] = {}
        self.messages: Counts[str] = Counts()
        """How many were sent, by type or way."""
        self._awaited: dict[tuple[str, int], trio.Event] = {}
        self._senders: dict[tuple[str, int], str] = {}

    # --- layout ---------------------------------------------------------------------------------------------------------------

    def next_base(self) -> int:
        """An address that nothing had before."""
        self._mappings += 1
        return REGION_FIRST + self._mappings * REGION_STRIDE

    async def map_region(self, kind: str, pages: int) -> Region:
        """A new region."""
        region = Region(self.clock, len(self.regions), kind, pages, self.next_base())
        if kind == "file":
            region.file = await self.process.memfd_create(region.span_bytes)
        await self.map_again(region)
        self.regions.append(region)
        return region

    async def map_again(self, region: Region, page: int = 0, pages: int | None = None) -> None:
        """Map `pages` pages of it (all) where it is."""
        count = region.span_pages if pages is None else pages
        at = region.base + page * PAGE_SIZE
        shared = region.kind in {"shared", "file"}
        offset = page * PAGE_SIZE if region.file is not None else 0
        await self.process.mmap(count * PAGE_SIZE, "rw", at, shared=shared, file=region.file, offset=offset)
        if region.kind == "huge":
            await self.process.madvise(at, count * PAGE_SIZE, "HUGEPAGE")

    async def lay_out(self) -> None:
        """Map the lanes, the program's regions, and the counters."""
        lanes = -(-self.program.actors * LANE_WORDS // WORDS_PER_PAGE)
        await self.map_region("lanes", lanes)
        for layout in self.program.regions:
            await self.map_region(layout.kind, layout.pages)
        self.counters = Region(self.clock, len(self.regions), "counters", 1, self.next_base())
        await self.map_again(self.counters)

    # --- violations -----------------------------------------------------------------------------------------------------------

    @property
    def noting(self) -> bool:
        """Whether anybody reads what is noted."""
        return self._trace is not None

    def note(self, what: str) -> None:
        """A line in the story."""
        if self._trace is not None:
            self._trace.add(self.now_s(), what)

    def complain(self, checker: str, what: str, since: Moment | None = None) -> None:
        """A violation, with its virtual time, or that `since` which it is there."""
        self.outcome.complain(checker, what, self._trace, since=since)

    def one_ended(self, kind: str) -> None:
        """An operation has ended."""
        self.outcome.operations += 1
        self.outcome.done[kind] += 1
        event = self._due.pop(self.outcome.operations, None)
        if event is not None:
            event.set()

    async def ended(self, operations: int) -> None:
        """Return when so many operations have ended."""
        if self.outcome.operations < operations:
            await self._due.setdefault(operations, trio.Event()).wait()

    async def sent(self, number: int) -> None:
        """Return when message `number` of the run is sent: there is a trace that counts them."""
        assert self._trace is not None, "only a trace counts messages"
        await self._trace.reached(number)

    def message_sent(self, device: str, kind: str) -> None:
        """A message of `device` was sent."""
        self.messages[kind] += 1
        number = (kind, self.messages[kind])
        if (kind, EVERY) in self._awaited and decides(self.messages[kind]):
            number = (kind, EVERY)
        if number in self._awaited:
            self._senders[number] = device
            self._awaited[number].set()

    def await_message(self, kind: str, number: int) -> None:
        """Somebody will wait for it in `sender`."""
        self._awaited[kind, number] = trio.Event()

    async def sender(self, kind: str, number: int) -> str:
        """The device of the `number`-th message of a kind, when it is sent."""
        await self._awaited[kind, number].wait()
        return self._senders[kind, number]

    def harm_begins(self, devices: Iterable[str], kind: str = "") -> list[Harm]:
        """Devices are harmed: from now on work with them may fail. `kind` is what it is counted as; nothing if somebody else counts it.

        For `harm_ends`.
        """
        self.harms += 1
        if kind:
            self.outcome.faults[kind] += 1
        return [self.excuses.harm_begins(device) for device in devices]

    def harm_ends(self, harms: Iterable[Harm]) -> None:
        """They are mended; the aftermath is not over."""
        self.harms -= 1
        self._harmed_s = self.now_s()
        self._aftermath_until_s = self._harmed_s + AFTERMATH_S
        for harm in harms:
            harm.ended_s = self._harmed_s

    def _refused(self, device: str) -> None:
        self.refusals.setdefault(device, moment(self._trace))

    def _changed(self, device: str, state: str, how: str) -> None:
        """The host has lost a device, or has it again."""
        if self._also_told is not None:
            self._also_told(device, state, how)
        if state != "lost":
            self.refusals.pop(device, None)
            self.excuses.ready(device, self.now_s())
        elif not self.excuses.lost(device, self.now_s()):
            self.complain("service", f"{device} was lost, and nothing had been done to it: {how}")

    def calm(self) -> None:
        """What happened to anybody is over and has been overcome: from now on nothing may fail because of it."""
        self._aftermath_until_s = min(self._aftermath_until_s, self.now_s())
        self.excuses.calm()

    def excused(self, error: HmmnetError, began_s: float) -> bool:
        """Whether work that began then may have failed like that because of what happened to somebody; with its host everything does."""
        address = error.address if isinstance(error, SignalError) else None
        return self.machine.host_crashed or self.excuses.cover(str(error), began_s, self.machine.device_names, address)

    def in_aftermath(self, at_s: float) -> bool:
        """Whether somebody is harmed then, or was not long ago."""
        return self.harms > 0 or at_s < self._aftermath_until_s

    @property
    def harmed_ever(self) -> bool:
        """Whether a page may be lost."""
        return self.harms > 0 or self._harmed_s >= 0

    async def attempt(self, who: str, work: Callable[[], Awaitable[None]], allowed: Iterable[int] = ()) -> bool:
        """Do `work`, and judge what it raises; whether it raised nothing. `allowed` are errnos that are answers like any other."""
        began_s = self.now_s()
        try:
            await work()
        except SignalError as error:
            await self._signalled(who, error, began_s)
        except KernelError as error:
            limited = bool(self.program.limit_pages) and error.code == errno.ENOMEM
            self.short += limited
            if error.code not in allowed and not limited and not self.excused(error, began_s):
                self.complain("service", f"{who}: {error}")
        except PeerError as error:
            if isinstance(error, IommuFault) or not self.excused(error, began_s):
                self.complain("service", f"{who}: {type(error).__name__}: {error}")
        except HmmnetError as error:
            self.complain("progress" if "times" in str(error) else "service", f"{who}: {type(error).__name__}: {error}")
        else:
            return True
        self.outcome.refused += 1
        return False

    async def _signalled(self, who: str, error: SignalError, began_s: float) -> None:
        """An access has ended in a signal: its page is lost, or somebody excuses it. SIGSEGV is right where nobody has memory any more."""
        if self._says_lost(error, began_s):
            await self._lost(who, error)
        elif (isinstance(error, BusError) or self._is_known(error.address)) and not self.excused(error, began_s):
            self.complain("service", f"{who}: {error}")

    def _is_known(self, address: int) -> bool:
        """Whether a region is there, or a step has, or had, memory of its own, which nobody else changes."""
        return address - address % REGION_STRIDE in self.apart or any(region.word_at(address) is not None for region in self.regions)

    async def _lost(self, who: str, error: SignalError) -> None:
        """A page is gone with its device, which only a harm may do. It is given up, so that work can go on."""
        self.outcome.lost += 1
        if not self._may_be_lost(str(error)):
            self.complain("loss", f"{who}: {error}")
        for region in self.regions:
            word = region.word_at(error.address)
            if word is not None:
                with contextlib.suppress(KernelError):  # locked at this moment: whoever touches it next tries again
                    await self.give_up(region, word // WORDS_PER_PAGE, 1)

    def _says_lost(self, error: SignalError, began_s: float) -> bool:
        """Whether it tells of a lost page: in so many words, unless its device was dying when the work began."""
        return LOST in str(error) or (ONLY_COPY in str(error) and self.excused(error, began_s))

    def is_lost(self, error: SignalError, began_s: float) -> bool:
        """Whether it tells of a lost page, to work that began then, and such a loss may be."""
        return self._says_lost(error, began_s) and self._may_be_lost(str(error))

    def _may_be_lost(self, text: str) -> bool:
        """Whether the device that is said to have had a page was ever lost."""
        return any(map(self.excuses.was_lost, named_in(text, self.machine.device_names)))

    async def give_up(self, region: Region, page: int, count: int) -> None:
        """MADV_DONTNEED of some pages: private memory is zero afterwards, what is shared is what it was."""
        words = count * WORDS_PER_PAGE
        address = region.base + region.spread[page] * PAGE_SIZE
        self._unsettle(region, page * WORDS_PER_PAGE, words)
        if region is self.counters:
            self.adds_sure = False
        if region.kind == "file" and region.file is not None:
            hole = region.history.store_begins(page * WORDS_PER_PAGE, np.zeros(words, np.uint64))
            with region.changing("given_up", page, count):
                await region.file.punch(page * PAGE_SIZE, count * PAGE_SIZE)
            region.history.store_ends(hole)
            return
        look = region.look(page * WORDS_PER_PAGE, words)
        mark = region.history.store_begins(page * WORDS_PER_PAGE, np.zeros(words, np.uint64)) if region.is_private else None
        done = False
        try:
            with region.changing("given_up", page, count):
                await self.process.madvise(address, count * PAGE_SIZE, "DONTNEED")
            done = region.stayed(look)
        except KernelError:
            if region.stayed(look):
                raise
        finally:
            if mark is not None:
                region.history.store_ends(mark, certain=done)

    @contextlib.contextmanager
    def deriving(self, region: Region, first: int, count: int, out: int, out_count: int) -> Iterator[None]:
        """While a job makes words from `out` on of words from `first` on: if those are given up meanwhile, nobody knows what it makes."""
        derived = Derived(region, first, count, out, out_count)
        self._derived.append(derived)
        try:
            yield
        finally:
            self._derived.remove(derived)
            if derived.unknown:
                region.history.wild_ends(out, out_count)

    def _unsettle(self, region: Region, first: int, count: int) -> None:
        """Some words are about to be given up."""
        for one in self._derived:
            if one.region is region and not one.unknown and one.first < first + count and first < one.first + one.count:
                one.unknown = True
                region.history.wild_begins(one.out, one.out_count)

    # --- accesses -------------------------------------------------------------------------------------------------------------

    def values(self, serial: int, first: int, count: int) -> Words:
        """What step `serial` stores to some words: each value is used once."""
        first += serial << SERIAL_SHIFT  # a region has fewer words than a serial leaves room for
        return np.arange(first, first + count, dtype=np.uint64)

    async def load(self, who: str, region: Region, first: int, count: int, fetch: Callable[[int], Awaitable[Words]]) -> None:
        """Words are loaded by `fetch(address)`, and must be explainable."""
        look, mark, began_s = region.look(first, count), region.history.load_begins(first, count), self.now_s()
        got: Words | None = None
        try:
            got = await fetch(region.address(first))
        except SegmentationFault as error:
            self._judge(who, region, look, READ, error, began_s)
        finally:
            wrong = None
            if got is None or not region.stayed(look):
                region.history.load_fails(mark)
            else:
                wrong = region.history.load_ends(mark, got)
        if got is not None and region.may(look, READ) is False:
            self.complain("rights", f"{who}: loaded what it has no right to")
        if wrong is not None:
            where = f"word {wrong.word} of region {region.number} ({region.kind}, 0x{region.address(wrong.word):x})"
            self.complain("history", f"{who}: {where} is 0x{wrong.value:x}, which {wrong.why}")

    async def store(
        self, who: str, region: Region, first: int, values: Words, put: Callable[[int, Words], Awaitable[None]], *, guarded: bool = True
    ) -> None:
        """`put(address, values)` stores; its success is remembered. Not `guarded`: it goes past the process's rights (a file's write)."""
        look, mark, began_s = region.look(first, len(values)), region.history.store_begins(first, values), self.now_s()
        done = False
        try:
            await put(region.address(first), values)
            done = not guarded or region.stayed(look)
        except SegmentationFault as error:
            self._judge(who, region, look, WRITE, error, began_s)
        finally:
            region.history.store_ends(mark, certain=done)
        if done and guarded and region.may(look, WRITE) is False:
            self.complain("rights", f"{who}: stored what it has no right to")

    def _judge(self, who: str, region: Region, look: Look, right: int, error: SignalError, began_s: float) -> None:
        """A SIGSEGV: right where a right is missing, or where something changed meanwhile."""
        if ONLY_COPY in str(error):
            raise error
        if region.may(look, right) and not self.excused(error, began_s):
            self.complain("service", f"{who}: {error}")

    async def cpu_load(self, who: str, region: Region, first: int, count: int, process: Process | None = None) -> None:
        """By the CPU."""
        reader = process or self.process

        async def fetch(address: int) -> Words:
            return np.frombuffer(await reader.read(address, count * WORD_BYTES), np.uint64)

        await self.load(who, region, first, count, fetch)

    async def cpu_store(self, who: str, region: Region, first: int, count: int, serial: int) -> None:
        """By the CPU."""

        async def put(address: int, values: Words) -> None:
            await self.process.write(address, values.tobytes())

        await self.store(who, region, first, self.values(serial, first, count), put)

    async def add(
        self, who: str, which: int, work: Callable[[int], Awaitable[int]], refused: Callable[[BaseException], bool] = lambda _: False
    ) -> None:
        """An atomic addition of one to counter `which`. `refused`: whether an error tells that it never began."""
        assert self.counters is not None, "a region of counters is mapped first"
        counter = self.adds[which]
        began = counter.add_begins()
        try:
            old = await work(self.counters.base + which * WORD_BYTES)
        except BaseException as error:
            (counter.add_refused if refused(error) else counter.add_fails)(began)
            raise
        wrong = counter.add_ends(began, old)
        if wrong and self.adds_sure:
            self.complain("history", f"{who}: counter {which} (0x{self.counters.base + which * WORD_BYTES:x}): {wrong}")
