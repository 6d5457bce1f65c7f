"""``hmmnet.launch``: a machine for the calling program, with the host inside it and real device processes.

The host (page tables, hub, migrations) runs as tasks of the caller's own trio run, so a program's accesses cost no message; each device is
a process. The machine shows in ``hmmnet ps`` like any other, logs into its runtime directory, and is gone when the block is left, whatever
ends it: return, exception, cancellation, Ctrl-C, or the program's death.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import trio

from hmmnet.cable import Cables
from hmmnet.cable.cable import HOST_ADDRESS
from hmmnet.errors import HmmnetError
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.measure import automatic_rate
from hmmnet.faults.carry import Carrier
from hmmnet.faults.forms import Plannable, as_plan, one_fault
from hmmnet.faults.injector import Injector
from hmmnet.faults.kinds import Fault
from hmmnet.faults.network import Network
from hmmnet.faults.plan import Plan, named
from hmmnet.launcher.crew import READY_S, Crew
from hmmnet.launcher.directory import DeviceRecord, Directory, MachineRecord, as_name, new_record
from hmmnet.launcher.processes import raise_file_limit
from hmmnet.launcher.rate import Rate, check_rate
from hmmnet.launcher.zygote import Exited, ZygoteClient
from hmmnet.observe.events import Events
from hmmnet.observe.logs import log_to, stop_logging
from hmmnet.pages import Words
from hmmnet.program import Machine, Process, documented_by
from hmmnet.topology.load import installed_models, load
from hmmnet.topology.model import Personality, Topology, with_personality
from hmmnet.wire.keys import fresh_keys, write_keys
from hmmnet.wire.transport import KINDS, Kind, Transport
from hmmnet.wire.zmq_transport import CurveKeys, ZmqTransport

from .blocking import Blocking, BlockingMachine, only_error, only_under_trio

HOST = "modelled"
"""The address-space provider; its class is found through the entry point group ``hmmnet.host``."""

LaunchKind: TypeAlias = Kind | Literal["cable"]
LAUNCH_KINDS: tuple[LaunchKind, ...] = (*KINDS, "cable")

NO_FAULTS = Plan()

_numbers = itertools.count(1)


class Host(Protocol):
    """What is used of `hmmnet.host.service.Host`."""

    memory: Any
    """Its physical memory, by which its code is known from another host's in the same process."""
    control_endpoint: str
    client_endpoint: str
    injector: Injector
    on_restart: Callable[[str, float], None] | None
    """Called with (device, emulated seconds) when a fault wants it started again so long after its end."""
    on_unplugged: Callable[[str], None] | None
    """Called with a device that is taken out in order, before it is told goodbye."""
    on_change: Callable[[str, str, str], None] | None
    """Called with (device, ``ready`` or ``lost``, how) whenever a device comes or goes, until the machine ends."""
    on_refused: Callable[[str], None] | None
    """Called with a device that the IOMMU refuses an access, at that moment."""
    injection: Any
    """Carries out what faults do at the host (`hmmnet.host.injection`)."""
    network: Network
    """What happens to messages on the wires of real devices."""
    faults: Carrier
    """The faults of a launched machine."""

    def add_fault(self, fault: Fault) -> int:
        """A fault begins; its number."""
        ...

    def remove_fault(self, number: int) -> None:
        """It ends."""
        ...

    def list_faults(self) -> list[dict[str, Any]]:
        """The faults that are, as plain data."""
        ...

    events: Events

    def running(self) -> AbstractAsyncContextManager[Any]:
        """Serve while the block runs; devices are told goodbye at its end."""
        ...

    def crash(self, why: str) -> None:
        """It is gone: nobody is told, and whoever waits for it, or calls it, gets PeerLost with `why`."""
        ...

    def owns(self, task: trio.lowlevel.Task) -> bool:
        """Whether a task runs for the host itself, and not for a program that calls it."""
        ...

    async def device_ready(self, name: str) -> None:
        """Return when the device called `name` is welcomed and serves."""
        ...

    def device_exited(self, name: str, how: str) -> None:
        """The device's process is gone: no lease needs to be waited out."""
        ...

    def set_rate(self, rate: float) -> None:
        """The emulated clock goes on at another rate, here and at every peer."""
        ...

    async def create_process(self, node: str = "", cgroup: str = "") -> Process:
        """A new, empty process."""
        ...

    async def create_cgroup(self, name: str, limit_bytes: int | None = None) -> None:
        """A memory cgroup."""
        ...

    async def oom_kill(self, cgroup: str = "") -> int:
        """Kill whose end frees most memory."""
        ...

    async def unplug(self, device: str) -> None:
        """Hot removal."""
        ...

    def incarnation(self, device: str) -> int:
        """Which life of the device serves; 0: none. Raises KernelError(ENOENT)."""
        ...

    def poisoned_pages(self, device: str) -> int:
        """How many pages of a device's memory are broken."""
        ...

    def audit(self, *, quiet: bool = True) -> list[str]:
        """What is wrong with the books; empty when all is well. `quiet`: nothing is under way."""
        ...

    def left_over(self) -> list[str]:
        """What is still in use, though no program runs any more: processes, frames of every memory, swap."""
        ...

    def audit_changes(self, mirrors: Mapping[str, Sequence[tuple[int, Any]]] = ...) -> list[str]:
        """The same of what has changed since the last call, while things are under way; with mirrors that can be seen."""
        ...

    def audit_mirror(self, device: str, process: int, pages: Words, frames: Words, writable: npt.NDArray[np.bool_]) -> list[str]:
        """What is wrong with translations that a device's mirror holds."""
        ...

    @property
    def all_ready(self) -> bool:
        """Whether every device of the topology serves now."""
        ...

    @property
    def settled(self) -> bool:
        """Whether no session has anything under way, and none has been silent."""
        ...

    async def report(self) -> dict[str, Any]:
        """What the run did so far."""
        ...

    async def check(self) -> dict[str, Any]:
        """The invariants, now."""
        ...


