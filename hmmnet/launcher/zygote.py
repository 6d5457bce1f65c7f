"""The launcher's side of the zygote: ask for devices, hear of their ends.

The protocol is written down in `hmmnet.devices.zygote`, which is the other end. One task reads (`run`); everybody else only asks.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

import trio

from hmmnet.errors import HmmnetError

from .processes import child_environment, describe_exit, end_process, wait_process

READY_S = 20.0
"""Real seconds for the zygote's imports; a cold disk needs several."""
GRACE_S = 0.4
"""Real seconds that devices have to end by themselves before they are killed; Ctrl-C promises to be over within one."""
KILL_S = 0.3
"""Real seconds for the zygote to kill what did not end, and to end itself."""
READ_BYTES = 1 << 16
STDERR_FILENO = 2


@dataclass(frozen=True)
class Started:
    """A device process was forked."""

    name: str
    pid: int


@dataclass(frozen=True)
class Exited:
    """A device process ended; `how` says it in words."""

    name: str
    pid: int
    status: int
    how: str


Told = Started | Exited


class ZygoteClient:
    """A running zygote; tests replace its `command`."""

    def __init__(self, command: Sequence[str] | None = None, stderr: IO[bytes] | None = None) -> None:
        self._ready = trio.Event()
        self._gone = trio.Event()
        self._received = b""
        self._hearing = False
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [*(command or (sys.executable, "-m", "hmmnet.devices", "--zygote"))],
                stdin=theirs.fileno(),
                stdout=STDERR_FILENO if stderr is None else stderr,  # our stdout may be a pipe that somebody reads to its end
                stderr=stderr,
                env=child_environment(),
                start_new_session=True,
            )
        ours.setblocking(False)
        self._socket = trio.socket.from_stdlib_socket(ours)

    async def run(self, tell: Callable[[Told], None]) -> None:
        """Hear what the zygote says until it is gone; `tell` gets every start and end of a device."""
        self._hearing = True
        try:
            with suppress(OSError, trio.ClosedResourceError):  # the zygote died, or we ended it
                while data := await self._socket.recv(READ_BYTES):
                    *lines, self._received = (self._received + data).split(b"\n")
                    for line in lines:
                        self._hear(json.loads(line), tell)
            await wait_process(self.process)  # the kernel closes a process's files before it has ended, on a busy computer long before
            self._gone.set()
        finally:
            self._hearing = False

    def _hear(self, message: dict[str, Any], tell: Callable[[Told], None]) -> None:
        if "zygote" in message:
            self._ready.set()
        elif "started" in message:
            tell(Started(message["started"], message["pid"]))
        elif "exited" in message:
            tell(Exited(message["exited"], message["pid"], message["status"], describe_exit(message["status"])))

    async def wait_ready(self) -> None:
        """Return when the imports are done. Raises HmmnetError when the zygote ends before or needs too long."""
        with trio.move_on_after(READY_S):
            async with trio.open_nursery() as nursery:

                async def until(event: trio.Event) -> None:
                    await event.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until, self._ready)
                nursery.start_soon(until, self._gone)
        if not self._ready.is_set():
            raise HmmnetError(f"the device zygote did not start ({self.how()}); its message stands above")

    async def start(self, name: str, settings: dict[str, Any]) -> None:
        """Ask for a device."""
        await self._send({"start": name, "settings": settings})

    async def kill(self, name: str) -> None:
        """SIGKILL a device."""
        await self._send({"kill": name})

    async def _send(self, message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while data:
                data = data[await self._socket.send(data) :]
        except ConnectionError as error:
            raise HmmnetError(f"the device zygote is gone ({self.how()})") from error

    @property
    def gone(self) -> trio.Event:
        """Set when the zygote has ended; all devices are dead then."""
        return self._gone

    def how(self) -> str:
        """How the zygote is or ended, in words."""
        status = self.process.poll()
        return "it still runs" if status is None else describe_exit(status)

    async def end(self, grace_s: float = GRACE_S) -> None:
        """Let the devices end by themselves for `grace_s`, kill the others, return when all are gone; whether `run` still runs or not.

        If it does, it has told of the last end when this returns.
        """
        with trio.CancelScope(shield=True):
            if self.process.poll() is None:
                with trio.move_on_after(grace_s), suppress(HmmnetError):
                    await self._send({"end": grace_s})
            await end_process(self.process, grace_s + KILL_S)
            if self._hearing:  # its last words lie in the socket, which has an end now
                with trio.move_on_after(KILL_S):
                    await self._gone.wait()
            self._socket.close()
