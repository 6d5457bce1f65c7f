"""The device processes of one machine: started from the zygote, watched, shown in the machine's record.

What a device's end means for the machine is not decided here: `lost` is told, and the host is told through it that it need not wait a
lease.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Mapping
from errno import EBUSY, ENOENT, ESRCH
from types import MappingProxyType
from typing import Any

import trio

from hmmnet.errors import HmmnetError, KernelError
from hmmnet.topology.model import Topology

from .directory import DeviceRecord, Directory, process_started
from .zygote import GRACE_S, Exited, Told, ZygoteClient

READY_S = 30.0
"""Real seconds for a device from its fork to its welcome; 64 of them on a busy single core need a few."""

log = logging.getLogger("hmmnet.launcher")


class Crew:
    """The devices of `topology`. `changed` is called after every change of a record; `lost` with (name, how) when a device process
    ended. `extra` are further settings of devices, by name.
    """

    def __init__(
        self,
        topology: Topology,
        directory: Directory,
        zygote: ZygoteClient,
        *,
        changed: Callable[[], None],
        lost: Callable[[str, str], None],
        extra: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    ) -> None:
        self.records = {spec.name: DeviceRecord(spec.name, spec.model, spec.memory_bytes) for spec in topology.devices}
        self._unplugged: set[str] = set()
        """Devices that were taken out in order, and are not back: their end is no loss."""
        self.ending = False
        """Set when the machine is on its way down: from then on a device's end is no loss."""
        self._directory = directory
        self._changed = changed
        self._lost = lost
        self._ended = {name: trio.Event() for name in self.records}
        self.zygote = zygote
        self.processes = {zygote.process.pid: process_started(zygote.process.pid)}
        """Every process that there has been, the zygote and each incarnation of each device: pid to `process_started`."""
        self.exits: list[Exited] = []
        """How each incarnation of each device ended, in that order."""
        self.when_ended: list[Callable[[], None]] = []
        """What is called when every process has ended; logs and all else are still there."""
        self._extra = extra
        self._endpoint = ""
        self._host_pid = 0

    async def run(self) -> None:
        """Hear of the devices' ends, until all of it is over. Raises HmmnetError when the zygote dies before `end`."""
        await self.zygote.run(self._hear)
        if not self.ending:
            for name, record in self.records.items():
                if record.pid:  # what never was is not lost
                    self._end(name, "its zygote is gone")
            raise HmmnetError(f"the device zygote is gone ({self.zygote.how()}), and every device with it")

    async def start(self, endpoint: str, host_pid: int) -> None:
        """Start every device; each connects to the host's control `endpoint` by itself, and ends with the process `host_pid`."""
        self._endpoint, self._host_pid = endpoint, host_pid
        await self.zygote.wait_ready()
        for name in self.records:
            await self.zygote.start(name, self.settings(name, endpoint, host_pid))

    async def restart(self, name: str) -> None:
        """Start a device again whose process has ended: empty, as a new incarnation. Raises KernelError: ENOENT, EBUSY (it runs)."""
        record = self._known(name, "start_device")
        if not self.has_ended(name):
            raise KernelError(EBUSY, "start_device", f"device {name} runs already, as process {record.pid}")
        record.state, record.how, record.pid = "starting", "", 0
        self._unplugged.discard(name)
        self._ended[name] = trio.Event()
        await self.zygote.start(name, self.settings(name, self._endpoint, self._host_pid))
        self._changed()

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a device's process. Raises KernelError: ENOENT, ESRCH (it does not run)."""
        record = self._known(name, "kill")
        if self.has_ended(name) or not record.pid:
            raise KernelError(ESRCH, "kill", f"device {name} does not run")
        try:
            os.kill(record.pid, number)
        except ProcessLookupError:  # its zygote knows already, and is about to say so
            raise KernelError(ESRCH, "kill", f"device {name} does not run: it has just ended") from None

    def _known(self, name: str, call: str) -> DeviceRecord:
        if name not in self.records:
            raise KernelError(ENOENT, call, f'there is no device "{name}"; there are {", ".join(self.records)}')
        return self.records[name]

    def settings(self, name: str, endpoint: str, host_pid: int) -> dict[str, Any]:
        """What a device process is told at its start; the rest comes with the host's welcome."""
        return {
            "name": name,
            "endpoint": endpoint,
            "secret_file": str(self._directory.secret_file),
            "log_folder": str(self._directory.logs),
            "host_pid": host_pid,
            **self._extra.get(name, {}),
        }

    def ready(self, name: str) -> None:
        """The host has welcomed this device."""
        record = self.records[name]
        if record.state == "starting":
            record.state = "ready"
            self._changed()

    def lost(self, name: str, how: str) -> None:
        """The host has lost this device. Its process may still run: then its end is told beside that, when it comes."""
        record = self.records[name]
        if record.state == "ready" and name not in self._unplugged:
            record.state, record.how = "lost", how
            self._changed()

    def has_ended(self, name: str) -> bool:
        """Whether the process of this device's last life has ended."""
        return self._ended[name].is_set()

    def unplugged(self, name: str) -> None:
        """The host has taken this device out in order: its process ends, or has."""
        self._unplugged.add(name)
        record = self.records[name]
        if record.state == "lost":
            record.state, record.how = "unplugged", ""
            self._changed()

    async def wait_ended(self, name: str) -> str:
        """Return how a device ended, when it has."""
        await self._ended[name].wait()
        return self.records[name].how or "was unplugged"

    async def kill(self, name: str) -> None:
        """SIGKILL a device and return when it is gone. Raises KernelError(ENOENT)."""
        self._known(name, "kill")
        await self.zygote.kill(name)
        await self._ended[name].wait()

    def expect_end(self) -> None:
        """The host is about to say goodbye to the devices: their ends are no losses any more."""
        self.ending = True

    async def end(self, grace_s: float = GRACE_S) -> None:
        """End every device: by itself within the grace (the host said goodbye before), else by force.

        All of `when_ended` are called. Raises what one of them raised; an ExceptionGroup where several did.
        """
        self.ending = True
        await self.zygote.end(grace_s)
        errors: list[Exception] = []
        for call in self.when_ended:
            try:
                call()
            except Exception as error:  # noqa: BLE001 - whatever it is, the others are called; it is raised below
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ExceptionGroup("several of those who were to be called when the machine has ended failed", errors)

    def _hear(self, told: Told) -> None:
        if told.name not in self.records:
            log.warning("the zygote told of %s, which this machine does not have", told.name)
        elif isinstance(told, Exited):
            self.exits.append(told)
            self._end(told.name, told.how)
        else:
            self.records[told.name].pid = told.pid
            self.processes[told.pid] = process_started(told.pid)
            self._changed()

    def _end(self, name: str, how: str) -> None:
        record = self.records[name]
        if self.has_ended(name):
            return
        unplugged = name in self._unplugged
        before = f"{record.how}; its process: " if record.state == "lost" else ""
        record.state, record.how = ("unplugged", "") if unplugged else ("lost", before + how)
        self._ended[name].set()
        if not self.ending:
            level, what = (logging.INFO, "was unplugged, and") if unplugged else (logging.ERROR, "is gone:")
            log.log(level, "device %s %s %s", name, what, how, extra={"fields": {"device": name, "device_pid": record.pid}})
            self._lost(name, how)
            self._changed()
