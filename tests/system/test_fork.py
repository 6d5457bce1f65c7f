"""A family of processes on two GPUs: the same addresses, shared pages, and each its own data.

           parent ── fork ──> child ── fork ──> grandchild
             │                  │                  │
           gpu0               gpu1               gpu0        vector_add on the same pointers, at once, pages moving all the while

Oracle: what each process has stored, added by numpy.
"""

from __future__ import annotations

import numpy as np
import pytest
import trio

import hmmnet
from hmmnet.program import Process

COUNT = 1 << 14
NBYTES = 8 * COUNT
"""32 pages for each array: every group of 16 pages is shared, written and moved by several."""
BOUND_S = 60


async def add(process: Process, device: str, a: int, b: int, out: int, addend: float) -> None:
    """Store an addend of one's own over shared pages, add on a device, and check."""
    await process.write(b, np.full(COUNT, addend))
    await process.launch("vector_add", device, a=a, b=b, out=out, n=COUNT)
    assert (await process.read_array(out, "<f8", COUNT)).tolist() == (np.arange(COUNT) + addend).tolist()


async def stir(process: Process, array: int, seed: int) -> None:
    """Send parts of an array to and fro."""
    rng = np.random.default_rng(seed)
    for _ in range(6):
        page = int(rng.integers(0, 24))
        await process.migrate(array + page * 4096, 8 * 4096, ("gpu0", "gpu1", "host")[int(rng.integers(3))])


@pytest.mark.parametrize("seed", range(3))
async def test_each_process_of_a_family_has_its_own_data(seed: int) -> None:
    """Shared pages are copied when one of them stores, on the CPU or on a device, wherever the page is; nothing is left at the end."""
    with trio.fail_after(BOUND_S):
        async with hmmnet.launch("two-gpus", rate=1.0) as machine:
            parent = await machine.create_process()
            a, b, out = [await parent.mmap(NBYTES) for _ in range(3)]
            await parent.write(a, np.arange(COUNT, dtype="<f8"))
            await parent.write(b, np.zeros(COUNT))
            await parent.migrate(a, NBYTES, "gpu0")
            child = await parent.fork()
            await child.migrate(b, NBYTES // 2, "gpu1")
            grandchild = await child.fork()
            family = ((parent, "gpu0", 1.0), (child, "gpu1", 2.0), (grandchild, "gpu0", 3.0))
            for _ in range(3):
                async with trio.open_nursery() as nursery:
                    for number, (process, device, addend) in enumerate(family):
                        nursery.start_soon(add, process, device, a, b, out, addend)
                        nursery.start_soon(stir, process, a, 10 * seed + number)
            for process, _, addend in family:
                assert set((await process.read_array(b, "<f8", COUNT)).tolist()) == {addend}
                assert (await process.read_array(a, "<f8", COUNT)).tolist() == list(range(COUNT))
                await process.exit()
            report = await machine.report()
            assert report["processes"] == 0
            while any(figures["pages_used"] for figures in (await machine.report())["devices"].values()):
                await trio.sleep(0.01)