@documented_by(Machine)
class LaunchedMachine:
    """A running machine; see `hmmnet.program.Machine`."""

    def __init__(
        self, name: str, topology: Topology, host: Host, crew: Crew, clock: EmulatedClock, directory: Directory, cables: Cables
    ) -> None:
        self.name = name
        self.topology = topology
        self.host = host
        self.directory = directory
        self.cables = cables
        """Network cables by device, which can be made bad; none unless the machine was launched with them."""
        self._crew = crew
        self._clock = clock

    def __repr__(self) -> str:
        return f'<machine "{self.name}": {", ".join(self.device_names)}>'

    @property
    def device_names(self) -> tuple[str, ...]:
        """The devices of the topology, in its order."""
        return self.topology.device_names

    @property
    def devices(self) -> tuple[DeviceRecord, ...]:
        """The device processes: name, model, pid, state."""
        return tuple(self._crew.records.values())

    @property
    def processes(self) -> Mapping[int, int]:
        """Every process beside this one that there has been, the zygote and each incarnation of each device: pid to its start in ticks."""
        return self._crew.processes

    @property
    def exits(self) -> Sequence[Exited]:
        """How each incarnation of each device ended, so far: name, pid, exit code (or minus the signal), and that in words."""
        return tuple(self._crew.exits)

    def when_ended(self, call: Callable[[], None]) -> None:
        """Have `call` called when the machine has been left and its last process has ended: the logs are complete, and still there.

        What it raises, leaving the machine raises; the other calls are made all the same.
        """
        self._crew.when_ended.append(call)

    @property
    def rate(self) -> float:
        """Emulated seconds for each real second."""
        return self._clock.rate

    def emulated_s(self) -> float:
        """The machine's clock, in emulated seconds."""
        return self._clock.now()

    def set_rate(self, rate: float) -> None:
        """Go on at `rate` emulated seconds for each real second, in every process of the machine. Raises HmmnetError."""
        self.host.set_rate(rate)

    async def create_process(self, node: str = "", cgroup: str = "") -> Process:
        """A new, empty process."""
        return await self.host.create_process(node, cgroup)

    async def process(self, node: str = "", cgroup: str = "") -> Process:
        """The same as `create_process`, for short programs."""
        return await self.host.create_process(node, cgroup)

    async def create_cgroup(self, name: str, limit_bytes: int | None = None) -> None:
        """A memory cgroup for processes to be created in."""
        await self.host.create_cgroup(name, limit_bytes)

    async def oom_kill(self, cgroup: str = "") -> int:
        """Kill the process whose end frees most memory; its pid. See `Machine.oom_kill`."""
        return await self.host.oom_kill(cgroup)

    async def unplug(self, device: str) -> None:
        """Hot removal of a device, its pages home first. See `Machine.unplug`."""
        await self.host.unplug(device)

    async def report(self) -> dict[str, Any]:
        """Per link asked, reached and whether the emulation kept up; counters of the profile; devices."""
        return await self.host.report()

    async def check(self) -> dict[str, Any]:
        """See `Machine.check`."""
        return await self.host.check()

    def add_fault(self, fault: Plannable, **given: Any) -> int:
        """A fault begins; its number: a kind's name and what that takes (`on`, `probability` ...), or any form of one
        (`hmmnet.faults.forms`).

        Raises HmmnetError for what is none, what real processes cannot do, and what is not there.
        """
        return self.host.add_fault(named(one_fault(fault, given)))

    def remove_fault(self, number: int) -> None:
        """It ends. Raises HmmnetError when there is none of that number."""
        self.host.remove_fault(number)

    def list_faults(self) -> list[dict[str, Any]]:
        """The faults that are: number, whether it has begun, and what makes it."""
        return self.host.list_faults()

    def heal(self) -> None:
        """All faults end, whoever began them."""
        for one in self.list_faults():
            self.remove_fault(one["number"])

    async def kill_device(self, name: str) -> None:
        """``kill -9`` of a device process; returns when it is gone and the host knows."""
        await self._crew.kill(name)

    @property
    def running(self) -> tuple[str, ...]:
        """The devices whose processes run now."""
        return tuple(name for name in self._crew.records if not self._crew.has_ended(name))

    async def start_device(self, name: str) -> None:
        """Start a device again whose process has ended, empty; returns when it is ready.

        Raises KernelError: ENOENT, EBUSY (it runs); HmmnetError when it does not come.
        """
        await self._crew.restart(name)
        await until_ready(self.host, self._crew, [name])

    def pause_device(self, name: str) -> None:
        """SIGSTOP: the process is there and does nothing, until `resume_device`. Raises KernelError: ENOENT, ESRCH."""
        self._crew.signal(name, signal.SIGSTOP)

    def resume_device(self, name: str) -> None:
        """SIGCONT. Raises KernelError: ENOENT, ESRCH."""
        self._crew.signal(name, signal.SIGCONT)


