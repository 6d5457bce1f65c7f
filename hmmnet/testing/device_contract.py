"""What any device model must do, whatever else it does: a test class to inherit from.

    class TestMine(hmmnet.testing.DeviceContract):
        model = "mine"                              # as topologies name it, or the class itself

Each check gets a `ScriptedHost` with context 1 of process 10 open, and the device. Host and device run in virtual time, scheduled from the
test's seed: with the marker ``seeds(20)`` on the class every check is played in twenty orders of events. `play` plays one check.

They say: a device keeps what it is given and gives it back, drops what it is told to drop, refuses by name what makes no sense, and
goes on; `job_checks` says what its jobs must see and may do. After every check the host must have seen no DMA without a translation, and
the frames in use must be those that hold a page.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

import msgspec
import numpy as np
import pytest
import trio
import xxhash

from hmmnet.blocking import only_error
from hmmnet.errors import KernelError, RemoteError
from hmmnet.fabric.dma import BytesSink
from hmmnet.fabric.stream import Holds
from hmmnet.pages import PAGE_SIZE, PAGES_MAX, ZONE_SHIFT, from_wire, to_wire
from hmmnet.plugins import MODELS, offered
from hmmnet.sim import run_virtual
from hmmnet.sim.clock import VirtualClock
from hmmnet.wire import messages as m

from .compared import same
from .job_checks import JOB_CHECKS
from .scripted_host import PAGE, Model, ScriptedHost, machine, results_of, u64

INFINITE = float("inf")
FIGURES = {
    "name", "model", "kind", "zone", "pages", "pages_used", "pages_used_max", "contexts", "jobs_running", "jobs_finished",
    "copied_in_bytes", "copied_out_bytes", "emulated_s", "migrations", "pages_in", "pages_out", "remote_read_bytes",
    "remote_written_bytes", "faults", "fault_groups", "fault_duplicates", "fault_stale", "fault_fatal", "fault_group_s",
}  # fmt: skip

Check: TypeAlias = Callable[[ScriptedHost, Model], Awaitable[None]]
BUSY_S = 0.1
"""Virtual seconds in which whoever need not wait is done."""
LIMIT_S = 20.0
"""Virtual seconds of one check."""


def play(check: Check, model: str | type, seed: int = 0, **spec: Any) -> None:
    """Play one check against a device of `model` (a name, or the class) with this specification, in virtual time, scheduled from `seed`.

    AssertionError says what does not hold.
    """
    name = model if isinstance(model, str) else model.__name__.lower()

    async def main() -> None:
        async with machine(clock=VirtualClock, model=name, **spec) as (host, device):
            with trio.fail_after(LIMIT_S):
                await check(host, device)
                await frames_are_accounted_for(host, device)

    with nullcontext() if isinstance(model, str) else offered(MODELS, name, model), only_error():
        run_virtual(main, seed=seed)


async def frames_are_accounted_for(host: ScriptedHost, device: Model) -> None:
    """Frames in use are the pages that live here, no more and no less."""
    here = {entry.frame for entry in host.table.values() if host.is_device(entry)}
    assert (await host.figures())["pages_used"] == len(here)
    assert set(device.memory.live_frames().tolist()) == here


async def refused(host: ScriptedHost, message: m.Message, answer: type[m.Message] = m.Done) -> str:
    """Send what makes no sense; the complaint that comes back."""
    try:
        await host.session.ask(message, answer)
    except RemoteError as error:
        return str(error)
    raise AssertionError(f"{type(message).__name__} was not refused: {message}")


async def errno_of(host: ScriptedHost, message: m.Message, answer: type[m.Message] = m.Done) -> str:
    """The errno name that a request fails with."""
    try:
        await host.session.ask(message, answer)
    except KernelError as error:
        return error.name
    raise AssertionError(f"{type(message).__name__} did not fail: {message}")


async def prefetch(host: ScriptedHost, page: int, pages: int, context: int = 1) -> int:
    """Pages that moved to the device."""
    return (await host.session.ask(m.Ioctl(context, "migrate_to_dev", page * PAGE_SIZE, pages), m.IoctlDone)).cpages


async def send_home(host: ScriptedHost, page: int, pages: int) -> int:
    """Pages that moved to the host."""
    return (await host.session.ask(m.Ioctl(1, "migrate_to_sys", page * PAGE_SIZE, pages), m.IoctlDone)).cpages


async def keeps_data_there_and_back(host: ScriptedHost, device: Model) -> None:
    """Written, zero and never-touched pages survive the way to the device and home, in large and small pieces."""
    at = host.mmap(PAGE, 700)
    data = np.random.default_rng(1).integers(0, 256, 600 * PAGE_SIZE).astype(np.uint8).tobytes()
    await host.cpu_write(at, data)
    assert await prefetch(host, PAGE, 700) == 700
    assert all(host.on_device(PAGE, 700))
    assert await send_home(host, PAGE, 300) == 300
    same(await host.cpu_read(at, 600 * PAGE_SIZE), data)
    assert not any(await host.cpu_read(at + 600 * PAGE_SIZE, 100 * PAGE_SIZE))


async def zeroes_what_was_used(host: ScriptedHost, device: Model) -> None:
    """Never-touched pages that come to frames which held other data read as zero, also where written ones come with them."""
    pages = device.memory.pages
    await host.cpu_write(host.mmap(PAGE, pages), b"\xff" * (pages * PAGE_SIZE))
    await prefetch(host, PAGE, pages)
    await send_home(host, PAGE, pages)
    other = PAGE + 2 * pages
    at = host.mmap(other, pages)
    await host.cpu_write(at, b"\x01" * PAGE_SIZE)
    await prefetch(host, other, pages)
    await send_home(host, other, pages)
    same(await host.cpu_read(at, PAGE_SIZE), b"\x01" * PAGE_SIZE)
    assert not any(await host.cpu_read(at + PAGE_SIZE, (pages - 1) * PAGE_SIZE))


async def gives_single_pages_back(host: ScriptedHost, device: Model) -> None:
    """A CPU fault takes one page home, its neighbours stay."""
    at = host.mmap(PAGE, 8)
    await host.cpu_write(at, b"".join(bytes([i]) * PAGE_SIZE for i in range(8)))
    await prefetch(host, PAGE, 8)
    assert await host.cpu_read(at + 3 * PAGE_SIZE, 4) == bytes([3] * 4)
    assert host.on_device(PAGE, 8) == [i != 3 for i in range(8)]


async def drops_what_is_invalidated(host: ScriptedHost, device: Model) -> None:
    """After the answer to an invalidation no entry of the range is left, and neighbours before it are."""
    host.mmap(PAGE, 8)
    await prefetch(host, PAGE, 8)
    mirror = device.contexts[1].context.mirror
    assert mirror.mapped_count() == 8
    async with host.invalidated(PAGE + 2, PAGE + 4, "protection_vma"):
        left = (mirror.range(PAGE, PAGE + 8) != 0).tolist()
    assert left[:2] == [True, True]
    assert left[2:4] == [False, False]


async def drops_at_once(host: ScriptedHost, device: Model) -> None:
    """Entries are gone before the device looks at any later message, however long its answer takes."""
    host.mmap(PAGE, 4)
    await prefetch(host, PAGE, 4)
    mirror = device.contexts[1].context.mirror
    answers = [host.session.begin(message) for message in host.announcements(PAGE, PAGE + 4, "soft_dirty")]
    await host.figures()
    assert not mirror.range(PAGE, PAGE + 4).any()
    for answer in answers:
        await answer.wait()


async def answers_when_its_dma_is_over(host: ScriptedHost, device: Model) -> None:
    """While it reads or writes memory of the host it has not let go of it, and does not say that it has."""
    at = host.mmap(PAGE, 1)
    await host.cpu_write(at, bytes(PAGE_SIZE))
    for kind, kernel, arguments in ((m.DmaRead, "peek", {"n": 1}), (m.DmaWrite, "poke", {"words": b"\x07" * 8})):
        begun, goes_on, answered = trio.Event(), trio.Event(), trio.Event()

        async def held(begun: trio.Event = begun, goes_on: trio.Event = goes_on) -> None:
            begun.set()
            await goes_on.wait()

        async def invalidate(answered: trio.Event = answered) -> None:
            async with host.invalidated(PAGE, PAGE + 1, "soft_dirty"):
                answered.set()

        host.pauses[kind] = held
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(host.launch, kernel, "remote", a=at, **arguments))
            await begun.wait()
            nursery.start_soon(invalidate)
            await trio.sleep(BUSY_S)
            assert not answered.is_set(), f"answered while its {kind.__name__} was under way"
            goes_on.set()
    assert await host.cpu_read(at, 8) == b"\x07" * 8


async def closes_when_its_dma_is_over(host: ScriptedHost, device: Model) -> None:
    """A context that is being closed has not let go of a page while a job of it reads or writes that, and is not closed so long."""
    at = host.mmap(PAGE, 1)
    await host.cpu_write(at, bytes(PAGE_SIZE))
    begun, goes_on, answers = trio.Event(), trio.Event(), list[str]()

    async def held() -> None:
        begun.set()
        await goes_on.wait()

    async def job() -> None:
        with suppress(RemoteError, KernelError):
            await host.launch("peek", "remote", a=at, n=1)

    async def closing() -> None:
        await host.close(1)
        answers.append("closed")

    async def invalidate() -> None:
        async with host.invalidated(PAGE, PAGE + 1, "soft_dirty"):
            answers.append("let go")

    host.pauses[m.DmaRead] = held
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job)
        await begun.wait()
        for step in (closing, invalidate):
            nursery.start_soon(step)
            await trio.sleep(BUSY_S)
            assert not answers, f"{answers[0]} while its DmaRead was under way"
        goes_on.set()
    assert sorted(answers) == ["closed", "let go"]


async def lets_go_when_its_lease_is_over(host: ScriptedHost, device: Model) -> None:
    """Told by nobody it uses no translation any more; when the host is gone its jobs end, too."""
    host.mmap(PAGE, 8)
    await prefetch(host, PAGE, 8)
    mirror = device.contexts[1].context.mirror
    assert mirror.mapped_count() == 8
    device.drop_mirrors()
    assert mirror.mapped_count() == 0
    begun, goes_on, done = trio.Event(), trio.Event(), list[m.Finished]()

    async def held() -> None:
        begun.set()
        await goes_on.wait()

    async def job() -> None:
        with suppress(RemoteError, KernelError):
            done.append(await host.launch("reduction", "remote", a=host.mmap(PAGE + 4096, 1), n=512))

    host.pauses[m.RangeFault] = held
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job)
        await begun.wait()
        device.fence()
        assert mirror.mapped_count() == 0
        goes_on.set()
    assert not done, "a job went on without a host"


async def drops_before_it_copies_out(host: ScriptedHost, device: Model) -> None:
    """When a copy home is answered, no entry leads to the page any more, whoever asked and however it was named."""
    host.mmap(PAGE, 2)
    await prefetch(host, PAGE, 2)
    mirror = device.contexts[1].context.mirror
    await host.take_home([PAGE], 1)
    assert not mirror.range(PAGE, PAGE + 1).any()
    await host.take_home([PAGE + 1], 0)
    assert not mirror.range(PAGE + 1, PAGE + 2).any()


async def survives_late_and_unknown_invalidations(host: ScriptedHost, device: Model) -> None:
    """A context or subscription that is not there holds nothing: done. A range that is none: refused."""
    await host.session.ask(m.Invalidate(99, 1, 0, 10, "unmap", -1, 7), m.Done)
    await host.session.ask(m.Invalidate(1, 12345, 0, 10, "unmap", -1, 7), m.Done)
    await refused(host, m.Invalidate(1, 100, 10, 10, "unmap", -1, 7))
    await refused(host, m.Invalidate(1, 100, 11, 10, "unmap", -1, 7))


async def takes_a_sequence_that_it_was_not_told(host: ScriptedHost, device: Model) -> None:
    """The host tells it nothing of pages that it does not hold: words with a later sequence than it has heard of are good."""
    at = host.mmap(PAGE, 1)
    await host.cpu_write(at, np.arange(512, dtype="<i8").tobytes())
    for tries in (1, 2):
        assert results_of(await host.launch("reduction", "remote", a=at, n=512)) == {"sum": sum(range(512))}
        assert len(host.sent(m.RangeFault)) == tries, "what it had read was good, and it has read it again"
        async with host.invalidated(PAGE, PAGE + 1, "soft_dirty"):
            await trio.lowlevel.checkpoint()
        host.pass_over()


async def refuses_bad_copies(host: ScriptedHost, device: Model) -> None:
    """Frames that are not ours, were not granted, or are half a number; streams that are none."""
    own, other = u64([device.memory.base]), u64([(host.zone + 1) << ZONE_SHIFT])
    beyond = u64([device.memory.base + device.memory.pages])
    for frames in (own, other, beyond):
        await refused(host, m.CopyIn(2, to_wire(frames), b""))
        await refused(host, m.CopyIn(0, b"", to_wire(frames)))
        await refused(host, m.CopyOut(4, 1, b"", to_wire(frames), 0.0, INFINITE, 0.0))
    await refused(host, m.CopyIn(2, bytes(7), b""))
    await refused(host, m.CopyIn(2, b"", b""))
    await refused(host, m.CopyOut(4, 1, bytes(3), to_wire(own), 0.0, INFINITE, 0.0))
    await refused(host, m.CopyOut(4, 1, to_wire(u64([PAGES_MAX])), to_wire(own), 0.0, INFINITE, 0.0))
    await refused(host, m.CopyOut(4, 1, b"", b"", 0.0, INFINITE, 0.0))
    host.mmap(PAGE, 1)
    await prefetch(host, PAGE, 1)
    live = to_wire(u64([host.table[PAGE].frame]))
    await refused(host, m.CopyIn(6, live, b""))
    await refused(host, m.CopyOut(0, 1, b"", b"", 0.0, INFINITE, 0.0))


async def answers_a_copy_without_a_stream(host: ScriptedHost, device: Model) -> None:
    """A few pages come with the answer, whole; nothing leads to them any more, and if they stay they can be used again."""
    at = host.mmap(PAGE, 64)
    await host.cpu_write(at, np.arange(64 * 512, dtype="<i8").tobytes())
    await prefetch(host, PAGE, 64)
    mirror = device.contexts[1].context.mirror
    frames = u64([host.table[PAGE + 1].frame, host.table[PAGE + 2].frame])
    copied = await host.session.ask(m.CopyOut(0, 1, to_wire(u64([PAGE + 1, PAGE + 2])), to_wire(frames), 0.0, INFINITE, 0.0), m.Copied)
    same(copied.data, np.arange(512, 3 * 512, dtype="<i8").tobytes())
    assert copied.checksum == xxhash.xxh3_64_intdigest(copied.data)
    assert (mirror.range(PAGE, PAGE + 4) != 0).tolist() == [True, False, False, True]
    many = to_wire(u64(host.table[PAGE + i].frame for i in range(64)))
    await refused(host, m.CopyOut(0, 1, b"", many, 0.0, INFINITE, 0.0), m.Copied)
    async with host.invalidated(PAGE, PAGE + 64, "soft_dirty"):
        assert not mirror.range(PAGE, PAGE + 64).any()
    assert results_of(await host.launch("reduction", a=at, n=64 * 512)) == {"sum": sum(range(64 * 512))}


async def says_how_its_copies_go_on(host: ScriptedHost, device: Model) -> None:
    """Asked about a stream it says what holds it: credits, here; and that it knows nothing of another. What is no list is refused."""
    host.mmap(PAGE, 64)
    await prefetch(host, PAGE, 64)
    frames = u64(host.table[PAGE + i].frame for i in range(64))
    stream, data = host.new_stream(), bytearray(64 * PAGE_SIZE)
    await host.session.ask(m.CopyOut(stream, 1, b"", to_wire(frames), 0.0, INFINITE, 0.0), m.Done)
    await trio.sleep(BUSY_S)
    shown = await host.session.ask(m.ShowStreams(to_wire(u64([stream, stream + 2]))), m.StreamsShown)
    assert from_wire(shown.holds).tolist() == [Holds.CREDIT, Holds.GONE]
    assert from_wire(shown.begun).tolist()[0] > 0
    await refused(host, m.ShowStreams(bytes(9)), m.StreamsShown)
    await host.receiver.expect(stream, BytesSink(data)).wait()
    same(bytes(data), bytes(64 * PAGE_SIZE))


async def ignores_bad_frees(host: ScriptedHost, device: Model) -> None:
    """A note that frees what is not live frees nothing."""
    host.mmap(PAGE, 2)
    await prefetch(host, PAGE, 2)
    live = host.table[PAGE].frame
    for frames in ([live, live], [live, device.memory.base + 100], [live, 5]):
        host.session.note(m.FreeFrames(to_wire(u64(frames))))
    host.session.note(m.FreeFrames(bytes(9)))
    assert (await host.figures())["pages_used"] == 2


async def counts_contexts(host: ScriptedHost, device: Model) -> None:
    """Open once, close once; a number can be used again."""
    assert await errno_of(host, m.OpenContext(1, 10)) == "EEXIST"
    assert await errno_of(host, m.CloseContext(2)) == "EBADF"
    for _ in range(3):
        await host.open(2, 11)
        await host.close(2)
    assert (await host.figures())["contexts"] == 1
    assert await errno_of(host, m.Ioctl(2, "migrate_to_dev", 0, 1), m.IoctlDone) == "EBADF"


async def runs_jobs(host: ScriptedHost, device: Model) -> None:
    """A kernel of hmmnet's own gives the right sum, wherever its data are."""
    at = host.mmap(PAGE, 64)
    await host.cpu_write(at, np.arange(64 * 512, dtype="<i8").tobytes())
    for placement in ("remote", "demand", "remote"):
        finished = await host.launch("reduction", placement, a=at, n=64 * 512)
        assert results_of(finished) == {"sum": sum(range(64 * 512))}
    assert (await host.figures())["jobs_finished"] == 3


