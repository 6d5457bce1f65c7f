"""Device processes: they start, serve, and end when they should. Real processes over ipc, against the scripted host."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from hmmnet.devices import service
from hmmnet.devices.service import Settings, run_device, serve, single
from hmmnet.errors import HmmnetError, PeerLost, PeerRefused
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.faults import Injector
from hmmnet.testing.scripted_host import SECRET, ScriptedHost, host_alone, results_of, until
from hmmnet.wire.memory_transport import MemoryTransport
from hmmnet.wire.secrets import write_secret
from hmmnet.wire.zmq_transport import ZmqTransport

ROOT = Path(__file__).resolve().parents[2]
PAGE = 0x10000
END_S = 10.0
"""Bound on every wait; nothing here takes a tenth of it."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: the socket's name must fit into 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="hmm"))
    write_secret(path / "secret", SECRET)
    yield path
    shutil.rmtree(path)


def start(folder: Path, *options: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hmmnet.devices", "gpu0", f"ipc://{folder}/host", "--secret-file", str(folder / "secret")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "--log-folder", str(folder), *options], stdin=stdin, stderr=subprocess.PIPE, env=environment)


def start_launcher(script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})


def lives(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


async def ended(process: subprocess.Popen[bytes]) -> int:
    """Its exit code, within bounds."""
    await until(lambda: process.poll() is not None)
    assert process.stderr is not None
    text = process.stderr.read().decode()
    process.stderr.close()
    if process.stdin is not None:
        process.stdin.close()
    assert "Traceback" not in text
    return process.returncode


@asynccontextmanager
async def running(folder: Path, stdin: int = subprocess.DEVNULL) -> AsyncIterator[tuple[ScriptedHost, subprocess.Popen[bytes]]]:
    """A host here and a device in a process of its own, which is killed if a test leaves it."""
    with ZmqTransport() as transport:
        async with host_alone(transport, f"ipc://{folder}/") as host:
            process = start(folder, stdin=stdin)
            try:
                with trio.fail_after(END_S):
                    await host.joined.wait()
                await host.open()
                yield host, process
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()


async def test_a_job_in_a_device_process(folder: Path) -> None:
    """The whole way over ipc: faults, streams in, streams out; and the goodbye ends the process well."""
    async with running(folder) as (host, process):
        n = 1 << 18
        a = np.arange(n, dtype="<i8")
        at = host.mmap(PAGE, 512)
        await host.cpu_write(at, a.tobytes())
        finished = await host.launch("vector_add", a=at, b=at, out=at, n=n, dtype="<i8")
        assert finished.error == ""
        assert (np.frombuffer(await host.cpu_read(at, 64 * 8), "<i8") == a[:64] * 2).all()
        assert results_of(await host.launch("reduction", a=at, n=n)) == {"sum": int(a.sum()) * 2}
        await host.server.bye()
        assert await ended(process) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_end_it_with_a_goodbye(folder: Path, number: signal.Signals) -> None:
    """The host hears the goodbye at once and need not wait for a lease."""
    async with running(folder) as (host, process):
        process.send_signal(number)
        assert await ended(process) == 0
        await until(lambda: host.session.lost is not None)
        assert "goodbye" in str(host.session.lost)


async def test_end_of_stdin_ends_it(folder: Path) -> None:
    """Whoever started it and held its stdin is gone."""
    async with running(folder, subprocess.PIPE) as (_, process):
        assert process.stdin is not None
        process.stdin.close()
        assert await ended(process) == 0


async def test_death_of_the_parent_ends_it(folder: Path) -> None:
    """A device of a launcher that is killed goes with it, although nobody held its stdin."""
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'hmmnet.devices', 'gpu0',"
        f" 'ipc://{folder}/host', '--secret-file', '{folder}/secret'], stdin=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    with ZmqTransport() as transport:
        async with host_alone(transport, f"ipc://{folder}/") as host:
            launcher = start_launcher(script)
            assert launcher.stdout is not None
            child = int(launcher.stdout.readline())
            with trio.fail_after(END_S):
                await host.joined.wait()
                launcher.kill()
                launcher.wait()
                launcher.stdout.close()
                await until(lambda: not lives(child))


async def test_a_silent_host_ends_it(folder: Path) -> None:
    """When lease and patience are over it stops by itself, says so in its log, and its exit code says that this was no ordinary end."""
    with ZmqTransport() as transport:
        async with host_alone(transport, f"ipc://{folder}/") as host:
            process = start(folder, "--patience-s", "0.1")
            with trio.fail_after(END_S):
                await host.joined.wait()
            # The host freezes: it neither reads nor sends until the device has ended.
            process.wait(END_S)
            assert await ended(process) == 1
    assert "host is lost" in (folder / "gpu0.jsonl").read_text()


def test_wrong_secret_is_one_line_and_an_exit_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the host says about it reaches the terminal."""
    (folder / "secret").unlink()
    write_secret(folder / "secret", bytes(32))

    async def main() -> None:
        with ZmqTransport() as transport:
            async with host_alone(transport, f"ipc://{folder}/"):
                process = start(folder)
                await until(lambda: process.poll() is not None)
                assert process.stderr is not None
                lines = process.stderr.read().decode().strip().splitlines()
                process.stderr.close()
                assert process.returncode == 1
                assert len(lines) == 1
                assert "hmmnet device gpu0" in lines[0]
                assert "secret" in lines[0]

    trio.run(main)


def test_nobody_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No host at the endpoint: one line, after the time that was allowed."""
    code = run_device({"name": "gpu0", "endpoint": f"ipc://{folder}/host", "secret_file": str(folder / "secret"), "connect_s": 0.2})
    assert code == 1
    assert "no host answered" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{}, {"name": "gpu0"}, {"name": 3, "endpoint": "e", "secret_file": "f"}, {"nme": "gpu0"}])
