"""The host of a machine: endpoints, peers, processes; everything of this folder put together.

`Host` runs as tasks of whoever enters `running`: a program that embeds it (`hmmnet.launch`), or the host process (`__main__.py`). Devices
connect to the control endpoint, programs in other processes to the client endpoint; both say hello with the machine's secret.

**When a device is lost** its session ends first: it said BYE, fell silent, was replaced, or the launcher saw its process end. At that
moment, in one step: no new work reaches it, its transfers are cancelled, and its zone is marked lost, so that a CPU access to a page that
was only there is a SIGBUS that names device and cause. Migrations that were under way give up, which puts the pages in transit back.
Then, in a task: the fence is waited for, its contexts leave the hubs, and what is left of its page map goes away.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import trio

from hmmnet.errors import KernelError, PeerLost, ProtocolError, RemoteError
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import BulkReceiver, BulkSender
from hmmnet.faults.injector import HOST, Injector
from hmmnet.faults.kinds import Fault
from hmmnet.faults.network import Network
from hmmnet.faults.taps import TappedChannel, TappedListener
from hmmnet.faults.targets import check_target
from hmmnet.pages import Words
from hmmnet.sleeping import Completion
from hmmnet.topology import Topology
from hmmnet.wire.exchange import HEARTBEAT_S, LEASE_S, RETRY_S
from hmmnet.wire.messages import Call, Hello, Inject, Inspect, Rate, Recall
from hmmnet.wire.server import Server
from hmmnet.wire.session import Session
from hmmnet.wire.transport import Channel, Listener, Transport

from . import audit
from .admission import Admission, Connecting
from .audit import NO_MIRRORS, Audit, Mirrored
from .calls import new_client
from .checking import Checker
from .contexts import Contexts
from .device import Device, Life
from .devmem import PageMap
from .dma import Dma
from .dma_map import DeviceDma, DmaRoutes, page_map_owners
from .homing import Homing
from .injection import Injection, own_injector
from .interconnect import Interconnect
from .link import SessionLink
from .oom import OomKiller
from .personality import personality_named
from .process import Process
from .processes import ProcessTable
from .relay import copy_across
from .requests import Requests
from .telemetry import Telemetry

log = logging.getLogger("hmmnet.host")


class Host:
    """A machine's host. `directory` is where ipc endpoints lie; `scheme` is ``ring``, ``ipc``, ``tcp`` (at `address`) or ``mem``.

    ``ring`` is ``ipc`` with page data in shared memory, for devices that can open it. Times are in real seconds.
    `personality` is whose rules it keeps, when not those that the topology names. Raises HmmnetError for one that there is not.
    `seed` is what chances of faults are drawn from: the host's, and those of each life of each device (`injector` has its own).
    """

    def __init__(
        self,
        topology: Topology,
        transport: Transport,
        directory: Path,
        secret: bytes,
        clock: EmulatedClock,
        name: str = "machine",
        *,
        scheme: str = "ipc",
        address: str = "127.0.0.1",
        heartbeat_s: float = HEARTBEAT_S,
        lease_s: float = LEASE_S,
        retry_s: float = RETRY_S,
        incarnation: int | None = None,
        injector: Injector | None = None,
        personality: str = "",
        seed: int = 0,
    ) -> None:
        self.personality = personality_named(personality or topology.personality)
        self.topology = topology
        self.name = name
        self.clock = clock
        self.memory = self.personality.memory()
        self.injector = injector or own_injector(clock, seed)
        self.points = self.memory.points = self.injector.points_of(HOST)
        self.injection = Injection(self, self.injector)
        self._seed = seed
        self.network = Network(Random(f"{seed} wires"))  # noqa: S311 - chance, not secrecy
        """What happens to messages on the wires to the devices (a simulated machine has a network of its own at their other end)."""
        self.faults = self.injection.carrier(clock)
        """The faults of this machine, where the host carries them out (a simulated machine has its own)."""
        self.corrected_errors: Counter[str] = Counter()
        """Errors of memory that ECC has corrected, by device."""
        for node in topology.nodes:
            self.memory.add_node(node.name, node.pages)
        self.interconnect = Interconnect(topology, clock, self.memory)
        self._routes = DmaRoutes(topology)
        self.devices = {spec.name: Device(spec) for spec in topology.devices}
        self._table = ProcessTable(self.memory, self.personality)
        self.spaces, self.hubs, self.processes = self._table.spaces, self._table.hubs, self._table.processes
        self.late_callbacks = self._table.late_callbacks
        self._oom = OomKiller(self.memory, self.spaces, self.processes, self.spawn)
        self.memory.relief.killer = self._oom.out_of_memory
        self.links: dict[int, SessionLink] = {}
        """Living devices by zone."""
        self.homing = Homing(self.memory, self.links, self.spaces, self._context_of, self.interconnect.profile, clock.now)
        self.events = self.homing.events
        """Where to hear what happens."""
        self.contexts = Contexts(self.devices, self.hubs, self.interconnect.profile)
        self._table.serve(self.homing, self.contexts)
        self.network.process_of = self.contexts.process_of
        beside = partial(self.interconnect.attach_beside, place=topology.nodes[0].name)
        self.kernel = self.personality.kernel(self.memory, self.spaces, beside, self.interconnect.detach)
        """What a v25 kernel exports to drivers in the host; None today."""
        self._copy = self.personality.copy(self.homing, self.links, self._context_of, copy_across)
        self._page_map_owners = page_map_owners(topology)
        self._transport = transport
        self._secret = secret
        self._directory = directory
        self._scheme = "ipc" if scheme == "ring" else scheme
        self._ring = scheme == "ring"
        self._address = address
        self._heartbeat_s, self._lease_s, self._retry_s = heartbeat_s, lease_s, retry_s
        self._incarnation = secrets.randbits(62) if incarnation is None else incarnation
        self._dma: dict[str, Dma] = {}
        self._servers: list[Server] = []
        self._nursery: trio.Nursery | None = None
        self._ending = False
        self._samples: Telemetry | None = None
        self._audit: Audit | None = None
        self.on_restart: Callable[[str, float], None] | None = None
        """Called with (device, emulated seconds) when a fault wants it started again then."""
        self.on_unplugged: Callable[[str], None] | None = None
        """Called with a device that is taken out in order, before it is told goodbye."""
        self.on_change: Callable[[str, str, str], None] | None = None
        """Called with (device, ``ready`` or ``lost``, how) whenever a device comes or goes, until the machine ends."""
        self.on_refused: Callable[[str], None] | None = None
        """Called with a device that the IOMMU refuses an access, at that moment."""
        self.control_endpoint = ""
        """Where devices connect, while the host runs."""
        self.client_endpoint = ""
        """Where programs connect, while the host runs."""

    # --- serving --------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Host]:
        """Serve while the block runs. At its end every peer is told goodbye. Raises HmmnetError when an endpoint cannot be bound."""
        failure: Exception | None = None
        async with AsyncExitStack() as stack:
            samples = await self._telemetry_channel(stack)
            self._samples = Telemetry(samples, self._secret, self.links)
            admission = Admission(
                self.topology,
                self._transport,
                self.clock,
                self.memory,
                self._endpoint,
                self._incarnation,
                self._lease_s,
                samples.endpoint,
                ring=self._ring,
                tap=self._tapped,
                seed=self._seed,
            )
            control = await self._listen(stack, "control")
            if self._scheme != "mem":
                control = TappedListener(control, self.network)
            clients = await self._listen(stack, "client")
            self.control_endpoint, self.client_endpoint = control.endpoint, clients.endpoint

            def device_joined(session: Session, hello: Hello) -> None:
                self._device_joined(session, hello, admission.connecting(hello.name))

            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._samples.run)
                self._nursery.start_soon(self.network.run)
                for listener, welcome, joined in (
                    (control, admission.device, device_joined),
                    (clients, admission.program, self._program_joined),
                ):
                    real = self.clock.real
                    server = Server(
                        listener, self._secret, welcome, joined, real(self._heartbeat_s), real(self._lease_s), real(self._retry_s)
                    )
                    self._servers.append(server)
                    await self._nursery.start(self._serve, server)
                try:
                    yield self
                except Exception as error:  # noqa: BLE001 - raised again below: as it is, not in the nursery's group
                    failure = error
                finally:
                    self._ending = True
                    with trio.CancelScope(shield=True):
                        await self._goodbye()
                    self._nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    def crash(self, why: str) -> None:
        """It is gone from one moment to the next, in a simulated machine, which cuts its wires: nobody is told, no device is declared lost,
        nothing is asked of a peer again. Whoever waits for a device gets PeerLost with `why`; so does every call of a program from now on.
        """
        self._ending = True
        self.memory.crashed = why
        for process in self.processes.values():
            process.ended = True
        for server in self._servers:
            for session in server.sessions:
                session.cut(PeerLost(why))

    def owns(self, task: trio.lowlevel.Task) -> bool:
        """Whether it runs for the host itself, and not for a program that calls it."""
        nursery = task.parent_nursery
        while nursery is not None and nursery is not self._nursery:
            nursery = nursery.parent_task.parent_nursery
        return nursery is not None

    def _endpoint(self, name: str) -> str:
        if self._scheme == "tcp":
            return f"tcp://{self._address}:*"
        return f"mem://{self.name}/{name}" if self._scheme == "mem" else f"ipc://{self._directory / name}"

    async def _listen(self, stack: AsyncExitStack, name: str) -> Listener:
        listener = self._transport.listen(self._endpoint(name))

        async def close() -> None:
            with trio.CancelScope(shield=True):
                await listener.aclose()

        stack.push_async_callback(close)
        return listener

    def _tapped(self, channel: Channel, device: str) -> Channel:
        """A device's bulk channel, with the network in it; in a simulated machine that stands elsewhere."""
        return channel if self._scheme == "mem" else TappedChannel(channel, device, self.network)

    async def _telemetry_channel(self, stack: AsyncExitStack) -> Channel:
        channel = self._transport.bind_telemetry(self._endpoint("telemetry"))

        async def close() -> None:
            with trio.CancelScope(shield=True):
                await channel.aclose()

        stack.push_async_callback(close)
        return channel

    async def _serve(self, server: Server, *, task_status: trio.TaskStatus[None]) -> None:
        """`Server.run`. Cancelled from outside it ends before `running` does: the machine ends, and nobody waits for its peers any more."""
        try:
            await server.run(task_status=task_status)
        finally:
            self._ending = True
            server.hang_up()

    async def _goodbye(self) -> None:
        if self.memory.crashed:
            return
        self.network.heal()  # goodbyes are for everybody
        if self.points.armed:
            await self.points.at("session.bye")
        async with trio.open_nursery() as nursery:
            for server in self._servers:
                nursery.start_soon(server.bye)

    # --- devices --------------------------------------------------------------------------------------------------------------

    def _device_joined(self, session: Session, hello: Hello, connecting: Connecting) -> None:
        spec, zone = connecting.spec, connecting.zone
        rings = connecting.rings
        ring_in, ring_out = (None, None) if rings is None else (rings.to_device, rings.to_host)
        sender = BulkSender(connecting.bulk_in, self.clock, ring=ring_in)
        receiver = BulkReceiver(connecting.bulk_out, self.clock, ring=ring_out)
        link = SessionLink(spec, zone, self.memory.node_named(spec.node), session, sender, receiver, self.interconnect, self._lease_s)
        arena = None if connecting.shared is None else connecting.shared.arena
        life = Life(spec, hello.incarnation, hello.pid, link, PageMap(self.memory, link, spec.pages, arena))
        life.page_map.zone.pgmap_owner = self._page_map_owners[spec.name]
        self.interconnect.attach(life.page_map.zone, spec.node)
        self.links[zone] = link
        self.devices[spec.name].begin(life)
        over = Completion()

        def lost(cause: PeerLost) -> None:
            removed = life.page_map.removed
            how = "it was unplugged" if removed else str(cause)
            if self._ending:
                log.debug("device %s ends with the machine: %s", spec.name, how)
            else:
                log.log(logging.INFO if removed else logging.WARNING, "device %s is lost: %s", spec.name, how)
            self.links.pop(zone, None)
            self.devices[spec.name].end(life, how)
            life.page_map.lose(how)
            over.set()
            if self._samples is not None:
                self._samples.forget(zone)
            self._tell(spec.name, "lost", how)
            if not self._ending:
                self.injection.device_lost(spec.name)

        session.on_lost(lost)
        session.on(Inject, partial(self.injection.heard, f"{spec.name}/{hello.incarnation}"))
        assert self._nursery is not None, "peers join while the host runs"
        self._nursery.start_soon(self._live, life, session, connecting, over)

    def _tell(self, device: str, state: str, how: str) -> None:
        if not self._ending:
            self.events.device(device, state, how)
        if self.on_change is not None and not self._ending:
            self.on_change(device, state, how)

    def _refused(self, device: str, why: str) -> None:
        self.events.refused(device, why)
        if self.on_refused is not None:
            self.on_refused(device)

    async def _live(self, life: Life, session: Session, connecting: Connecting, over: Completion) -> None:
        """Everything that runs for one life of a device, and its burial."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(life.link.sender.run)
                nursery.start_soon(life.link.receiver.run)
                nursery.start_soon(life.link.run)
                maps = DeviceDma(life.name, life.zone, self._routes, self.interconnect.place_of)
                Requests(life, self.homing, self.clock, nursery, maps, self.personality, self._copy).attach(session)
                dma = self._dma[life.name] = Dma(life, self.interconnect, nursery, maps)
                dma.on_refused = self._refused
                dma.attach(session)
                await self._greet(life, session)
                if connecting.rings is not None:
                    connecting.rings.shut()
                await over.wait()
                nursery.cancel_scope.cancel()
            await life.link.fenced()  # until then every invalidation of what it mirrors waits for it
            await life.page_map.withdraw(self.spaces)
            life.page_map.zone.withdrawn = True
            for context in list(life.contexts.values()):
                await context.unsubscribe_all()
            life.contexts.clear()
            life.link.domains.clear()
            forget = partial(self.interconnect.detach, life.page_map.zone)
            if life.page_map.bury():
                forget()
            else:
                life.page_map.bury_late(forget)
        finally:
            for memory in (connecting.rings, connecting.shared):
                if memory is not None:
                    memory.close()
            with trio.CancelScope(shield=True):
                await connecting.bulk_in.aclose()
                await connecting.bulk_out.aclose()

    async def _greet(self, life: Life, session: Session) -> None:
        """The device is ready when it has answered something, whatever."""
        if self.points.armed:
            await self.points.at("session.joined", device=life.name)
        try:
            await session.request(Inspect())
        except (PeerLost, ProtocolError):  # an answer that cannot be read ends its session, too
            return
        except (RemoteError, KernelError) as error:
            log.info("device %s does not tell its figures: %s", life.name, error)
        self.injection.greet(session)
        self.devices[life.name].serves(life)
        self._tell(life.name, "ready", "")

    async def device_ready(self, name: str) -> None:
        """Return when the device called `name` has been welcomed and has answered a first request. Raises KernelError(ENOENT)."""
        await self.contexts.device(name).ready()

    def device_exited(self, name: str, how: str) -> None:
        """The launcher saw the device's process end: no lease needs to be waited out."""
        life = self.contexts.device(name).life
        if life is not None:
            life.link.gone(how)

    def _context_of(self, process: int, zone: int) -> int:
        """The number of a process's context on a living device, 0 for none."""
        link = self.links.get(zone)
        if link is not None:
            life = self.devices[link.name].life
            context = None if life is None else life.context_of(process)
            if context is not None:
                return context.number
        return 0

    # --- programs -------------------------------------------------------------------------------------------------------------

    def _program_joined(self, session: Session, hello: Hello) -> None:
        client = new_client(self)
        session.on(Call, client.call)
        session.on(Recall, client.recall)
        assert self._nursery is not None, "peers join while the host runs"
        nursery = self._nursery

        def lost(cause: PeerLost) -> None:
            log.info("program %s is gone: %s", hello.name, cause)
            nursery.start_soon(client.gone)

        session.on_lost(lost)

    @property
    def device_names(self) -> tuple[str, ...]:
        """The devices of the topology, in its order."""
        return self.topology.device_names

    def emulated_s(self) -> float:
        """The machine's clock, in emulated seconds."""
        return self.clock.now()

    async def create_cgroup(self, name: str, limit_bytes: int | None = None) -> None:
        """A memory cgroup for processes to be created in (see `host.mm.memcg`). Raises HmmnetError."""
        self.memory.cgroups.create(name, limit_bytes)

    async def oom_kill(self, cgroup: str = "") -> int:
        """See `Machine.oom_kill`. Raises HmmnetError, KernelError(ESRCH)."""
        return await self._oom.kill_worst(cgroup)

    async def unplug(self, name: str) -> None:
        """Hot removal of a device: its pages home, its memory gone, then goodbye; see `Machine.unplug`.

        Nothing new comes to its memory from the first moment on; what runs on it goes on by DMA until the goodbye. Raises
        KernelError(ENOENT, ENODEV, ENOMEM), PeerLost, HmmnetError (who holds what; the device is as before then).
        """
        life = self.contexts.device(name, "unplug").present("unplug")
        life.leaving = True
        try:
            await life.settled()
            await self.homing.unplug(life.page_map)
        except BaseException:
            life.leaving = False
            raise
        life.link.flush_freed()
        if self.on_unplugged is not None:
            self.on_unplugged(name)
        await life.link.session.bye()

    def incarnation(self, name: str) -> int:
        """Which life of the device has joined and is not over; 0: none. Raises KernelError(ENOENT)."""
        life = self.contexts.device(name).life
        return 0 if life is None else life.incarnation

    async def create_process(self, node: str = "", cgroup: str = "") -> Process:
        """A new, empty process; see `Machine.create_process`. Raises HmmnetError."""
        return self._table.create(node, cgroup)

    def spawn(self, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Run it beside everything else, while the host runs."""
        assert self._nursery is not None, "things happen while the host runs"
        self._nursery.start_soon(function, *arguments)

    def add_fault(self, fault: Fault) -> int:
        """A fault begins; its number. Raises HmmnetError for what real processes cannot do, and for what is not there."""
        check_target(fault, self.topology, "real")
        return self.faults.add(fault)

    def remove_fault(self, number: int) -> None:
        """It ends. Raises HmmnetError when there is none of that number."""
        self.faults.remove(number)

    def list_faults(self) -> list[dict[str, Any]]:
        """The faults that are, as plain data."""
        return self.faults.as_json()

    def set_rate(self, rate: float) -> None:
        """The emulated clock goes on at `rate` emulated seconds for each real one, here and at every peer."""
        self.clock.set_rate(rate)
        note = Rate(self.clock.epoch_monotonic_s, self.clock.epoch_emulated_s, self.clock.rate)
        for server in self._servers:
            for session in server.sessions:
                session.note(note)

    # --- figures --------------------------------------------------------------------------------------------------------------

    def audit(self, *, quiet: bool = True) -> list[str]:
        """What is wrong with the books (I1 to I5, I7, I8 of every process and memory) at this moment; empty when all is well.

        `quiet`: nothing is under way now. Then nothing may be in transit either, and without processes only the zero page may be in use.
        """
        return [*self.late_callbacks, *audit.books(self.memory, self.spaces.values(), quiet=quiet), *audit.domains(self.devices)]

    def left_over(self) -> list[str]:
        """What is still in use, processes too, when a program and all that it has begun have ended: see `audit.left_over`."""
        return [*(f"process {number} is left over" for number in self.spaces), *audit.left_over(self.memory)]

    def audit_changes(self, mirrors: Mapping[str, Sequence[tuple[int, Mirrored]]] = NO_MIRRORS) -> list[str]:
        """`audit`, while things move, of what has changed since the last call; and of those `mirrors`, by device: (process, mirror).

        For one who asks: what has been told is told again, but changes are looked at once.
        """
        if self._audit is None:
            self._audit = Audit(self.memory, self.spaces, self.devices, self.late_callbacks)
        return self._audit.changes(mirrors, self.clock.now())

    def poisoned_pages(self, device: str) -> int:
        """How many pages of the memory of `device` are broken, in its present life. KeyError for a name that nothing has."""
        life = self.devices[device].life
        return 0 if life is None else life.page_map.zone.poisoned()

    def audit_mirror(self, device: str, process: int, pages: Words, frames: Words, writable: npt.NDArray[np.bool_]) -> list[str]:
        """I1 of a mirror that can be seen: which translations that `device` holds of `process` the page table does not have.

        A device that is lost may believe what it likes: it is fenced.
        """
        life = self.devices[device].life
        context = None if life is None else life.context_of(process)
        return [] if context is None else audit.believed(context, f"the mirror of {device}", pages, frames, writable)

    async def check(self) -> dict[str, Any]:
        """The invariants, and those of every device's mirror, while the machine runs: see `Checker.check`."""
        return await Checker(self.memory, self.spaces, self.devices, self.clock, self.late_callbacks).check()

    @property
    def all_ready(self) -> bool:
        """Whether every device of the topology serves now."""
        return all(device.life is not None for device in self.devices.values())

    @property
    def settled(self) -> bool:
        """Whether no session has anything under way, and none has been silent."""
        return all(session.settled for server in self._servers for session in server.sessions)

    async def report(self) -> dict[str, Any]:
        """What the run did so far, as plain data.

        ``faults``: how often each kind of fault that was added has happened.
        ``links``: per link and direction what was asked and reached, and whether the emulation kept up; ``profile``: rows that
        `hmmnet.observe.counters.Profile.from_json` reads; ``devices`` and memory ``cgroups``, by name; the clock's ``rate`` and
        ``emulated_s``.
        """
        await self.interconnect.settle()
        for link in self.links.values():
            link.settle()
        return {
            "name": self.name,
            "topology": self.topology.name,
            "personality": self.personality.name,
            "rate": self.clock.rate,
            "emulated_s": self.clock.now(),
            "links": [dict(vars(link)) for link in self.interconnect.arbiter.report()],
            "profile": self.interconnect.profile.as_json(),
            "devices": {name: self._device_figures(device) for name, device in self.devices.items()},
            "processes": len(self.spaces),
            "poisoned_pages": self.memory.poisoned,
            "cgroups": self.memory.cgroups.as_json(),
            "faults": self.faults.fired(),
            "refused_peers": sum(server.refused_count for server in self._servers),
        }

    def _device_figures(self, device: Device) -> dict[str, Any]:
        life, dma = device.life, self._dma.get(device.spec.name)
        return {
            "model": device.spec.model,
            "kind": device.spec.kind,
            "state": "ready" if life is not None else "lost" if device.last_loss else "starting",
            "lives": device.lives,
            "last_loss": device.last_loss,
            "pid": 0 if life is None else life.pid,
            "zone": 0 if life is None else life.zone,
            "pages": device.spec.pages,
            "pages_used": 0 if life is None else life.page_map.used_pages,
            "bulk": "" if life is None else life.link.sender.carries,
            "contexts": 0 if life is None else len(life.contexts),
            "jobs": 0 if life is None else life.jobs,
            "ecc_corrected": self.corrected_errors[device.spec.name],
            "dma_bytes": {} if dma is None else dma.maps.as_json(),
            "iommu_refused": 0 if dma is None else dma.refused,
            "iommu_last": "" if dma is None else dma.last_refusal,
            "telemetry": {} if life is None or self._samples is None else self._samples.figures(life.zone),
        }
