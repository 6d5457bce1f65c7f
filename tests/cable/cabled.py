"""A machine behind bad cables, in a network namespace of its own; prints what came of it as JSON. ``python -m tests.cable.cabled``."""

from __future__ import annotations

import json
import random

from hmmnet.cable.namespaces import isolate

NBYTES = 2 << 20
KINDS: dict[str, dict[str, float]] = {
    "good": {},
    "loss": {"loss": 0.05},
    "late": {"latency_s": 0.01, "jitter_s": 0.01},
    "reordered": {"reorder": 0.2},
    "twice": {"duplicate": 0.3},
    "slow": {"rate_bytes_per_s": 20e6},
}


async def main() -> None:
    """There and back over each kind of cable, then a reset, then a cut in one direction."""
    import hmmnet
    from hmmnet.cable import Impairment
    from hmmnet.errors import BusError, PeerLost

    told: dict[str, object] = {}
    async with hmmnet.launch("two-gpus", transport="cable", rate=1.0) as machine:
        process = await machine.create_process()
        address = await process.malloc(NBYTES)
        data = random.Random(5).randbytes(NBYTES)
        await process.write(address, data)
        cable = machine.cables["gpu0"]
        for name, bad in KINDS.items():
            cable.impair(Impairment(**bad))  # type: ignore[arg-type]  # none of these is `down`
            moved = await process.migrate(address, NBYTES, "gpu0")
            told[name] = (moved, await process.read(address, NBYTES) == data)
        told["dropped"] = cable.to_device.dropped + cable.to_host.dropped > 0
        cable.repair()
        cable.reset(0.05)
        moved = await process.migrate(address, NBYTES, "gpu0")
        told["reset"] = (moved, await process.read(address, NBYTES) == data)
        await process.migrate(address, NBYTES, "gpu0")
        cable.impair(to_host=Impairment(down=True))
        try:
            await process.read(address, 1)
        except (BusError, PeerLost) as error:
            told["one way"] = str(error)
        cable.repair()
        other = await process.malloc(NBYTES)
        await process.write(other, data)
        told["other"] = (await process.migrate(other, NBYTES, "gpu1"), await process.read(other, NBYTES) == data)
        await process.exit()
    print(json.dumps(told))


if __name__ == "__main__":
    isolate()  # before anything makes a thread
    import trio

    trio.run(main)
