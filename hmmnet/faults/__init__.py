"""Faults by name: what can go wrong, where, how often.

`points` names every step boundary of the protocol, `injector` is what host and devices ask there; `controls` decides how often (the
kernel's fault attributes), `messages` are the faults of messages between host and devices, `plan` reads and writes lists of faults. Who
applies a plan to a simulated machine is `hmmnet.sim`.

A test that stops a migration between unmap and copy, kills its device there, and looks::

    async def main(machine):                                # hmmnet.simulate(main, seed=7)
        process = await machine.create_process()
        address = await process.malloc(4096)
        await process.store(address, 42)
        machine.injector.add(PointFault("migrate.before_copy", "crash", device="gpu0", controls=Controls(nth=1)))
        with pytest.raises(PeerLost):
            await process.migrate(address, 4096, "gpu0")
        assert await process.load(address) == 42            # the source is intact
        assert machine.injector.fired[0].where.point == "migrate.before_copy"

`Injector.add(fault) -> number`, `remove(number)`, `release(number)` (who is paused), `heal()`; `record()` and `reached` count which points
a run passes; `fired` is what happened where; `active` and `count(number)` tell of what may happen. `POINTS` is the registry.
"""

from .controls import Controls
from .injector import Fired, Injector, PointFault, Points
from .messages import FAULTS, MessageFault, Way
from .plan import Plan
from .points import POINTS, Point, Where

__all__ = [
    "FAULTS",
    "POINTS",
    "Controls",
    "Fired",
    "Injector",
    "MessageFault",
    "Plan",
    "Point",
    "PointFault",
    "Points",
    "Way",
    "Where",
]
