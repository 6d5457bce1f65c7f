"""A remote machine against the host's own call handling, over a memory transport: pieces, errors and handles travel as they are."""

from __future__ import annotations

import errno
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trio

from hmmnet.client import RemoteMachine, remote_machine
from hmmnet.errors import BusError, KernelError, PeerGone, PeerLost, PeerRefused, RemoteError
from hmmnet.host.calls import new_client
from hmmnet.program import PM_PRESENT, Handle, IoctlResult, JobResult, Machine, Mapping, PageReferences, Process, Residency
from hmmnet.remote import CHUNK_BYTES
from hmmnet.wire.memory_transport import MemoryTransport
from hmmnet.wire.messages import Call, Hello, Recall, Refused, Welcome
from hmmnet.wire.server import Server
from hmmnet.wire.session import Session
from tests.logged_calls import LoggedCalls, PlainFile

SECRET = bytes(32)
BASE = 0x1000
PLACE = "mem://clients"


class EchoHandle:
    """A device that gives back what it is given, behind a word that says how much that was."""

    device = "dm0"
    number = 3

    def __init__(self) -> None:
        self.closed = False

    async def ioctl(self, command: str, address: int, pages: int, data: bytes = b"", flags: int = 0) -> IoctlResult:
        if command != "read":
            raise KernelError(errno.ENOTTY, "ioctl", f"no command {command}")
        return IoctlResult(pages, flags, data[::-1])

    async def close(self) -> None:
        self.closed = True


