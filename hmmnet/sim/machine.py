"""A machine inside one trio run: the host, and every device as a task with a wire that can be cut."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from fnmatch import fnmatchcase
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from random import Random
from typing import Any, cast

import trio
from trio.testing import MockClock

from hmmnet.blocking import only_error
from hmmnet.errors import HmmnetError, KernelError, PeerLost
from hmmnet.faults.carry import AtWork, Carrier, Undo
from hmmnet.faults.controls import Tally
from hmmnet.faults.effects import DeviceEffect, Effect, HostEffect, LinkEffect, NodeEffect
from hmmnet.faults.forms import Plannable, as_plan, one_fault
from hmmnet.faults.injector import HOST, Injector, PointFault
from hmmnet.faults.kinds import Fault
from hmmnet.faults.messages import MessageFault
from hmmnet.faults.network import Network
from hmmnet.faults.plan import plain
from hmmnet.faults.points import matching
from hmmnet.faults.targets import check_target
from hmmnet.machine import Host, host_class
from hmmnet.program import Machine, Process, documented_by
from hmmnet.topology.load import installed_models, load
from hmmnet.topology.model import Personality, Topology, with_personality
from hmmnet.wire.memory_transport import MemoryTransport

from . import crash
from .clock import JumpClock, VirtualClock, telling
from .leaving import closed, leaves, left_by
from .node import Node, NodeTransport
from .suffering import Suffering
from .trace import Trace

SECRET = bytes(32)
"""Everybody who can reach these wires is in this process."""
POINTS_SEED = 0x506F696E74
"""Chance at points is drawn apart from that of messages: one more fault there changes nothing here."""
HOST_CRASHED = "the host has crashed (fault host.crash), and with it every process and page of this machine"
PID = 1
"""The pid that devices give: none of them is a process."""

Serve = Callable[..., Awaitable[PeerLost]]


@documented_by(Machine)
class SimulatedMachine:
    """See `hmmnet.program.Machine`; beside it, what only a machine of tasks can do."""

    def __init__(
        self,
        name: str,
        topology: Topology,
        host: Host,
        wires: MemoryTransport,
        network: Network,
        injector: Injector,
        nursery: trio.Nursery,
        serve: Serve,
        clock: VirtualClock,
    ) -> None:
        self.name = name
        self.topology = topology
        self.host = host
        self.network = network
        """The faults of its wires."""
        self._clock = clock
        self.injector = injector
        """What happens at its protocol points (`hmmnet.faults.points`)."""
        injector.on_node = self._on_node
        self.carrier = Carrier(
            "sim",
            {
                HostEffect: host.injection.deed,
                DeviceEffect: self._in_devices,
                NodeEffect: self._to_nodes,
            },
            nursery.start_soon,
            clock.sleep,
            counted={PointFault: self._at_points, MessageFault: self._on_wires, LinkEffect: host.injection.link},
            in_vain=self._in_vain,
        )
        """The faults that were added, by number."""
        self._revived: dict[str, float] = {}
        self._kept: dict[str, Any] = {}
        """Memory of devices that have ended, which their next life begins with."""
        self._host_silent = False
        self.host_crashed = False
        """Whether the host is gone for good: every call raises PeerLost then, but those that are about devices and faults."""
        self._points = {device: injector.points_of(device) for device in topology.device_names}
        self._wires = wires
        self.nursery = nursery
        """Tasks in it end with the machine."""
        self._serve = serve
        self._nodes: dict[str, Node] = {}
        self._incarnations = dict.fromkeys(topology.device_names, 0)

    def __repr__(self) -> str:
        return f'<simulated machine "{self.name}": {", ".join(self.device_names)}>'

    @property
    def device_names(self) -> tuple[str, ...]:
        """The devices, in the topology's order."""
        return self.topology.device_names

    @property
    def rate(self) -> float:
        """Emulated seconds for each second of the run; 1 unless it was set: virtual time is the machine's."""
        return self._clock.rate

    def emulated_s(self) -> float:
        """The machine's clock, in emulated seconds."""
        return self._clock.now()

    def set_rate(self, rate: float) -> None:
        """Go on at `rate` emulated seconds for each second of the run, which stands for a real one: leases and timeouts are in those.

        Raises HmmnetError.
        """
        self._with_host()
        self.host.set_rate(rate)

    async def create_process(self, node: str = "", cgroup: str = "") -> Process:
        """See `Machine.create_process`."""
        self._with_host()
        return await self.host.create_process(node, cgroup)

    async def process(self, node: str = "", cgroup: str = "") -> Process:
        """The same as `create_process`, for short programs."""
        return await self.create_process(node, cgroup)

    async def create_cgroup(self, name: str, limit_bytes: int | None = None) -> None:
        """See `Machine.create_cgroup`."""
        self._with_host()
        await self.host.create_cgroup(name, limit_bytes)

    async def oom_kill(self, cgroup: str = "") -> int:
        """See `Machine.oom_kill`."""
        self._with_host()
        return await self.host.oom_kill(cgroup)

    async def unplug(self, device: str) -> None:
        """See `Machine.unplug`."""
        self._with_host()
        await self.host.unplug(device)

    async def check(self) -> dict[str, Any]:
        """See `Machine.check`."""
        self._with_host()
        return await self.host.check()

    async def report(self) -> dict[str, Any]:
        """See `Machine.report`."""
        self._with_host()
        return {**await self.host.report(), "faults": self.carrier.fired()}

    # --- devices --------------------------------------------------------------------------------------------------------------

    @property
    def running(self) -> tuple[str, ...]:
        """The devices that run now."""
        return tuple([name for name in self.device_names if name in self._nodes])

    @property
    def all_ready(self) -> bool:
        """Whether every device serves, as the host sees it."""
        return not self.host_crashed and self.host.all_ready

    @property
    def settled(self) -> bool:
        """Whether nothing is on its way: no message is late, and the host has heard of every device lately and waits for none."""
        return not self.host_crashed and self.network.idle and self.host.settled

    def device(self, name: str) -> Any:
        """The device called `name` itself, to look at (`hmmnet.devices.models.base.Device`). Raises KernelError(ENOENT) unless it runs."""
        node = self._nodes.get(name)
        if node is None or node.device is None:
            raise KernelError(2, "device", f"device {name} does not run")
        return node.device

    def audit(self, *, quiet: bool = False) -> list[str]:
        """What is wrong with the books of the host and the mirrors of its devices now (I1 to I5, I7, I8); empty when all is well.

        `quiet`: nothing is under way, so that nothing may be in transit. Of a machine whose host has crashed, whose books are gone: what
        devices use beyond their lease.
        """
        found = [] if self.host_crashed else self.host.audit(quiet=quiet)
        for name, node in self._nodes.items():
            for mirror in [] if self.host_crashed or node.device is None else node.device.mirrors():
                found += self.host.audit_mirror(name, *mirror)
        for name, node in self._nodes.items():
            if node.device is not None:
                found += self._used_beyond_lease(name, node.device)
        return found

    def audit_changes(self) -> list[str]:
        """`audit` of what has changed since the last call: as true, and some ten times as fast."""
        mirrors: dict[str, list[tuple[int, Any]]] = {}
        found: list[str] = []
        for name, node in self._nodes.items():
            device = node.device
            if device is not None and device.contexts:
                mirrors[name] = device.open_mirrors
                if device.fenced:
                    found += self._used_beyond_lease(name, device)
        if self.host_crashed:
            return found
        return self.host.audit_changes(mirrors) + found

    @staticmethod
    def _used_beyond_lease(name: str, device: Any) -> list[str]:
        """What a device that has not heard of the host for a lease translates all the same: pages may be somebody else's by now."""
        return [
            f"lease: {name} has heard nothing for longer than a lease, and has {len(mirror[1])} translations of process {mirror[0]}"
            for mirror in (device.mirrors() if device.fenced else ())
            if len(mirror[1])
        ]

    def left_over(self) -> list[str]:
        """What is still in use, when no process is there any more: of each device's own books, and of the host's (`Host.left_over`).

        Broken frames stay so. Nothing can be said of a machine whose host has crashed: who was to let go of what was known there.
        """
        if self.host_crashed:
            return []
        used = {
            name: node.device.memory.used_pages - self.host.poisoned_pages(name)
            for name, node in self._nodes.items()
            if node.device is not None
        }
        return [f"{name}: {frames} frames of its memory are left over" for name, frames in used.items() if frames] + self.host.left_over()

    async def start_device(self, name: str) -> None:
        """Start the device `name`, empty, as a new incarnation; returns when it is ready.

        Raises KernelError: ENOENT, EBUSY (it runs); HmmnetError when it cannot become what it is to be.
        """
        self._known(name, "start_device")
        if name in self._nodes:
            raise KernelError(16, "start_device", f"device {name} runs already")
        self._incarnations[name] += 1
        if self._host_silent and not self.host_crashed:
            self.network.hold(name)
        node = Node(NodeTransport(self._wires, name, self.network), trio.CancelScope(), self._incarnations[name])
        self._nodes[name] = node
        ready = False
        with only_error():
            async with trio.open_nursery() as watch:
                watch.start_soon(self._give_up_with, node, watch.cancel_scope)
                self.nursery.start_soon(self._be, name, node)
                if self.host_crashed:
                    await trio.sleep_forever()  # nobody answers it, and it gives up
                await self.host.device_ready(name)
                ready = True
                watch.cancel_scope.cancel()
        if not ready:
            raise node.failure or HmmnetError("the device ended before it was ready")

    @staticmethod
    async def _give_up_with(node: Node, scope: trio.CancelScope) -> None:
        """Nobody need wait for a device that has ended. (An error raised here would come together with a cancellation from elsewhere.)"""
        await node.ended.wait()
        scope.cancel()

    async def kill_device(self, name: str) -> None:
        """Its process is gone from one moment to the next, with its memory; the launcher tells the host. Raises KernelError(ENOENT)."""
        self._known(name, "kill_device")
        if name not in self._nodes:
            raise KernelError(2, "kill_device", f"device {name} does not run")
        self._crash(name)
        await trio.lowlevel.checkpoint()

    def incarnation(self, name: str) -> int:
        """Which life of the device it is, from 1 on, or was the last. Raises KernelError(ENOENT)."""
        self._known(name, "incarnation")
        return self._incarnations[name]

    async def device_ended(self, name: str, incarnation: int = 0) -> None:
        """Return when it does not run, or not as that incarnation (0: the one that it is now)."""
        node = self._nodes.get(name)
        if node is not None and incarnation in (0, node.incarnation):
            await node.ended.wait()

    def _crash(self, name: str, *, told: bool = True) -> None:
        node = self._nodes.pop(name)
        self.injector.resume(name)
        self.network.release(name, lost=True)
        node.transport.cut()
        node.scope.cancel()
        if told and not self.host_crashed:
            self.host.device_exited(name, "was killed")
        if name in self._revived:
            self.nursery.start_soon(self._again, name, self._revived[name])

    def _on_node(self, action: str, name: str) -> None:
        """A fault wants a device's life, or its silence; what does not run any more has neither."""
        if name not in self._nodes:
            return
        if action == "crash":
            self._crash(name)
        else:
            self._hang(name)

    async def hang_device(self, name: str) -> None:
        """It stops where it is (SIGSTOP): nothing that it is sent is read, nothing comes from it. Raises KernelError(ENOENT)."""
        self._known(name, "hang_device")
        if name not in self._nodes:
            raise KernelError(2, "hang_device", f"device {name} does not run")
        self._hang(name)
        await trio.lowlevel.checkpoint()

    def _hang(self, name: str) -> None:
        self.injector.stop(name)
        self.network.hold(name)

    async def resume_device(self, name: str) -> None:
        """It goes on (SIGCONT), with all that it was sent meanwhile. Raises KernelError(ENOENT)."""
        self._known(name, "resume_device")
        self._resume(name)
        await trio.lowlevel.checkpoint()

    def _resume(self, name: str) -> None:
        self.injector.resume(name)
        self.network.release(name)

    # --- faults ---------------------------------------------------------------------------------------------------------------

    def add_fault(self, fault: Plannable, **given: Any) -> int:
        """A fault begins, by kind and parameters or in any form of one (`hmmnet.faults.forms`); its number, for `remove_fault`.

        Raises HmmnetError for what is none, and for what a simulated machine cannot do, or has not.
        """
        one = one_fault(fault, given)
        whole = one if isinstance(one, Fault) else plain(one)
        check_target(whole, self.topology, "sim")
        return self.carrier.add(whole)

    def remove_fault(self, number: int) -> None:
        """It ends. Raises HmmnetError when there is none of that number."""
        self.carrier.remove(number)

    def list_faults(self) -> list[dict[str, Any]]:
        """The faults that are: number, whether it has begun, and what makes it."""
        return self.carrier.as_json()

    def heal(self) -> None:
        """All faults end."""
        self.carrier.heal()
        self.network.heal()
        self.injector.heal()

    def held_up(self) -> list[str]:
        """Faults that act, whom they hold, and which devices are silent: why nothing may move any more."""
        return self.carrier.told_now() + self.network.silent()

    def _at_points(self, fault: PointFault, tally: Tally) -> Undo:
        number = self.injector.add(fault, tally=tally)
        return AtWork(partial(self.injector.remove, number), partial(self.injector.count, number), partial(self.injector.held, number))

    def _on_wires(self, fault: MessageFault, tally: Tally) -> Undo:
        number = self.network.add(fault, tally)
        return AtWork(partial(self.network.discard, number), partial(self.network.count, number), partial(self.network.held, number))

    def _in_vain(self, fault: Fault) -> str:
        """Why a fault that begins now would happen to nobody; empty when it would not."""
        if self.host_crashed and all(map(_of_host, fault.effects)):
            return HOST_CRASHED
        meant = [name for name in self.device_names if fnmatchcase(name, fault.needs_running)]
        if meant and not any(name in self._nodes for name in meant):
            return f"{', '.join(meant)}: does not run; start it first, or `bounce` it"
        why: str = self.host.injection.nothing_there(fault)
        return why

    def _in_devices(self, effect: DeviceEffect) -> Undo:
        suffering = Suffering(effect)
        for name, node in self._nodes.items():
            if node.device is not None:
                suffering.begin(name, node.device)
        return AtWork(suffering, suffering.fired)

    def _made(self, name: str, node: Node, device: Any) -> None:
        """A device has started: it suffers what those of its name do now, as a real one is told when it comes."""
        node.device = device
        if name in self._kept:
            device.memory.begin_with(self._kept.pop(name))
        for undo in self.carrier.at_work:
            if isinstance(undo, AtWork) and isinstance(undo.end, Suffering):
                undo.end.begin(name, device)

    def _to_nodes(self, effect: NodeEffect) -> Undo:
        """Raises HmmnetError when nothing is called so."""
        if effect.node == HOST:
            return self._silence() if effect.deed == "hang" else self._crash_host()
        names = [name for name in self.device_names if fnmatchcase(name, effect.node)]
        if not names:
            raise HmmnetError(f'no device is called "{effect.node}"; there are {", ".join(self.device_names)}')
        running = [name for name in names if name in self._nodes]
        down_s = float(effect.settings.get("down", 0.0))
        if effect.deed == "revive":
            return self._revive(names, down_s)
        for name in running:
            if effect.settings.get("kept") and (device := self._nodes[name].device) is not None:
                self._kept[name] = device.memory
            if effect.deed in ("crash", "bounce", "unplug"):
                self._crash(name, told=effect.deed != "unplug")
            elif effect.deed == "unload":
                self._nodes[name].scope.cancel()
            elif effect.deed == "hang":
                self._hang(name)
        for name in names if effect.deed == "bounce" else ():  # one that has ended already starts again, too
            self.nursery.start_soon(self._again, name, down_s)
        return partial(self._resume_all, names) if effect.deed == "hang" else _nothing

    def _with_host(self) -> None:
        """Raises PeerLost when the host has crashed."""
        if self.host_crashed:
            raise PeerLost(HOST_CRASHED)

    def _crash_host(self) -> Undo:
        """The host is gone from one moment to the next (SIGKILL), with all of its memory; calls that are under way in it end. Devices hear
        nothing any more; those that start find nobody.
        """
        if not self.host_crashed:
            self.host_crashed = True
            self._wires.cut_listeners()
            for node in self._nodes.values():
                node.transport.cut()
            self.host.crash(HOST_CRASHED)
            self.nursery.start_soon(crash.end_calls, self.host, HOST_CRASHED)
        return _nothing

    def _silence(self) -> Undo:
        """The host stops where it is until that is undone. Devices that start meanwhile find nobody."""
        self.injector.stop(HOST)
        self._host_silent = True
        for name in self.device_names:
            self.network.hold(name)

        def undo() -> None:
            self._host_silent = False
            self.injector.resume(HOST)
            for name in self.device_names:
                self.network.release(name)

        return undo

    def _resume_all(self, names: Sequence[str]) -> None:
        for name in names:
            self._resume(name)

    def _revive(self, names: Sequence[str], down_s: float) -> Undo:
        self._revived.update(dict.fromkeys(names, down_s))

        def undo() -> None:
            for name in names:
                self._revived.pop(name, None)

        return AtWork(undo, lambda: 0)

    async def _again(self, name: str, down_s: float) -> None:
        """A fault wants it back. Another one may not let it: then it stays away, as a process does that fails to start."""
        await self._clock.sleep(down_s)
        if name not in self._nodes:
            with suppress(HmmnetError):
                await self.start_device(name)

    # --- devices, inside --------------------------------------------------------------------------------------------------------

    def _known(self, name: str, call: str) -> None:
        if name not in self._incarnations:
            raise KernelError(2, call, f'there is no device "{name}"; there are {", ".join(self.device_names)}')

    async def _be(self, name: str, node: Node) -> None:
        try:
            with node.scope:
                await self._serve(
                    node.transport,
                    self.host.control_endpoint,
                    name,
                    SECRET,
                    node.incarnation,
                    VirtualClock(),
                    pid=PID,
                    points=self._points[name],
                    made=partial(self._made, name, node),
                )
        except HmmnetError as error:
            node.failure = error
        if self._nodes.get(name) is node:
            del self._nodes[name]
            self.injector.resume(name)
            self.network.release(name, lost=True)
        node.ended.set()


