"""A machine that runs elsewhere, used over a client session: the same `Machine` as inside the host; `remote.py` has what it gives out."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any

from hmmnet.errors import HmmnetError
from hmmnet.faults.catalogue import as_given
from hmmnet.faults.forms import Plannable, is_file, one_fault
from hmmnet.faults.plan import named
from hmmnet.launcher.directory import running_machine
from hmmnet.program import Machine, documented_by
from hmmnet.wire.client import connect
from hmmnet.wire.messages import PROTOCOL_VERSION, Hello, Rate, Welcome
from hmmnet.wire.session import Session
from hmmnet.wire.transport import Transport
from hmmnet.wire.zmq_transport import ZmqTransport

from .blocking import Blocking, BlockingMachine, only_error, only_under_trio
from .remote import Calls, RemoteProcess


@documented_by(Machine)
class RemoteMachine:
    """See `hmmnet.program.Machine`. `name` is the machine's."""

    def __init__(self, session: Session, welcome: Welcome, name: str) -> None:
        self.name = name
        self._calls = Calls(session)
        self._devices: tuple[str, ...] = ()
        self._clock = Rate(welcome.epoch_monotonic_s, welcome.epoch_emulated_s, welcome.rate)
        session.on(Rate, self._set_clock)

    def __repr__(self) -> str:
        return f'<machine "{self.name}": {", ".join(self.device_names)}>'

    def _set_clock(self, rate: Rate) -> None:
        self._clock = rate

    async def prepare(self) -> None:
        """Ask for what does not change."""
        self._devices = tuple((await self._calls.call("devices"))[0])

    @property
    def device_names(self) -> tuple[str, ...]:
        """See `Machine.device_names`."""
        return self._devices

    def emulated_s(self) -> float:
        """See `Machine.emulated_s`; the clock is the same for every process of one computer."""
        clock = self._clock
        return clock.epoch_emulated_s + (time.monotonic() - clock.epoch_monotonic_s) * clock.rate

    async def create_process(self, node: str = "", cgroup: str = "") -> RemoteProcess:
        """See `Machine.create_process`."""
        made = await self._calls.recallable("create_process", lambda made: ("exit", {"process": made}), node=node, cgroup=cgroup)
        return RemoteProcess(self._calls, int(made))

    async def process(self, node: str = "", cgroup: str = "") -> RemoteProcess:
        """The same as `create_process`, for short programs."""
        return await self.create_process(node, cgroup)

    async def create_cgroup(self, name: str, limit_bytes: int | None = None) -> None:
        """See `Machine.create_cgroup`."""
        await self._calls.call("create_cgroup", name=name, limit=limit_bytes)

    async def oom_kill(self, cgroup: str = "") -> int:
        """See `Machine.oom_kill`."""
        return int((await self._calls.call("oom_kill", cgroup=cgroup))[0])

    async def unplug(self, device: str) -> None:
        """See `Machine.unplug`."""
        await self._calls.call("unplug", device=device)

    async def add_fault(self, kind: Plannable, **given: Any) -> int:
        """A fault begins, by kind and parameters or in any form of one (`hmmnet.faults.forms`); its number. Raises HmmnetError for what is
        none, or cannot be done.
        """
        named_kind = isinstance(kind, str) and not is_file(kind)
        said = {"kind": kind, **given} if named_kind else as_given(named(one_fault(kind, given)))
        value, _ = await self._calls.call("add_fault", fault=said)
        return int(value)

    async def remove_fault(self, number: int) -> None:
        """It ends. Raises HmmnetError when there is none of that number."""
        await self._calls.call("remove_fault", fault=number)

    async def list_faults(self) -> list[dict[str, Any]]:
        """The faults that are: number, whether it has begun, and what makes it."""
        value, _ = await self._calls.call("list_faults")
        return list(value)

    async def heal(self) -> None:
        """All faults end, whoever began them; one that ends by itself meanwhile has."""
        for one in await self.list_faults():
            try:
                await self.remove_fault(one["number"])
            except HmmnetError:
                if any(other["number"] == one["number"] for other in await self.list_faults()):
                    raise

    async def report(self) -> dict[str, Any]:
        """See `Machine.report`."""
        value, _ = await self._calls.call("report")
        return dict(value)

    async def check(self) -> dict[str, Any]:
        """See `Machine.check`."""
        value, _ = await self._calls.call("check")
        return dict(value)


