"""Faults of messages between the host and its devices, as kinds; what they do to bytes is in `messages`."""

from __future__ import annotations

from typing import Any, get_args

from hmmnet.wire.codec import WITH_BODY
from hmmnet.wire.codec import Kind as Frame
from hmmnet.wire.messages import Body

from .kinds import EACH, Fault, Kind, Parameter
from .messages import MessageFault, Way

CHANNEL = Parameter("channel", "choice", "which messages", "any", ("any", "control", "bulk"))
BULK = Parameter("channel", "choice", "which messages", "bulk", ("bulk",))
MESSAGES = (*(body.__name__ for body in get_args(Body)), *(frame.name for frame in Frame if frame not in WITH_BODY))
"""Types of control messages, and of frames that carry none: what `network.type_of` says of each."""
MESSAGE = Parameter("message", "choice", "only control messages of this type, such as Invalidate", "", MESSAGES)
LATENCY = Parameter("latency", "time", "how late", 0.001)
JITTER = Parameter("jitter", "time", "at most so much more", 0.0)
SAME = "results as without it; it takes longer"


def _message(kind: str) -> Any:
    def makes(fault: Fault) -> list[MessageFault]:
        settings = fault.settings
        way = Way.parse(fault.on, settings.get("channel", "any"))
        made = MessageFault(
            kind,
            way,
            fault.controls,
            settings.get("latency", 0.0),
            settings.get("jitter", 0.0),
            message=settings.get("message", ""),
            shape=settings.get("shape", "bit"),
        )
        return [made.narrowed_as(fault.process, fault.start, fault.end)]

    return makes


KINDS = (
    Kind("loss", "messages", "a message is gone", SAME + EACH, _message("loss"), "way", (CHANNEL, MESSAGE)),
    Kind(
        "delay",
        "messages",
        "a message arrives later, and everything behind it too",
        SAME,
        _message("delay"),
        "way",
        (CHANNEL, MESSAGE, LATENCY, JITTER),
    ),
    Kind(
        "reorder",
        "messages",
        "a message arrives later, and what is behind it first",
        SAME,
        _message("reorder"),
        "way",
        (CHANNEL, MESSAGE, LATENCY, JITTER),
    ),
    Kind("duplicate", "messages", "a message arrives twice", SAME, _message("duplicate"), "way", (CHANNEL, MESSAGE)),
    Kind(
        "corrupt",
        "messages",
        "data of a message are damaged",
        "it is caught and sent again" + EACH,
        _message("corrupt"),
        "way",
        (BULK, Parameter("shape", "choice", "one bit, a burst of bytes, or halves swapped", "bit", ("bit", "burst", "swap"))),
    ),
    Kind(
        "truncate",
        "messages",
        "the end of a message is cut off",
        "caught; a control session may end by it",
        _message("truncate"),
        "way",
        (CHANNEL, MESSAGE),
    ),
    Kind(
        "garbage",
        "messages",
        "a message is random bytes",
        "caught; a control session may end by it",
        _message("garbage"),
        "way",
        (CHANNEL, MESSAGE),
    ),
    Kind(
        "old_version",
        "messages",
        "a control message says that it is of another protocol version",
        "it is refused; the session may end by it",
        _message("old_version"),
        "way",
        (Parameter("channel", "choice", "which messages", "control", ("control",)), MESSAGE),
    ),
    Kind(
        "partition",
        "messages",
        "nothing passes, in one direction or both, until the fault is removed",
        "shorter than the lease: nothing; longer: as if the device had died",
        _message("partition"),
        "way",
        (CHANNEL,),
    ),
    Kind(
        "hold",
        "messages",
        "messages wait, in their order, until the fault is removed",
        "as a partition; nothing is lost",
        _message("hold"),
        "way",
    ),
)
