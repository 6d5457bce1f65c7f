"""The host as a process: what it reads, what it says, and how it ends; here inside the test's own process, with its pipes.

Oracle: the lines that the module's docstring promises.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from hmmnet.errors import HmmnetError
from hmmnet.host import __main__ as program
from hmmnet.host.__main__ import Config
from hmmnet.observe.logs import JsonLines, stop_logging
from hmmnet.wire.secrets import new_secret, write_secret
from hmmnet.wire.zmq_transport import ZmqTransport

from .scripted_device import running_host, scripted_device, topology


def config(folder: Path, **changes: Any) -> Config:
    secret = folder / "secret"
    if not secret.exists():
        write_secret(secret, new_secret())
    given: dict[str, Any] = {"name": "m", "topology": topology("gpu0"), "directory": str(folder), "secret_file": str(secret)}
    return Config(**(given | {"rate": 1.0, "transport": "ipc"} | changes))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the host tells its launcher."""
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(program, "tell", said.append)
    return said


def test_a_configuration_survives_the_line_and_mistakes_are_named(tmp_path: Path) -> None:
    """What was encoded comes back; an unknown field, a wrong personality and no JSON are errors that say what is wrong."""
    made = config(tmp_path)
    assert program.decode_config(msgspec.json.encode(made)) == made
    plain = msgspec.json.decode(msgspec.json.encode(made))
    for changed, why in (({"colour": 1}, "colour"), ({"personality": "v26"}, "v26"), ({"name": 3}, "name")):
        with pytest.raises(HmmnetError, match=f"the host's configuration is wrong: .*{why}"):
            program.decode_config(msgspec.json.encode(plain | changed))
    with pytest.raises(HmmnetError, match="the host's configuration is wrong"):
        program.decode_config(b"{")


async def test_lines_come_whole_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in one piece, one in three, what is not ended at the end of the pipe is none; a line that is too long is an error."""
    reading, writing = os.pipe()
    got: list[bytes] = []

    async def read() -> None:
        async for line in program.lines(reading):
            got.append(line)  # noqa: PERF401 - as they come

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        for piece in (b"one\ntwo\nth", b"re", b"e\nunfinished"):
            os.write(writing, piece)
            await trio.testing.wait_all_tasks_blocked()
        os.close(writing)
    assert got == [b"one", b"two", b"three"]
    monkeypatch.setattr(program, "LINE_BYTES_MAX", 8)
    reading, writing = os.pipe()
    os.write(writing, b"123456789")
    with pytest.raises(HmmnetError, match="a line on stdin is longer than 8 bytes"):
        await read()
    os.close(writing)


def test_what_is_told_is_a_line_and_nobody_listening_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """One JSON object a line, at once; a launcher that is gone is found out at the end of stdin, not here."""
    program.tell({"restart": "gpu0", "after": 0.5})
    assert msgspec.json.decode(capsysbinary.readouterr().out) == {"restart": "gpu0", "after": 0.5}
    reading, writing = os.pipe()
    os.close(reading)
    with caplog.at_level(logging.INFO, "hmmnet.host"), os.fdopen(writing, "wb", 0) as closed:
        monkeypatch.setattr(sys, "stdout", type("Out", (), {"buffer": closed}))
        program.tell({"fired": {}})
    assert "nobody reads what the host tells" in caplog.text


@pytest.mark.virtual_time
async def test_the_launcher_is_obeyed_and_nonsense_is_not(told: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    """A device whose process ended is lost with that cause; faults begin or are refused; garbage is logged, and the host goes on."""
    async with running_host("gpu0") as (host, transport), scripted_device(host, transport, "gpu0") as device:
        await host.device_ready("gpu0")
        begins = {"kind": "alloc.host", "probability": 0.5}
        for given in ([begins, {"kind": "crash", "on": "gpu7", "place": "my.toml:3"}, begins], [{"kind": "nonsense"}], [begins]):
            program.obey(host, msgspec.json.encode({"faults": given}))
        assert [one["fault"]["kind"] for one in host.list_faults()] == ["alloc.host", "alloc.host"], "the first that is refused is the last"
        assert told[0]["refused"].startswith('my.toml:3: no device is called "gpu7"')
        assert "nonsense" in told[1]["refused"]
        assert told[2:] == [{"begun": 1}]
        for line in (b"{", b'{"left": 1}', msgspec.json.encode({"exited": "gpu7", "how": "died"})):
            program.obey(host, line)
        assert caplog.text.count("the launcher told something that makes no sense") == 3
        device.vanish()
        program.obey(host, msgspec.json.encode({"exited": "gpu0", "how": "was killed by signal 9"}))
        assert host.devices["gpu0"].last_loss == 'device "gpu0" was killed by signal 9'


async def test_it_says_where_it_serves_and_what_faults_did(
    tmp_path: Path, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endpoints and rate first; a fault's count soon after it happened; at the end of the commands everything is closed."""
    monkeypatch.setattr(program, "FIRED_EVERY_S", 0.01)
    send, receive = trio.open_memory_channel[bytes](10)

    async def commands() -> AsyncIterator[bytes]:
        async with receive:
            async for line in receive:
                yield line

    async with trio.open_nursery() as nursery:
        nursery.start_soon(program.serve, config(tmp_path), commands(), trio.CancelScope())
        with trio.fail_after(10):
            while not told:
                await trio.sleep(0.01)
            assert told[0]["rate"] == 1.0
            assert told[0]["control"].startswith(f"ipc://{tmp_path}")
            await send.send(msgspec.json.encode({"faults": [{"kind": "ecc.corrected", "on": "gpu0"}]}))
            while {"fired": {"ecc.corrected": 1}} not in told:
                await trio.sleep(0.01)
            await send.aclose()


async def test_a_rate_that_is_left_open_is_measured(tmp_path: Path) -> None:
    """``auto``: some rate above zero; a number is taken as it is."""
    with ZmqTransport() as transport:
        assert await program.rate_for(config(tmp_path, rate=0.25), transport) == 0.25
        assert 0 < await program.rate_for(config(tmp_path, rate="auto"), transport) <= 1


def test_it_serves_from_the_first_line_of_stdin_until_its_end(
    tmp_path: Path, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole process: exit code 0, and its log where the configuration wants it; without a configuration 1, and why."""
    monkeypatch.setattr(program, "die_with_parent", lambda _: None)
    reading, writing = os.pipe()
    monkeypatch.setattr(os, "dup", lambda _: reading)
    (tmp_path / "logs").mkdir()

    def launcher() -> None:
        os.write(writing, msgspec.json.encode(config(tmp_path, log_folder=str(tmp_path / "logs"))) + b"\n")
        for _ in range(1000):
            if told:
                break
            time.sleep(0.01)
        os.close(writing)

    thread = threading.Thread(target=launcher)
    thread.start()
    assert program.main() == 0
    thread.join(10)
    logging.getLogger("hmmnet.host").warning("still here")
    for handler in logging.getLogger("hmmnet").handlers[:]:
        if isinstance(handler, JsonLines):
            stop_logging(handler)
    assert "control" in told[0]
    assert "still here" in (tmp_path / "logs" / "host.jsonl").read_text()
    reading, writing = os.pipe()
    monkeypatch.setattr(os, "dup", lambda _: reading)
    os.close(writing)
    assert program.main() == 1
    assert "stdin ended before the configuration came" in capsys.readouterr().err
