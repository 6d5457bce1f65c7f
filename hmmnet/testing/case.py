"""One test and its machine: what was asked for, and what happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hmmnet.faults import Plan
from hmmnet.faults.carry import Carrier
from hmmnet.faults.kinds import Fault
from hmmnet.machine import Host
from hmmnet.observe.events import Event
from hmmnet.sim import Trace
from hmmnet.topology.model import Topology

from .migrations import Migrations
from .story import Story


class Told(Trace):
    """The trace of a simulated machine, which tells the faults in it to a story."""

    def __init__(self, story: Story, *, keep: bool = False) -> None:
        super().__init__(keep=keep)
        self._story = story

    def add(self, now_s: float, what: str) -> None:
        """See `Trace.add`."""
        super().add(now_s, what)
        if what.startswith("fault "):
            self._story.fault(now_s, what)


@dataclass
class Case:
    """What a test asks of its machine, and what became of it. `limit_s` bounds the life of a real machine, in real seconds."""

    seed: int
    topology: Topology
    plan: Plan
    limit_s: float
    migrations: Migrations
    story: Story = field(default_factory=Story)
    machine: str = ""
    """Which fixture has given a machine: a test has one."""
    forbidden: bool = False
    """What failed the test is a migration that was not allowed."""
    crashes: list[str] = field(default_factory=list)
    """What has crashed in devices' processes, as their logs tell; `look` is asked as long as they are there."""
    look: Callable[[], list[str]] | None = None

    def crashed(self) -> list[str]:
        """What has crashed in devices' processes so far."""
        if self.look is not None:
            self.crashes = self.look()
        return self.crashes

    def hear(self, event: Event) -> None:
        """A host's event; what strict mode does not allow is marked in the story."""
        before = len(self.migrations.unexpected)
        self.migrations.hear(event)
        self.story.hear(event, marked=len(self.migrations.unexpected) > before)

    @contextmanager
    def hearing_faults(self, carrier: Carrier, now_s: Callable[[], float]) -> Iterator[None]:
        """Hear of each fault that begins, and that is over, while the block runs; `now_s` is emulated time."""

        def told(number: int, fault: Fault | None) -> None:
            self.story.note(now_s(), f"fault {number} is over" if fault is None else f"fault {number} begins: {fault}")

        carrier.told.append(told)
        try:
            yield
        finally:
            carrier.told.remove(told)

    def hear_effects(self, host: Host, now_s: Callable[[], float]) -> None:
        """Hear what faults do to the messages of real devices, and at the host's protocol points."""
        host.network.told = lambda _, what: self.story.fault(now_s(), what)
        host.injector.on_fired = lambda fired: self.story.fault(fired.at_s, fired.line)

    @contextmanager
    def listening(self, host: Host) -> Iterator[None]:
        """Hear what happens on a machine while the block runs."""
        with host.events.told_to(self.hear):
            yield
