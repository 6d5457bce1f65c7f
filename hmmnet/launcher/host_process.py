"""The launcher's side of the host process: its configuration, what it tells, its end.

``python -m hmmnet.host`` reads one JSON object a line from stdin. The first is its configuration (`Config` of its ``__main__``), those
that follow tell of devices that ended, ``{"exited": NAME, "how": TEXT}``, and of faults that are to begin. It writes one
JSON object a line to stdout:
``{"control": ENDPOINT, "client": ENDPOINT, "rate": NUMBER}`` when it serves, then
``{"device": NAME, "state": "ready" | "lost", "how": TEXT}`` whenever a device comes or goes, and what faults do and want
(`hmmnet.host.__main__`). It ends on SIGTERM after saying goodbye to its devices, and when stdin ends: then its launcher is gone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import IO, Any

import msgspec
import trio

from .processes import child_environment, end_process, wait_process

GRACE_S = 0.5
"""Real seconds for a host to say goodbye to its devices before it is killed."""
READ_BYTES = 1 << 16
START_S = 30.0
"""Real seconds for a host's imports, its measurement of the wire (``auto``), and its sockets."""


class HostProcess:
    """A host process; `hear` gets each object that it tells. `command` is replaced in tests."""

    def __init__(
        self,
        config: dict[str, Any],
        hear: Callable[[dict[str, Any]], None],
        command: Sequence[str] | None = None,
        stderr: IO[bytes] | None = None,
    ) -> None:
        self._hear = hear
        self._received = b""
        self.process = subprocess.Popen(
            [*(command or (sys.executable, "-m", "hmmnet.host"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=child_environment(),
            start_new_session=True,
        )
        assert self.process.stdin is not None, "asked for"
        assert self.process.stdout is not None, "asked for"
        self._stdin = trio.lowlevel.FdStream(os.dup(self.process.stdin.fileno()))
        self._stdout = trio.lowlevel.FdStream(os.dup(self.process.stdout.fileno()))
        self.process.stdin.close()
        self.process.stdout.close()
        self._config = config
        self._sending = trio.Lock()

    async def run(self) -> int:
        """Configure it and hear it until it ends; how it ended, as `describe_exit` takes it."""
        await self.tell(self._config)
        async for data in self._stdout:
            *lines, self._received = (self._received + data).split(b"\n")
            for line in lines:
                self._hear(msgspec.json.decode(line))
        return await wait_process(self.process)

    async def tell(self, message: dict[str, Any]) -> None:
        """Send it one object. Nothing happens when it is gone: `run` says so."""
        async with self._sending:
            try:
                await self._stdin.send_all(msgspec.json.encode(message) + b"\n")
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    async def end(self, grace_s: float = GRACE_S) -> None:
        """End it: goodbye within the grace, else by force. Returns when it is gone."""
        with trio.CancelScope(shield=True):
            if self.process.poll() is None:
                self.process.terminate()
            await end_process(self.process, grace_s)
            await self._stdin.aclose()
            await self._stdout.aclose()
