"""The device process: says hello, becomes what it is told to be, serves until the host or its own time is over.

A device knows only its name, where the host is, and the machine's secret. What it is (model, memory) comes with the welcome, so a
topology is read in one place.

When the host is silent for a lease, the device drops its mirror: the host may take it for lost and give the pages to somebody else. It
keeps its memory, and goes on with the host's next word; a program that embeds the host may have computed, or stood in a debugger.

It ends when the host says goodbye, or says that it does not know the device any more; when the host's process has ended, or, where that is
not known, has been silent for `PATIENCE_S` more; when whoever started the device is gone (`hmmnet.lifeline`, and end of file on stdin); and
on SIGTERM or SIGINT. The same `serve` runs inside another trio run, over memory channels, for simulations and tests.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import trio

from hmmnet.errors import HmmnetError, PeerGone, PeerLost
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import BulkReceiver, BulkSender
from hmmnet.faults.injector import Injector, Points
from hmmnet.lifeline import stop_on_signal, wait_ended
from hmmnet.observe.logs import log_to
from hmmnet.sleeping import Completion
from hmmnet.wire.client import connect
from hmmnet.wire.messages import PROTOCOL_VERSION, Hello, Welcome
from hmmnet.wire.secrets import read_secret
from hmmnet.wire.session import Session
from hmmnet.wire.transport import ANSWER_BYTES_MAX, Transport

from .models import load_model
from .models.base import Device, Wiring
from .shared import shared_rings
from .spec import spec_of
from .telemetry import publish

STDIN_BYTES = 4096
CONNECT_S = 10.0
PATIENCE_S = 60.0
"""Silence after the lease until a device ends that cannot see its host's process: long enough for a network that is being mended."""

log = logging.getLogger("hmmnet.devices")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a device process is started; as JSON from the launcher's zygote, or from the command line."""

    name: str
    endpoint: str
    secret_file: str
    log_folder: str = ""
    """JSON lines go to ``NAME.jsonl`` in here; empty: warnings go to stderr."""
    host_pid: int = 0
    """The host's process, when it runs on this computer; 0 when that is not known."""
    connect_s: float = CONNECT_S
    patience_s: float = PATIENCE_S
    keys_file: str = ""
    """CURVE keys, for a host that is reached over a network."""
    namespace: str = ""
    """Path of a network namespace that the process enters first."""


async def serve(
    transport: Transport,
    endpoint: str,
    name: str,
    secret: bytes,
    incarnation: int,
    clock: EmulatedClock | None = None,
    connect_s: float = CONNECT_S,
    made: Callable[[Device], None] | None = None,
    trim: Callable[[], None] = lambda: None,
    pid: int = 0,
    points: Points | None = None,
    **timing: float,
) -> PeerLost:
    """Be the device called `name` until its session ends; returns why it ended. Says goodbye when cancelled.

    `incarnation` must be larger than that of any earlier life of this device. `made` is shown the device once it exists, `trim` is
    called when it has become idle. `pid` is whose process it is (default: this one's). Faults are injected at `points`.
    `timing` are `heartbeat_s`, `lease_s`, `retry_s`,
    `patience_s` of `connect`. Raises PeerRefused, PeerLost (no host), HmmnetError (no such model).
    """
    emulated = clock or EmulatedClock()
    hello = Hello(PROTOCOL_VERSION, "device", name, incarnation, pid or os.getpid(), secret)
    over = Completion()
    device: Device | None = None
    injector = None
    if points is None:  # nobody else decides what goes wrong here: the host may, over the session
        injector = injector_of(emulated)
        points = injector.points_of(name)
    hooks = points
    if hooks.armed:
        await hooks.at("device.hello")
    try:
        async with trio.open_nursery() as nursery:

            def prepare(session: Session, welcome: Welcome) -> None:
                nonlocal device
                device = assemble(transport, session, welcome, emulated, nursery, trim, hooks, injector)
                session.on_lost(lambda _: over.set())
                if welcome.telemetry:
                    samples = transport.connect_telemetry(welcome.telemetry)
                    nursery.start_soon(publish, samples, secret, name, welcome.zone, device.figures)
                if made is not None:
                    made(device)

            async with connect(transport, endpoint, hello, prepare=prepare, connect_s=connect_s, **timing) as (session, _):
                await over.wait()
                assert session.lost is not None, "the event is set by the loss"
                lost = session.lost
            if device is not None:
                device.fence()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise single(group) from None
    return lost