async def refuses_bad_launches(host: ScriptedHost, device: Model) -> None:
    """Each with its errno; nothing is left running."""
    good = msgspec.msgpack.encode({"a": 0, "n": 0})
    assert await errno_of(host, m.Launch(1, 1, "no_such_kernel", good), m.Finished) == "ENOENT"
    assert await errno_of(host, m.Launch(1, 1, "reduction", good, "nowhere"), m.Finished) == "EINVAL"
    assert await errno_of(host, m.Launch(9, 1, "reduction", good), m.Finished) == "EBADF"
    for raw in (b"", b"\xc1", msgspec.msgpack.encode([1]), msgspec.msgpack.encode({1: 2}), good[:-1]):
        assert await errno_of(host, m.Launch(1, 1, "reduction", raw), m.Finished) == "EINVAL"
    assert (await host.figures())["jobs_running"] == 0


async def names_the_fault_address(host: ScriptedHost, device: Model) -> None:
    """A job that touches nothing ends with the address; the next one runs."""
    finished = await host.launch("reduction", a=0x5000_0000, n=1)
    assert finished.fault_address == 0x5000_0000
    await runs_jobs_after(host)


async def runs_jobs_after(host: ScriptedHost) -> None:
    """The device is usable."""
    at = host.mmap(PAGE + 4096, 1)
    assert results_of(await host.launch("reduction", a=at, n=512)) == {"sum": 0}


