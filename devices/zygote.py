"""The zygote: one interpreter with every import done, from which device processes are forked.

A fresh interpreter needs most of a second and 22 MB of its own; a fork needs milliseconds and shares the imports' pages. That holds only if
the zygote is a still pond: no thread, no ZeroMQ context, no event loop, and `gc.freeze` so that collections in the children do not write
to the shared objects.

It talks with the launcher over the socket that it finds as its stdin, one JSON object a line. From the launcher: ``{"start": NAME,
"settings": {...}}``,
``{"kill": NAME}`` (SIGKILL), ``{"end": GRACE_S}``. To the launcher: ``{"zygote": PID}`` when it is ready, ``{"started": NAME, "pid":
PID}``,
``{"exited": NAME, "pid": PID, "status": N}`` with the exit code, or minus the signal, of every child.

End of file on that socket means that the launcher is gone: all children are killed and the zygote ends. The children die with the
zygote (`hmmnet.lifeline`), so nothing survives whichever of them is killed.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from hmmnet.lifeline import die_with_parent, name_process

READ_BYTES = 1 << 16
CRASHED = 70
"""Exit code of a child with a bug (EX_SOFTWARE): 1 is that of one without a host."""
LINE_BYTES_MAX = 1 << 20
"""A start command carries one device's settings; a launcher that sends more than this in a line is none."""

Settings = dict[str, Any]
Child = Callable[[Settings], int | None]
"""Runs one device; what it returns is the exit code, None is 0."""


class Zygote:
    """Forks a child for each start command and reports its end. `child` runs in the forked process."""

    def __init__(self, control: socket.socket, child: Child) -> None:
        self._control = control
        self._child = child
        self._received = b""
        self._children: dict[int, tuple[str, int]] = {}
        """By pidfd: the device's name and its pid."""
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._ending_s: float | None = None

    def run(self) -> None:
        """Serve until the launcher says ``end`` or is gone; no child is left when this returns."""
        self._tell({"zygote": os.getpid()})
        while self._ending_s is None or (self._children and time.monotonic() < self._ending_s):
            timeout_ms = None if self._ending_s is None else max(1, int(1000 * (self._ending_s - time.monotonic())))
            for descriptor, _ in self._poll.poll(timeout_ms):
                if descriptor != self._control.fileno():
                    self._reap(descriptor)
                elif not self._read():
                    self._ending_s = time.monotonic()
        for name, pid in list(self._children.values()):
            self._kill(name, pid)
        for descriptor in list(self._children):
            self._reap(descriptor)

    def _read(self) -> bool:
        """Take what the launcher sent; False when it is gone."""
        try:
            data = self._control.recv(READ_BYTES)
        except ConnectionError:
            return False
        if not data:
            return False
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > LINE_BYTES_MAX:
            return False
        for line in lines:
            self._obey(json.loads(line))
        return True

    def _obey(self, command: dict[str, Any]) -> None:
        if "start" in command:
            self._start(command["start"], command["settings"])
        elif "kill" in command:
            for name, pid in self._children.values():
                if name == command["kill"]:
                    self._kill(name, pid)
        elif "end" in command:
            self._ending_s = time.monotonic() + float(command["end"])

    def _start(self, name: str, settings: Settings) -> None:
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._be_child(zygote, name, settings)
        descriptor = os.pidfd_open(pid)
        self._children[descriptor] = (name, pid)
        self._poll.register(descriptor, select.POLLIN)
        self._tell({"started": name, "pid": pid})

    def _be_child(self, zygote: int, name: str, settings: Settings) -> NoReturn:
        """Become a device: nothing of the zygote's is kept but its memory."""
        status = 1
        try:
            die_with_parent(zygote)
            name_process(name)
            for descriptor in self._children:
                os.close(descriptor)
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            os.close(nothing)
            self._control.close()
            status = self._child(settings) or 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001 - the last frame of a process: it reports and ends
            status = CRASHED
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)

    def _kill(self, name: str, pid: int) -> None:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            print(f"hmmnet: zygote: {name} (process {pid}) was gone before it could be killed", file=sys.stderr)

    def _reap(self, descriptor: int) -> None:
        name, pid = self._children.pop(descriptor)
        self._poll.unregister(descriptor)
        _, status = os.waitpid(pid, 0)
        os.close(descriptor)
        self._tell({"exited": name, "pid": pid, "status": os.waitstatus_to_exitcode(status)})

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self._control.sendall(json.dumps(message).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):  # the launcher is gone: the next read says so and ends us
            return


def serve(child: Child, launcher_pid: int) -> None:
    """Be the zygote of launcher `launcher_pid` over the socket on stdin; to be called with every import done."""
    die_with_parent(launcher_pid)
    name_process("zygote")
    # The launcher decides what a Ctrl-C means; a terminal sends it to everybody.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # without a collection before: what that frees are holes among what is shared, and children would fill them
    gc.enable()
    with socket.socket(fileno=os.dup(0)) as control:
        Zygote(control, child).run()