async def start_devices(host: Host, crew: Crew) -> None:
    """Start every device and return when the host has welcomed all. Raises HmmnetError naming those that did not come."""
    await crew.start(host.control_endpoint, os.getpid())
    await until_ready(host, crew, list(crew.records))


async def start_again(crew: Crew, name: str, after_s: float) -> None:
    """A fault wants a device back, so many real seconds after its end: empty, as a new incarnation."""
    await crew.wait_ended(name)
    await trio.sleep(after_s)
    if not crew.ending and crew.has_ended(name):
        await crew.restart(name)


async def until_ready(host: Host, crew: Crew, names: Sequence[str]) -> None:
    """Return when the host has welcomed the devices `names`. Raises HmmnetError naming those that did not come."""

    async def one(name: str) -> None:
        await host.device_ready(name)
        crew.ready(name)

    async def until_ended(name: str) -> None:
        how = await crew.wait_ended(name)
        raise HmmnetError(f"device {name} {how} before it was ready; its message stands above")

    with trio.move_on_after(READY_S) as limit, only_error():
        async with trio.open_nursery() as watch:
            for name in names:
                watch.start_soon(until_ended, name)
            async with trio.open_nursery() as nursery:
                for name in names:
                    nursery.start_soon(one, name)
            watch.cancel_scope.cancel()
    if limit.cancelled_caught:
        missing = [name for name in names if crew.records[name].state != "ready"]
        raise HmmnetError(f"{len(missing)} of {len(names)} devices did not come within {READY_S:g} s: {', '.join(missing[:8])}")


def host_class(provider: str = HOST) -> Any:
    """The host's class, by entry point. Raises HmmnetError."""
    for entry in entry_points(group="hmmnet.host", name=provider):
        return entry.load()
    raise HmmnetError(f'no host "{provider}" is installed; install hmmnet itself ("pip install ." or "pip install -e ." in its folder)')


@asynccontextmanager
async def machine_directory(record: MachineRecord) -> AsyncIterator[Directory]:
    """Hold the runtime directory while the block runs; it goes at the end, whatever ended it. Raises MachineExists."""
    directory = Directory.create(record.name, record)
    try:
        sockets = directory.sockets()
        record.sockets = "" if sockets == directory.path else str(sockets)
        with suppress(OSError):  # the disk is full: what was signed first names the process, too
            directory.sign(record)
        directory.write(record)
        yield directory
    finally:
        directory.remove()


async def serve(host: Host, running: trio.Event, end: trio.Event, over: trio.Event) -> None:
    """Run the host, which `running` tells, until `end` is set; `over` says that it is over."""
    try:
        async with host.running():
            running.set()
            await end.wait()
    finally:
        over.set()


async def to_its_end(function: Callable[..., Awaitable[None]], *arguments: Any, **keywords: Any) -> None:
    """Run `function` whatever is cancelled around it: a host that is cancelled with its program could not say goodbye any more."""
    with trio.CancelScope(shield=True):
        await function(*arguments, **keywords)