async def refuses_unknown_commands(host: ScriptedHost, device: Model) -> None:
    """A command that the model does not have is an errno."""
    assert await errno_of(host, m.Ioctl(1, "no_such_command", 0, 1), m.IoctlDone) in {"EINVAL", "EOPNOTSUPP"}


async def refuses_ranges_that_are_none(host: ScriptedHost, device: Model) -> None:
    """Unaligned, empty, or beyond the address space: EINVAL."""
    for command in ("migrate_to_dev", "migrate_to_sys"):
        for address, pages in ((1, 1), (0, 0), ((PAGES_MAX - 1) * PAGE_SIZE, 2)):
            assert await errno_of(host, m.Ioctl(1, command, address, pages), m.IoctlDone) == "EINVAL"


async def reports_figures(host: ScriptedHost, device: Model) -> None:
    """All that `Report` promises."""
    figures = await host.figures()
    assert set(figures) >= FIGURES
    assert figures["name"] == host.spec["name"]
    assert figures["pages"] == device.memory.pages


async def adopts_the_clock(host: ScriptedHost, device: Model) -> None:
    """Emulated time goes on as the host says."""
    host.clock.adopt(host.clock.epoch_monotonic_s, 1e6, 2.0)
    host.session.note(m.Rate(host.clock.epoch_monotonic_s, 1e6, 2.0))
    assert (await host.figures())["emulated_s"] >= 1e6


