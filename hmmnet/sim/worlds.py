"""The two worlds, as a command line chooses between them."""

from __future__ import annotations

import math
import signal
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar

import trio

from hmmnet.blocking import only_error

from .run import run_virtual

WorldName = Literal["real", "sim"]
WORLDS: tuple[WorldName, ...] = ("real", "sim")
T = TypeVar("T")


def run_in(world: WorldName, main: Callable[..., Awaitable[T]], *arguments: Any, seed: int = 0) -> T:
    """`trio.run` as `world` wants it: in real time, or in virtual time from `seed`, for as long as it takes. In the main thread.

    Ctrl-C in real time cancels `main`, and is raised as KeyboardInterrupt once that has come to its end.
    """
    if world == "sim":
        return run_virtual(main, *arguments, seed=seed, limit_s=math.inf)
    with only_error():
        return trio.run(_until_interrupted, main, *arguments)


async def _until_interrupted(main: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """`main`, cancelled at the first SIGINT: a KeyboardInterrupt out of the blue would leave half a step behind, wherever it strikes."""
    interrupted = False
    done: list[T] = []

    async def watch() -> None:
        nonlocal interrupted
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            async for _ in signals:
                interrupted = True
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        done.append(await main(*arguments))
        nursery.cancel_scope.cancel()
    if interrupted:
        raise KeyboardInterrupt
    return done[0]