def test_bad_settings_are_named(settings: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    """A launcher's mistake is one line, not a traceback."""
    assert run_device(settings) == 1
    assert "hmmnet device" in capsys.readouterr().err


def test_an_unreadable_secret_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file and what to do about it."""
    (folder / "secret").chmod(0o644)
    assert run_device({"name": "gpu0", "endpoint": f"ipc://{folder}/host", "secret_file": str(folder / "secret")}) == 1
    assert "chmod 600" in capsys.readouterr().err


def test_settings_have_defaults() -> None:
    """What the zygote must give is what has no default."""
    assert Settings(name="a", endpoint="b", secret_file="c").connect_s > 0


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [({"model": "tpu"}, "no device model"), ({"kind": "shared"}, "kind 'shared'"), ({"memory_bytes": 5}, "no device specification")],
)
async def test_a_bad_specification_is_refused(spec: dict[str, Any], complaint: str) -> None:
    """A welcome that makes no sense ends the device with a reason."""
    with MemoryTransport() as transport:
        async with host_alone(transport, **spec) as host:
            with pytest.raises(HmmnetError, match=complaint):
                await serve(transport, "mem://host", host.spec["name"], SECRET, 1)


async def test_wrong_secret_in_process() -> None:
    """The refusal is an exception of its own."""
    with MemoryTransport() as transport:
        async with host_alone(transport):
            with pytest.raises(PeerRefused, match="secret"):
                await serve(transport, "mem://host", "gpu0", b"wrong", 1)


async def test_a_goodbye_is_returned() -> None:
    """`serve` says why it ended."""
    with MemoryTransport() as transport:
        lost: list[PeerLost] = []
        async with trio.open_nursery() as nursery, host_alone(transport) as host:

            async def device() -> None:
                lost.append(await serve(transport, "mem://host", "gpu0", SECRET, 1))

            nursery.start_soon(device)
            await host.joined.wait()
            await host.open()
        assert "goodbye" in str(lost[0])


def test_single_error_of_nested_groups() -> None:
    """One error inside groups is that error; several stay a group."""
    one = ValueError("x")
    assert single(ExceptionGroup("a", [ExceptionGroup("b", [one])])) is one
    several = ExceptionGroup("a", [one, KeyError()])
    assert single(several) is several


async def test_a_device_draws_its_chances_from_what_its_welcome_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ones for the same words, others for others."""
    made: list[Injector] = []

    def injector_of(clock: EmulatedClock) -> Injector:
        made.append(Injector(now=clock.now))
        return made[-1]

    async def drawn(chance: str) -> list[float]:
        with MemoryTransport() as transport:
            async with trio.open_nursery() as nursery, host_alone(transport, chance=chance) as host:
                nursery.start_soon(serve, transport, "mem://host", "gpu0", SECRET, 1)
                await host.joined.wait()
                await host.open()
        return [made[-1].random.random() for _ in range(8)]

    monkeypatch.setattr(service, "injector_of", injector_of)
    first = await drawn("7 gpu0 1")
    assert first == await drawn("7 gpu0 1")
    assert first != await drawn("7 gpu0 2")
