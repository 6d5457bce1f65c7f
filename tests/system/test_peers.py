"""Real processes: pages go from one GPU to another over the links between them.

                node0 ──pcie── gpu0 ┐
                  └────pcie─── gpu1 ┴── nvswitch

Oracle: the bytes that each link has carried, and the pattern that was written.
"""

from __future__ import annotations

import hmmnet
from hmmnet.topology.load import parse

MIB = 1 << 20
MACHINE = parse("""
[[memory]]
name = "node0"
size = "64 MiB"
[[switch]]
name = "nvswitch"
[[device]]
name = "gpu[0-1]"
memory = "16 MiB"
[[link]]
a = "node0"
b = "gpu[0-1]"
bandwidth = "10 GB/s"
latency = "1 us"
[[link]]
a = "nvswitch"
b = "gpu[0-1]"
bandwidth = "40 GB/s"
latency = "1 us"
""")
PATTERN = bytes(range(256)) * (8 * MIB // 256)


async def test_pages_go_from_gpu_to_gpu_over_the_peer_links() -> None:
    """8 MiB to gpu0, on to gpu1 and back: each time they cross the two peer links, and the host's links only the first time."""
    async with hmmnet.launch(MACHINE) as machine:
        process = await machine.create_process()
        address = await process.mmap(8 * MIB)
        await process.write(address, PATTERN)
        for place in ("gpu0", "gpu1", "gpu0"):
            assert await process.migrate(address, 8 * MIB, place) == 8 * MIB
        rows = [(link["link"], link["bytes_moved"]) for link in (await machine.report())["links"] if link["bytes_moved"]]
        assert [moved for link, moved in rows if "node0" in link] == [8 * MIB]
        assert [moved for link, moved in rows if "nvswitch" in link] == [8 * MIB] * 4  # two links, each in both directions
        assert await process.read(address, 8 * MIB) == PATTERN
        await process.exit()
