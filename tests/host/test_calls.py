"""What programs in other processes may call: every operation reaches the process, everything malformed is refused here."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import trio
import trio.testing

from hmmnet.errors import HmmnetError, KernelError, ProtocolError
from hmmnet.faults.kinds import Fault
from hmmnet.host import calls
from hmmnet.host.arguments import CHUNK_BYTES, STAGED_BYTES_MAX
from hmmnet.host.calls import new_client, operation_names
from hmmnet.host.clients import FILES_MAX, HANDLES_MAX, PROCESSES_MAX, Client
from hmmnet.program import IoctlResult, JobResult, Residency
from hmmnet.wire.messages import Call, Recall
from tests.host.scripted_device import running_host
from tests.logged_calls import LoggedCalls, PlainFile

pytestmark = pytest.mark.virtual_time


class RecordingHandle:
    device = "gpu0"
    number = 3

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    async def ioctl(self, command: str, address: int, pages: int, data: bytes = b"", flags: int = 0) -> IoctlResult:
        self.log.append(("ioctl", command, address, pages, len(data), flags))
        return IoctlResult(pages, 1, bytes(pages * 4096))

    async def close(self) -> None:
        self.log.append("close")


class RecordingProcess(LoggedCalls):
    """Notes what it is asked; answers something recognisable."""

    async def munmap(self, address: int, length: int) -> None:
        self.log.append(("munmap", address, length))

    async def malloc(self, length: int) -> int:
        return length

    async def read(self, address: int, length: int) -> bytes:
        return bytes([7]) * length

    async def write(self, address: int, data: bytes | bytearray | memoryview | npt.NDArray[Any]) -> None:
        self.log.append(("write", address, bytes(data)))

    async def load(self, address: int, dtype: str = "<u8") -> int:
        return 0

    async def store(self, address: int, value: float, dtype: str = "<u8") -> None:
        return None

    async def read_array(self, address: int, dtype: str, count: int) -> npt.NDArray[Any]:
        return np.zeros(count)

    async def pagemap(self, address: int, pages: int) -> bytes:
        return b"P" * pages

    async def residency(self, address: int, pages: int) -> Residency:
        return Residency(("host", "gpu0"), np.array([0, 1, -2], dtype=np.int16))

    async def open(self, device: str) -> RecordingHandle:
        handle = self.handles[3] = RecordingHandle(self.log)
        return handle

    async def launch(self, kernel: str, device: str, placement: str = "demand", **arguments: Any) -> JobResult:
        if kernel == "endless":
            try:
                await trio.sleep_forever()
            finally:
                self.log.append("ended")
        self.log.append((kernel, device, placement, arguments))
        return JobResult({"sum": 1}, {"faults": 2})

    async def migrate(self, address: int, length: int, to: str) -> int:
        return length


class RecordingMachine:
    device_names = ("gpu0", "gpu1")

    def __init__(self) -> None:
        self.processes: list[RecordingProcess] = []
        self.cgroups: dict[str, int | None] = {}
        self.asked: list[tuple[str, str]] = []

    def emulated_s(self) -> float:
        return 0.0

    async def create_process(self, node: str = "", cgroup: str = "") -> RecordingProcess:
        self.processes.append(RecordingProcess(len(self.processes) + 1))
        return self.processes[-1]

    async def oom_kill(self, cgroup: str = "") -> int:
        self.asked.append(("oom_kill", cgroup))
        return 7

    async def unplug(self, device: str) -> None:
        self.asked.append(("unplug", device))

    async def create_cgroup(self, name: str, limit_bytes: int | None = None) -> None:
        self.cgroups[name] = limit_bytes

    async def report(self) -> dict[str, Any]:
        return {"links": []}

    async def check(self) -> dict[str, Any]:
        return {"complaints": [], "pages": 3}


async def call(client: Client, operation: str, data: bytes = b"", **arguments: Any) -> tuple[Any, bytes]:
    result = await client.call(Call(operation, msgspec.msgpack.encode(arguments), data))
    return msgspec.msgpack.decode(result.value), result.data


@pytest.fixture
async def client() -> Client:
    """A client with process 1."""
    client = new_client(RecordingMachine())
    assert await call(client, "create_process") == (1, b"")
    return client


def log_of(client: Client) -> list[Any]:
    process = client.processes[1]
    assert isinstance(process, RecordingProcess)
    return process.log


async def test_every_operation_of_a_program_is_served(client: Client) -> None:
    """The names are those of the message's docstring."""
    text = Call.__doc__ or ""
    assert all(f"``{name}``" in text for name in operation_names())