@asynccontextmanager
async def simulated(
    topology: str | Path | Topology = "two-gpus",
    *,
    name: str = "simulated",
    trace: Trace | None = None,
    seed: int = 0,
    faults: Plannable = (),
    personality: Personality | None = None,
) -> AsyncIterator[SimulatedMachine]:
    """A machine while the block runs, in a trio run in virtual time (`run_virtual`). Raises TopologyError; HmmnetError in real time.

    `faults` (`hmmnet.faults.forms`) begin when all devices are there; `seed` is what their chance is drawn from. `personality`: as
    `hmmnet.launch`.
    """
    if not isinstance(trio.lowlevel.current_clock(), (JumpClock, MockClock)):
        raise HmmnetError("a simulated machine needs virtual time: run it with hmmnet.simulate, or hmmnet.sim.run_virtual")
    machine = topology if isinstance(topology, Topology) else load(topology, installed_models() or None)
    machine = with_personality(machine, personality)
    plan = as_plan(faults)
    watch = None if trace is None else trace.sent
    wires = MemoryTransport(watch)
    clock = VirtualClock()
    injector = Injector(Random(seed ^ POINTS_SEED), sleep=clock.sleep)  # noqa: S311 - chance, not secrecy
    host: Host = _host()(machine, wires, Path(), SECRET, clock, name, scheme="mem", incarnation=1, injector=injector)
    with only_error(), ExitStack() as saying:
        saying.callback(closed)
        async with trio.open_nursery() as nursery:
            async with host.running():
                network = Network(Random(seed), None if trace is None else trace.add)  # noqa: S311 - chance, not secrecy
                network.process_of = host.network.process_of
                if trace is not None:
                    injector.on_fired = trace.fired
                nursery.start_soon(network.run)
                world = SimulatedMachine(name, machine, host, wires, network, injector, nursery, _serve(), clock)
                for device in machine.device_names:
                    await world.start_device(device)
                plan.begin(world.add_fault)
                saying.enter_context(telling(world.held_up))
                try:
                    yield world
                except BaseException as error:
                    left_by(error)
                    raise
                finally:
                    leaves()
                    world.carrier.heal()
                    network.heal()
                    injector.heal(but="session.bye")
            nursery.cancel_scope.cancel()


def _of_host(effect: Effect) -> bool:
    """Whether it happens at the host, and nowhere else."""
    if isinstance(effect, PointFault):
        return all(point.side == "host" for point in matching(effect.point))
    return isinstance(effect, HostEffect | LinkEffect) or (isinstance(effect, NodeEffect) and effect.node == HOST)


def _nothing() -> None:
    """What is done is done."""


@cache
def _host() -> Any:
    """The host's class; looking it up takes longer than starting a machine."""
    return host_class()


@cache
def _serve() -> Serve:
    """What a device process runs, found as users' models are. Raises HmmnetError."""
    for entry in entry_points(group="hmmnet.device_service", name="serve"):
        return cast(Serve, entry.load())
    raise HmmnetError('devices are not installed; install hmmnet itself ("pip install ." or "pip install -e ." in its folder)')
