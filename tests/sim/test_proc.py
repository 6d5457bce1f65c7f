"""What a program sees of its memory through /proc, while it moves; and the end of a process that is killed."""

from __future__ import annotations

import pytest
import trio

import hmmnet
from hmmnet.errors import KernelError
from hmmnet.pages import PAGE_SIZE
from hmmnet.program import PM_PRESENT, PM_SOFT_DIRTY, PM_SWAP, Process
from hmmnet.sim import SimulatedMachine, run_virtual, simulated

PAGES = 8


def on_machine(main: object) -> None:
    """Run `main` with a machine of two GPUs, in virtual time."""

    async def run() -> None:
        async with simulated("two-gpus") as machine:
            await main(machine)  # type: ignore[operator]

    run_virtual(run, seed=1, limit_s=60)


async def written(machine: SimulatedMachine | hmmnet.LaunchedMachine) -> tuple[Process, int]:
    process = await machine.create_process()
    address = await process.mmap(PAGES * PAGE_SIZE)
    await process.write(address, b"x" * PAGES * PAGE_SIZE)
    return process, address


def test_pages_on_a_device_are_resident_and_not_present() -> None:
    """pagemap says swap, smaps says Rss and Anonymous, and no Swap; soft-dirty is cleared and comes back with a store."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await written(machine)
        (before,) = await process.smaps()
        await process.migrate(address, 4 * PAGE_SIZE, "gpu0")
        (after,) = await process.smaps()
        assert (after.rss, after.anonymous, after.swap) == (before.rss, before.anonymous, 0)
        words = (await process.pagemap_words(address, PAGES)).tolist()
        assert [word & PM_SWAP != 0 for word in words] == [True] * 4 + [False] * 4
        assert [word & PM_PRESENT != 0 for word in words] == [False] * 4 + [True] * 4
        await process.clear_refs()
        await process.store(address, 1)
        dirty = (await process.pagemap_words(address, PAGES)).tolist()
        assert [word & PM_SOFT_DIRTY != 0 for word in dirty] == [True] + [False] * 7
        await process.clear_refs(soft_dirty=False)
        assert (await process.smaps())[0].referenced == 0

    on_machine(main)


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_a_process_that_is_killed_leaves_nothing(out_of_memory: bool) -> None:
    """Its jobs end, its pages on devices are free, whatever it asks then is ESRCH; its child lives on."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await written(machine)
        child = await process.fork()
        await process.migrate(address, PAGES * PAGE_SIZE, "gpu0")
        await process.kill(out_of_memory=out_of_memory)
        with pytest.raises(KernelError, match="ESRCH"):
            await process.read(address, 1)
        assert await child.read(address, PAGES * PAGE_SIZE) == b"x" * PAGES * PAGE_SIZE
        await child.kill(out_of_memory=out_of_memory)
        await trio.sleep(1)
        assert [device["pages_used"] for device in (await machine.report())["devices"].values()] == [0, 0]

    on_machine(main)
