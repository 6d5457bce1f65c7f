"""What the demo does, step by step; each step tells what happened and nothing is printed here.

Two runs over the same data: in the first the devices fetch by faulting what they touch, in the second everything was sent to them before.
Each run has result areas of its own, which the CPU reads at the end and compares with what plain Python computed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import trio

from hmmnet.pages import PAGE_SIZE, Words
from hmmnet.program import JobResult, Machine, Process, Residency
from hmmnet.workloads.shares import run_shares

from .answers import Answers, word_at, wrong
from .data import SEARCHES, Area, Data, Share, from_to, store
from .story import CPU_ACCESS, DUMMY_DRIVER, MIGRATION, MIRRORING, Question

DEMAND = "by demand"
EXPLICIT = "migrated"
SHOWN_LETTERS_MAX = 20
SHOWN_FROM = 40
"""Searches among which the word that is shown is chosen."""


@dataclass(frozen=True)
class Counted:
    """Plain Python has read the text, and knows what must come out."""

    answers: Answers


@dataclass(frozen=True)
class Built:
    """The data are in CPU memory."""

    data: Data
    text_bytes: int
    searches: int


@dataclass(frozen=True)
class Asked:
    """A question's moment has come."""

    question: Question


@dataclass(frozen=True)
class Ran:
    """A kernel ran on all devices at once; `seconds` are emulated, from the launch to the last end."""

    run: str
    kernel: str
    jobs: Mapping[str, JobResult]
    seconds: float


@dataclass(frozen=True)
class Moved:
    """Pages were moved on purpose; `to` is ``host`` or ``devices``. Pages without data need no link: `crossed_bytes` leaves them out."""

    to: str
    moved_bytes: int
    crossed_bytes: int
    seconds: float


@dataclass(frozen=True)
class Checked:
    """Results that were read on the CPU, against plain Python."""

    run: str
    kernel: str
    results: int
    wrong: int
    seconds: float
    pages_from_devices: int


@dataclass(frozen=True)
class Found:
    """One word as the devices found it, for a person to look up: how often, and at which byte first."""

    word: str
    count: int
    first_at: int


@dataclass(frozen=True)
class Sampled:
    """Where the pages live at this moment."""

    moment: str
    emulated_s: float
    residency: Residency


Event: TypeAlias = Counted | Built | Asked | Ran | Moved | Checked | Found | Sampled
Tell: TypeAlias = Callable[[Event], None]


