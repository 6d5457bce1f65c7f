"""Every migration, invalidation and loss is told, with its cause, to those who listen."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import numpy as np

import hmmnet
from hmmnet.observe.events import DeviceChanged, Event, Events, Invalidated, Moved
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, runs_of
from hmmnet.program import Process
from hmmnet.sim import SimulatedMachine

AT = 1 << 32
PAGE = AT >> PAGE_SHIFT
COUNT = 32


def heard(body: Callable[[SimulatedMachine, Process], Awaitable[None]], topology: str = "two-gpus") -> list[Event]:
    """What is told while `body` runs; a mapping of `COUNT` written pages is at `AT`."""
    events: list[Event] = []

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        await process.mmap(COUNT * PAGE_SIZE, address=AT)
        await process.write(AT, np.arange(COUNT * PAGE_SIZE // 8, dtype="<u8"))
        with machine.host.events.told_to(events.append):
            await body(machine, process)
        await process.load(AT)

    hmmnet.simulate(main, topology)
    return events


def moves(events: list[Event]) -> list[tuple[list[tuple[int, int]], str, str, str]]:
    """Migrations: page ranges relative to `AT`, source, target, cause."""
    return [
        ([(start - PAGE, end - PAGE) for start, end in runs_of(event.pages)], event.source, event.target, event.cause)
        for event in events
        if isinstance(event, Moved)
    ]


def test_ways_of_a_page() -> None:
    """Asked for, faulted on, touched by the CPU one page or several, asked home: each with what it moved, no more."""

    async def body(machine: SimulatedMachine, process: Process) -> None:
        await process.migrate(AT + 3 * PAGE_SIZE, 2 * PAGE_SIZE, "gpu0")
        await process.launch("reduction", "gpu1", a=AT + 16 * PAGE_SIZE, n=512)
        await process.load(AT + 3 * PAGE_SIZE)
        await process.read(AT + 20 * PAGE_SIZE, 4 * PAGE_SIZE)
        await process.migrate(AT, COUNT * PAGE_SIZE, "host")

    events = heard(body)
    assert moves(events) == [
        ([(3, 5)], "host", "gpu0", "prefetch"),
        ([(16, 32)], "host", "gpu1", "fault"),
        ([(3, 4)], "gpu0", "host", "cpu fault"),
        ([(20, 24)], "gpu1", "host", "cpu fault"),
        ([(4, 5)], "gpu0", "host", "user"),
        ([(16, 20), (24, 32)], "gpu1", "host", "user"),
    ]
    whys = [event.why for event in events if isinstance(event, Moved)]
    assert whys[:3] == ["asked for by a program", "a fault of gpu1", "an access of the CPU"]
    times = [event.at_s for event in events]
    assert times == sorted(times)


def test_memory_given_up_and_a_device_that_dies() -> None:
    """A dmirror that is closed sends its pages home, in every process that maps them; a killed device is lost, and says how."""

    async def body(machine: SimulatedMachine, process: Process) -> None:
        handle = await process.open("dmirror0")
        await handle.ioctl("migrate_to_dev", AT + PAGE_SIZE, 2)
        child = await process.fork()
        await handle.close()
        for inherited in list(child.handles.values()):
            await inherited.close()
        await machine.kill_device("dmirror1")
        await machine.start_device("dmirror1")

    events = heard(body, "dmirror-4")
    assert moves(events) == [
        ([(1, 3)], "host", "dmirror0", "user"),
        ([(1, 3)], "dmirror0", "host", "release"),
        ([(1, 3)], "dmirror0", "host", "release"),
    ]
    assert len({event.process for event in events if isinstance(event, Moved)}) == 2
    changes = [event for event in events if isinstance(event, DeviceChanged)]
    assert [(change.device, change.state) for change in changes] == [("dmirror1", "lost"), ("dmirror1", "ready")]
    assert "was killed" in changes[0].how


def test_mirrors_that_are_told() -> None:
    """Protection changes reach the mirrors that overlap, and nobody is told of what nobody mirrors."""

    async def body(machine: SimulatedMachine, process: Process) -> None:
        await process.mprotect(AT, PAGE_SIZE, "r")
        await process.launch("reduction", "gpu0", "remote", a=AT, n=512)
        await process.launch("reduction", "gpu1", "remote", a=AT, n=512)
        await process.mprotect(AT, PAGE_SIZE, "rw")

    told = [event for event in heard(body) if isinstance(event, Invalidated)]
    assert [(event.start - PAGE, event.end - PAGE, event.event, event.told) for event in told] == [(0, 1, "protection_vma", 2)]


def test_nobody_listens() -> None:
    """Then nothing is kept, and a listener that left hears nothing more."""
    events = Events(lambda: 1.0)
    heard: list[Event] = []
    with events.told_to(heard.append):
        events.refused("gpu0", "page 0x1")
        events.moved(1, np.zeros(0, np.uint64), "host", "gpu0", "fault")
    assert not events.heard
    events.device("gpu0", "lost", "x")
    assert len(heard) == 1
