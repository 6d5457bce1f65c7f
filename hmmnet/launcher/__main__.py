"""``python -m hmmnet.launcher``: a machine in the background, for ``hmmnet up --detach``.

Reads one JSON object from stdin (`topology`, `name`, `rate`, `transport`, `faults`, `seed`), writes one JSON object a line to stdout while
the machine starts: its record after every change, at last with the state ``running``, or ``{"error": TEXT}``. Then it lets go of stdout and
stderr, so that whoever started it can go, and holds the machine until SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import msgspec
import trio

from hmmnet.errors import HmmnetError
from hmmnet.lifeline import name_process
from hmmnet.topology.model import Topology

from .directory import MachineRecord
from .supervisor import STDERR, Supervisor, leaves


def main() -> int:
    """Be the launcher; the exit code."""
    name_process("up")
    config = msgspec.json.decode(sys.stdin.buffer.read())
    try:
        trio.run(hold, config)
    except HmmnetError as error:
        tell({"error": str(error)})
        return 1
    except BaseExceptionGroup as group:
        errors = leaves(group)
        if not all(isinstance(error, HmmnetError) for error in errors):
            raise
        tell({"error": "; ".join(dict.fromkeys(map(str, errors)))})
        return 1
    return 0


async def hold(config: dict[str, Any]) -> None:
    """Hold the machine until a signal."""
    telling = True

    def changed(record: MachineRecord) -> None:
        if telling:
            tell(msgspec.to_builtins(record))

    supervisor = Supervisor(
        msgspec.convert(config["topology"], Topology),
        config["name"],
        config["rate"],
        config["transport"],
        changed,
        quiet=True,
        faults=config.get("faults", ()),
        seed=config.get("seed", 0),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signal, nursery.cancel_scope)
        await nursery.start(supervisor.run)
        telling = False
        let_go(supervisor.directory.logs / STDERR)


async def stop_on_signal(scope: trio.CancelScope) -> None:
    """Cancel `scope` when the user or the system wants the end."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async for _ in signals:
            scope.cancel()
            return


def let_go(errors: os.PathLike[str]) -> None:
    """Read and write nothing of our starter's any more: whoever reads our output sees its end now."""
    nothing = os.open(os.devnull, os.O_RDWR)
    log = os.open(errors, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for target, source in ((0, nothing), (1, nothing), (2, log)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(log)


def tell(message: dict[str, Any]) -> None:
    """One line to our starter, if it still listens."""
    try:
        sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        return


if __name__ == "__main__":
    sys.exit(main())