async def test_operations_reach_the_process(client: Client) -> None:
    """Arguments arrive as given; values and data come back."""
    assert await call(client, "devices") == (["gpu0", "gpu1"], b"")
    assert await call(client, "report") == ({"links": []}, b"")
    assert await call(client, "check") == ({"complaints": [], "pages": 3}, b"")
    assert await call(client, "mmap", process=1, length=8192) == (0x1000, b"")
    await call(client, "mprotect", process=1, address=4096, length=1, protection="r")
    await call(client, "write", b"abc", process=1, address=5)
    assert await call(client, "read", process=1, address=0, length=3) == (None, b"\7\7\7")
    assert await call(client, "pagemap", process=1, address=0, pages=2) == (None, b"PP")
    owners, raw = await call(client, "residency", process=1, address=0, pages=3)
    assert (owners, np.frombuffer(raw, "<i2").tolist()) == (["host", "gpu0"], [0, 1, -2])
    assert await call(client, "migrate", process=1, address=0, length=5, to="gpu0") == (5, b"")
    done, _ = await call(client, "launch", process=1, kernel="k", device="gpu0", arguments={"n": 3})
    assert done == {"results": {"sum": 1}, "counters": {"faults": 2}}
    assert log_of(client) == [
        ("mmap", 8192, "rw", None, False, False, None, 0, False),
        ("mprotect", 4096, 1, "r"),
        ("write", 5, b"abc"),
        ("k", "gpu0", "demand", {"n": 3}),
    ]


async def test_files(client: Client) -> None:
    """Numbers of the client's own, that mmap takes; unknown and closed ones are EBADF, and too many EMFILE."""
    number, _ = await call(client, "memfd_create", process=1, length=8)
    assert await call(client, "file_write", b"abc", file=number, offset=6) == (9, b"")
    assert await call(client, "file_read", file=number, offset=5, length=10) == (None, b"\0abc")
    await call(client, "file_truncate", file=number, length=4)
    await call(client, "file_punch", file=number, offset=1, length=2)
    await call(client, "mmap", process=1, length=4096, shared=True, file=number, offset=4096)
    file = client.files[number]
    assert isinstance(file, PlainFile)
    assert (file.size, file.holes) == (4, [(1, 2)])
    assert log_of(client) == [("mmap", 4096, "rw", None, False, True, file, 4096, False)]
    client.files.update(dict.fromkeys(range(10, 9 + FILES_MAX), file))
    with pytest.raises(KernelError, match="EMFILE"):
        await call(client, "memfd_create", process=1, length=1)
    await call(client, "file_close", file=number)
    assert file.closed
    for use in (call(client, "file_close", file=number), call(client, "file_read", file=number, offset=0, length=1)):
        with pytest.raises(KernelError, match="EBADF"):
            await use
    await client.gone()
    assert not client.files


async def test_a_child_has_the_handles_of_its_parent(client: Client) -> None:
    """Under the same numbers, and within the client's limits."""
    handle, _ = await call(client, "open", process=1, device="gpu0")
    assert await call(client, "fork", process=1) == ({"process": 2, "handles": {handle: "gpu0"}}, b"")
    done, _ = await call(client, "ioctl", process=2, handle=handle, command="write", address=0, pages=1)
    assert done["cpages"] == 1
    await call(client, "exit", process=2)
    with pytest.raises(KernelError, match="EBADF"):
        await call(client, "close", process=2, handle=handle)
    client.handles.update({(9, number): client.handles[1, handle] for number in range(HANDLES_MAX - 1)})
    with pytest.raises(KernelError, match="EMFILE"):
        await call(client, "fork", process=1)


async def test_pages_are_held_until_put_or_the_client_is_gone(client: Client) -> None:
    """References have numbers of their own; what was not let go is, at the latest, when the client goes."""
    where: dict[str, Any] = {"process": 1, "address": 4096, "pages": 2}
    held, _ = await call(client, "get_user_pages", pin=True, **where)
    assert held["count"] == 2
    assert (await call(client, "read_pages", process=1, reference=held["reference"], first=1, pages=1))[1] == b"\1" * 4096
    await call(client, "put_pages", process=1, reference=held["reference"])
    with pytest.raises(KernelError, match="EINVAL"):
        await call(client, "put_pages", process=1, reference=held["reference"])
    await call(client, "get_user_pages", **where)
    log = log_of(client)
    await client.gone()
    gup = ("get_user_pages", 4096, 2, False)
    assert log == [(*gup, True, False), "put", (*gup, False, False), "put", "exit"]