async def runs_when_memory_is_full(host: ScriptedHost, device: Model) -> None:
    """More data than frames: what does not fit is used where it is."""
    pages = device.memory.pages + 32
    at = host.mmap(PAGE, pages)
    await host.cpu_write(at, np.ones(pages * 512, dtype="<i8").tobytes())
    assert await prefetch(host, PAGE, pages) <= device.memory.pages
    assert results_of(await host.launch("reduction", a=at, n=pages * 512)) == {"sum": pages * 512}


async def survives_a_soak(host: ScriptedHost, device: Model) -> None:
    """Hundreds of operations in random order: every byte is where it should be. The seed is fixed; change it to look further."""
    chance = random.Random(20)  # noqa: S311 - chance, not secrecy
    pages = 24
    at = host.mmap(PAGE, pages)
    expected = bytearray(pages * PAGE_SIZE)
    for step in range(200):
        first = chance.randrange(pages)
        count = chance.randint(1, pages - first)
        action = chance.choice(("prefetch", "home", "write", "read", "invalidate", "sum", "pin"))
        if action == "prefetch":
            await prefetch(host, PAGE + first, count)
        elif action == "home":
            await send_home(host, PAGE + first, count)
        elif action == "write":
            place, data = first * PAGE_SIZE + chance.randrange(4000), chance.randbytes(chance.randint(1, 90))
            expected[place : place + len(data)] = data
            await host.cpu_write(at + place, data)
        elif action == "read":
            place = first * PAGE_SIZE
            assert await host.cpu_read(at + place, 64) == bytes(expected[place : place + 64]), f"step {step}"
        elif action == "invalidate":
            async with host.invalidated(PAGE + first, PAGE + first + count, "soft_dirty"):
                await trio.lowlevel.checkpoint()
        elif action == "sum":
            placement = chance.choice(("demand", "remote"))
            finished = await host.launch("reduction", placement, a=at + first * PAGE_SIZE, n=count * 512, dtype="<u8")
            view = np.frombuffer(expected, "<u8")[first * 512 : (first + count) * 512]
            assert results_of(finished) == {"sum": int(view.sum(dtype=np.uint64))}, f"step {step}"
        else:
            host.pinned = {PAGE + chance.randrange(pages)}
    same(await host.cpu_read(at, len(expected)), bytes(expected))


