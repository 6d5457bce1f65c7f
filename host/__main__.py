"""``python -m hmmnet.host``: the host as a process of its own, held by a launcher.

It reads one JSON object a line from stdin: first its `Config`, then what the launcher sees, ``{"exited": DEVICE, "how": TEXT}``, and faults
that are to begin, ``{"faults": [WHAT MAKES ONE, ...]}``, each with its `place` in a plan. It writes one JSON object a line to stdout:
``{"control": ENDPOINT, "client": ENDPOINT, "rate": NUMBER}`` when it serves, then
``{"device": NAME, "state": "ready" | "lost", "how": TEXT}`` whenever a device comes or goes, ``{"device": NAME, "state": "unplugged"}``
before one is told goodbye that is taken out in order, ``{"restart": NAME, "after": SECONDS}`` when a fault wants a device started again,
so many real seconds after its end, ``{"fired": {KIND: COUNT}}`` when faults have happened, and
``{"refused": TEXT}`` for the first that cannot begin, or ``{"begun": COUNT}`` when all have. It says goodbye to its peers and ends on
SIGTERM, SIGINT, and at the end of stdin: then its launcher is gone.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import trio

from hmmnet.errors import HmmnetError, KernelError
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.measure import automatic_rate
from hmmnet.faults.catalogue import fault
from hmmnet.lifeline import die_with_parent, name_process, stop_on_signal
from hmmnet.observe.logs import log_to
from hmmnet.topology import Topology
from hmmnet.wire.secrets import read_secret
from hmmnet.wire.transport import Kind
from hmmnet.wire.zmq_transport import ZmqTransport

from .service import Host

LINE_BYTES_MAX = 1 << 24
"""A configuration holds a topology of at most some thousand parts."""
READ_BYTES = 1 << 16
FIRED_EVERY_S = 0.2
"""Real seconds between looks at what faults did: seldom enough to cost nothing."""

log = logging.getLogger("hmmnet.host")


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the launcher says first. `rate` is emulated seconds for a real one; ``auto`` measures what this computer moves.

    `personality` is whose rules the host keeps, where not those that the topology names. `seed` is what chances of faults are drawn from.
    """

    name: str
    topology: Topology
    directory: str
    secret_file: str
    log_folder: str = ""
    rate: float | Literal["auto"] = "auto"
    transport: Kind = "ring"
    personality: Literal["", "today", "v25"] = ""
    seed: int = 0


class Told(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the launcher says: a device's process has `exited`, or `faults` are to begin."""

    exited: str = ""
    how: str = ""
    faults: tuple[dict[str, Any], ...] = ()


def tell(message: dict[str, Any]) -> None:
    """Write one line to the launcher. When it is gone, the end of stdin says so."""
    try:
        sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        log.info("nobody reads what the host tells")


async def lines(descriptor: int) -> AsyncIterator[bytes]:
    """Lines from a pipe, until its end. Raises HmmnetError for one that is too long."""
    async with trio.lowlevel.FdStream(descriptor) as stream:
        held = b""
        while data := await stream.receive_some(READ_BYTES):
            *whole, held = (held + data).split(b"\n")
            for line in whole:
                yield line
            if len(held) > LINE_BYTES_MAX:
                raise HmmnetError(f"a line on stdin is longer than {LINE_BYTES_MAX} bytes")


async def rate_for(config: Config, transport: ZmqTransport) -> float:
    """The rate that the configuration asks for, measured if it leaves that open."""
    if config.rate != "auto":
        return config.rate
    endpoint = "tcp://127.0.0.1:*" if config.transport == "tcp" else f"ipc://{Path(config.directory) / 'measure'}"
    return await automatic_rate(config.topology, transport, endpoint, ring=config.transport == "ring")


async def serve(config: Config, commands: AsyncIterator[bytes], obeying: trio.CancelScope) -> None:
    """Run the host until `commands` end or `obeying` is cancelled; only then it says goodbye, all its tasks alive. Raises HmmnetError."""
    secret = read_secret(Path(config.secret_file))
    with ZmqTransport() as transport:
        clock = EmulatedClock(await rate_for(config, transport))
        host = Host(
            config.topology,
            transport,
            Path(config.directory),
            secret,
            clock,
            config.name,
            scheme=config.transport,
            personality=config.personality,
            seed=config.seed,
        )
        host.on_change = lambda device, state, how: tell({"device": device, "state": state, "how": how})
        host.on_unplugged = lambda device: tell({"device": device, "state": "unplugged"})
        host.on_restart = lambda device, seconds: tell({"restart": device, "after": seconds / clock.rate})
        async with host.running():
            host.spawn(tell_fired, host)
            tell({"control": host.control_endpoint, "client": host.client_endpoint, "rate": clock.rate})
            with obeying:
                async for line in commands:
                    obey(host, line)


def obey(host: Host, line: bytes) -> None:
    """Do what the launcher says in one line."""
    try:
        told = msgspec.json.decode(line, type=Told)
        if told.exited:
            host.device_exited(told.exited, told.how)
        if told.faults and all(harm(host, given) for given in told.faults):
            tell({"begun": len(told.faults)})
    except (msgspec.MsgspecError, KernelError) as error:
        log.warning("the launcher told something that makes no sense: %s", error)


def harm(host: Host, given: dict[str, Any]) -> bool:
    """Whether a fault of the plan begins; the launcher hears of one that cannot."""
    place, kind = given.pop("place", ""), given.get("kind")
    try:
        host.add_fault(fault(**given))
    except HmmnetError as error:
        why = str(error)
        tell({"refused": f"{place}: {why.removeprefix(f'fault {kind}: ')}" if place else why})
        return False
    return True


async def tell_fired(host: Host) -> None:
    """The launcher hears how often faults have happened, soon after they did."""
    before: dict[str, int] = {}
    while True:
        fired = host.faults.fired()
        if fired != before:
            tell({"fired": fired})
            before = fired
        await trio.sleep(FIRED_EVERY_S)


async def process() -> None:
    """The whole process."""
    async with trio.open_nursery() as nursery:
        obeying = trio.CancelScope()
        nursery.start_soon(stop_on_signal, obeying)
        commands = lines(os.dup(0))
        try:
            first = await anext(commands, None)
            if first is None:
                raise HmmnetError("stdin ended before the configuration came; the host is started by `hmmnet up`")
            config = decode_config(first)
            if config.log_folder:
                log_to(Path(config.log_folder), "host")
            await serve(config, commands, obeying)
        finally:
            with trio.CancelScope(shield=True):
                await commands.aclose()  # type: ignore[attr-defined] # it is an async generator
        nursery.cancel_scope.cancel()


def decode_config(line: bytes) -> Config:
    """The configuration in the first line. Raises HmmnetError."""
    try:
        return msgspec.json.decode(line, type=Config)
    except msgspec.MsgspecError as error:
        raise HmmnetError(f"the host's configuration is wrong: {error}") from error


def main() -> int:
    """The command; returns the exit code."""
    die_with_parent(os.getppid())
    name_process("host")
    failed = False
    try:
        trio.run(process)
    except* HmmnetError as group:
        failed = True
        for error in group.exceptions:
            print(f"hmmnet host: {error}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