def assemble(
    transport: Transport,
    session: Session,
    welcome: Welcome,
    clock: EmulatedClock,
    nursery: trio.Nursery,
    trim: Callable[[], None],
    points: Points,
    injector: Injector | None = None,
) -> Device:
    """Make the device that a welcome describes, with its bulk streams; its tasks run in `nursery`. Raises HmmnetError."""
    spec = spec_of(welcome)
    model = load_model(spec.model)
    if points.armed and points.fails("device.welcome"):
        raise HmmnetError(f"{spec.name} cannot be what it is told to be: {points.why('device.welcome')}")
    if injector is not None:
        injector.random.seed(spec.chance)  # before the host tells of any fault
    clock.adopt(welcome.epoch_monotonic_s, welcome.epoch_emulated_s, welcome.rate)
    rings = shared_rings(spec.ring_file, spec.ring_token)
    ring_in, ring_out = (None, None) if rings is None else (rings.to_device, rings.to_host)
    receiver = BulkReceiver(transport.connect_channel(welcome.bulk_in, key=welcome.bulk_key), clock, ring=ring_in)
    sender = BulkSender(transport.connect_channel(welcome.bulk_out, ANSWER_BYTES_MAX, welcome.bulk_key), clock, ring=ring_out)
    nursery.start_soon(receiver.run)
    nursery.start_soon(sender.run)
    device = model(spec, welcome.zone, Wiring(session, sender, receiver, clock, nursery, points, injector, trim))
    # At the moment of the loss, before any other task runs: the lease is over.
    session.on_silent(device.drop_mirrors)
    session.on_lost(lambda _: device.fence())
    # DMA is never left half way, so nothing cancels it: without this a job would wait for the credits of a host that is gone.
    session.on_lost(lambda cause: sender.fail(str(cause)))
    session.on_lost(lambda cause: receiver.fail(str(cause)))
    return device


def injector_of(clock: EmulatedClock) -> Injector:
    """What is to happen at the points of a process of its own; what its chances are drawn from the host says (`assemble`)."""

    async def sleep(seconds: float) -> None:
        await clock.sleep_until(clock.now() + seconds)

    return Injector(Random(0), now=clock.now, sleep=sleep, on_node=on_own_node)  # noqa: S311 - chance, not secrecy


def on_own_node(action: str, node: str) -> None:
    """What a fault at a point of this process does to it; another's life is not ours."""
    log.warning("a fault: %s %s", action, node)
    os.kill(os.getpid(), signal.SIGKILL if action == "crash" else signal.SIGSTOP)


def single(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error in a group of nested nurseries; the group itself when there are several."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


# --- as a process -----------------------------------------------------------------------------------------------------------------


def run_device(settings: dict[str, Any]) -> int:
    """Be a device process from the first line to the exit code: 0 after a goodbye or a signal, 1 when the host was lost or refused us.

    `settings` are those of `Settings`. A forked child of the zygote calls this with every import done. Raises what is a bug, after it has
    been logged.
    """
    try:
        checked = msgspec.convert(settings, Settings)
        secret = read_secret(Path(checked.secret_file))
        if checked.log_folder:
            log_to(Path(checked.log_folder), checked.name)
        if checked.namespace:
            from hmmnet.cable.namespaces import enter

            enter(checked.namespace)
        lost = trio.run(_process, checked, secret)
    except (HmmnetError, OSError, msgspec.ValidationError) as error:
        print(f"hmmnet device {settings.get('name', '(no name)')}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        log.critical("the device crashed", exc_info=error)
        raise
    if lost is None or isinstance(lost, PeerGone):
        return 0
    log.warning("the host is lost: %s", lost)
    return 1


async def _process(settings: Settings, secret: bytes) -> PeerLost | None:
    """Serve; None when a signal, the end of stdin or of the host's process came first."""
    from hmmnet.wire.allocator import give_back_buffers
    from hmmnet.wire.keys import read_keys
    from hmmnet.wire.zmq_transport import ZmqTransport

    lost: PeerLost | None = None
    try:
        with ZmqTransport(curve=read_keys(Path(settings.keys_file)) if settings.keys_file else None) as transport:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stop_on_signal, nursery.cancel_scope)
                if stdin_is_a_pipe():
                    nursery.start_soon(_stop_with_stdin, nursery.cancel_scope)
                if settings.host_pid:
                    nursery.start_soon(_stop_with_host, settings.host_pid, nursery.cancel_scope)
                lost = await serve(
                    transport,
                    settings.endpoint,
                    settings.name,
                    secret,
                    time.time_ns(),
                    connect_s=settings.connect_s,
                    trim=give_back_buffers,
                    patience_s=math.inf if settings.host_pid else settings.patience_s,
                )
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise single(group) from None
    return lost


def stdin_is_a_pipe() -> bool:
    """Whether stdin ends when whoever started us does: a pipe or a socket, not a terminal, file or /dev/null."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


async def _stop_with_stdin(scope: trio.CancelScope) -> None:
    while True:
        await trio.lowlevel.wait_readable(0)
        if not os.read(0, STDIN_BYTES):
            log.info("ending: whoever started this device is gone (end of stdin)")
            scope.cancel()
            return


async def _stop_with_host(pid: int, scope: trio.CancelScope) -> None:
    await wait_ended(pid)
    log.warning("ending: the host is lost, its process %d has ended", pid)
    scope.cancel()
