"""What faults do to a device itself: its fault buffers, its memory, its clock, the disk that its log is on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from hmmnet.errors import HmmnetError
from hmmnet.faults.carry import AtWork, Carrier
from hmmnet.faults.catalogue import fault
from hmmnet.faults.controls import Tally
from hmmnet.faults.effects import DeviceEffect
from hmmnet.faults.injector import PointFault
from hmmnet.wire.messages import Inject
from hmmnet.wire.session import Session

from .faultbuffer import BATCH_PAGES

if TYPE_CHECKING:
    from .models.base import Device, Wiring

Undo = Callable[[], None]


def carrier_of(device: Device, wiring: Wiring) -> Carrier:
    """Carries out what concerns `device`; faults at points only where the process has an injector of its own."""
    injector, clock = wiring.injector, wiring.clock

    async def sleep(seconds: float) -> None:
        await clock.sleep_until(clock.now() + seconds)

    def at_points(fault: PointFault, tally: Tally) -> Undo:
        if injector is None:
            return AtWork(_nothing, lambda: 0)
        number = injector.add(fault, tally=tally)
        return AtWork(partial(injector.remove, number), partial(injector.count, number))

    def own(effect: DeviceEffect) -> Undo:
        return begin(device, effect) if fnmatchcase(device.spec.name, effect.device) else AtWork(_nothing, lambda: 0)

    carrier = Carrier("real", {DeviceEffect: own}, wiring.nursery.start_soon, sleep, counted={PointFault: at_points})
    if injector is not None:
        injector.on_fired = lambda _: tell_fired(carrier, wiring.session)
    return carrier


def tell_fired(carrier: Carrier, session: Session) -> None:
    """The host is told how often each fault has happened here."""
    for number, fired in carrier.counts().items():
        if fired:
            session.note(Inject(number, msgspec.msgpack.encode({"fired": fired})))


def obey(carrier: Carrier, message: Inject, session: Session) -> None:
    """Begin, or end, what the host says. Raises HmmnetError."""
    if not message.fault:
        if message.number in carrier.active:
            carrier.remove(message.number)
        return
    try:
        given = msgspec.msgpack.decode(message.fault, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise HmmnetError(f"a fault is no map: {error}") from error
    given.pop("after", None)  # the host says when
    given.pop("lasts", None)
    if message.number not in carrier.active:
        carrier.add(fault(**given), message.number)
        tell_fired(carrier, session)


def begin(device: Device, effect: DeviceEffect) -> Undo:
    """Do it; what undoes it. Raises HmmnetError."""
    do = DEEDS.get(effect.deed)
    if do is None:
        raise HmmnetError(f'a device has no deed "{effect.deed}"')
    return do(device, effect)


def _nothing() -> None:
    """What is done is done."""


def _buffer(device: Device, effect: DeviceEffect) -> Undo:
    device.set_buffer(max(1, int(effect.settings["entries"])))
    return lambda: device.set_buffer(BATCH_PAGES)


def _retire(device: Device, effect: DeviceEffect) -> Undo:
    device.memory.retire(int(effect.settings["pages"]))
    return _nothing


def _clock(device: Device, effect: DeviceEffect) -> Undo:
    return device.clock.disturb(float(effect.settings["jump"]), float(effect.settings["skew"]))


def _disk(device: Device, effect: DeviceEffect) -> Undo:
    del device
    latency_s = float(effect.settings["latency"])

    def slow(_: logging.LogRecord) -> bool:
        time.sleep(latency_s)  # as a write to a slow disk: the whole process waits
        return True

    handlers = list(logging.getLogger().handlers) + list(logging.getLogger("hmmnet").handlers)
    for handler in handlers:
        handler.addFilter(slow)

    def right() -> None:
        for handler in handlers:
            handler.removeFilter(slow)

    return right


DEEDS: dict[str, Callable[[Device, DeviceEffect], Undo]] = {"buffer": _buffer, "retire": _retire, "clock": _clock, "disk": _disk}
"""What a device can be made to suffer, by name."""
