"""The two worlds, as a command line chooses between them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar

import trio

from hmmnet.blocking import only_error

from .interrupts import CtrlC
from .run import run_virtual

WorldName = Literal["real", "sim"]
WORLDS: tuple[WorldName, ...] = ("real", "sim")
T = TypeVar("T")
LIMIT_S = 6 * 3600.0
"""Virtual seconds that a command may take: no work takes as many minutes, and where nothing else happens they are over in ten real seconds.
"""


def run_in(world: WorldName, main: Callable[..., Awaitable[T]], *arguments: Any, seed: int = 0) -> T:
    """`trio.run` as `world` wants it: in real time, or in virtual time from `seed`, for `LIMIT_S` at most. In the main thread.

    Raises what `main` raises; SimulationStuck, in virtual time, when it has no end.
    Ctrl-C cancels `main`, and is raised as KeyboardInterrupt once that has come to its end.
    """
    if world == "sim":
        return run_virtual(main, *arguments, seed=seed, limit_s=LIMIT_S)
    ctrl_c = CtrlC()
    try:
        with only_error():
            return trio.run(_until_interrupted, ctrl_c, main, *arguments)
    finally:
        if ctrl_c.came:
            raise KeyboardInterrupt from None


async def _until_interrupted(ctrl_c: CtrlC, main: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    with trio.CancelScope() as scope, ctrl_c.cancels(scope):
        return await main(*arguments)
    raise KeyboardInterrupt  # nobody else cancels
