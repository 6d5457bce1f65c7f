"""Faults of copy engines and links: slow, stalled, broken off, damaged, doubled, out of order; links narrower, or gone; no peer access."""

from __future__ import annotations

from typing import Any

from .effects import Effect, LinkEffect
from .injector import PointFault
from .kinds import EACH, Fault, Kind, Parameter
from .messages import MessageFault, Way
from .stepping import at_points

DIRECTION = Parameter("direction", "choice", "which copies", "both", ("both", "to_device", "to_host"))
_POINTS = {"to_device": ["migrate.mid_copy"], "to_host": ["device.mid_copy"], "both": ["migrate.mid_copy", "device.mid_copy"]}


def _chunks(fault: Fault, action: Any, **more: Any) -> list[PointFault]:
    return [at_points(fault, point, action, **more) for point in _POINTS[fault.settings["direction"]]]


def _bulk(fault: Fault, kind: str, **more: Any) -> MessageFault:
    direction = fault.settings["direction"]
    way = Way(fault.on, direction != "to_host", direction != "to_device", "bulk")
    return MessageFault(kind, way, fault.controls, **more)


def _corrupt(fault: Fault) -> list[Effect]:
    effects: list[Effect] = [_bulk(fault, "corrupt", shape=fault.settings["shape"])]
    if fault.settings["direction"] != "to_device":  # a few pages come home with an answer and not as chunks
        effects.append(at_points(fault, "device.bad_copy", "fail"))
    return effects


def _link(**change: Any) -> Any:
    return lambda fault: [LinkEffect(fault.on, **{name: make(fault) for name, make in change.items()}, controls=fault.controls)]


SAME = "every byte is right; it takes longer"
HANGS = "; from 20 real seconds for a chunk on the device is lost (to_host), or who asked has an error (to_device)"
KINDS = (
    Kind(
        "copy.slow",
        "copy engine",
        "each chunk waits before it is sent",
        SAME + HANGS,
        lambda fault: _chunks(fault, "delay", delay_s=fault.settings["latency"], jitter_s=fault.settings["jitter"]),
        parameters=(
            DIRECTION,
            Parameter("latency", "time", "for each chunk", 0.001),
            Parameter("jitter", "time", "at most so much more", 0.0),
        ),
    ),
    Kind(
        "copy.stall",
        "copy engine",
        "chunks wait until it is released",
        SAME + HANGS,
        lambda fault: _chunks(fault, "pause"),
        parameters=(DIRECTION,),
    ),
    Kind(
        "copy.timeout",
        "copy engine",
        "a chunk waits, and then the engine gives up",
        "an error for who asked; the source is intact",
        lambda fault: _chunks(fault, "fail", delay_s=fault.settings["latency"]),
        parameters=(DIRECTION, Parameter("latency", "time", "until it gives up", 0.5)),
    ),
    Kind(
        "copy.error",
        "copy engine",
        "the engine gives up at a chunk; earlier ones have landed (with nth: a partial transfer)",
        "an error for who asked; the source is intact",
        lambda fault: _chunks(fault, "fail"),
        parameters=(DIRECTION,),
    ),
    Kind(
        "copy.corrupt",
        "copy engine",
        "bytes of a chunk are damaged on the way",
        "it is caught and sent again; every byte is right" + EACH,
        _corrupt,
        parameters=(
            DIRECTION,
            Parameter("shape", "choice", "one bit, a burst of bytes, or halves swapped", "bit", ("bit", "burst", "swap")),
        ),
    ),
    Kind(
        "copy.lost",
        "copy engine",
        "a chunk is lost",
        "it is sent again" + EACH,
        lambda fault: [_bulk(fault, "loss")],
        parameters=(DIRECTION,),
    ),
    Kind(
        "copy.duplicate",
        "copy engine",
        "a chunk arrives twice",
        "the second is ignored",
        lambda fault: [_bulk(fault, "duplicate")],
        parameters=(DIRECTION,),
    ),
    Kind(
        "copy.reorder",
        "copy engine",
        "a chunk arrives behind later ones (out-of-order completion)",
        "it lands by its index",
        lambda fault: [_bulk(fault, "reorder", jitter_s=fault.settings["jitter"])],
        parameters=(DIRECTION, Parameter("jitter", "time", "by at most so much", 0.005)),
    ),
    Kind(
        "link.slow",
        "link",
        "bandwidth collapses: the link carries a part of what it could",
        SAME,
        _link(factor=lambda fault: fault.settings["factor"]),
        "link",
        (Parameter("factor", "number", "what is left, such as 0.1", 0.1),),
    ),
    Kind(
        "link.lanes",
        "link",
        "lanes are lost: a link of 16 trains at fewer",
        SAME,
        _link(factor=lambda fault: fault.settings["lanes"] / 16),
        "link",
        (Parameter("lanes", "count", "of 16", 4),),
    ),
    Kind(
        "link.latency",
        "link",
        "transfers take longer to arrive",
        SAME,
        _link(latency_s=lambda fault: fault.settings["latency"], jitter_s=lambda fault: fault.settings["jitter"]),
        "link",
        (
            Parameter("latency", "time", "more than the link's own", 0.0001),
            Parameter("jitter", "time", "at most so much more, for each transfer anew", 0.0),
        ),
    ),
    Kind(
        "link.down",
        "link",
        "the link is gone until the fault is removed: transfers take another way; without one, those under way wait, new ones fail",
        "every byte is right where there is another way, or soon is; else copies fail and the source is intact",
        _link(down=lambda _: True),
        "link",
    ),
    Kind(
        "p2p.suspend",
        "link",
        "no device reaches another over a link of their own",
        "transfers go through the host's links",
        _link(down=lambda _: True, peers=lambda _: True),
        "link",
    ),
)
