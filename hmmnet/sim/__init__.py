"""The simulated world: a whole machine, host and devices, in one trio run, in virtual time, from a seed.

It is the same host and the same devices as those that run as processes. What differs is what they stand on: wires are queues
(`hmmnet.wire.memory_transport`), time jumps to the next moment at which something happens (`clock`), and the order in which tasks run
that all could is drawn from the seed (`schedule`). One seed, one run, byte for byte, on any computer; `trace` writes it down, hashed.

`simulate` is the way in::

    def test_something():
        outcome = hmmnet.simulate(main, "two-gpus", seed=7)     # async def main(machine): ...
        assert outcome.value == ...

`machine.simulated` is the machine alone, for a run that stands in virtual time already.
"""

from .machine import SimulatedMachine, simulated
from .run import Simulation, run_virtual, simulate
from .trace import Trace

__all__ = ["SimulatedMachine", "Simulation", "Trace", "run_virtual", "simulate", "simulated"]
