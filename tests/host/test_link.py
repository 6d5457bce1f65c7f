"""A device link over a session: damaged answers, wrong answers, fencing, and what a device is told before it is asked."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
import trio

from hmmnet.errors import BusError, KernelError, PeerError, ProtocolError, SegmentationFault
from hmmnet.fabric.stream import TRIES_MAX
from hmmnet.host import link
from hmmnet.host.homing import COPIES_MAX
from hmmnet.host.link import FREE_DELAY_S
from hmmnet.host.process import Process
from hmmnet.host.service import Host
from hmmnet.observe.counters import CPU_FAULT, DEVICE_TO_HOST
from hmmnet.pages import PAGE_SIZE, ZONE_SHIFT, from_wire
from hmmnet.wire.memory_transport import MemoryTransport
from hmmnet.wire.messages import Copied, CopyIn, CopyOut, Done, Evict, Evicted, FreeFrames, Invalidate, Ioctl, Message

from .scripted_device import LEASE_S, NO_FIGURES, ScriptedDevice, running_host, scripted_device

pytestmark = pytest.mark.virtual_time

Machine = tuple[Host, MemoryTransport, ScriptedDevice, Process, int]


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    """A host, gpu0, and a process with four numbered pages on it."""
    async with running_host("gpu0") as (host, transport), scripted_device(host, transport, "gpu0") as device:
        process = await host.create_process()
        await process.open("gpu0")
        address = await process.mmap(4 * PAGE_SIZE)
        await process.write(address, np.repeat(np.arange(1, 5, dtype=np.uint8), PAGE_SIZE))
        assert await process.migrate(address, 4 * PAGE_SIZE, "gpu0") == 4 * PAGE_SIZE
        yield host, transport, device, process, address


def answer_with(device: ScriptedDevice, answers: list[Message | None]) -> None:
    """Answer the next CopyOuts with `answers`; None is the right one."""
    right = device.copy_out

    def copy_out(message: CopyOut) -> Message | None:
        answer = answers.pop(0) if answers else None
        return right(message) if answer is None else answer

    device.copy_out = copy_out  # type: ignore[method-assign]


async def test_a_damaged_answer_is_asked_for_again(machine: Machine) -> None:
    """As often as a chunk of a stream is, and then right: the load gets the right byte."""
    _, _, device, process, address = machine
    damaged = Copied(bytes(PAGE_SIZE), 1)
    answer_with(device, [damaged] * (TRIES_MAX - 1))
    assert await process.read(address, 1) == b"\1"
    assert len(device.of(CopyOut)) == TRIES_MAX


async def test_damage_that_does_not_end_is_a_bus_error_and_the_page_stays(machine: Machine) -> None:
    """The page is still on the device: a later load succeeds."""
    _, _, device, process, address = machine
    answer_with(device, [Copied(bytes(PAGE_SIZE), 1) for _ in range(TRIES_MAX * COPIES_MAX)])
    with pytest.raises(BusError, match="checksum"):
        await process.read(address, 1)
    assert await process.read(address, 1) == b"\1"


async def test_a_fault_settles_accounts_while_the_device_works(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU waits for is not made longer by the books: those of some faults at once, and the last ones' a little later."""
    monkeypatch.setattr(link, "SINGLES_MAX", 3)
    host, _, _, process, address = machine
    counted = host.interconnect.profile.counter
    for page, settled in enumerate((0, 0, 0, 3)):
        await process.load(address + page * PAGE_SIZE)
        assert counted(DEVICE_TO_HOST, "gpu0").count == settled
    assert counted(CPU_FAULT, "gpu0").count == 4
    with trio.fail_after(LEASE_S):
        while counted(DEVICE_TO_HOST, "gpu0").count < 4:
            await trio.sleep(FREE_DELAY_S)
    assert counted(DEVICE_TO_HOST, "gpu0").total_bytes == 4 * PAGE_SIZE


