"""Faults of nodes: devices that crash, hang, restart, are pulled out, unloaded or reset; the host's death."""

from __future__ import annotations

from typing import Any

from .effects import NodeEffect
from .injector import PointFault
from .kinds import Fault, Kind, Parameter
from .stepping import at_points

LOST = "pages in transit are back; what was only there is SIGBUS; others go on"
AGAIN = LOST + "; it comes back empty, as a new incarnation"


def _node(deed: str) -> Any:
    return lambda fault: [NodeEffect(deed, fault.on, settings=fault.settings)]


def _reset(fault: Fault) -> list[NodeEffect | PointFault]:
    return [at_points(fault, "migrate.mid_copy", "crash"), NodeEffect("revive", fault.on, settings=fault.settings)]


GIVEN_BACK = "a process's memory is given back as it ends, and whoever gets it next finds zeros; a simulated device's can stay as it was"
"""Why no real device starts again with the bytes of its former life; a hang or a partition shorter than the lease keeps them in use."""
DOWN = Parameter("down", "time", "until it starts again, emulated (0: at once)", 0.0)
KINDS = (
    Kind("crash", "nodes", "a device's process is gone from one moment to the next (SIGKILL)", LOST, _node("crash"), "node", once=True),
    Kind(
        "hang",
        "nodes",
        "a node stops where it is (SIGSTOP) until the fault is removed",
        "shorter than the lease: nothing; longer: as a crash",
        _node("hang"),
        "node",
    ),
    Kind("bounce", "nodes", "a device crashes and starts again", AGAIN, _node("bounce"), "node", (DOWN,), once=True),
    Kind(
        "restart.kept",
        "nodes",
        "a device crashes and starts again, its memory full of what its former life left there",
        AGAIN + ": nobody ever sees a byte of the former life",
        lambda fault: [NodeEffect("bounce", fault.on, settings={**fault.settings, "kept": True})],
        "node",
        (DOWN,),
        not_in={"real": GIVEN_BACK},
        once=True,
    ),
    Kind(
        "unplug",
        "nodes",
        "a device is pulled out with pages in it: nobody tells the host, which finds out",
        LOST + ", after the lease",
        _node("unplug"),
        "node",
        not_in={"real": "the launcher sees a process end and tells the host: use crash, or a partition"},
        once=True,
    ),
    Kind(
        "unload",
        "nodes",
        "a device's driver is unloaded (SIGTERM): it says goodbye, whatever is still in its memory",
        "holders of its pages are named; " + LOST,
        _node("unload"),
        "node",
        once=True,
    ),
    Kind("reset", "nodes", "a device is reset in the middle of a migration, and comes back", AGAIN, _reset, "node", (DOWN,)),
    Kind(
        "host.crash",
        "nodes",
        "the host is gone (SIGKILL), with every process and page",
        "every call ends with PeerLost, those under way too; devices stop using their mirrors within the lease, and end",
        lambda _: [NodeEffect("crash", "host")],
        "nothing",
        not_in={"real": "the host runs inside the program, or holds this very session: end its process instead"},
        once=True,
    ),
)
