"""The two worlds, as a command line chooses between them."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar

import trio

from .run import run_virtual

WorldName = Literal["real", "sim"]
WORLDS: tuple[WorldName, ...] = ("real", "sim")
T = TypeVar("T")


def run_in(world: WorldName, main: Callable[..., Awaitable[T]], *arguments: Any, seed: int = 0) -> T:
    """`trio.run` as `world` wants it: in real time, or in virtual time from `seed`, for as long as it takes."""
    if world == "sim":
        return run_virtual(main, *arguments, seed=seed, limit_s=math.inf)
    return trio.run(main, *arguments)