async def test_long_ioctl_data_go_in_stages_and_come_in_fetches(client: Client) -> None:
    """What was staged comes first, the call's own data last; the result is fetched chunk by chunk."""
    handle, _ = await call(client, "open", process=1, device="gpu0")
    await call(client, "stage", bytes(CHUNK_BYTES), process=1, handle=handle)
    where = {"process": 1, "handle": handle}
    value, first = await call(client, "ioctl", b"xy", command="write", address=0, pages=300, **where)
    assert value == {"cpages": 300, "faults": 1, "length": 300 * 4096}
    assert log_of(client)[0] == ("ioctl", "write", 0, 300, CHUNK_BYTES + 2, 0)
    _, rest = await call(client, "fetch", offset=len(first), **where)
    assert len(first) + len(rest) == 300 * 4096
    await call(client, "close", **where)
    with pytest.raises(KernelError, match="EBADF"):
        await call(client, "close", **where)


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("mmap", {"process": 1}),
        ("mmap", {"process": 1, "length": -1}),
        ("mmap", {"process": 1, "length": 1 << 60}),
        ("mmap", {"process": 1, "length": 1, "surprise": 1}),
        ("mmap", {"process": "one", "length": 1}),
        ("mmap", {"process": 1, "length": 1, "protection": "r" * 1000}),
        ("read", {"process": 1, "address": 0, "length": CHUNK_BYTES + 1}),
        ("pagemap", {"process": 1, "address": 0, "pages": 1 << 30}),
        ("open", {"process": 1, "device": "x" * 100}),
        ("launch", {"process": 1, "kernel": "k", "device": "d", "arguments": {"placement": 1}}),
        ("launch", {"process": 1, "kernel": "k", "device": "d", "arguments": [1]}),
        ("no_such_operation", {}),
        ("__init__", {}),
    ],
)
async def test_calls_that_make_no_sense_are_refused(client: Client, operation: str, arguments: dict[str, Any]) -> None:
    """Each argument has a type and a bound; unknown ones are mistakes."""
    with pytest.raises(ProtocolError):
        await call(client, operation, **arguments)
    assert log_of(client) == []


@pytest.mark.parametrize("raw", [b"", b"\xff", b"\x81", b"\x93\1\2\3", b"\x81\xa7process\xd9\xff"])
async def test_garbage_arguments_are_refused(client: Client, raw: bytes) -> None:
    """Bytes that are no msgpack map."""
    with pytest.raises(ProtocolError, match="arguments of mmap"):
        await client.call(Call("mmap", raw))


async def test_a_client_reaches_only_what_it_made(client: Client) -> None:
    """Pids and handles of others do not exist for it."""
    with pytest.raises(KernelError, match="ESRCH"):
        await call(client, "read", process=2, address=0, length=1)
    with pytest.raises(KernelError, match="EBADF"):
        await call(client, "ioctl", process=1, handle=9, command="read", address=0, pages=1)


