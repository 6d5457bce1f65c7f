"""Faults by name: what can go wrong, where, how often.

`catalogue` has every kind of fault with its parameters (`KINDS`; a file for each family), `fault` makes one, `Plan` reads and writes lists
of them. `points` names every step boundary of the protocol, `injector` is what host and devices ask there; `controls` decides how often
(the kernel's fault attributes), `messages` are the faults of messages. The same fault works in both worlds, or says why it cannot::

    number = machine.add_fault(fault("copy.corrupt", "gpu0", probability=0.1, direction="to_host"))
    ...
    machine.remove_fault(number)                            # or machine.heal(); hmmnet.simulate(main, faults="plan.toml")

A test that stops a migration between unmap and copy, kills its device there, and looks::

    async def main(machine):                                # hmmnet.simulate(main, seed=7)
        process = await machine.create_process()
        address = await process.malloc(4096)
        await process.store(address, 42)
        machine.add_fault(PointFault("migrate.before_copy", "crash", device="gpu0", controls=Controls(nth=1)))
        with pytest.raises(PeerLost):
            await process.migrate(address, 4096, "gpu0")
        assert await process.load(address) == 42            # the source is intact
        assert machine.injector.fired[0].where.point == "migrate.before_copy"

`machine.injector` records: `record()` and `reached` count which points a run passes, `fired` is what happened where. `POINTS` is the
registry of points, `KINDS` that of faults; `kind.holds` says what a test may demand after one.
"""

from hmmnet.errors import PlanError

from .catalogue import KINDS, fault
from .controls import Controls
from .forms import Plannable, as_plan
from .injector import Fired, Injector, PointFault, Points
from .kinds import Fault, Kind
from .messages import FAULTS, MessageFault, Way
from .plan import AnyFault, Plan
from .points import POINTS, Point, Where

__all__ = [
    "FAULTS",
    "KINDS",
    "POINTS",
    "AnyFault",
    "Controls",
    "Fault",
    "Fired",
    "Injector",
    "Kind",
    "MessageFault",
    "Plan",
    "PlanError",
    "Plannable",
    "Point",
    "PointFault",
    "Points",
    "Way",
    "Where",
    "as_plan",
    "fault",
]