async def wait_shielded(event: trio.Event) -> None:
    """Wait also when cancelled."""
    with trio.CancelScope(shield=True):
        await event.wait()


@asynccontextmanager
async def embedded(
    topology: Topology, name: str, rate: Rate, transport: LaunchKind, seed: int = 0, plan: Plan = NO_FAULTS
) -> AsyncIterator[LaunchedMachine]:
    """Run a machine with the host in this trio run; the faults of `plan` begin when every device is there."""
    raise_file_limit()
    record = new_record(name, topology.name, "program")
    async with AsyncExitStack() as stack:
        directory = await stack.enter_async_context(machine_directory(record))
        stack.callback(stop_logging, log_to(directory.logs, "host"))

        def save() -> None:
            directory.write(record)

        def lost(device: str, how: str) -> None:
            host.device_exited(device, how)

        def changed(device: str, state: str, how: str) -> None:
            if state == "ready":  # also one that a fault wanted back
                crew.ready(device)
            else:
                crew.lost(device, how)

        cables = stack.enter_context(Cables.laid(topology.device_names if transport == "cable" else ()))
        keys, extra = _beyond_loopback(directory, cables)
        clock = EmulatedClock()  # its rate is measured before anything else wants the cores
        wire: Transport = stack.enter_context(ZmqTransport(curve=keys))
        sockets = Path(record.sockets or directory.path)
        probe = f"ipc://{sockets / 'measure'}" if transport in {"ring", "ipc"} else "tcp://127.0.0.1:*"
        clock.set_rate(await automatic_rate(topology, wire, probe, ring=transport == "ring") if rate == "auto" else rate)
        crew = Crew(topology, directory, ZygoteClient(), changed=save, lost=lost, extra=extra)
        record.devices = list(crew.records.values())
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(cables.stop)
        stack.push_async_callback(crew.end)
        nursery.start_soon(to_its_end, crew.run)
        nursery.start_soon(to_its_end, cables.run)
        place = {"scheme": "tcp", "address": HOST_ADDRESS} if cables else {"scheme": transport}
        host: Host = host_class()(topology, wire, sockets, directory.secret(), clock, name, seed=seed, **place)
        host.on_change, host.on_unplugged = changed, crew.unplugged
        host.on_restart = lambda device, down_s: nursery.start_soon(start_again, crew, device, down_s / clock.rate)
        running, end, over = trio.Event(), trio.Event(), trio.Event()
        stack.push_async_callback(wait_shielded, over)
        stack.callback(end.set)
        stack.callback(crew.expect_end)
        nursery.start_soon(to_its_end, serve, host, running, end, over)  # not `nursery.start`: cancelled, that waits for the end of `serve`
        await running.wait()
        await start_devices(host, crew)
        record.rate, record.state, record.client_endpoint = clock.rate, "running", host.client_endpoint
        save()
        machine = LaunchedMachine(name, topology, host, crew, clock, directory, cables)
        plan.begin(machine.add_fault)
        yield machine
        cables.repair()  # goodbyes are for everybody


def _beyond_loopback(directory: Directory, cables: Cables) -> tuple[CurveKeys | None, dict[str, dict[str, str]]]:
    """The host's keys, and what each device is told of its cable; nothing where there are no cables."""
    if not cables:
        return None, {}
    keys = fresh_keys()
    write_keys(directory.keys_file, keys)
    return keys, {name: {"namespace": cable.namespace, "keys_file": str(directory.keys_file)} for name, cable in cables.items()}


class Launch:
    """What `launch` returns: enter it with ``async with`` (in trio) or ``with`` (anywhere else)."""

    def __init__(
        self, topology: Topology, name: str | None, rate: Rate, transport: LaunchKind, seed: int = 0, plan: Plan = NO_FAULTS
    ) -> None:
        self._topology = topology
        self.plan = plan
        """The faults that begin when every device is there."""
        self._seed = seed
        self._name = name
        self._rate = rate
        self._transport = transport
        self._inside: AbstractAsyncContextManager[LaunchedMachine] | None = None
        self._blocking: Blocking[LaunchedMachine] | None = None

    async def __aenter__(self) -> LaunchedMachine:
        assert self._inside is None, "a launch is entered once"
        only_under_trio("hmmnet.launch(...)")
        name = self._name or f"{as_name(self._topology.name)[:16]}-{os.getpid()}-{next(_numbers)}"
        self._inside = embedded(self._topology, name, self._rate, self._transport, self._seed, self.plan)
        with only_error():
            return await self._inside.__aenter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._inside is not None
        with only_error(error):
            await self._inside.__aexit__(kind, error, trace)

    def __enter__(self) -> LaunchedBlockingMachine:
        self._blocking = Blocking(lambda: Launch(self._topology, self._name, self._rate, self._transport, self._seed, self.plan))
        return LaunchedBlockingMachine(self._blocking.start(), self._blocking)

    def __exit__(self, *error: object) -> None:
        assert self._blocking is not None
        self._blocking.stop()