CHECKS: tuple[Check, ...] = (
    keeps_data_there_and_back,
    zeroes_what_was_used,
    gives_single_pages_back,
    drops_what_is_invalidated,
    drops_at_once,
    answers_when_its_dma_is_over,
    closes_when_its_dma_is_over,
    lets_go_when_its_lease_is_over,
    drops_before_it_copies_out,
    survives_late_and_unknown_invalidations,
    takes_a_sequence_that_it_was_not_told,
    refuses_bad_copies,
    answers_a_copy_without_a_stream,
    says_how_its_copies_go_on,
    ignores_bad_frees,
    counts_contexts,
    runs_jobs,
    refuses_bad_launches,
    names_the_fault_address,
    refuses_unknown_commands,
    refuses_ranges_that_are_none,
    reports_figures,
    adopts_the_clock,
    runs_when_memory_is_full,
    survives_a_soak,
    *JOB_CHECKS,
)


class DeviceContract:
    """Inherit from it, say which `model`, and pytest plays every check against it."""

    model: ClassVar[str | type] = ""
    """The model's name, or its class."""
    memory_bytes: ClassVar[int] = 800 << 12
    """Its memory: the checks fill it, and need 700 pages."""
    spec: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """More of its entry in a topology (``kind``, ``atomics``). Not ``fault_capable``: the checks are for devices whose jobs can fault."""

    @pytest.fixture
    def hmmnet_seed(self, request: pytest.FixtureRequest) -> int:
        """The test's seed; here too, so that the contract holds where the plugin is left out."""
        return int(getattr(request, "param", 0) or request.config.getoption("hmmnet_seed", None) or 0)

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_contract(self, check: Check, hmmnet_seed: int) -> None:
        """What every device must do."""
        assert self.model, f'{type(self).__name__}: say which model, such as: model = "mine"'
        play(check, self.model, hmmnet_seed, memory_bytes=self.memory_bytes, **self.spec)
