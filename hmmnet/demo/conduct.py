"""The demo from the first line to the verdict: reads the text, launches the machine, runs the steps, adds up what came out."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import trio

from hmmnet.errors import HmmnetError
from hmmnet.program import Machine
from hmmnet.sim.worlds import WorldName

from .answers import Answers, answers_for
from .data import MEBIBYTE, SEARCHES, Input
from .steps import Counted, Demo, Event, facts_of

SECONDS_MAX = 120.0
"""Real seconds after which the demo gives up, for a little text: with the default's 4 MiB it takes less than ten."""
SECONDS_MAX_PER_MIB = 2.0
"""More for each MiB of text; on a slow computer that others use, too, half a second was needed."""


class DemoTimeout(HmmnetError):
    """The demo did not end."""


@dataclass(frozen=True)
class Started:
    """The machine is up."""

    topology: str
    devices: tuple[str, ...]
    rate: float
    """Emulated seconds for a real second."""
    seconds: float


@dataclass
class Outcome:
    """What a demo came to."""

    source: str
    text_bytes: int
    cut: bool
    """Whether the source has more text."""
    words: int
    topology: str
    devices: tuple[str, ...]
    mistakes: list[str]
    report: dict[str, Any]
    seconds: float
    facts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def correct(self) -> bool:
        """Whether every result was right."""
        return not self.mistakes

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "correct": self.correct,
            "mistakes": self.mistakes,
            "input": {"source": self.source, "bytes": self.text_bytes, "cut": self.cut, "words": self.words},
            "topology": self.topology,
            "devices": list(self.devices),
            "real_s": self.seconds,
            "steps": self.facts,
            "report": self.report,
        }


@dataclass
class Conductor:
    """Runs the demo; `tell` hears the steps, `on_start` hears that the machine is up."""

    given: Input
    topology: str
    seed: int
    tell: Callable[[Event], None]
    on_start: Callable[[Started], None]
    rate: float | Literal["auto"] = "auto"
    searches: int = SEARCHES
    world: WorldName = "real"
    during: Callable[[Any], AbstractAsyncContextManager[Any]] = nullcontext
    """What holds while the steps run on the machine."""

    async def run(self) -> Outcome:
        """The whole demo on a machine of its own. Raises DemoTimeout, and what launching raises."""
        if self.world == "sim":
            return await self._simulated()
        from hmmnet.machine import launch

        limit_s = SECONDS_MAX + SECONDS_MAX_PER_MIB * len(self.given.text) / MEBIBYTE
        rate = 0.0
        with trio.move_on_after(limit_s) as scope:
            began = time.monotonic()
            async with launch(self.topology, rate=self.rate, seed=self.seed) as machine:
                rate = machine.rate
                self.on_start(Started(self.topology, machine.device_names, rate, time.monotonic() - began))
                # not beside the start, which measures what this computer moves: half a second here cost most of the machine's rate
                answers = await trio.to_thread.run_sync(answers_for, self.given.text, abandon_on_cancel=True)
                return await self.perform(machine, answers, began)
        assert scope.cancelled_caught
        if rate:
            why = f"the links of {self.topology} are slow, at a rate of {rate:g}; give it another --rate or less text, or ask"
        else:
            why = "the machine did not start; ask"
        raise DemoTimeout(f'no end after {limit_s:.0f} s: {why} "hmmnet doctor"')

    async def _simulated(self) -> Outcome:
        """In virtual time nothing may go on in a thread meanwhile: time would jump over it."""
        from hmmnet.sim import simulated

        began = time.monotonic()
        answers = answers_for(self.given.text)
        async with simulated(self.topology, seed=self.seed) as machine:
            self.on_start(Started(self.topology, machine.device_names, machine.rate, time.monotonic() - began))
            return await self.perform(machine, answers, began)

    async def perform(self, machine: Machine, answers: Answers, began: float) -> Outcome:
        """The steps on a machine that runs."""
        facts: list[dict[str, Any]] = []

        def hear(event: Event) -> None:
            fact = facts_of(event)
            if fact is not None:
                facts.append(fact)
            self.tell(event)

        hear(Counted(answers))
        demo = Demo(machine, hear, self.given.text, answers, random.Random(self.seed), self.searches)  # noqa: S311 - chance, not secrecy
        async with self.during(machine):
            await demo.run()
        return Outcome(
            source=self.given.source,
            text_bytes=len(self.given.text),
            cut=self.given.cut,
            words=answers.words,
            topology=self.topology,
            devices=tuple(machine.device_names),
            mistakes=demo.mistakes,
            report=await machine.report(),
            seconds=time.monotonic() - began,
            facts=facts,
        )