@dataclass
class Demo:
    """One demo on one machine."""

    machine: Machine
    tell: Tell
    text: bytes
    answers: Answers
    chance: random.Random
    searches: int = SEARCHES
    mistakes: list[str] = field(default_factory=list)
    counts: Words = field(default_factory=lambda: np.zeros(0, dtype=np.uint64), init=False, repr=False)
    found: list[Words] = field(default_factory=list, init=False, repr=False)
    """What the CPU read last."""

    async def run(self) -> None:
        """All steps. What came out wrong is in `mistakes` afterwards."""
        process = await self.machine.create_process()
        data = await store(process, self.text, self.machine.device_names, self.chance, self.searches)
        self.tell(Built(data, len(self.text), sum(len(s.wanted) for s in data.shares)))
        await self.sample(process, data, "built")
        self.tell(Asked(MIRRORING))
        await self.kernels(process, data, data.shares, DEMAND)
        await self.sample(process, data, "by demand")
        self.tell(Asked(MIGRATION))
        await self.move(process, data, "host")
        await self.sample(process, data, "sent home")
        await self.move(process, data, "devices")
        await self.sample(process, data, "migrated")
        await self.kernels(process, data, data.again, EXPLICIT)
        await self.sample(process, data, "ran again")
        self.tell(Asked(CPU_ACCESS))
        for run, shares in ((DEMAND, data.shares), (EXPLICIT, data.again)):
            await self.check_counts(process, data, shares, run)
            await self.check_searches(process, shares, run)
        self.show_one(data)
        await self.sample(process, data, "read by CPU")
        self.tell(Asked(DUMMY_DRIVER))
        await process.exit()

    async def kernels(self, process: Process, data: Data, shares: tuple[Share, ...], run: str) -> None:
        """Word count, then tree search, each on all devices at once."""
        n = len(data.words)
        counting = {
            s.device: {"text": s.text.address, "length": s.text_length, "words": s.words.address, "n": n, "out": s.counts.address}
            for s in shares
        }
        searching = {s.device: {"root": s.root, "keys": s.keys.address, "n": len(s.wanted), "out": s.found.address} for s in shares}
        for kernel, arguments in (("word_count", counting), ("tree_search", searching)):
            began = self.machine.emulated_s()
            jobs = await run_shares(process, kernel, "demand", arguments)
            self.tell(Ran(run, kernel, jobs, self.machine.emulated_s() - began))

    async def move(self, process: Process, data: Data, to: str) -> None:
        """All input home; or to each device its input and the room for its results, in one piece; all devices at once."""
        moved: list[int] = []
        crossed: list[int] = []

        async def one(area: Area, target: str, with_data: int) -> None:
            moved.append(await process.migrate(area.address, area.size_bytes, target))
            crossed.append(min(moved[-1], with_data))

        if to == "host":
            wanted = [(share.input, "host", share.input.size_bytes) for share in data.shares]
        else:
            wanted = [(from_to(share.input, share.output), share.device, share.input.size_bytes) for share in data.again]
        began = self.machine.emulated_s()
        async with trio.open_nursery() as nursery:
            for arguments in wanted:
                nursery.start_soon(one, *arguments)
        self.tell(Moved(to, sum(moved), sum(crossed), self.machine.emulated_s() - began))

    async def check_counts(self, process: Process, data: Data, shares: tuple[Share, ...], run: str) -> None:
        """The devices' counts of each word, added up, against Counter's."""
        areas = [s.counts for s in shares]
        away = await pages_away(process, areas)
        began = self.machine.emulated_s()
        total = np.zeros(len(data.words), dtype=np.uint64)
        for area in areas:
            total += await process.read_array(area.address, "<u8", len(data.words))
        seconds = self.machine.emulated_s() - began
        away -= await pages_away(process, areas)
        self.counts = total
        expected = [self.answers.counts.get(key, 0) for key in data.words.tolist()]
        bad = wrong(total.tolist(), expected) + abs(len(self.answers.counts) - len(data.words))
        self.note(Checked(run, "word_count", len(data.words), bad, seconds, away))

    async def check_searches(self, process: Process, shares: tuple[Share, ...], run: str) -> None:
        """Where each word was found, against a dictionary."""
        areas = [s.found for s in shares]
        away = await pages_away(process, areas)
        began = self.machine.emulated_s()
        found = [await process.read_array(s.found.address, "<u8", len(s.wanted)) for s in shares]
        seconds = self.machine.emulated_s() - began
        away -= await pages_away(process, areas)
        self.found = found
        bad = sum(wrong(got.tolist(), map(self.answers.search, s.wanted.tolist())) for got, s in zip(found, shares, strict=True))
        self.note(Checked(run, "tree_search", sum(map(len, found)), bad, seconds, away))

    def show_one(self, data: Data) -> None:
        """The longest of the first words that were looked up and found, with what the devices say of it."""
        hits = [(int(at), int(key)) for at, key in zip(self.found[0][:SHOWN_FROM], data.again[0].wanted[:SHOWN_FROM], strict=True)]
        words = [(word_at(self.text, at), at, key) for at, key in hits if at < len(self.text)]
        words = [entry for entry in words if len(entry[0]) <= SHOWN_LETTERS_MAX]
        if words:
            word, at, key = max(words, key=lambda entry: len(entry[0]))
            self.tell(Found(word, int(self.counts[np.searchsorted(data.words, np.uint64(key))]), at))

    def note(self, checked: Checked) -> None:
        """Tell, and remember what is wrong."""
        if checked.wrong:
            self.mistakes.append(f"{checked.kernel} {checked.run}: {checked.wrong} of {checked.results} results are wrong")
        self.tell(checked)

    async def sample(self, process: Process, data: Data, moment: str) -> None:
        """Look where the pages are; looking moves nothing."""
        residency = await process.residency(data.whole.address, data.whole.size_bytes // PAGE_SIZE)
        self.tell(Sampled(moment, self.machine.emulated_s(), residency))


async def pages_away(process: Process, areas: list[Area]) -> int:
    """How many pages of `areas` the CPU's page table has as special entries: device memory."""
    letters = [await process.pagemap(area.address, area.size_bytes // PAGE_SIZE) for area in areas]
    return sum(value & 0x7F == ord("S") for part in letters for value in part)


def facts_of(event: Event) -> dict[str, Any] | None:
    """An event for programs; questions and samples have none."""
    if isinstance(event, Ran):
        counters = {device: dict(job.counters) for device, job in event.jobs.items()}
        return {"step": "run", "run": event.run, "kernel": event.kernel, "emulated_s": event.seconds, "devices": counters}
    if isinstance(event, Moved):
        return {"step": "migrate", "to": event.to, "moved_bytes": event.moved_bytes, "emulated_s": event.seconds}
    if isinstance(event, Checked):
        return {"step": "check", "run": event.run, "kernel": event.kernel, "results": event.results, "wrong": event.wrong}
    if isinstance(event, Built):
        return {"step": "build", "text_bytes": event.text_bytes, "different_words": len(event.data.words), "searches": event.searches}
    return None
