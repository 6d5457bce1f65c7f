"""What messages go through is out of their way while nothing can happen to them."""

from __future__ import annotations

from random import Random

from hmmnet.faults.messages import MessageFault, Parts, Way
from hmmnet.faults.network import WIRES_MAX, Network, Wire


def _send(wire: Wire) -> int:
    """How often a message arrives that is sent there."""
    arrived: list[Parts] = []
    wire((b"x",), arrived.append)
    return len(arrived)


async def test_a_wire_is_free_once_nothing_can_happen_there() -> None:
    """It says so from the first message on that passes, until a fault begins, of its device; messages are held; or somebody watches."""
    network = Network(Random(1))
    wire, other = (network.wire(name, "control", to_device=True) for name in ("gpu0", "gpu1"))
    assert (_send(wire), wire.free) == (1, True)

    number = network.add(MessageFault("loss", Way("gpu0")))
    assert not wire.free
    assert (_send(wire), wire.free) == (0, False)
    assert (_send(other), other.free) == (1, True)
    network.remove(number)
    assert (_send(wire), wire.free) == (1, True)

    network.hold("gpu0")
    assert not wire.free
    assert (_send(wire), wire.free) == (0, False)
    network.release("gpu0")
    assert (_send(wire), wire.free) == (1, True)

    seen: list[str] = []
    network.watch = lambda device, _: seen.append(device)
    assert not wire.free
    assert (_send(wire), wire.free, seen) == (1, False, ["gpu0"])


async def test_a_wire_on_which_something_is_late_is_not_free() -> None:
    """What comes behind waits for it, though the fault is over."""
    network = Network(Random(1))
    wire = network.wire("gpu0", "bulk", to_device=False)
    number = network.add(MessageFault("delay", Way("gpu0"), latency_s=1.0))
    assert _send(wire) == 0
    network.remove(number)
    assert (_send(wire), wire.free) == (0, False)


def test_the_way_of_the_same_messages_is_the_same() -> None:
    """Also for the next life of a device."""
    network = Network(Random(1))
    wire = network.wire("gpu0", "bulk", to_device=True)
    assert network.wire("gpu0", "bulk", to_device=True) is wire
    assert network.wire("gpu0", "bulk", to_device=False) is not wire


def test_strangers_names_are_not_remembered_for_ever() -> None:
    """What comes on a socket may call itself anything."""
    network = Network(Random(1))
    for number in range(WIRES_MAX + 10):
        assert _send(network.wire(f"stranger{number}", "control", to_device=False)) == 1
    assert len(network._wires) == WIRES_MAX
