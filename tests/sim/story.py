"""A story in which much could happen in another order: three tasks on two devices, pages that all want, a fork, and a death.

``python -m tests.sim.story SEED`` prints the digest of the run.
"""

from __future__ import annotations

import sys

import numpy as np
import trio

import hmmnet
from hmmnet.sim import SimulatedMachine

COUNT = 1 << 13
NBYTES = COUNT * 8


async def story(machine: SimulatedMachine) -> list[int]:
    """Sums that do not depend on the order."""
    process = await machine.create_process()
    shared = await process.malloc(NBYTES)
    await process.write(shared, np.arange(COUNT, dtype="<u8"))
    sums: list[int] = []

    async def worker(device: str, placement: str) -> None:
        out = await process.malloc(NBYTES)
        for _ in range(3):
            await process.launch("vector_add", device, placement, a=shared, b=shared, out=out, n=COUNT, dtype="<u8")
            sums.append(int((await process.read_array(out, "<u8", COUNT)).sum()))
            await process.migrate(shared, NBYTES, device)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker, "gpu0", "demand")
        nursery.start_soon(worker, "gpu1", "demand")
        nursery.start_soon(worker, "gpu1", "remote")
    await process.migrate(shared, NBYTES, "host")
    child = await process.fork()
    await child.store(shared, 7)
    await machine.kill_device("gpu1")
    sums += [await process.load(shared), await child.load(shared)]  # type: ignore[list-item]  # both are whole numbers
    await child.exit()
    await process.exit()
    return sums


if __name__ == "__main__":
    print(hmmnet.simulate(story, seed=int(sys.argv[1])).digest)
