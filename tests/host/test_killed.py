"""``kill -9`` of a real device process in the middle of a migration, over ipc, through shared memory and as messages.

    program ── host (this process) ══ ipc ══ gpu0 (python -m hmmnet.devices)

Oracle: pages in transit are back on the host, untouched; pages whose only copy was on the device are bus errors that name page and device.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from hmmnet.errors import BusError, PeerError
from hmmnet.fabric.arbiter import Flow
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import Source, StreamReport
from hmmnet.host.process import Process
from hmmnet.host.service import Host
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE
from hmmnet.topology import DeviceSpec, LinkSpec, MemoryNode, Topology
from hmmnet.wire.secrets import new_secret, write_secret
from hmmnet.wire.zmq_transport import ZmqTransport

MIB = 1 << 20
AREA = 24 * MIB
READY_S = 20
TOPOLOGY = Topology(
    "killed",
    "",
    (MemoryNode("host", 256 * MIB),),
    (DeviceSpec("gpu0", "gpu", 64 * MIB, node="host"),),
    (),
    (LinkSpec("link", "host", "gpu0", "pcie", 1e13, 1e-9),),
)


@asynccontextmanager
async def machine(scheme: str = "ring") -> AsyncIterator[tuple[Host, int]]:
    """A host with one device process; yields the host and the process's id."""
    with tempfile.TemporaryDirectory(prefix="hm-") as name, ZmqTransport() as transport:
        directory, secret = Path(name), new_secret()
        write_secret(directory / "secret", secret)
        host = Host(TOPOLOGY, transport, directory, secret, EmulatedClock(), "killed", scheme=scheme)
        async with host.running():
            command = [sys.executable, "-m", "hmmnet.devices", "gpu0", host.control_endpoint, "--secret-file", str(directory / "secret")]
            process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
            try:
                with trio.fail_after(READY_S):
                    await host.device_ready("gpu0")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_watch, host, process)
                    yield host, process.pid
                    nursery.cancel_scope.cancel()
            finally:
                process.kill()
                process.wait()


async def _watch(host: Host, process: subprocess.Popen[bytes]) -> None:
    """What a launcher does: tell the host when the process has ended."""
    while process.poll() is None:
        await trio.sleep(0.01)
    host.device_exited("gpu0", f"ended with status {process.returncode}")


async def numbered(process: Process) -> tuple[int, np.ndarray[tuple[int], np.dtype[np.uint64]]]:
    """An area whose every word says where it is."""
    values = np.arange(AREA // 8, dtype=np.uint64)
    address = await process.mmap(AREA)
    await process.write(address, values)
    return address, values


class DeadlySource:
    """Passes a source on, and kills a process when chunk `at` is asked for."""

    def __init__(self, source: Source, pid: int, at: int) -> None:
        self.nbytes = source.nbytes
        self._source = source
        self._pid = pid
        self._at = at

    def chunk(self, offset: int, length: int) -> Any:
        self._kill(offset)
        return self._source.chunk(offset, length)

    def fill(self, offset: int, out: Any) -> None:
        self._kill(offset)
        self._source.fill(offset, out)

    def _kill(self, offset: int) -> None:
        if offset >= self._at * MIB and self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self._pid = 0


def shared_files() -> list[str]:
    """Files without a name that this process holds open."""
    links = list(Path("/proc/self/fd").iterdir())  # one of them is the listing's own, which ends here
    return [str(link.readlink()) for link in links if link.is_symlink() and "memfd" in str(link.readlink())]


@pytest.mark.parametrize("scheme", ["ring", "ipc"])
@pytest.mark.parametrize("chunk", [0, 5, 23])
async def test_killed_in_the_middle_of_a_stream_to_it(chunk: int, scheme: str) -> None:
    """Everything is back on the host, byte for byte, however much had landed; nothing of what was shared is left."""
    before = shared_files()
    async with machine(scheme) as (host, pid):
        assert (await host.report())["devices"]["gpu0"]["bulk"] == ("ring" if scheme == "ring" else "messages")
        process = await host.create_process()
        address, values = await numbered(process)
        sender = host.links[64].sender
        send = sender.send

        async def deadly(stream: int, source: Source, pacer: Flow) -> StreamReport:
            return await send(stream, DeadlySource(source, pid, chunk), pacer)

        sender.send = deadly  # type: ignore[method-assign, assignment]
        with trio.fail_after(READY_S), pytest.raises(PeerError):
            await process.migrate(address, AREA, "gpu0")
        assert np.array_equal(await process.read_array(address, "<u8", AREA // 8), values)
        assert process.space.residency(address, AREA // PAGE_SIZE).owners == ("host",)
        await process.write(address, b"and writable")
        await process.exit()
    assert shared_files() == before


async def test_killed_with_pages_on_it() -> None:
    """What had come home lives; the first page that had not is named."""
    async with machine() as (host, pid):
        process = await host.create_process()
        address, values = await numbered(process)
        assert await process.migrate(address, AREA // 2, "gpu0") == AREA // 2
        assert await process.load(address + 8) == 1
        os.kill(pid, signal.SIGKILL)
        with trio.fail_after(READY_S), pytest.raises(BusError) as caught:
            await process.read(address, AREA)
        assert caught.value.address == address + PAGE_SIZE
        assert f"page 0x{(address >> PAGE_SHIFT) + 1:x}" in str(caught.value)
        assert 'device "gpu0"' in str(caught.value)
        assert await process.load(address) == 0
        half = await process.read_array(address + AREA // 2, "<u8", AREA // 16)
        assert np.array_equal(half, values[AREA // 16 :])
        await process.exit()


async def test_stopped_and_never_continued() -> None:
    """SIGSTOP looks like silence: an access that needs the device ends in SIGBUS when the lease is over, and the machine goes on."""
    async with machine() as (host, pid):
        process = await host.create_process()
        address, _ = await numbered(process)
        await process.migrate(address, PAGE_SIZE, "gpu0")
        os.kill(pid, signal.SIGSTOP)
        with trio.fail_after(READY_S), pytest.raises(BusError, match="silent"):
            await process.read(address, 1)
        assert await process.load(address + PAGE_SIZE) == PAGE_SIZE // 8
        await process.exit()