class PlainProcess(LoggedCalls):
    """A process with one area of memory."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self.memory = bytearray(5 * CHUNK_BYTES)
        self.handle = EchoHandle()

    async def munmap(self, address: int, length: int) -> None:
        raise KernelError(errno.EINVAL, "munmap", f"0x{address:x} is no page's address")

    async def malloc(self, length: int) -> int:
        return BASE + 64

    async def read(self, address: int, length: int) -> bytes:
        if address + length > BASE + len(self.memory):
            raise BusError(address, "the page was on gpu1, which was killed by SIGKILL")
        await trio.lowlevel.checkpoint()
        return bytes(self.memory[address - BASE : address - BASE + length])

    async def write(self, address: int, data: bytes | bytearray | memoryview | npt.NDArray[Any]) -> None:
        self.memory[address - BASE : address - BASE + len(data)] = data

    async def load(self, address: int, dtype: str = "<u8") -> int | float:
        raise AssertionError("loads are made of reads")

    async def store(self, address: int, value: float, dtype: str = "<u8") -> None:
        raise AssertionError("stores are made of writes")

    async def read_array(self, address: int, dtype: str, count: int) -> npt.NDArray[Any]:
        raise AssertionError("arrays are made of reads")

    async def pagemap(self, address: int, pages: int) -> bytes:
        return bytes([ord("P")]) * pages

    async def residency(self, address: int, pages: int) -> Residency:
        """Piece by piece the owners come in another order."""
        where = np.arange(pages, dtype=np.int16) % 3 - 1
        names = ("host", "gpu0") if address == BASE else ("gpu0", "host")
        return Residency(names, where)

    async def open(self, device: str) -> Handle:
        self.handles[3] = self.handle
        return self.handle

    async def launch(self, kernel: str, device: str, placement: str = "demand", **arguments: Any) -> JobResult:
        if kernel == "endless":
            self.log.append("begun")
            try:
                await trio.sleep_forever()
            finally:
                self.log.append("ended")
        if kernel == "fatal":
            raise PeerGone(f'device "{device}" killed by SIGKILL')
        if kernel == "cut":
            raise PeerLost(f'device "{device}" was silent for 2.1 s')
        return JobResult({"kernel": kernel, **arguments}, {"device": device, "placement": placement})

    async def migrate(self, address: int, length: int, to: str) -> int:
        return length // 2


class PlainMachine:
    """A machine of plain processes."""

    device_names = ("gpu0", "gpu1")

    def __init__(self) -> None:
        self.processes: list[PlainProcess] = []
        self.nodes: list[str] = []
        self.memberships: list[str] = []
        self.cgroups: dict[str, int | None] = {}
        self.asked: list[tuple[str, str]] = []

    def emulated_s(self) -> float:
        return 0.0

    async def create_process(self, node: str = "", cgroup: str = "") -> Process:
        self.processes.append(PlainProcess(100 * (1 + len(self.processes))))
        self.nodes.append(node)
        self.memberships.append(cgroup)
        return self.processes[-1]

    async def oom_kill(self, cgroup: str = "") -> int:
        self.asked.append(("oom_kill", cgroup))
        return 7

    async def unplug(self, device: str) -> None:
        self.asked.append(("unplug", device))

    async def create_cgroup(self, name: str, limit_bytes: int | None = None) -> None:
        self.cgroups[name] = limit_bytes

    async def report(self) -> dict[str, Any]:
        return {"links": {"pcie0": {"kept_up": True}}}

    async def check(self) -> dict[str, Any]:
        return {"complaints": [], "pages": 3}


def welcome(hello: Hello) -> Welcome | Refused:
    return Welcome(hello.version, 1, -1, [], "", "", b"", "", time.monotonic(), 5.0, 0.5, 2.0, b"")


@asynccontextmanager
async def world() -> AsyncIterator[tuple[RemoteMachine, PlainMachine]]:
    machine = PlainMachine()
    transport = MemoryTransport()

    def joined(session: Session, hello: Hello) -> None:
        client = new_client(machine)
        session.on(Call, client.call)
        session.on(Recall, client.recall)

    async with trio.open_nursery() as nursery:
        server = Server(transport.listen(PLACE), SECRET, welcome, joined)
        await nursery.start(server.run)
        async with remote_machine(PLACE, SECRET, "default", transport) as remote:
            yield remote, machine
        nursery.cancel_scope.cancel()


def test_remote_and_blocking_classes_fill_the_interfaces() -> None:
    """What a workload calls is there, with the same names."""
    from hmmnet.blocking import BlockingHandle, BlockingMachine, BlockingProcess, BlockingReferences
    from hmmnet.remote import RemoteHandle, RemoteProcess, RemoteReferences

    for interface, classes in (
        (Process, (RemoteProcess, BlockingProcess)),
        (Handle, (RemoteHandle, BlockingHandle)),
        (PageReferences, (RemoteReferences, BlockingReferences)),
        (Machine, (RemoteMachine,)),
    ):
        wanted = {name for name, value in vars(interface).items() if callable(value) and not name.startswith("_")}
        for kind in classes:
            assert wanted <= set(dir(kind)), kind
    assert {"check", "device_names", "emulated_s", "process", "report"} <= set(dir(BlockingMachine))


async def test_machine_operations() -> None:
    """Names, report, clock, processes."""
    async with world() as (remote, machine):
        assert remote.device_names == ("gpu0", "gpu1")
        assert (await remote.report())["links"]["pcie0"]["kept_up"] is True
        assert await remote.check() == {"complaints": [], "pages": 3}
        assert 5.0 <= remote.emulated_s() < 35.0
        assert (await remote.create_process()).pid == 100
        assert (await remote.process(node="node1")).pid == 200
        await remote.create_cgroup("small", 4096)
        await remote.create_process(cgroup="small")
        assert (machine.nodes, machine.memberships, machine.cgroups) == (["", "node1", ""], ["", "", "small"], {"small": 4096})
        assert isinstance(remote, Machine)


async def test_memory_larger_than_a_call_goes_in_pieces() -> None:
    """Reads and writes of any length and alignment."""
    async with world() as (remote, machine):
        process = await remote.create_process()
        data = np.random.default_rng(1).integers(0, 255, 3 * CHUNK_BYTES + 77, dtype=np.uint8)
        await process.write(BASE + 5, data)
        assert await process.read(BASE + 5, len(data)) == data.tobytes()
        assert machine.processes[0].memory[5 : 5 + len(data)] == data.tobytes()
        assert await process.read(BASE, 0) == b""


async def test_values_and_arrays() -> None:
    """Loads and stores of one value and of many."""
    async with world() as (remote, _):
        process = await remote.create_process()
        await process.store(BASE, (1 << 64) - 1)
        await process.store(BASE + 8, -1.5, "<f8")
        assert await process.load(BASE) == (1 << 64) - 1
        assert await process.load(BASE + 8, "<f8") == -1.5
        await process.write(BASE, np.arange(1000, dtype="<i4"))
        values = await process.read_array(BASE, "<i4", 1000)
        assert values.tolist() == list(range(1000))
        values[0] = 7  # a copy of one's own, to be written to


@pytest.mark.parametrize("dtype", ["fish", "O", "V0"])
async def test_types_that_there_are_not_are_the_same_mistake_in_every_call(dtype: str) -> None:
    """EINVAL, as inside the host; nothing is sent."""
    async with world() as (remote, _):
        process = await remote.create_process()
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "load": lambda: process.load(BASE, dtype),
            "read_array": lambda: process.read_array(BASE, dtype, 3),
            "store": lambda: process.store(BASE, object(), dtype),  # type: ignore[arg-type]
        }
        for call, ask in calls.items():
            with pytest.raises(KernelError, match="EINVAL") as caught:
                await ask()
            assert caught.value.call == call
        with pytest.raises(KernelError, match="read_array: EINVAL: count is None"):
            await process.read_array(BASE, "<u8", None)  # type: ignore[arg-type]


async def test_a_process_ends_once() -> None:
    """Whichever way it ended, to end it again does nothing: also beside a first call, after one that was cancelled, and without a host."""
    async with world() as (remote, machine):
        for first, second in itertools.product(("exit", "kill"), repeat=2):
            process = await remote.create_process()
            await getattr(process, first)()
            await getattr(process, second)()
            await process.exit()
            assert len(machine.processes[-1].log) == 1
        process = await remote.create_process()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(process.exit)
        process = await remote.create_process()
        with trio.CancelScope() as scope:
            scope.cancel()
            await process.exit()
        assert scope.cancelled_caught
        await process.exit()
    await process.exit()


async def test_system_calls_with_their_arguments_and_errors() -> None:
    """Arguments arrive as given; a kernel error arrives as itself."""
    async with world() as (remote, machine):
        process = await remote.create_process()
        assert await process.mmap(4096, "r", 0x7000, populate=True) == 0x1000
        await process.mprotect(BASE, 4096, "none")
        await process.madvise(BASE, 4096, "DONTNEED")
        await process.mlock(BASE, 4096)
        await process.munlock(BASE, 4096)
        assert await process.mremap(BASE, 4096, 8192, may_move=False) == 0x2000
        assert await process.malloc(10) == BASE + 64
        assert await process.migrate(BASE, 4096, "gpu1") == 2048
        assert machine.processes[0].log == [
            ("mmap", 4096, "r", 0x7000, True, False, None, 0, False),
            ("mprotect", BASE, 4096, "none"),
            ("madvise", BASE, 4096, "DONTNEED"),
            ("mlock", BASE, 4096),
            ("munlock", BASE, 4096),
            ("mremap", BASE, 4096, 8192, None, False, False),
        ]
        with pytest.raises(KernelError) as caught:
            await process.munmap(3, 4096)
        assert (caught.value.name, caught.value.call) == ("EINVAL", "munmap")


async def test_files_over_a_session() -> None:
    """Long reads and writes go in chunks; the size is known here; a closed file, or another machine's, is EBADF."""
    async with world() as (remote, machine):
        process = await remote.create_process()
        file = await process.memfd_create(10)
        data = np.arange(CHUNK_BYTES // 2, dtype="<u4")
        await file.write(8, data)
        assert file.size == 8 + data.nbytes
        assert await file.read(8, 1 << 40) == data.tobytes()
        await file.punch(0, 4)
        await process.mmap(4096, "r", shared=True, file=file)
        *_, (_, _, _, _, _, shared, opened, _, _) = machine.processes[0].log
        assert shared
        assert isinstance(opened, PlainFile)
        assert opened.holes == [(0, 4)]
        for use, name in (
            (process.memfd_create(-1), "EINVAL"),
            (file.read(-1, 1), "EINVAL"),
            (file.read(0, 1 << 60), "EFBIG"),
            (file.write(-1, b"x"), "EINVAL"),
            (file.write(1 << 47, b"x"), "EFBIG"),
            (file.punch(0, -1), "EINVAL"),
            (file.truncate(1 << 60), "EFBIG"),
            (process.mmap(4096, file=file, offset=-4096), "EINVAL"),
        ):
            with pytest.raises(KernelError, match=name):
                await use
        await file.truncate(5)
        assert (file.size, opened.size) == (5, 5)
        await file.close()
        await file.close()
        assert opened.closed
        for use in (file.read(0, 1), process.mmap(4096, file=file), process.mmap(4096, file=opened)):
            with pytest.raises(KernelError, match="EBADF"):
                await use


async def test_a_device_is_mapped_like_a_file() -> None:
    """mmap of an open handle reaches the process with its own handle."""
    async with world() as (remote, machine):
        process = await remote.create_process()
        handle = await process.open("gpu0")
        await process.mmap(4096, shared=True, file=handle)
        assert machine.processes[0].log[-1] == ("mmap", 4096, "rw", None, False, True, machine.processes[0].handle, 0, False)


async def test_signals_arrive_as_signals() -> None:
    """An access to lost data is a BusError with its address and cause."""
    async with world() as (remote, _):
        process = await remote.create_process()
        end = BASE + 5 * CHUNK_BYTES
        with pytest.raises(BusError, match="killed by SIGKILL") as caught:
            await process.read(end - 10, 20)
        assert caught.value.address == end - 10


async def test_a_device_that_dies_is_lost_to_a_client_as_it_is_inside_the_host() -> None:
    """The same program, the same exception: whether the device is certainly dead, too. The host itself is well."""
    async with world() as (remote, _):
        process = await remote.create_process()
        with pytest.raises(PeerGone, match=r'^device "gpu0" killed by SIGKILL$'):
            await process.launch("fatal", "gpu0")
        with pytest.raises(PeerLost, match=r'^device "gpu0" was silent for 2.1 s$') as caught:
            await process.launch("cut", "gpu0")
        assert not isinstance(caught.value, PeerGone)
        assert (await process.launch("k", "gpu0")).results == {"kernel": "k"}


async def test_residency_joins_pieces_with_owners_in_any_order() -> None:
    """One list of owners, indices into it, and the markers below zero untouched."""
    async with world() as (remote, _):
        process = await remote.create_process()
        pages = CHUNK_BYTES // 2 + 10
        found = await process.residency(BASE, pages)
        assert found.owners == ("host", "gpu0")
        assert found.pages[:3].tolist() == [-1, 0, 1]
        assert found.pages[CHUNK_BYTES // 2 :].tolist()[:3] == [-1, 1, 0]
        assert len(found.pages) == pages
        assert await process.pagemap(BASE, pages) == b"P" * pages


async def test_what_proc_shows() -> None:
    """Words in pieces, put together; mappings with all their fields; what is forgotten; a killed process is gone."""
    async with world() as (remote, machine):
        process = await remote.create_process()
        pages = CHUNK_BYTES // 8 + 5
        words = await process.pagemap_words(BASE, pages)
        assert words.tolist() == [(BASE >> 12) + i | PM_PRESENT for i in range(pages)]
        assert await process.smaps() == [Mapping(0x1000, 0x3000, "rw-p", 8192, 4096, 0, 0, 0, 0)]
        await process.clear_refs()
        await process.clear_refs(soft_dirty=False)
        assert await process.oom_score() == 666
        await process.set_oom_score_adj(-500)
        assert machine.processes[0].log[-1] == ("oom_score_adj", -500)
        await process.kill(out_of_memory=True)
        assert machine.processes[0].log[-4:] == [
            ("clear_refs", True),
            ("clear_refs", False),
            ("oom_score_adj", -500),
            ("kill", True),
        ]
        with pytest.raises(KernelError, match="ESRCH"):
            await process.smaps()


async def test_jobs_and_device_commands() -> None:
    """A job's results and counters; a command's data longer than a call, both ways."""
    async with world() as (remote, machine):
        process = await remote.create_process()
        done = await process.launch("vector_add", "gpu0", "remote", a=1, n=2)
        assert done.results == {"kernel": "vector_add", "a": 1, "n": 2}
        assert done.counters == {"device": "gpu0", "placement": "remote"}
        handle = await process.open("dm0")
        data = np.random.default_rng(2).integers(0, 255, 2 * CHUNK_BYTES + 4096, dtype=np.uint8).tobytes()
        result = await handle.ioctl("read", BASE, len(data) // 4096, data, flags=3)
        assert result == IoctlResult(len(data) // 4096, 3, data[::-1])
        assert (await handle.ioctl("read", BASE, 0)).data == b""
        with pytest.raises(KernelError, match="ENOTTY"):
            await handle.ioctl("fly", BASE, 1)
        await handle.close()
        assert machine.processes[0].handle.closed
        await process.exit()
        with pytest.raises(KernelError, match="ESRCH"):
            await process.malloc(1)


async def test_a_child_and_held_pages() -> None:
    """A child has its parent's handles, each on its own; pages are held until they are put."""
    async with world() as (remote, machine):
        process = await remote.create_process()
        handle = await process.open("dm0")
        child = await process.fork()
        assert child.pid == process.pid + 1
        assert {number: found.device for number, found in child.handles.items()} == {handle.number: "dm0"}
        await child.handles[handle.number].close()
        assert not child.handles
        assert list(process.handles) == [handle.number]
        held = await process.get_user_pages(BASE, 2, write=True, longterm=True)
        assert await held.read(held.count) == bytes([0, 1]) * 4096
        await held.put()
        await held.put()
        assert machine.processes[0].log[-2:] == [("get_user_pages", BASE, 2, True, False, True), "put"]
        await process.exit()
        assert not process.handles


async def test_missing_pages_over_a_session() -> None:
    """The address of a page that somebody wants, and its bytes back; a registration that was closed is not known any more."""
    async with world() as (remote, machine):
        process = await remote.create_process()
        faults = await process.userfaultfd(BASE, 4096)
        assert await faults.read() == 0x5000
        await faults.copy(0x5000, bytes(4096))
        await faults.close()
        await faults.close()
        with pytest.raises(KernelError, match="EBADF"):
            await faults.read()
        assert machine.processes[0].log == [("userfaultfd", BASE, 4096, False), ("copy", 0x5000, bytes(4096)), "closed"]


async def test_a_cancelled_job_ends_at_the_host() -> None:
    """The client's task stops waiting at once, and the host's, which waits for the device, right after."""
    async with world() as (remote, machine):
        process = await remote.create_process()
        for begun in (True, False):
            with trio.fail_after(5), trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(process.launch, "endless", "gpu0")
                    while begun and machine.processes[0].log[-1:] != ["begun"]:
                        await trio.sleep(0.001)
                    scope.cancel()
            with trio.fail_after(5):
                while machine.processes[0].log[-1] != "ended":
                    await trio.sleep(0.001)
        assert (await process.launch("k", "gpu0")).results == {"kernel": "k"}


async def test_what_a_cancelled_call_has_made_is_unmade() -> None:
    """The answer finds nobody: the child, the file, the handle and the pages that it tells of go away again."""
    async with world() as (remote, machine):
        process = await remote.create_process()
        plain = machine.processes[0]
        with trio.fail_after(5):
            for make in (remote.create_process, process.fork, partial(process.open, "dm0"), partial(process.memfd_create, 8)):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await make()
                assert scope.cancelled_caught
            with trio.CancelScope() as scope:
                scope.cancel()
                await process.get_user_pages(BASE, 2)
            while plain.log[-1:] != ["put"] or not plain.handle.closed:
                await trio.sleep(0.001)
        assert machine.processes[1].log == ["exit"]
        assert [child.log for child in plain.children] == [["exit"]]
        assert [file.closed for file in plain.files] == [True]


async def test_a_cancelled_write_counts_when_it_has_come() -> None:
    """The host carries it out all the same, and says how long the file is then; a closed file has no length."""
    async with world() as (remote, _):
        process = await remote.create_process()
        file = await process.memfd_create(0)
        with trio.CancelScope() as scope:
            scope.cancel()
            await file.write(0, b"12345")
        with trio.fail_after(5):
            while file.size == 0:
                await trio.sleep(0.001)
        assert (file.size, await file.read(0, 100)) == (5, b"12345")
        with trio.CancelScope() as scope:
            scope.cancel()
            await file.truncate(2)
        with trio.fail_after(5):
            while file.size != 2:
                await trio.sleep(0.001)
        assert await file.read(0, 100) == b"12"
        await file.close()
        with pytest.raises(KernelError, match="EBADF"):
            _ = file.size


async def test_what_the_host_cannot_make_sense_of_is_its_refusal() -> None:
    """An argument that no struct takes ends in RemoteError, and the session lives on."""
    async with world() as (remote, _):
        process = await remote.create_process()
        with pytest.raises(RemoteError, match="length"):
            await process.malloc(-1)
        assert await process.malloc(1) == BASE + 64


async def test_a_wrong_secret_is_refused() -> None:
    """With the host's reason."""
    async with world() as (_, machine):
        transport = MemoryTransport()

        def joined(session: Session, hello: Hello) -> None:
            session.on(Call, new_client(machine).call)

        async with trio.open_nursery() as nursery:
            await nursery.start(Server(transport.listen(PLACE), bytes([1] * 32), welcome, joined).run)
            with pytest.raises(PeerRefused, match="secret"):
                async with remote_machine(PLACE, SECRET, "default", transport):
                    pytest.fail("a wrong secret was welcomed")
            nursery.cancel_scope.cancel()