async def test_limits(client: Client) -> None:
    """Processes of one client, data piled up on one handle, pages of one command."""
    for _ in range(PROCESSES_MAX - 1):
        await call(client, "create_process")
    with pytest.raises(KernelError, match="EAGAIN"):
        await call(client, "create_process")
    handle, _ = await call(client, "open", process=1, device="gpu0")
    where = {"process": 1, "handle": handle}
    chunk = bytes(CHUNK_BYTES)
    for _ in range(STAGED_BYTES_MAX // CHUNK_BYTES):
        await call(client, "stage", chunk, **where)
    with pytest.raises(KernelError, match="E2BIG"):
        await call(client, "stage", chunk, **where)
    with pytest.raises(KernelError, match="E2BIG"):
        await call(client, "ioctl", command="read", address=0, pages=STAGED_BYTES_MAX // 4096 + 1, **where)


async def test_a_client_that_goes_away_takes_its_processes_along(client: Client) -> None:
    """They exit, as a killed program does; exited ones are left alone."""
    await call(client, "create_process")
    await call(client, "exit", process=2)
    log = log_of(client)
    await client.gone()
    assert log == ["exit"]
    with pytest.raises(KernelError, match="ESRCH"):
        await call(client, "malloc", process=1, length=1)


async def test_calls_end_when_they_are_recalled_and_with_the_client(client: Client) -> None:
    """By the client's number, which no two calls under way share; what is over is over. A call without a number ends with the client."""
    process = client.processes[1]
    assert isinstance(process, RecordingProcess)
    errors: list[int] = []

    async def launch(number: int) -> None:
        arguments = msgspec.msgpack.encode({"process": 1, "kernel": "endless", "device": "gpu0"})
        with pytest.raises(KernelError) as caught:
            await client.call(Call("launch", arguments, b"", number))
        errors.append(caught.value.code)

    client.recall(Recall(7))
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(launch, 7)
            nursery.start_soon(launch, 0)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(ProtocolError, match="call 7 is under way already"):
                client.call(Call("devices", msgspec.msgpack.encode({}), b"", 7))
            client.recall(Recall(0))
            client.recall(Recall(7))
            await trio.testing.wait_all_tasks_blocked()
            assert errors == [errno.EINTR]
            assert process.log == ["ended"]
            await client.gone()
            assert process.log == ["ended", "ended", "exit"]
    assert errors == [errno.EINTR] * 2


@pytest.mark.parametrize("operation", ["fork", "get_user_pages", "exit", "create_process"])
async def test_a_client_that_goes_away_leaves_nothing_of_what_it_waits_for(operation: str) -> None:
    """A call that waits for the address space is dropped with its client: no child stays, no page held, no frame used."""
    async with running_host("gpu0") as (host, _):
        client = new_client(host)
        pid, _ = await call(client, "create_process")
        address, _ = await call(client, "mmap", process=pid, length=4 * 4096)
        await call(client, "write", bytes(4 * 4096), process=pid, address=address)
        await call(client, "get_user_pages", process=pid, address=address, pages=1, pin=True)
        more = {"address": address, "pages": 4, "pin": True} if operation == "get_user_pages" else {}

        async def ask() -> None:
            with suppress(KernelError):
                await call(client, operation, **({} if operation == "create_process" else {"process": pid}), **more)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                async with host.spaces[pid].mmap_lock.write():
                    nursery.start_soon(ask)
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.start_soon(client.gone)
                    await trio.testing.wait_all_tasks_blocked()
        assert (await host.report())["processes"] == 0
        assert sum(node.allocator.used_count for node in host.memory.nodes) == 0


class BreakableMachine(RecordingMachine):
    """One that takes faults."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: dict[int, Fault] = {}

    def add_fault(self, fault: Fault) -> int:
        self.faults[3] = fault
        return 3

    def remove_fault(self, number: int) -> None:
        del self.faults[number]

    def list_faults(self) -> list[dict[str, Any]]:
        return [{"number": number, "fault": fault.kind.name} for number, fault in self.faults.items()]


async def test_a_machine_is_broken_and_mended_over_a_session() -> None:
    """A fault by what makes it; a machine that is no host refuses; what is no fault is refused with every mistake, and nothing begins."""
    machine = BreakableMachine()
    client = new_client(machine)
    assert await call(client, "add_fault", fault={"kind": "alloc.host", "probability": 0.25}) == (3, b"")
    assert machine.faults[3].kind.name == "alloc.host"
    assert await call(client, "list_faults") == ([{"number": 3, "fault": "alloc.host"}], b"")
    await call(client, "remove_fault", fault=3)
    assert await call(client, "list_faults") == ([], b"")
    with pytest.raises(HmmnetError, match="no fault is called"):
        await call(client, "add_fault", fault={"kind": "nonsense"})
    assert machine.faults == {}
    plain = new_client(RecordingMachine())
    with pytest.raises(KernelError, match="EOPNOTSUPP"):
        await call(plain, "add_fault", fault={"kind": "alloc.host"})
    with pytest.raises(KernelError, match="EOPNOTSUPP"):
        await call(plain, "list_faults")


async def test_taking_something_out_of_the_machine(client: Client) -> None:
    """A device by name, a process by the kernel's choice: asked of the machine as given, and answered."""
    machine = client.machine
    assert isinstance(machine, RecordingMachine)
    assert await call(client, "unplug", device="gpu1") == (None, b"")
    assert await call(client, "oom_kill", cgroup="job") == (7, b"")
    assert await call(client, "oom_kill") == (7, b"")
    assert machine.asked == [("unplug", "gpu1"), ("oom_kill", "job"), ("oom_kill", "")]
    assert await call(client, "oom_score", process=1) == (666, b"")
    await call(client, "set_oom_score_adj", process=1, value=-7)
    assert log_of(client) == [("oom_score_adj", -7)]


async def test_registrations_and_held_pages_have_limits(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than a client may have is EMFILE; the process is not asked; what is given back makes room."""
    monkeypatch.setattr(calls, "FAULTS_MAX", 1)
    monkeypatch.setattr(calls, "REFERENCE_SETS_MAX", 1)
    number, _ = await call(client, "userfaultfd", process=1, address=4096, length=4096)
    held, _ = await call(client, "get_user_pages", process=1, address=4096, pages=2)
    asked = len(log_of(client))
    with pytest.raises(KernelError, match="EMFILE"):
        await call(client, "userfaultfd", process=1, address=4096, length=4096)
    with pytest.raises(KernelError, match="EMFILE"):
        await call(client, "get_user_pages", process=1, address=4096, pages=2)
    assert len(log_of(client)) == asked
    await call(client, "fault_close", process=1, faults=number)
    await call(client, "put_pages", process=1, reference=held["reference"])
    await call(client, "userfaultfd", process=1, address=4096, length=4096)
    await call(client, "get_user_pages", process=1, address=4096, pages=2)


async def test_memory_is_unlocked(client: Client) -> None:
    """munlock(2), as given."""
    assert await call(client, "munlock", process=1, address=4096, length=1) == (None, b"")
    assert log_of(client)[-1] == ("munlock", 4096, 1)
