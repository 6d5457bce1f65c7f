"""Network cables that can be bad: each device in a network namespace of its own, and between it and the host IP packets that pass through
this process.

Real sockets and the kernel's real TCP meet loss, delay, reordering, duplicates, a rate, a cut in one direction or both, and resets, without
privileges and without tools: namespaces, TUN devices and addresses are made with a handful of system calls. Linux's own netem would do
much of it where it is there; it often is not, and it cannot reset a connection.

`packets` and `impairment` are logic: what an IPv4 packet is, and when each arrives. `namespaces` makes the plumbing, `cable` moves packets.
"""

from .cable import Cable, Cables
from .impairment import Impairment
from .namespaces import isolate

__all__ = ["Cable", "Cables", "Impairment", "isolate"]