async def test_a_storm_of_faults_tells_of_freed_frames_as_it_goes(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the request of the fault that finds that many have gathered; nobody waits for a moment."""
    monkeypatch.setattr(link, "SINGLES_MAX", 3)
    monkeypatch.setattr(link, "SINGLES_DELAY_S", 1000.0)
    _, _, device, process, address = machine
    for page in range(4):
        assert not device.of(FreeFrames)
        await process.load(address + page * PAGE_SIZE)
    with trio.fail_after(LEASE_S):
        while not device.of(FreeFrames):
            await trio.sleep(0.001)
    assert [type(message) for message in device.heard if isinstance(message, CopyOut | FreeFrames)] == [CopyOut] * 4 + [FreeFrames]
    assert sum(len(message.frames) for message in device.of(FreeFrames) if isinstance(message, FreeFrames)) == 3 * 8


async def test_frames_are_told_in_the_order_in_which_they_were_freed(machine: Machine) -> None:
    """One by one or many at once: in one list."""
    host, _, device, process, address = machine
    life = host.devices["gpu0"].life
    assert life is not None
    first = life.link.zone << ZONE_SHIFT
    life.link.free_frame(first + 9)
    life.link.free_frame(first + 8)
    life.link.free_frames(np.array([first + 3, first + 7], np.uint64))
    life.link.free_frame(first + 5)
    assert await process.read(address + PAGE_SIZE, 1) == b"\2"
    life.link.flush_freed()
    with trio.fail_after(LEASE_S):
        while not device.of(FreeFrames):
            await trio.sleep(FREE_DELAY_S)
    told = from_wire(b"".join(message.frames for message in device.of(FreeFrames) if isinstance(message, FreeFrames)))
    assert (told[:5] - np.uint64(first)).tolist() == [9, 8, 3, 7, 5]
    assert len(told) == 6, "the page that came home"


@pytest.mark.parametrize("answer", [Done(), Copied(b"short", 0)], ids=["another kind", "another length"])
async def test_an_answer_that_is_none_is_a_bus_error(machine: Machine, answer: Message) -> None:
    """The peer's mistake is named; nothing of it lands."""
    _, _, device, process, address = machine
    answer_with(device, [answer] * COPIES_MAX)
    with pytest.raises(BusError, match="answered a CopyOut"):
        await process.read(address, 1)
    assert await process.read(address, 1) == b"\1"


@pytest.mark.parametrize("answer", ["refused", "another kind"])
async def test_a_stream_that_a_device_does_not_expect_ends(machine: Machine, answer: str) -> None:
    """It credits nothing of what it has refused, so the host would send it for ever. Nothing has moved; the next migration goes well."""
    _, _, device, process, _ = machine
    right = device.copy_in

    def refuse(_: CopyIn) -> Message:
        raise ProtocolError("message cannot be decoded")

    def misread(message: CopyIn) -> Message:
        right(message)
        return NO_FIGURES

    address = await process.mmap(3 * PAGE_SIZE)
    await process.write(address, b"x" * (3 * PAGE_SIZE))
    device.session.on(CopyIn, refuse if answer == "refused" else misread)
    with trio.fail_after(10), pytest.raises(PeerError, match=r"cannot be decoded|answered CopyIn with Report, not Done"):
        await process.migrate(address, 3 * PAGE_SIZE, "gpu0")
    assert await process.read(address, 3 * PAGE_SIZE) == b"x" * (3 * PAGE_SIZE)
    device.session.on(CopyIn, right)
    assert await process.migrate(address, 3 * PAGE_SIZE, "gpu0") == 3 * PAGE_SIZE


async def test_freed_frames_are_told_before_anything_is_asked(machine: Machine) -> None:
    """A command sees a driver that knows its free memory."""
    _, _, device, process, address = machine
    await process.munmap(address, 4 * PAGE_SIZE)
    handle = await process.open("gpu0")
    await handle.ioctl("echo", 0, 1)
    kinds = [type(message) for message in device.heard]
    assert kinds[-2:] == [FreeFrames, Ioctl]


async def test_an_eviction_is_told_its_free_frames_with_the_answer(machine: Machine) -> None:
    """The driver that evicts may use the frames at once."""
    _, _, device, process, address = machine
    frames = np.arange(device.welcome.zone << 36, (device.welcome.zone << 36) + 4, dtype="<u8").tobytes()
    evicted = await device.session.ask(Evict(frames), Evicted)
    assert evicted.moved == 4
    assert len(device.of(FreeFrames)) == 1
    assert await process.read(address, 1) == b"\1"
    assert await device.session.ask(Evict(frames), Evicted) == Evicted(0)


class Garbled(Message, frozen=True):
    """An answer that no host can read."""


def broken(_: Message) -> Message:
    raise ZeroDivisionError("this driver is broken")


def interrupted(_: Message) -> Message:
    raise KernelError(errno.EINTR, "invalidate", "somebody sent a signal")


def crashed(_: Message) -> Message:
    raise SegmentationFault(0, "this driver has no such address")


@pytest.mark.parametrize(
    ("answer", "loss"),
    [
        (broken, "did not carry out an invalidation"),
        (interrupted, "did not carry out an invalidation"),
        (crashed, "did not carry out an invalidation"),
        (lambda _: NO_FIGURES, "answered with Report, which acknowledges nothing"),
        (lambda _: Garbled(), "said what cannot be read"),
    ],
    ids=["broken", "errno", "signal", "another kind", "unreadable"],
)
@pytest.mark.parametrize("exits", [False, True], ids=["munmap", "exit"])
async def test_an_invalidation_that_a_device_refuses_condemns_it(
    machine: Machine, answer: Callable[[Message], Message], loss: str, exits: bool
) -> None:
    """It cannot be trusted to have dropped anything: its session ends, and the page table change goes on after its lease, all of it."""
    host, _, device, process, address = machine
    await device.subscribe(1)
    device.session.on(Invalidate, answer)
    began_s = trio.current_time()
    with trio.fail_after(10):
        await (process.exit() if exits else process.munmap(address, PAGE_SIZE))
    assert trio.current_time() - began_s >= LEASE_S * 0.9
    assert loss in host.devices["gpu0"].last_loss
    if exits:
        assert process.pid not in host.processes
        assert host.audit(quiet=True) == []
        assert sum(node.allocator.used_count for node in host.memory.nodes) == 0


async def test_a_new_incarnation_replaces_a_device_that_still_lives(machine: Machine) -> None:
    """The old life may go on somewhere: invalidations that wait for it wait its lease out; the new one serves at once."""
    host, transport, device, process, address = machine
    await device.subscribe(1)
    began_s = trio.current_time()
    async with scripted_device(host, transport, "gpu0", incarnation=2) as second:
        await host.device_ready("gpu0")
        with pytest.raises(BusError, match="new incarnation"):
            await process.read(address, 1)
        with trio.fail_after(10):
            await process.munmap(address, PAGE_SIZE)
        assert trio.current_time() - began_s >= LEASE_S * 0.9
        again = await process.mmap(PAGE_SIZE)
        assert await process.migrate(again, PAGE_SIZE, "gpu0") == PAGE_SIZE
        assert second.welcome.zone == device.welcome.zone + 1


async def test_whose_a_context_is(machine: Machine) -> None:
    """By its number: messages of devices name contexts, and faults name processes. 0 when its process has exited or there is none."""
    host, _, _, process, _ = machine
    life = host.devices["gpu0"].life
    assert life is not None
    (context,) = life.contexts.values()
    assert host.contexts.process_of(context.number) == process.pid
    assert host.contexts.process_of(context.number + 1) == 0
    await process.exit()
    assert host.contexts.process_of(context.number) == 0
