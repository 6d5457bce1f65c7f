"""Faults by name: what can go wrong, where, how often.

`controls` decides how often (the kernel's fault attributes), `messages` are the faults of messages between host and devices, `plan` reads
and writes lists of faults. Nothing here has clocks, tasks or wires; who applies a plan to a simulated machine is `hmmnet.sim.network`.
"""

from .controls import Controls
from .messages import FAULTS, MessageFault, Way
from .plan import Plan

__all__ = ["FAULTS", "Controls", "MessageFault", "Plan", "Way"]
