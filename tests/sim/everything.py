"""A program that passes every protocol point of host and devices once at least, and says what it saw."""

from __future__ import annotations

import numpy as np

from hmmnet.sim import SimulatedMachine
from hmmnet.topology.load import parse

MIB = 1 << 20
COMPOUND = 1 << 8
"""A dmirror's flag: huge pages go whole."""
PAGE = 4096
COUNT = 1 << 12
NBYTES = COUNT * 8
MACHINE = parse("""
[[memory]]
name = "node0"
size = "64 MiB"
[[device]]
name = "gpu[0-1]"
memory = "16 MiB"
[[device]]
name = "dmirror0"
model = "dmirror"
memory = "16 MiB"
[[link]]
a = "node0"
b = "gpu[0-1]"
bandwidth = "10 GB/s"
latency = "1 us"
[[link]]
a = "node0"
b = "dmirror0"
bandwidth = "10 GB/s"
latency = "1 us"
""")
MOVED = {6: NBYTES, 7: NBYTES, 8: 4 * PAGE, 10: 64 * PAGE, 12: 512, 13: 64 * PAGE}
"""Which of what was seen say how much has moved, and the most that can: bytes, or pages. All others are data."""
VALUES = np.arange(COUNT, dtype="<u8")


async def everything(machine: SimulatedMachine) -> list[object]:
    """What was read, in order."""
    await machine.create_cgroup("group", 32 * MIB)
    process = await machine.create_process(cgroup="group")
    seen: list[object] = []
    data, out = await process.mmap(NBYTES), await process.mmap(NBYTES)
    await process.write(data, VALUES)
    for device, placement in (("gpu1", "remote"), ("gpu0", "demand"), ("gpu1", "demand")):
        await process.launch("vector_add", device, placement, a=data, b=data, out=out, n=COUNT, dtype="<u8")
        seen += [await process.load(out + PAGE), int((await process.read_array(out, "<u8", COUNT)).sum())]
    seen.append(await process.migrate(data, NBYTES, "gpu0"))
    seen.append(await process.migrate(data, NBYTES, "host"))
    fresh = await process.mmap(4 * PAGE)
    seen += [await process.migrate(fresh, 4 * PAGE, "gpu0"), await process.load(fresh)]
    huge = await process.mmap(6 * MIB)
    block = -(-huge // (2 * MIB)) * 2 * MIB
    await process.madvise(block, 4 * MIB, "HUGEPAGE")
    await process.write(block, b"huge" * MIB)
    seen += [await process.migrate(block + 2 * MIB, 64 * PAGE, "gpu1"), await process.read(block + 2 * MIB, 4)]
    handle = await process.open("dmirror0")
    await handle.ioctl("flags", 0, 1, flags=COMPOUND)
    seen.append((await handle.ioctl("migrate_to_dev", block, 512)).cpages)
    await handle.close()  # evicts
    seen.append(await process.migrate(block, 64 * PAGE, "gpu0"))
    seen.append(await process.read(block, 2 * MIB) == b"huge" * (MIB // 2))
    file = await process.memfd_create(4 * PAGE)
    mapped = await process.mmap(4 * PAGE, shared=True, file=file)
    await process.write(mapped, b"file")
    child = await process.fork()
    await child.store(data, 7)
    await process.mprotect(out, NBYTES, "r")
    moved = await process.mremap(data, NBYTES, NBYTES * 2)
    seen += [await child.load(data), await process.load(moved + 8 * 5), await process.read(mapped, 4)]
    await process.madvise(moved, PAGE, "DONTNEED")
    await process.munmap(out, PAGE)
    await child.exit()
    await process.exit()
    return seen
