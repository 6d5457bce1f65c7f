"""``hmmnet up`` without its screen: the host process, the devices, the record; from start to end.

Who dies, and what then: a device's end is told to the host and shown, and the machine goes on. The host's or the zygote's end is the
machine's:
everything else is ended, the record says why, and the logs stay. The launcher's own end takes everything along, however it comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

import msgspec
import trio

from hmmnet.errors import HmmnetError
from hmmnet.observe.logs import log_to, stop_logging
from hmmnet.topology.model import Topology
from hmmnet.wire.transport import Kind

from .crew import READY_S, Crew
from .directory import Directory, MachineRecord, new_record
from .host_process import START_S, HostProcess
from .processes import describe_exit, raise_file_limit
from .rate import Rate
from .zygote import ZygoteClient

log = logging.getLogger("hmmnet.launcher")

STDERR = "stderr.txt"
"""In the logs: what the processes of a machine in the background write there, such as the traceback of a crash."""


class Supervisor:
    """One machine under a launcher. `changed` is called with the record after every change; `quiet` sends stderr of all processes to the
    logs. `faults` begin when every device is there; each is what makes one (`hmmnet.faults.catalogue.as_given`), and its `place` in a plan.
    `seed` is what their chances are drawn from.
    """

    host_command: Sequence[str] | None = None
    zygote_command: Sequence[str] | None = None
    """Other programs in the place of host and zygote, for tests."""

    def __init__(
        self,
        topology: Topology,
        name: str,
        rate: Rate,
        transport: Kind,
        changed: Callable[[MachineRecord], None],
        *,
        quiet: bool = False,
        faults: Sequence[Mapping[str, Any]] = (),
        seed: int = 0,
    ) -> None:
        self.record = new_record(name, topology.name, "up")
        self._topology = topology
        self._rate = rate
        self._transport = transport
        self._changed = changed
        self._quiet = quiet
        self._faults = faults
        self._seed = seed
        self._serving = trio.Event()
        self._all_ready = trio.Event()
        self._begun = trio.Event()
        self._control = ""

    async def run(self, *, task_status: trio.TaskStatus[MachineRecord] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the machine until cancelled; `task_status` hears when every device is ready. Raises MachineExists, and HmmnetError when
        the machine fails.
        """
        raise_file_limit()
        self.directory = directory = Directory.create(self.record.name, self.record)
        handler = log_to(directory.logs, "launcher")
        try:
            sockets = directory.sockets()
            self.record.sockets = "" if sockets == directory.path else str(sockets)
            with suppress(OSError):  # the disk is full: what was signed first names the process, too
                directory.sign(self.record)
            self._save()
            async with AsyncExitStack() as stack:
                await self._hold(stack, task_status)
        except HmmnetError as error:
            self._fail(str(error))
            raise
        except BaseExceptionGroup as group:
            errors = group.subgroup(HmmnetError)
            if errors is not None:
                self._fail("; ".join(map(str, leaves(errors))))
            raise
        finally:
            stop_logging(handler)
            if self.record.state == "failed":
                directory.release()
            else:
                directory.remove()

    async def _hold(self, stack: AsyncExitStack, task_status: trio.TaskStatus[MachineRecord]) -> None:
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        stderr = stack.enter_context((self.directory.logs / STDERR).open("ab")) if self._quiet else None
        zygote = ZygoteClient(self.zygote_command, stderr)
        self.crew = Crew(self._topology, self.directory, zygote, changed=self._save, lost=self._device_lost)
        self.record.devices = list(self.crew.records.values())
        stack.push_async_callback(self.crew.end)
        nursery.start_soon(self._watch_crew)
        self.host = HostProcess(self._host_config(), self._hear, self.host_command, stderr)
        stack.push_async_callback(self.host.end)
        stack.callback(self.crew.expect_end)
        self.record.host_pid = self.host.process.pid
        self._save()
        nursery.start_soon(self._watch_host)
        self._nursery = nursery
        await self._wait(self._serving, START_S, "the host did not begin to serve")
        await self.crew.start(self._control, self.host.process.pid)
        self._save()
        await self._wait(self._all_ready, READY_S, "not every device came")
        if self._faults:  # a machine whose plan is refused never ran
            await self.host.tell({"faults": list(self._faults)})
            await self._wait(self._begun, START_S, "its faults did not begin")
        self.record.state = "running"
        self._save()
        log.info("machine %s runs", self.record.name, extra={"fields": {"topology": self.record.topology, "rate": self.record.rate}})
        task_status.started(self.record)
        await trio.sleep_forever()

    def _host_config(self) -> dict[str, Any]:
        return {
            "name": self.record.name,
            "topology": msgspec.to_builtins(self._topology),
            "directory": self.record.sockets or str(self.directory.path),
            "secret_file": str(self.directory.secret_file),
            "log_folder": str(self.directory.logs),
            "rate": self._rate,
            "transport": self._transport,
            "seed": self._seed,
        }

    async def _watch_crew(self) -> None:
        try:
            await self.crew.run()
        except HmmnetError as error:
            raise self._error(str(error)) from error

    async def _watch_host(self) -> None:
        status = await self.host.run()
        if not self.crew.ending:
            raise self._error(f"the host process {describe_exit(status)}")

    def _hear(self, told: dict[str, Any]) -> None:
        if "control" in told:
            self._control = told["control"]
            self.record.client_endpoint = told["client"]
            self.record.rate = told["rate"]
            self._serving.set()
        elif told.get("state") == "ready":
            self.crew.ready(told["device"])
        elif told.get("state") == "lost":
            log.warning("the host lost %s: %s", told["device"], told.get("how", ""))
            self.crew.lost(told["device"], told.get("how", ""))
        elif told.get("state") == "unplugged":
            self.crew.unplugged(told["device"])
        elif "restart" in told:
            self._nursery.start_soon(self._start_again, told["restart"], float(told["after"]))
        elif "fired" in told:
            self.record.faults = told["fired"]
        elif "begun" in told:
            self._begun.set()
        elif "refused" in told:
            self._nursery.start_soon(self._give_up, told["refused"])
        self._save()

    def _device_lost(self, name: str, how: str) -> None:
        if not self._all_ready.is_set():
            self._nursery.start_soon(self._give_up, f"device {name} {how} before the machine was ready")
        self._nursery.start_soon(self.host.tell, {"exited": name, "how": how})

    async def _start_again(self, name: str, after_s: float) -> None:
        """A fault wants a device back, so many real seconds after its end: empty, as a new incarnation."""
        await self.crew.wait_ended(name)
        await trio.sleep(after_s)
        if not self.crew.ending and self.crew.has_ended(name):
            await self.crew.restart(name)

    async def _give_up(self, why: str) -> None:
        raise self._error(why)

    def _error(self, why: str) -> HmmnetError:
        return HmmnetError(f'{why}; "hmmnet logs {self.record.name}" tells more')

    async def _wait(self, event: trio.Event, seconds: float, what: str) -> None:
        with trio.move_on_after(seconds):
            await event.wait()
        if not event.is_set():
            missing = [record.name for record in self.record.devices if record.state != "ready"]
            raise self._error(f"{what} within {seconds:g} s (not ready: {', '.join(missing[:8])})")

    def _save(self) -> None:
        devices = self.record.devices
        if len(devices) == len(self._topology.devices) and all(device.state == "ready" and device.pid for device in devices):
            self._all_ready.set()
        self.directory.write(self.record)
        self._changed(self.record)

    def _fail(self, why: str) -> None:
        self.record.state, self.record.why = "failed", why
        log.error("machine %s failed: %s", self.record.name, why)
        self._save()


def leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    """The exceptions in a group of groups."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