@documented_by(LaunchedMachine)
class LaunchedBlockingMachine(BlockingMachine):
    """A launched machine for programs without trio."""

    def __init__(self, machine: LaunchedMachine, loop: Blocking[LaunchedMachine]) -> None:
        super().__init__(machine, loop)
        self._launched = machine
        self.name = machine.name
        self.topology = machine.topology

    @property
    def devices(self) -> tuple[DeviceRecord, ...]:
        """See `LaunchedMachine.devices`."""
        return self._launched.devices

    @property
    def rate(self) -> float:
        """See `LaunchedMachine.rate`."""
        return self._launched.rate

    def set_rate(self, rate: float) -> None:
        """See `LaunchedMachine.set_rate`."""
        self._loop.ask(lambda: self._launched.set_rate(rate))

    def add_fault(self, fault: Plannable, **given: Any) -> int:
        """See `LaunchedMachine.add_fault`."""
        return self._loop.ask(lambda: self._launched.add_fault(fault, **given))

    def remove_fault(self, number: int) -> None:
        """See `LaunchedMachine.remove_fault`."""
        self._loop.ask(lambda: self._launched.remove_fault(number))

    def list_faults(self) -> list[dict[str, Any]]:
        """See `LaunchedMachine.list_faults`."""
        return self._loop.ask(self._launched.list_faults)

    def heal(self) -> None:
        """See `LaunchedMachine.heal`."""
        self._loop.ask(self._launched.heal)

    def kill_device(self, name: str) -> None:
        """See `LaunchedMachine.kill_device`."""
        self._loop.call(self._launched.kill_device, name)

    def start_device(self, name: str) -> None:
        """See `LaunchedMachine.start_device`."""
        self._loop.call(self._launched.start_device, name)

    def pause_device(self, name: str) -> None:
        """See `LaunchedMachine.pause_device`."""
        self._loop.ask(lambda: self._launched.pause_device(name))

    def resume_device(self, name: str) -> None:
        """See `LaunchedMachine.resume_device`."""
        self._loop.ask(lambda: self._launched.resume_device(name))


def launch(
    topology: str | Path | Topology = "two-gpus",
    *,
    name: str | None = None,
    rate: Rate = "auto",
    transport: LaunchKind = "ring",
    personality: Personality | None = None,
    seed: int = 0,
    faults: Plannable = (),
) -> Launch:
    """Start a machine for this program: ``async with hmmnet.launch(...) as machine`` under trio, ``with ...`` in scripts and notebooks.

    `topology` is a preset's name, a TOML file or a `Topology`. `rate` is how many emulated seconds a real one has; ``auto`` measures what
    this computer moves and slows the emulated clock so that the links hold. `name` is how ``hmmnet ps`` shows it. `transport` is what the
    processes talk over: ``ring`` (Unix sockets, with page data in shared memory), ``ipc`` (sockets alone), ``tcp`` (loopback), or
    ``cable``: each device in a network namespace of its own, behind a cable that can be made bad (`hmmnet.cable`; call its `isolate`
    first, at the beginning of the process, and nothing of it is seen outside). `personality` says whose rules the host keeps, ``today``
    or ``v25``, where not those that the topology names. `seed` is what chances of faults are drawn from, at the host and in each life of
    each device: which occurrence a fault hits is the same in each launch, when it comes is the computer's doing. `faults` begin when
    every device is there: a plan, its file, faults, dictionaries, kinds (`hmmnet.faults.forms`). Raises TopologyError, PlanError (a plan
    with mistakes, or one that real processes cannot do) and HmmnetError (a rate, a transport or a personality that there is not) here;
    entering raises MachineExists when `name` is taken, and HmmnetError when a device does not start.
    """
    if transport not in LAUNCH_KINDS:
        raise HmmnetError(f"there is no transport {transport!r}; there are {', '.join(LAUNCH_KINDS)}")
    if not isinstance(topology, str | Path | Topology):
        raise HmmnetError(f"topology is {topology!r}; a preset's name, a TOML file or a Topology is wanted")
    machine = topology if isinstance(topology, Topology) else load(topology, installed_models() or None)
    plan = as_plan(faults)
    plan.check("real", machine)
    return Launch(with_personality(machine, personality), name, check_rate(rate), transport, seed, plan)