@asynccontextmanager
async def remote_machine(endpoint: str, secret: bytes, name: str, transport: Transport | None = None) -> AsyncIterator[RemoteMachine]:
    """A session with the host that listens for clients at `endpoint`. Raises PeerRefused, PeerLost."""
    own = transport is None
    wire = ZmqTransport() if transport is None else transport
    hello = Hello(
        version=PROTOCOL_VERSION,
        role="client",
        name=f"client-{os.getpid()}-{secrets.token_hex(4)}",
        incarnation=secrets.randbits(62),
        pid=os.getpid(),
        secret=secret,
    )
    try:
        async with connect(wire, endpoint, hello) as (session, welcome):
            machine = RemoteMachine(session, welcome, name)
            await machine.prepare()
            yield machine
    finally:
        if own:
            wire.close()


@asynccontextmanager
async def _attached(name: str | None) -> AsyncIterator[RemoteMachine]:
    directory = running_machine(name)
    record = directory.read()
    if record is None or not record.client_endpoint:
        raise HmmnetError(f'machine "{directory.name}" is still starting; try again in a moment')
    async with remote_machine(record.client_endpoint, directory.secret(), directory.name) as machine:
        yield machine


class Attachment:
    """What `attach` returns: enter it with ``async with`` (in trio) or ``with`` (anywhere else)."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._inside: Any = None
        self._blocking: Blocking[RemoteMachine] | None = None

    async def __aenter__(self) -> RemoteMachine:
        only_under_trio("hmmnet.attach(...)")
        self._inside = _attached(self._name)
        with only_error():
            machine: RemoteMachine = await self._inside.__aenter__()
        return machine

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        with only_error(error):
            ended: bool | None = await self._inside.__aexit__(kind, error, trace)
        return ended

    def __enter__(self) -> AttachedBlockingMachine:
        self._blocking = Blocking(lambda: Attachment(self._name))
        return AttachedBlockingMachine(self._blocking.start(), self._blocking)

    def __exit__(self, *error: object) -> None:
        assert self._blocking is not None
        self._blocking.stop()


@documented_by(RemoteMachine)
class AttachedBlockingMachine(BlockingMachine):
    """A machine that runs elsewhere, for programs without trio."""

    def __init__(self, machine: RemoteMachine, loop: Blocking[RemoteMachine]) -> None:
        super().__init__(machine, loop)
        self._remote = machine
        self.name = machine.name

    def add_fault(self, kind: Plannable, **given: Any) -> int:
        """See `RemoteMachine.add_fault`."""
        return self._loop.call(self._remote.add_fault, kind, **given)

    def remove_fault(self, number: int) -> None:
        """See `RemoteMachine.remove_fault`."""
        self._loop.call(self._remote.remove_fault, number)

    def list_faults(self) -> list[dict[str, Any]]:
        """See `RemoteMachine.list_faults`."""
        return self._loop.call(self._remote.list_faults)

    def heal(self) -> None:
        """See `RemoteMachine.heal`."""
        self._loop.call(self._remote.heal)


def attach(name: str | None = None) -> Attachment:
    """Use the machine `name` that runs already (``hmmnet up``); None: the only one, or "default".

    ``async with hmmnet.attach() as machine`` under trio, ``with hmmnet.attach() as machine`` in scripts and notebooks. Raises HmmnetError
    when there is no such machine, PeerRefused and PeerLost when it does not answer.
    """
    return Attachment(name)
