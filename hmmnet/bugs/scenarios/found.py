"""What a scenario finds, and what all of them need."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import numpy.typing as npt
import trio

from hmmnet.errors import HmmnetError
from hmmnet.pages import PAGE_SIZE
from hmmnet.program import Process

Numbers = npt.NDArray[np.uint64]
WORDS = PAGE_SIZE // 8
"""64-bit words of a page."""
PATIENCE_S = 1.0
"""Virtual seconds after which work of milliseconds does not go on."""


class Found(HmmnetError):
    """Something that must not be."""


async def together(works: Sequence[Callable[[], Awaitable[object]]], within_s: float = PATIENCE_S) -> None:
    """Do all at once. Raises Found when one fails, or does not end."""
    failed: list[HmmnetError] = []
    ended = 0

    async def one(work: Callable[[], Awaitable[object]]) -> None:
        nonlocal ended
        try:
            await work()
            ended += 1
        except HmmnetError as error:
            failed.append(error)

    with trio.move_on_after(within_s) as limit:
        async with trio.open_nursery() as nursery:
            for work in works:
                nursery.start_soon(one, work)
    if failed:
        raise Found(str(failed[0]))
    if limit.cancelled_caught:
        raise Found(f"{len(works) - ended} of {len(works)} did not end within {within_s:g} s: they wait for each other")


async def filled(process: Process, pages: int, *, aligned: int = 1) -> tuple[int, Numbers]:
    """Memory of `pages` pages that hold 0, 1, 2 ..., at a multiple of `aligned` pages: its address, and what it holds."""
    room = await process.mmap((pages + aligned - 1) * PAGE_SIZE)
    address = -(-room // (aligned * PAGE_SIZE)) * aligned * PAGE_SIZE
    numbers = np.arange(pages * WORDS, dtype=np.uint64)
    await process.write(address, numbers)
    return address, numbers


async def must_hold(process: Process, address: int, numbers: Numbers) -> None:
    """The CPU loads what was stored. Raises Found."""
    try:
        loaded = await process.read_array(address, "<u8", len(numbers))
    except HmmnetError as error:
        raise Found(f"memory that must be there is not: {error}") from error
    wrong = np.flatnonzero(loaded != numbers)
    if len(wrong):
        first = int(wrong[0])
        raise Found(f"{len(wrong)} words are wrong; the first at 0x{address + 8 * first:x} is {loaded[first]}, not {numbers[first]}")


async def must_sum(process: Process, device: str, address: int, numbers: Numbers, placement: str = "remote") -> None:
    """A device adds the words up as the CPU does. Raises Found."""
    try:
        result = await process.launch("reduction", device, placement, a=address, n=len(numbers), dtype="<u8")
    except HmmnetError as error:
        raise Found(f"a job on memory that is there failed: {error}") from error
    total, right = int(result.results["sum"]), int(numbers.sum())
    if total != right:
        raise Found(f"{device} sees other numbers than the CPU: their sum is {total}, not {right}")
